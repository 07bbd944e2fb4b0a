"""What an HTTP request needs of its client's end, whatever the protocol."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from meshlocal.net.relay_state import RelayCounters
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.http.ends import Expiry
from meshlocal.proxy.http.shared import HttpShared
from meshlocal.wire.http1.messages import RequestBody
from meshlocal.wire.http1.request import RequestHead


class ServedRequest(Protocol):
    """What a client's end needs to know of the request that it has under way."""

    @property
    def response_begun(self) -> bool:
        """Whether some of a final response went to the client."""
        ...

    @property
    def idle_limit(self) -> float:
        """Seconds that its response may stand still."""
        ...


class ClientStream(Protocol):
    """The client's end of one request.

    Attributes:
        shared: what all http listeners share.
        counters: bytes moved, once it is a tunnel.
        service: what all its connection's requests are for; None if each says its own.
        peer: the client's address.
        left: the client reset it (A8).
        early: what it sent that nobody took yet.
        expiry: what it waits for.
        expired: it was cut because that did not come in time.
        deadline: when it expires, by trio.current_time().
    """

    shared: HttpShared
    counters: RelayCounters | None
    service: ServiceKey | None
    peer: object
    left: bool
    early: bytearray
    expiry: Expiry
    expired: bool
    deadline: float

    @property
    def socket(self) -> socket.socket:
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
        """The next piece of the request's body; may be empty.

        Raises:
            ProtocolError: it is malformed, too long, or ended early.
            ClientLeftError: the client left.
        """
        ...

    async def send(self, data: bytes) -> None:
        """Send a piece of a response, as it came from an instance that speaks the same protocol.

        Raises:
            ClientLeftError: the client left.
        """
        ...

    def has_input(self) -> bool:
        """Whether something came on the connection that was not read yet."""
        ...

    def request_head(self, head: RequestHead, service: ServiceKey) -> bytes:
        """A request's head for an instance of the service."""
        ...
