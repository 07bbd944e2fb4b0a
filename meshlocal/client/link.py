"""A way to one discovery server, over gRPC or over WebSocket, with the same calls and the same errors."""

from __future__ import annotations

import ssl
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Protocol, TypeVar

from meshlocal.net.blocking import BlockedError, Blocking
from meshlocal.net.following import FileProblemError, Followed
from meshlocal.net.tls import SvidSource, TlsContext, client_context
from meshlocal.net.token_file import read_token
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.policy.exposure import TOKEN_IN_PLAINTEXT, would_show_token
from meshlocal.wire.grpc.method import Method, Req, Resp
from meshlocal.wire.grpc.status import GrpcError, StatusCode

REQUEST_LIMIT = 10.0
"""Seconds that a server may take to accept a request."""


MAX_EVENT_SIZE = 64 * 2**20
"""Bytes of one answer at most: room for a snapshot of some 200,000 instances."""


Event_co = TypeVar("Event_co", covariant=True)


class Events(Protocol[Event_co]):
    """The events of a watch that is under way."""

    @property
    def received(self) -> int:
        """Bytes that came so far, of an event that is not whole yet too."""
        ...

    async def receive(self) -> Event_co | None:
        """The next event; None at the end. Raises GrpcError."""
        ...


class Link(Protocol):
    """A way to a server."""

    async def probe(self) -> None:
        """See whether a server is there, without a question. Raises GrpcError, TimeoutError."""
        ...

    def watch(self, method: Method[Req, Resp], request: Req) -> AbstractAsyncContextManager[Events[Resp]]:
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
        config: names the files.
        workload: gives what it names no files of.
    """

    def __init__(self, config: DiscoveryClientConfig, workload: SvidSource | None = None) -> None:
        self._config = config
        self._workload = workload
        self._files = Blocking()
        self._made: Followed[TlsContext] | None = None

    async def context(self) -> ssl.SSLContext:
        """How servers are authenticated. Made anew when the file changed.

        Raises:
            GrpcError: the file cannot be used; the text says which and why.
        """
        try:
            return await self._files.run(self._look)
        except FileProblemError as error:
            raise GrpcError(StatusCode.UNAVAILABLE, str(error)) from None
        except BlockedError as error:
            raise GrpcError(StatusCode.UNAVAILABLE, f"{self._config.ca_file}: {error}") from None

    def _look(self) -> TlsContext:
        """The context of the files as they are now. A certificate or an authority that cannot be used is no reason to
        go on with what was there before: the next connection may come from another server."""
        config = self._config
        if self._made is None:
            workload = self._workload
            files = config.ca_file or workload, config.certificate_file or workload, config.key_file
            check_name = config.identity is None
            make = partial(client_context, *files, check_name=check_name, minimum="1.2", protocols=())
            self._made = Followed(files, make)
        else:
            self._made.look()
        context = self._made.current[0]
        context.identity = config.identity
        return context

    async def metadata(self, url: DiscoveryUrl) -> tuple[tuple[str, str], ...]:
        """What is sent along with each call to a server.

        Raises:
            GrpcError: the file holds no token, or cannot be read, or the token may not be sent there; the text says
                which and why.
        """
        file = self._config.token_file
        if file is None:
            return ()
        if would_show_token(url, self._config):
            raise GrpcError(StatusCode.UNAUTHENTICATED, f"{TOKEN_IN_PLAINTEXT}, which {url} is")
        try:
            token = await self._files.run(read_token, file)
        except FileProblemError as error:
            raise GrpcError(StatusCode.UNAUTHENTICATED, str(error)) from None
        except BlockedError as error:
            raise GrpcError(StatusCode.UNAUTHENTICATED, f"{file}: {error}") from None
        return (("authorization", f"Bearer {token}"),)
