"""A way to one discovery server, over gRPC or over WebSocket, with the same calls and the same errors."""

from __future__ import annotations

import ssl
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from meshlocal.net.blocking import BlockedError, Blocking
from meshlocal.net.tls import ClientContext, why
from meshlocal.wire.grpc.method import Method, Req, Resp
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import discovery_pb2 as pb

REQUEST_LIMIT = 10.0
"""Seconds that a server may take to accept a request."""


MAX_EVENT_SIZE = 64 * 2**20
"""Bytes of one answer at most: room for a snapshot of some 200,000 instances."""


class Events(Protocol):
    """The events of a watch that is under way."""

    @property
    def received(self) -> int:
        """Bytes that came so far, of an event that is not whole yet too."""
        ...

    async def receive(self) -> pb.WatchInstancesResponse | None:
        """The next event; None at the end. Raises GrpcError."""
        ...


class Link(Protocol):
    """A way to a server."""

    async def probe(self) -> None:
        """See whether a server is there, without a question. Raises GrpcError, TimeoutError."""
        ...

    def watch(self, request: pb.WatchInstancesRequest) -> AbstractAsyncContextManager[Events]:
        """Begin a watch, which ends with the block. Raises GrpcError, TimeoutError."""
        ...

    async def unary(self, method: Method[Req, Resp], request: Req) -> Resp:
        """Ask once. Raises GrpcError, TimeoutError."""
        ...


class Credentials:
    """What servers are told of who calls, and how they must prove who they are: from files that may change.

    The files are looked at for each connection, and read when they changed. A file system that hangs costs the
    attempt, and nothing else (P1).

    Args:
        ca_file: the authorities that a TLS server's certificate must come from; None: those of the system.
        token_file: holds the token that is sent along; it is read for each connection. None: no token.
    """

    def __init__(self, ca_file: str | None, token_file: str | None) -> None:
        self._ca_file = ca_file
        self._token_file = token_file
        self._files = Blocking()
        self._context = ClientContext(ca_file)

    async def context(self) -> ssl.SSLContext:
        """How servers are authenticated. Made anew when the file changed.

        Raises:
            GrpcError: the file cannot be used; the text says which and why.
        """
        try:
            return await self._files.run(self._context.get)
        except (OSError, ValueError) as error:
            raise GrpcError(StatusCode.UNAVAILABLE, f"{self._ca_file}: {_said(error)}") from None

    async def metadata(self) -> tuple[tuple[str, str], ...]:
        """What is sent along with each call.

        Raises:
            GrpcError: the file holds no token, or cannot be read; the text says which and why.
        """
        if self._token_file is None:
            return ()
        try:
            token = (await self._files.run(_read, self._token_file)).decode("ascii").strip()
        except UnicodeDecodeError:
            token = ""
        except OSError as error:
            raise GrpcError(StatusCode.UNAUTHENTICATED, f"{self._token_file}: {_said(error)}") from None
        if not token.isprintable() or not token:
            raise GrpcError(StatusCode.UNAUTHENTICATED, f"{self._token_file}: holds no token")
        return (("authorization", f"Bearer {token}"),)


def _read(file: str) -> bytes:
    return Path(file).read_bytes()


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, BlockedError) else why(error)
