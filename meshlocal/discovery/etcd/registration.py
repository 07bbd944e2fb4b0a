"""One instance's key in etcd, kept there by a lease for as long as this process lives (etcd API reference, Lease).

what happens                        what follows
the member is away, or cut off      the next one is asked; once all were, with backoff. The lease goes on meanwhile
the lease is gone                   a new lease, and the key again
what the key is to say changes      it is written at once, under the same lease
this process ends in good order     the lease is revoked, and the key with it
it is killed, or its machine dies   the lease ends by itself, after its time
"""

from __future__ import annotations

import trio

from meshlocal.discovery.etcd.client import FAILURES, LEASE_GONE, Cluster, Session, told
from meshlocal.net.log import get_log
from meshlocal.policy.backoff import Backoff, UniformSource
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import rpc_pb2 as pb

_log = get_log(__name__)

BACKOFF_INITIAL, BACKOFF_MAX = 0.25, 5.0
"""Seconds between two rounds of all members."""

REVOKE_LIMIT = 3.0
"""Seconds that the end may take to revoke the lease."""


class Registration:
    """Keeps a key.

    Args:
        cluster: where.
        key: which.
        seconds: of the lease: how long the key outlives this process, or a cut from all members.
        rng: for jitter.

    Attributes:
        registered: the key was written once.
    """

    def __init__(self, cluster: Cluster, key: bytes, seconds: int, rng: UniformSource) -> None:
        self.registered = trio.Event()
        self._cluster = cluster
        self._key = key
        self._seconds = seconds
        self._rng = rng
        self._value: bytes | None = None
        self._written: bytes | None = None
        self._lease = 0
        self._changed = trio.Event()
        self._settled = trio.Event()

    def say(self, value: bytes) -> None:
        """Have the key hold this, soon."""
        if value != self._value:
            self._value = value
            self._settled = trio.Event()
            self._changed.set()

    async def said(self) -> None:
        """Wait until the key holds what it is to."""
        while self._written != self._value:
            await self._settled.wait()

    async def run(self) -> None:
        """Keep the key, until cancelled."""
        backoff = Backoff(BACKOFF_INITIAL, BACKOFF_MAX, self._rng)
        tried, problem = 0, ""
        while True:
            if self._value is None:
                await self._changed.wait()
            try:
                async with self._cluster.connect() as session, session.keep_alive() as alive:
                    while True:
                        await self._write(session)
                        tried, problem = 0, ""
                        backoff.reset()
                        await self._wait()
                        await alive.send(pb.LeaseKeepAliveRequest(ID=self._lease))
                        with trio.fail_after(self._seconds / 3):
                            answer = await alive.receive()
                        if answer is None:
                            raise GrpcError(StatusCode.UNAVAILABLE, "etcd ended the stream of the lease")
                        if answer.TTL <= 0:
                            self._lose_lease()
            except FAILURES as error:
                tried += 1
                if tried % self._cluster.size:
                    await trio.lowlevel.checkpoint()
                    continue
                if told(error) != problem:
                    problem = told(error)
                    _log.warning("registration cannot be kept", key=self._key.decode(), problem=problem)
                await trio.sleep(backoff.next())

    async def revoke(self) -> None:
        """End the lease, if there is one. Called while `run` does not."""
        if not self._lease:
            return
        problem = "no answer in time"
        with trio.move_on_after(REVOKE_LIMIT):
            for _ in range(self._cluster.size):
                try:
                    async with self._cluster.connect() as session:
                        await session.revoke(self._lease)
                except FAILURES as error:
                    problem = "" if LEASE_GONE in str(error) else told(error)
                else:
                    problem = ""
                if not problem:
                    break
        self._lease = 0
        if problem:
            _log.warning("lease not revoked: it ends by itself", problem=problem, seconds=self._seconds)

    async def _wait(self) -> None:
        """Wait until the lease wants to be kept alive, or the key is to say something else."""
        self._changed = trio.Event()
        if self._written != self._value:
            return
        with trio.move_on_after(self._seconds / 3):
            await self._changed.wait()

    async def _write(self, session: Session) -> None:
        while self._written != self._value or not self._lease:
            value = self._value
            assert value is not None
            if not self._lease:
                self._lease = await session.grant(self._seconds)
            try:
                await session.put(self._key, value, self._lease)
            except GrpcError as error:
                if LEASE_GONE not in error.message:
                    raise
                self._lose_lease()
                continue
            self._written = value
            self._settled.set()
            if not self.registered.is_set():
                self.registered.set()
                _log.info("registered", key=self._key.decode(), lease=f"{self._lease:x}")

    def _lose_lease(self) -> None:
        _log.warning("lease lost; registering again", key=self._key.decode())
        self._lease, self._written = 0, None
