"""The client's end of HTTP/1.1: bytes from it and to it, and the time that each may take."""

from __future__ import annotations

import math

import trio

from meshlocal.client.connecting import Client
from meshlocal.net.pipe import Pipe
from meshlocal.net.relay_state import RelayCounters
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.http import answers
from meshlocal.proxy.http.answers import Answer
from meshlocal.proxy.http.ends import ClientLeftError, Expiry
from meshlocal.proxy.http.shared import HttpShared
from meshlocal.proxy.http.streams import ServedRequest
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.fields import CLIENT_CERT, OwnFields
from meshlocal.wire.http1.messages import RequestBody, ResponseFlow
from meshlocal.wire.http1.request import RequestHead
from meshlocal.wire.http1.response import Framing, ResponseHead
from meshlocal.wire.http1.rewrite import client_head, generated_answer, upstream_head

CHUNK = 65536
"""Bytes read at once."""

DRAIN_GRACE = 0.5
"""Seconds that a drain leaves to a client whose next request may be on its way (RFC 9112, 9.6)."""


class H1Client(Client):
    """One client's connection while it lives: the `ClientStream` of each of its requests in turn.

    Attributes:
        shared: what all http listeners share.
        service: what all its requests are for; None if each one says its own.
        peer: the client's address.
        scope: its cancellation ends the connection.
        fresh: it had no request yet.
        deadline: when it expires, by trio.current_time().
        expiry: what it waits for.
        expired: it was cut because that did not come.
        request: the one under way.
        counters: bytes moved, once it is a tunnel.
    """

    __slots__ = (
        "_forwarded",
        "counters",
        "deadline",
        "expired",
        "expiry",
        "fresh",
        "peer",
        "request",
        "scope",
        "service",
        "shared",
    )

    http2 = False

    def __init__(self, shared: HttpShared, service: ServiceKey | None, pipe: Pipe, peer: object) -> None:
        super().__init__(pipe)
        self.shared = shared
        self.service = service
        self.peer = peer
        self.scope = trio.CancelScope()
        self.deadline = math.inf
        self.expiry = Expiry.FIRST
        self.expired = False
        self.fresh = True
        self.request: ServedRequest | None = None
        self.counters: RelayCounters | None = None
        self._forwarded = b""

    @property
    def identity(self) -> str:
        """See `ClientStream`."""
        return self.pipe.identity

    @property
    def scheme(self) -> str:
        """See `ClientStream`."""
        return "http" if self.pipe.plain is not None else "https"

    @property
    def is_idle(self) -> bool:
        """Whether the connection waits for a request of which nothing came, its first one or the next."""
        return self.expiry in (Expiry.IDLE, Expiry.FIRST) and self.request is None

    @property
    def idle_limit(self) -> float:
        """Seconds that a response, or a tunnel, may stand still."""
        return self.request.idle_limit if self.request is not None else math.inf

    def has_input(self) -> bool:
        """Whether something came on the connection that was not read yet."""
        try:
            return bool(self.early) or self.pipe.has_input()
        except OSError:
            return False

    def expire(self) -> None:
        """End the connection: what it waits for did not come in time."""
        self.expired = True
        self.scope.cancel()

    def await_transfer(self) -> None:
        """Note that a response is under way, and has to wait: for the client to take it, or for more of it."""
        self.expiry = Expiry.TRANSFER
        self.deadline = trio.current_time() + self.idle_limit

    def await_request(self, now: float) -> None:
        """Note that the connection waits for a request of which nothing came."""
        config = self.shared.settings.config
        self.expiry = Expiry.FIRST if self.fresh else Expiry.IDLE
        limit = config.header_timeout if self.fresh else config.keep_alive_timeout
        self.deadline = now + (min(limit, DRAIN_GRACE) if self.shared.draining else limit)

    async def receive(self) -> bytes:
        """Wait for bytes from the client; empty at its end.

        Raises:
            ClientLeftError: it reset its connection.
        """
        while True:
            await self.pipe.wait_readable()
            try:
                received = self.pipe.read(CHUNK)
            except OSError:
                raise ClientLeftError from None
            if received is not None:
                return received

    async def _receive_body(self) -> bytes:
        """Wait for more of a request's body; empty at the client's end.

        Raises:
            ClientLeftError: it reset its connection.
        """
        self.expiry = Expiry.BODY
        self.deadline = trio.current_time() + self.shared.settings.config.body_timeout
        data = await self.receive()
        if self.request is not None and self.request.response_begun:
            self.await_transfer()
        else:
            self.deadline = math.inf
        return data

    async def read_body(self, body: RequestBody) -> bytes:
        """See `ClientStream.read_body`."""
        if self.early:
            data = bytes(self.early)
            self.early.clear()
        else:
            data = await self._receive_body()
            if not data:
                raise ProtocolError(*answers.BODY_INCOMPLETE)
        piece, used = body.feed(data)
        if used < len(data):
            self.early += data[used:]
        return piece

    def payload(self, head: RequestHead, service: ServiceKey, body: RequestBody | None, own: OwnFields) -> bytes:
        """See `ClientStream.payload`."""
        settings = self.shared.settings
        extra = settings.via
        if settings.append_forwarded:
            extra += self._forwarded_lines(head)
        if told := self.pipe.told:
            extra += b"%b: %b\r\n" % (CLIENT_CERT, told)
        host = b"" if head.has_host else service.encode()
        raw = upstream_head(head, extra, host=host, strip_forwarded=settings.strip_forwarded, own=own)
        return raw + b"".join(body.held) if body is not None and body.held else raw

    def interim(self, head: ResponseHead) -> bytes:
        """See `ClientStream.interim`: HTTP/1.0 knows none."""
        request = self.request
        return client_head(head, Framing.NONE) if request is not None and request.head.minor == 1 else b""

    def begin_response(
        self, request: ServedRequest, head: ResponseHead, flow: ResponseFlow, extra: bytes, *, unread: bool
    ) -> tuple[bytes, bool]:
        """See `ClientStream.begin_response`."""
        http10 = request.head.minor == 0
        close = request.closes_client(unread) or flow.closes_client(head, http10=http10)
        out = flow.begin(head, http10=http10, close=close, extra=extra, announce=http10 and not close)
        return out, close

    def end_response(self, flow: ResponseFlow) -> None:
        """See `ClientStream.end_response`: its last bytes said so."""

    async def answer(self, request: ServedRequest, answer: Answer) -> bool:
        """See `ClientStream.answer`."""
        head = request.head
        unread = head.has_body and (request.body is None or not request.body.finished)
        close = request.closes_client(unread)
        request.status = answer.status
        request.error = answer.reason
        request.response_begun = True
        await self.send(
            own_answer(
                request,
                answer,
                close=close,
                announce_keep_alive=not close and head.minor == 0,
                without_body=head.method == b"HEAD",
            )
        )
        return close

    def _forwarded_lines(self, head: RequestHead) -> bytes:
        """The X-Forwarded-For and -Proto fields to append to a request."""
        if not self._forwarded:
            host = self.peer[0] if isinstance(self.peer, tuple) else "unknown"
            self._forwarded = f"x-forwarded-for: {host}\r\n".encode()
        if head.forwarded and b"\r\nx-forwarded-proto:" in head.raw.lower():
            return self._forwarded
        return self._forwarded + b"x-forwarded-proto: " + self.scheme.encode() + b"\r\n"

    async def send(self, data: bytes) -> None:
        """Send bytes to the client.

        Raises:
            ClientLeftError: it reset its connection.
        """
        pipe = self.pipe
        try:
            sent = pipe.write(data)
            if sent == len(data):
                return
            rest = memoryview(data)[sent:]
            while rest:
                self.await_transfer()
                await pipe.wait_writable()
                rest = rest[pipe.write(rest) :]
        except OSError:
            raise ClientLeftError from None
        self.deadline = math.inf


def own_answer(
    request: ServedRequest,
    answer: Answer,
    *,
    close: bool = False,
    announce_keep_alive: bool = False,
    without_body: bool = False,
) -> bytes:
    """The bytes of an answer of the proxy's own to a request; see `generated_answer`."""
    text, field = answer.of(request.identify())
    return generated_answer(
        answer.status,
        answer.reason,
        text,
        extra=request.explanation() + b"%b: %b\r\n" % field,
        close=close,
        announce_keep_alive=announce_keep_alive,
        without_body=without_body,
    )
