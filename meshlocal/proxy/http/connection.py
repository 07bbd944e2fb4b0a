"""One client's connection: its requests, one after the other, and how it ends."""

from __future__ import annotations

import math
import socket
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import wait_readable, wait_writable

from meshlocal.client.connecting import Client
from meshlocal.net.relay import RelayCounters, current_loop
from meshlocal.net.sockets import abort, close
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.http.answers import BODY_TIMEOUT, HEAD_TIMEOUT, Answer
from meshlocal.proxy.http.attempt import Attempt
from meshlocal.proxy.http.ends import ClientLeftError, End, Expiry
from meshlocal.proxy.http.exchange import Exchange
from meshlocal.proxy.http.lane import Lane
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.request import HTTP2_PREFACE, HeadLimits, RequestHead, check_unfinished
from meshlocal.wire.http1.rewrite import HTTP2_REFUSAL, generated_answer, upstream_head

if TYPE_CHECKING:
    from meshlocal.proxy.http.forwarder import HttpForwarder
    from meshlocal.proxy.http.service import HttpService

CHUNK = 65536
"""Bytes read at once."""

LINGER = 2.0
"""Seconds, after a last answer, for the client to read it and close."""

DRAIN_GRACE = 0.5
"""Seconds that a drain leaves to a client whose next request may be on its way (RFC 9112, 9.6)."""


class ClientConnection(Client):
    """One client's connection while it lives.

    Attributes:
        service: what all its requests are for; None if each one says its own.
        peer: the client's address.
        begun: some of the current request's final response went to the client.
        fresh: it had no request yet.
        deadline: when it expires, by trio.current_time().
        expiry: what it waits for.
        expired: it was cut because that did not come.
        exchange: the request under way.
        counters: bytes moved, once it is a tunnel.
    """

    __slots__ = (
        "_forwarded",
        "begun",
        "counters",
        "deadline",
        "exchange",
        "expired",
        "expiry",
        "forwarder",
        "fresh",
        "peer",
        "scope",
        "service",
    )

    def __init__(self, forwarder: HttpForwarder, service: ServiceKey | None, sock: socket.socket, peer: object) -> None:
        super().__init__(sock)
        self.forwarder = forwarder
        self.service = service
        self.peer = peer
        self.scope = trio.CancelScope()
        self.deadline = math.inf
        self.expiry = Expiry.FIRST
        self.expired = False
        self.begun = False
        self.fresh = True
        self.exchange: Exchange | None = None
        self.counters: RelayCounters | None = None
        self._forwarded = b""

    @property
    def is_idle(self) -> bool:
        """It waits for a request of which nothing came, its first one or the next."""
        return self.expiry in (Expiry.IDLE, Expiry.FIRST) and self.exchange is None

    @property
    def idle_limit(self) -> float:
        """Seconds that a response, or a tunnel, may stand still."""
        service = self.exchange.service if self.exchange is not None else None
        limit = service.state.policy.idle_timeout if service is not None else None
        return math.inf if limit is None else limit

    def has_input(self) -> bool:
        """Something came on it that was not read yet."""
        try:
            return bool(self.early or self.socket.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def expire(self) -> None:
        """End it: what it waits for did not come in time."""
        self.expired = True
        self.scope.cancel()

    def await_transfer(self) -> None:
        """A response is under way, and has to wait: for the client to take it, or for more of it."""
        self.expiry = Expiry.TRANSFER
        self.deadline = trio.current_time() + self.idle_limit

    async def run(self) -> None:
        """Serve it to its end; the socket is closed or reset then."""
        end = End.ABORT
        try:
            with self.scope:
                end = await self._converse()
            if self.scope.cancelled_caught:
                end = await self._expire()
            if end is End.LINGER:
                with trio.move_on_after(LINGER):
                    await self._linger()
        except ClientLeftError:
            end = End.ABORT
        finally:
            if end is End.ABORT:
                abort(self.socket)
            else:
                close(self.socket)

    async def refuse(self, answer: Answer) -> None:
        """Answer before there is a request, and end; the socket is closed then."""
        try:
            with trio.move_on_after(LINGER):
                await self._answer(answer)
                await self._linger()
        except ClientLeftError:
            pass
        finally:
            close(self.socket)

    async def _converse(self) -> End:
        forwarder = self.forwarder
        loop = current_loop.get()
        lane = Lane(self, loop) if loop is not None else None
        while True:
            if lane is not None and not self.early and not forwarder.draining:
                self.await_request(trio.current_time())
                await lane.wait()
                if lane.end is not None:
                    return lane.end
                if lane.raised is not None and lane.exchange is None:
                    raise lane.raised
                if lane.exchange is not None:
                    ending = await self._exchange(lane.exchange, lane.attempt, lane.raised)
                    if ending is not End.KEEP:
                        return ending
                    continue
            received = await self._begin_head()
            if received is None:
                return End.CLOSE
            settings = forwarder.settings
            limits = settings.limits
            try:
                end = received.find(b"\r\n\r\n")
                if end < 0:
                    received = await self._finish_head(received, limits)
                    if received is None:
                        return End.CLOSE
                    end = received.find(b"\r\n\r\n")
                end += 4
                if end > limits.head:
                    raise ProtocolError(431, "head_too_large", f"the head is larger than {limits.head} bytes")
                if end < len(received):
                    raw = received[:end]
                    self.early += received[end:]
                else:
                    raw = received
                head = settings.heads.request(raw)
            except ProtocolError as error:
                return await self._refuse(error, received or b"")
            self.deadline = math.inf
            self.begun = self.fresh = False
            exchange = self.exchange = Exchange(self, head, trio.current_time())
            ending = await self._exchange(exchange)
            if ending is not End.KEEP:
                return ending

    async def _exchange(
        self, exchange: Exchange, attempt: Attempt | None = None, raised: Exception | None = None
    ) -> End:
        try:
            return await exchange.run(attempt, raised)
        finally:
            self.exchange = None
            exchange.finish(trio.current_time())

    def await_request(self, now: float) -> None:
        """It waits for a request of which nothing came."""
        config = self.forwarder.settings.config
        self.expiry = Expiry.FIRST if self.fresh else Expiry.IDLE
        limit = config.header_timeout if self.fresh else config.keep_alive_timeout
        self.deadline = now + (min(limit, DRAIN_GRACE) if self.forwarder.draining else limit)

    async def _begin_head(self) -> bytes | None:
        """The first bytes of the next request; None if none comes."""
        ready = self.fresh  # what a client sends with its connection is there when that is accepted, most of the time
        waits = False
        while True:
            if self.early:
                received = bytes(self.early)
                self.early.clear()
            else:
                if not waits:
                    # Once: empty lines win no time.
                    waits = True
                    self.await_request(trio.current_time())
                if not ready:
                    await wait_readable(self.socket)
                ready = False
                try:
                    received = self.socket.recv(CHUNK)
                except BlockingIOError:
                    continue
                except OSError:
                    raise ClientLeftError from None
                if not received:
                    return None
            # Empty lines before a request, from clients that end a body with one (RFC 9112, 2.2).
            start = 0
            while received.startswith(b"\r\n", start):
                start += 2
            if start < len(received):
                return received[start:] if start else received

    async def _finish_head(self, beginning: bytes, limits: HeadLimits) -> bytes | None:
        """The rest of a head, and what came behind it; None if the client ends its stream within the head."""
        received = bytearray(beginning)
        self.expiry = Expiry.HEAD
        self.deadline = trio.current_time() + self.forwarder.settings.config.header_timeout
        while True:
            check_unfinished(received, limits)
            data = await self.receive()
            if not data:
                return None
            searched = max(len(received) - 3, 0)
            received += data
            if received.find(b"\r\n\r\n", searched) >= 0:
                return bytes(received)

    async def receive(self) -> bytes:
        """Wait for bytes from the client; empty at its end.

        Raises:
            ClientLeftError: it reset its connection.
        """
        while True:
            await wait_readable(self.socket)
            try:
                return self.socket.recv(CHUNK)
            except BlockingIOError:
                continue
            except OSError:
                raise ClientLeftError from None

    async def receive_body(self) -> bytes:
        """Wait for more of a request's body; empty at the client's end.

        Raises:
            ClientLeftError: it reset its connection.
        """
        self.expiry = Expiry.BODY
        self.deadline = trio.current_time() + self.forwarder.settings.config.body_timeout
        data = await self.receive()
        if self.begun:
            self.await_transfer()
        else:
            self.deadline = math.inf
        return data

    def request_head(self, head: RequestHead, service: HttpService) -> bytes:
        """A request's head for an instance of the service."""
        settings = self.forwarder.settings
        extra = settings.via
        if settings.append_forwarded:
            extra += self.forwarded_lines(head)
        host = b"" if head.has_host else service.state.key.encode()
        return upstream_head(head, extra, host=host, strip_forwarded=settings.strip_forwarded)

    def forwarded_lines(self, head: RequestHead) -> bytes:
        """The X-Forwarded-For and -Proto fields to append to a request."""
        if not self._forwarded:
            host = self.peer[0] if isinstance(self.peer, tuple) else "unknown"
            self._forwarded = f"x-forwarded-for: {host}\r\n".encode()
        if head.forwarded and b"\r\nx-forwarded-proto:" in head.raw.lower():
            return self._forwarded
        return self._forwarded + b"x-forwarded-proto: http\r\n"

    async def send(self, data: bytes) -> None:
        """Send bytes to the client.

        Raises:
            ClientLeftError: it reset its connection.
        """
        sock = self.socket
        try:
            try:
                sent = sock.send(data)
            except BlockingIOError:
                sent = 0
            if sent == len(data):
                return
            rest = memoryview(data)[sent:]
            while rest:
                self.await_transfer()
                await wait_writable(sock)
                try:
                    rest = rest[sock.send(rest) :]
                except BlockingIOError:
                    continue
        except OSError:
            raise ClientLeftError from None
        self.deadline = math.inf

    async def _refuse(self, error: ProtocolError, received: bytes) -> End:
        if received.startswith(HTTP2_PREFACE):
            self.forwarder.refused["http2"] += 1
            await self._say(HTTP2_REFUSAL)
        else:
            await self._answer(Answer.to(error))
        return End.LINGER

    async def _answer(self, answer: Answer) -> None:
        """Answer to what is no request, or none yet; the connection ends with it."""
        self.forwarder.refuse(self, answer)
        await self._say(generated_answer(*answer, close=True))

    async def _say(self, data: bytes) -> None:
        with trio.move_on_after(LINGER):
            await self.send(data)

    async def _expire(self) -> End:
        if self.expiry is Expiry.HEAD:
            await self._answer(HEAD_TIMEOUT)
            return End.LINGER
        if self.expiry is Expiry.BODY and not self.begun:
            await self._say(generated_answer(*BODY_TIMEOUT, close=True))
            return End.LINGER
        return End.CLOSE if self.expiry in (Expiry.FIRST, Expiry.IDLE) else End.ABORT

    async def _linger(self) -> None:
        """End our side, and read on for a moment.

        To close with bytes unread would reset the connection, and the client might lose the answer (RFC 9112, 9.6).
        """
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            raise ClientLeftError from None
        while await self.receive():
            pass
