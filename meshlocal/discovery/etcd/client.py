"""A client of etcd, as far as instances need one: ranges, watches, and leases (etcd API reference, v3)."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import trio

from meshlocal.net.blocking import BlockedError, Blocking
from meshlocal.net.following import FileProblemError
from meshlocal.net.grpc.client import Channel, ClientCall, open_channel
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.net.tls import client_context
from meshlocal.policy.etcd_options import EtcdOptions
from meshlocal.wire.grpc.method import Method
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import rpc_pb2 as pb

RANGE = Method("/etcdserverpb.KV/Range", pb.RangeRequest, pb.RangeResponse)
PUT = Method("/etcdserverpb.KV/Put", pb.PutRequest, pb.PutResponse)
WATCH = Method(
    "/etcdserverpb.Watch/Watch", pb.WatchRequest, pb.WatchResponse, client_streaming=True, server_streaming=True
)
GRANT = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantRequest, pb.LeaseGrantResponse)
REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeRequest, pb.LeaseRevokeResponse)
KEEP_ALIVE = Method(
    "/etcdserverpb.Lease/LeaseKeepAlive",
    pb.LeaseKeepAliveRequest,
    pb.LeaseKeepAliveResponse,
    client_streaming=True,
    server_streaming=True,
)
AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", pb.AuthenticateRequest, pb.AuthenticateResponse)

CONNECT_LIMIT = 5.0
"""Seconds that a member may take to be connected and to authenticate."""

CALL_LIMIT = 10.0
"""Seconds that a member may take for an answer."""

_MESSAGE = 64 * 2**20
"""Bytes of an answer: a page of instances, which may have labels."""

_OPTIONS = GrpcOptions(max_message_size=_MESSAGE, keepalive_interval=10.0, keepalive_timeout=10.0)
"""A member that is frozen, or behind a cut, is found out by a ping; etcd allows one each five seconds."""

COMPACTED = "required revision has been compacted"
"""What etcd says of a revision that it holds no longer, in its words (rpctypes.ErrGRPCCompacted)."""

LEASE_GONE = "requested lease not found"
"""Likewise of a lease (rpctypes.ErrGRPCLeaseNotFound)."""

FAILURES = (GrpcError, OSError, FileProblemError, BlockedError, trio.TooSlowError)
"""What a connection to a member, and what is asked on it, may raise."""


class Session:
    """A connection to one member.

    Args:
        channel: the connection.
        token: of who authenticated; empty: nobody did.
    """

    def __init__(self, channel: Channel, token: str) -> None:
        self._channel = channel
        self._metadata: list[tuple[str, str]] = [("token", token)] if token else []

    async def range(self, request: pb.RangeRequest) -> pb.RangeResponse:
        """Keys and values, as of one revision.

        Raises:
            GrpcError, trio.TooSlowError: there was no answer.
        """
        with trio.fail_after(CALL_LIMIT):
            return await self._channel.unary(RANGE, request, self._metadata)

    async def put(self, key: bytes, value: bytes, lease: int) -> None:
        """Write a key, which is gone with its lease.

        Raises:
            GrpcError, trio.TooSlowError: there was no answer.
        """
        with trio.fail_after(CALL_LIMIT):
            await self._channel.unary(PUT, pb.PutRequest(key=key, value=value, lease=lease), self._metadata)

    async def grant(self, seconds: int) -> int:
        """A new lease.

        Raises:
            GrpcError, trio.TooSlowError: there was no answer.
        """
        with trio.fail_after(CALL_LIMIT):
            granted = await self._channel.unary(GRANT, pb.LeaseGrantRequest(TTL=seconds), self._metadata)
        if granted.error or not granted.ID:
            raise GrpcError(StatusCode.UNKNOWN, granted.error or "no lease was granted")
        return granted.ID

    async def revoke(self, lease: int) -> None:
        """End a lease, and what it holds.

        Raises:
            GrpcError, trio.TooSlowError: there was no answer.
        """
        with trio.fail_after(CALL_LIMIT):
            await self._channel.unary(REVOKE, pb.LeaseRevokeRequest(ID=lease), self._metadata)

    def keep_alive(
        self,
    ) -> AbstractAsyncContextManager[ClientCall[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]]:
        """A stream on which leases are kept alive."""
        return self._channel.call(KEEP_ALIVE, self._metadata)

    @asynccontextmanager
    async def watch(
        self, first: bytes, end: bytes, revision: int
    ) -> AsyncIterator[ClientCall[pb.WatchRequest, pb.WatchResponse]]:
        """Changes of a range of keys from a revision on. A member that is cut off from the others ends it.

        Raises:
            GrpcError: the call failed.
        """
        create = pb.WatchCreateRequest(
            key=first, range_end=end, start_revision=revision, progress_notify=True, fragment=True
        )
        async with self._channel.call(WATCH, [*self._metadata, ("hasleader", "true")]) as call:
            await call.send(pb.WatchRequest(create_request=create))
            yield call


class Cluster:
    """The members of one cluster, one after the other.

    Args:
        options: which they are, and how they are spoken to.
    """

    def __init__(self, options: EtcdOptions) -> None:
        self._options = options
        self._files = Blocking()
        self._next = 0

    @property
    def size(self) -> int:
        """How many members there are to try."""
        return len(self._options.endpoints)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Session]:
        """A connection to the next member. Files are read anew, as they may have changed (T3).

        Raises:
            GrpcError: it cannot be connected, or does not let this client in; or whatever its block raises.
            FileProblemError, BlockedError: a file cannot be read.
            trio.TooSlowError: it does not answer.
        """
        options = self._options
        host, port = options.endpoints[self._next % len(options.endpoints)]
        self._next += 1
        context, password = await self._files.run(_read_files, options)
        # Its own scope: what is done with the connection has no such limit.
        limit = trio.CancelScope(deadline=trio.current_time() + CONNECT_LIMIT)
        connected = False
        with limit:
            async with open_channel(host, port, options=_OPTIONS, ssl_context=context) as channel:
                token = await _authenticate(channel, options.user, password) if options.user else ""
                connected = True
                limit.deadline = float("inf")
                yield Session(channel, token)
        if limit.cancelled_caught and not connected:
            raise trio.TooSlowError


async def _authenticate(channel: Channel, user: str, password: str) -> str:
    answer = await channel.unary(AUTHENTICATE, pb.AuthenticateRequest(name=user, password=password))
    return answer.token


def _read_files(options: EtcdOptions) -> tuple[ssl.SSLContext | None, str]:
    context = None
    if options.tls:
        ca, certificate, key = (each or None for each in (options.ca_file, options.certificate_file, options.key_file))
        context = client_context(ca, certificate, key, check_name=True, minimum="1.2", protocols=("h2",))
    if not options.password_file:
        return context, ""
    try:
        return context, Path(options.password_file).read_text().rstrip("\r\n")
    except (OSError, ValueError) as error:
        raise FileProblemError(options.password_file, error) from None


def told(error: Exception) -> str:
    """What a failure of `FAILURES` is to people."""
    if isinstance(error, GrpcError):
        return f"{error.code.name}: {error.message}"
    return "no answer in time" if isinstance(error, trio.TooSlowError) else str(error)
