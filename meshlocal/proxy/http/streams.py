"""What an HTTP request needs of its client's end, whatever the protocol."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from meshlocal.net.pipe import Pipe
from meshlocal.net.relay_state import RelayCounters
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.http.answers import Answer
from meshlocal.proxy.http.ends import Expiry
from meshlocal.proxy.http.shared import HttpShared
from meshlocal.wire.http1.fields import OwnFields
from meshlocal.wire.http1.messages import RequestBody, ResponseFlow
from meshlocal.wire.http1.request import RequestHead
from meshlocal.wire.http1.response import ResponseHead


class ServedRequest(Protocol):
    """What a client's end needs to know of the request that it has under way.

    Attributes:
        status: of its response.
        error: what is wrong with it.
        response_begun: some of a final response went to the client.
        grpc_status: of the call; -1 while there is none, and where it is none.
    """

    head: RequestHead
    body: RequestBody | None
    status: int
    error: str
    response_begun: bool
    grpc_status: int

    @property
    def is_grpc(self) -> bool:
        """Whether it is a gRPC call."""
        ...

    @property
    def idle_limit(self) -> float:
        """Seconds that its response may stand still."""
        ...

    def identify(self) -> bytes:
        """What it is called, for who tells its client of a failure."""
        ...

    def closes_client(self, unread: bool = False) -> bool:
        """Whether the client's connection ends with the response that begins now."""
        ...

    def explanation(self) -> bytes:
        """Field lines that tell how the response came about."""
        ...

    def explanation_fields(self) -> tuple[tuple[bytes, bytes], ...]:
        """The same, name by name."""
        ...


class ClientStream(Protocol):
    """The client's end of one request.

    Attributes:
        http2: it speaks HTTP/2.
        counters: bytes moved, once it is a tunnel.
        left: the client reset it (A8).
        early: what it sent that nobody took yet.
        expiry: what it waits for.
        expired: it was cut because that did not come in time.
        deadline: when it expires, by trio.current_time().
    """

    http2: bool
    counters: RelayCounters | None
    left: bool
    early: bytearray
    expiry: Expiry
    expired: bool
    deadline: float

    @property
    def shared(self) -> HttpShared:
        """What all http listeners share."""
        ...

    @property
    def service(self) -> ServiceKey | None:
        """What all its connection's requests are for; None if each says its own."""
        ...

    @property
    def peer(self) -> object:
        """The client's address."""
        ...

    @property
    def identity(self) -> str:
        """Who the client proved to be; empty if it proved nothing."""
        ...

    @property
    def scheme(self) -> str:
        """How it came: `http`, or `https` over TLS."""
        ...

    @property
    def pipe(self) -> Pipe:
        """What a tunnel goes over."""
        ...

    async def watched(self, wait: Callable[[], Awaitable[object]], /) -> None:
        """Wait for something, but no longer than until it has left. `wait` raises nothing but Cancelled."""
        ...

    async def watch(self, waiting: trio.CancelScope) -> None:
        """Cancel `waiting` if it leaves; what it sends meanwhile comes into `early`."""
        ...

    def await_transfer(self) -> None:
        """A response is under way, and has to wait: for the client to take it, or for more of it."""
        ...

    async def read_body(self, body: RequestBody) -> bytes:
        """The next piece of the request's body, as HTTP/1.1 has it; may be empty.

        Raises:
            ProtocolError: it is malformed, too long, or ended early.
            ClientLeftError: the client left.
        """
        ...

    async def send(self, data: bytes) -> None:
        """Send a piece of a response, as `begin_response` and its flow gave it.

        Raises:
            ClientLeftError: the client left.
        """
        ...

    def has_input(self) -> bool:
        """Whether something came on the connection that was not read yet."""
        ...

    # For an instance that speaks HTTP/1.1.

    def payload(self, head: RequestHead, service: ServiceKey, body: RequestBody | None, own: OwnFields) -> bytes:
        """A request's head for an instance of the service, with what is held of the body.

        Args:
            head: as the client sent it.
            service: that it is for.
            body: of the request; None: it has none.
            own: what this request alone gets.
        """
        ...

    def interim(self, head: ResponseHead) -> bytes:
        """An interim response: what to `send` of it."""
        ...

    def begin_response(
        self, request: ServedRequest, head: ResponseHead, flow: ResponseFlow, extra: bytes, *, unread: bool
    ) -> tuple[bytes, bool]:
        """A final head: what to `send` of it and of what came behind it, and whether the client's connection ends with
        this response.

        Args:
            request: what it answers.
            head: as the instance sent it.
            flow: the response; its `body` gives what to `send` from now on.
            extra: field lines to append.
            unread: some of the request's body may be left on the connection.

        Raises:
            ProtocolError: what came of the body is malformed.
        """
        ...

    def end_response(self, flow: ResponseFlow) -> None:
        """All of the response was given to `send`."""
        ...

    # Without an instance.

    async def answer(self, request: ServedRequest, answer: Answer) -> bool:
        """Send an answer of the proxy's own; tells whether the connection ends with it.

        Raises:
            ClientLeftError: the client left.
        """
        ...
