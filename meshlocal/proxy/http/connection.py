"""One client's connection: its requests, one after the other, and how it ends."""

from __future__ import annotations

import math

import trio

from meshlocal.net.pipe import Pipe, finish_writing
from meshlocal.net.relay_loop import current_loop
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.http.answers import BODY_TIMEOUT, HEAD_TIMEOUT, Answer
from meshlocal.proxy.http.calls import Calls
from meshlocal.proxy.http.ends import ClientLeftError, End, Expiry
from meshlocal.proxy.http.h1.client import CHUNK, H1Client, own_answer
from meshlocal.proxy.http.h1.upstream import H1Upstream
from meshlocal.proxy.http.h2.client import H2ClientLink
from meshlocal.proxy.http.lane import Lane
from meshlocal.proxy.http.request import HttpRequest
from meshlocal.proxy.http.serve import serve
from meshlocal.proxy.http.shared import HttpShared
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.request import HTTP2_PREFACE, HeadLimits, check_unfinished
from meshlocal.wire.http1.rewrite import generated_answer

CLOSE_GRACE = 2.0
"""Seconds, after a last answer, for the client to read it and close."""


class ClientConnection(H1Client):
    """One client's connection while it lives.

    Attributes:
        link: what it became, if the client speaks HTTP/2.
    """

    __slots__ = ("link",)

    def __init__(self, shared: HttpShared, service: ServiceKey | None, pipe: Pipe, peer: object) -> None:
        super().__init__(shared, service, pipe, peer)
        self.link: H2ClientLink | None = None

    async def run(self) -> None:
        """Serve it to its end; the socket is closed or reset then."""
        end = End.ABORT
        try:
            with self.scope:
                end = await self._converse()
            if self.scope.cancelled_caught:
                end = await self._expire()
            if end is End.LINGER:
                with trio.move_on_after(CLOSE_GRACE):
                    await self._linger()
        except ClientLeftError:
            end = End.ABORT
        finally:
            if end is End.ABORT:
                self.pipe.abort()
            else:
                self.pipe.close()

    async def refuse(self, answer: Answer) -> None:
        """Answer before there is a request, and end; the socket is closed then."""
        try:
            with trio.move_on_after(CLOSE_GRACE):
                await self._answer(answer)
                await self._linger()
        except ClientLeftError:
            pass
        finally:
            self.pipe.close()

    async def _converse(self) -> End:
        shared = self.shared
        loop = current_loop.get()
        lane = Lane(self, loop) if loop is not None and self.pipe.plain is not None else None
        while True:
            if lane is not None and not self.early and not shared.draining:
                self.await_request(trio.current_time())
                await lane.wait()
                if lane.end is not None:
                    return lane.end
                if lane.request is not None:
                    ending = await self._serve(lane.request, lane.upstream, lane.raised)
                    lane.forget()
                    if ending is not End.KEEP:
                        return ending
                    continue
                if lane.raised is not None:
                    raise lane.raised
            ending = await self._serve_next()
            if ending is not End.KEEP:
                return ending

    async def _serve_next(self) -> End:
        """Wait for a request, and serve it. Nothing of it is held when the next one is waited for."""
        received = await self._begin_head()
        if received is None:
            return End.CLOSE
        settings = self.shared.settings
        limits = settings.limits
        fresh = self.fresh
        try:
            end = received.find(b"\r\n\r\n")
            if end < 0:
                received = await self._finish_head(received, limits)
                if received is None:
                    return End.CLOSE
                end = received.find(b"\r\n\r\n")
            end += 4
            if fresh and received.startswith(HTTP2_PREFACE):
                return await self._serve_http2(received)
            if end > limits.head:
                raise ProtocolError(431, "head_too_large", f"the head is larger than {limits.head} bytes")
            if end < len(received):
                raw = received[:end]
                self.early += received[end:]
            else:
                raw = received
            head = settings.heads.request(raw)
        except ProtocolError as error:
            return await self._refuse(error)
        self.deadline = math.inf
        self.fresh = False
        return await self._serve(HttpRequest(self, head, trio.current_time()))

    async def _serve_http2(self, received: bytes) -> End:
        """Serve a client that takes it for known that HTTP/2 is spoken here (RFC 9113, 3.3)."""
        loop = current_loop.get()
        self.expiry = Expiry.TRANSFER
        self.deadline = math.inf
        async with trio.open_nursery() as nursery:
            calls = Calls(nursery, loop)
            link = self.link = H2ClientLink(self.pipe, self.shared, self.service, self.peer, loop, calls)
            link.receive(received)
            if self.shared.draining:
                link.drain()
            await link.serve()
            nursery.cancel_scope.cancel()
        return End.CLOSE

    async def _serve(
        self, request: HttpRequest, upstream: H1Upstream | None = None, raised: Exception | None = None
    ) -> End:
        self.request = request
        try:
            ending = await serve(request, upstream, raised)
            self.request = None
            return ending
        finally:
            request.finish(trio.current_time())

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
                    await self.pipe.wait_readable()
                ready = False
                try:
                    data = self.pipe.read(CHUNK)
                except OSError:
                    raise ClientLeftError from None
                if data is None:
                    continue
                if not data:
                    return None
                received = data
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
        self.deadline = trio.current_time() + self.shared.settings.config.header_timeout
        while True:
            check_unfinished(received, limits)
            data = await self.receive()
            if not data:
                return None
            searched = max(len(received) - 3, 0)
            received += data
            if received.find(b"\r\n\r\n", searched) >= 0:
                return bytes(received)

    async def _refuse(self, error: ProtocolError) -> End:
        await self._answer(Answer.to(error))
        return End.LINGER

    async def _answer(self, answer: Answer) -> None:
        """Answer to what is no request, or none yet; the connection ends with it."""
        self.shared.refuse(self.peer, answer)
        await self._say(generated_answer(*answer, close=True))

    async def _say(self, data: bytes) -> None:
        with trio.move_on_after(CLOSE_GRACE):
            await self.send(data)

    async def _expire(self) -> End:
        if self.expiry is Expiry.HEAD:
            await self._answer(HEAD_TIMEOUT)
            return End.LINGER
        request = self.request
        if self.expiry is Expiry.BODY and request is not None and not request.response_begun:
            await self._say(own_answer(request, BODY_TIMEOUT, close=True))
            return End.LINGER
        return End.CLOSE if self.expiry in (Expiry.FIRST, Expiry.IDLE) else End.ABORT

    async def _linger(self) -> None:
        """End our side, and read on for a moment.

        To close with bytes unread would reset the connection, and the client might lose the answer (RFC 9112, 9.6).
        """
        try:
            await finish_writing(self.pipe)
        except OSError:
            raise ClientLeftError from None
        while await self.receive():
            pass
