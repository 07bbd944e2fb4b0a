"""A client of the SPIFFE Workload API: it keeps this workload's certificate and authorities up to date.

Certificates are no secret, their keys are: they stay in memory, and reach OpenSSL without a file on any disk
(`meshlocal.net.tls`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from meshlocal.net.blocking import BlockedError, Blocking
from meshlocal.net.connect_errors import STREAM_ERRORS, why_not_connected
from meshlocal.net.following import FileProblemError
from meshlocal.net.grpc.client import channel_over
from meshlocal.net.log import get_log
from meshlocal.net.tls import check_svid
from meshlocal.policy.backoff import Backoff, UniformSource
from meshlocal.wire.grpc.status import GrpcError
from meshlocal.wire.pb import workload_pb2 as pb
from meshlocal.wire.svid import Svid
from meshlocal.wire.workload_api import FETCH_X509_SVID, METADATA, default_svid

BACKOFF_INITIAL, BACKOFF_MAX = 0.2, 10.0
"""Seconds between two attempts to reach the agent."""

CONNECT_TIMEOUT = 5.0
"""Seconds to connect to the agent's socket."""

_log = get_log(__name__)


class WorkloadApi:
    """What the agent on this machine says of this workload.

    Args:
        path: of the agent's unix socket.
        rng: for the jitter of reconnects.

    Attributes:
        path: as given.
        svid: what it said last; None: nothing yet.
        version: how often it said something that makes sense.
        connected: whether it is being listened to.
        problem: why it is not, or what was wrong with what it said; empty if nothing is.
        arrived: set once there is a `svid`.
        on_update: called after each change of `svid`.
    """

    def __init__(self, path: str, rng: UniformSource) -> None:
        self.path = path
        self.svid: Svid | None = None
        self.version = 0
        self.connected = False
        self.problem = "not connected yet"
        self.arrived = anyio.Event()
        self.on_update: Callable[[], Awaitable[None]] | None = None
        self._rng = rng
        self._files = Blocking("openssl")

    async def run(self) -> None:
        """Listen to the agent, until cancelled. What it says holds until it says something else, also while it is
        away: it ends with the certificate."""
        backoff = Backoff(BACKOFF_INITIAL, BACKOFF_MAX, self._rng)
        said = ""
        while True:
            before = self.version
            try:
                problem = await self._listen()
            except GrpcError as error:
                problem = error.message or error.code.name
            except STREAM_ERRORS as error:
                problem = why_not_connected(error)
            finally:
                self.connected = False
            self.problem = problem
            if self.version != before:
                backoff.reset()
                said = ""
            if problem != said:
                _log.warning("workload api cannot be followed", socket=self.path, problem=problem)
            said = problem
            await anyio.sleep(backoff.next())

    async def _listen(self) -> str:
        """Listen for as long as the connection lasts; returns why it ended."""
        with anyio.move_on_after(CONNECT_TIMEOUT) as connecting:
            stream = await anyio.connect_unix(self.path)
        if connecting.cancelled_caught:
            return "does not answer"
        async with channel_over(stream) as channel, channel.call(FETCH_X509_SVID, METADATA) as call:
            await call.send(pb.X509SVIDRequest(), end=True)
            while True:
                response = await call.receive()
                if response is None:
                    return "the agent ended the stream"
                self.connected = True
                await self.take(response)

    async def take(self, response: pb.X509SVIDResponse) -> None:
        """Go by what the agent says, if it makes sense."""
        try:
            svid = default_svid(response)
            await self._files.run(check_svid, svid, self.path)
        except (ValueError, FileProblemError, BlockedError) as error:
            # What was there goes on.
            self.problem = str(error)
            _log.error("workload api makes no sense", socket=self.path, problem=str(error))
            return
        self.svid = svid
        self.version += 1
        self.problem = ""
        _log.info("svid received", spiffe_id=svid.spiffe_id)
        if self.on_update is not None:
            await self.on_update()
        self.arrived.set()
