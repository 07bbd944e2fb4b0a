"""One request on one connection to one instance, until its response has ended.

`start` sends the request, `take` turns what the instance sends into what the client gets, `end` hears that it sends no
more, `release` gives the connection back. None of these waits, so the lane can drive it as well as a task can;
`respond` is how a task does it, from wherever the lane left it (`meshlocal.proxy.http.h1.pump`).

Most responses come whole with one read, with nothing unusual about them: `take_whole` makes no more of them than has to
be made.

A task that waits for a quick instance takes neither a nursery nor a cancel scope. What streams a body up has both
(`meshlocal.proxy.http.h1.pump`).
"""

from __future__ import annotations

import math

import trio
from trio.lowlevel import checkpoint

from meshlocal.client.statistics import Outcome
from meshlocal.policy.retry import Failure
from meshlocal.proxy.http.ends import AttemptTimeoutError, ClientLeftError, CutError, End
from meshlocal.proxy.http.h1.client import CHUNK
from meshlocal.proxy.http.h1.tunnel import run_tunnel
from meshlocal.proxy.http.pool import Upstream
from meshlocal.proxy.http.request import HttpRequest
from meshlocal.proxy.http.service import HttpService
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.messages import ResponseFlow
from meshlocal.wire.http1.response import Framing, ResponseHead
from meshlocal.wire.http1.rewrite import client_head

TURN = 16
"""Full chunks that are moved in a row before other tasks get their turn."""


_SERVED, _KEEP = Outcome.SERVED, End.KEEP


class H1Upstream:
    """One try of a request on a connection to an instance.

    Args:
        request: what is sent.
        service: what it is for.
        upstream: the connection; it is put back, closed or reset in the end.

    Attributes:
        sent: some of the request may have reached the instance.
        unsent: what the connection would not take at once.
        out: what the client's connection would not take, before a task took over.
        failure: how it failed, once that is known.
        head_came: the final head did.
        slow: it waited for too long to go on without a watch on the client and the clock.
        reset: the connection failed, rather than ended.
        streaming: the request's body is being sent by another task.
        expecting: the client waits to be asked for its body.
        scope: of the wait for a head, while `streaming`; its deadline is the instance's.
        deadline: when the instance must have answered, by trio.current_time().
        started: the request was sent, or it was tried to.
    """

    __slots__ = (
        "_close_client",
        "_flow",
        "_released",
        "_size",
        "_switch",
        "_unread",
        "_wait_first",
        "_whole_reusable",
        "client",
        "deadline",
        "expecting",
        "failure",
        "head_came",
        "out",
        "pipe",
        "request",
        "reset",
        "scope",
        "sent",
        "service",
        "slow",
        "started",
        "streaming",
        "unsent",
        "upstream",
    )

    def __init__(self, request: HttpRequest, service: HttpService, upstream: Upstream) -> None:
        self.request = request
        self.client = request.client
        self.service = service
        self.upstream = upstream
        self.pipe = upstream.pipe
        self.deadline = math.inf
        self.scope: trio.CancelScope | None = None
        self.failure: Failure | None = None
        self.started = False
        self.sent = False
        self.unsent = b""
        self.out = b""
        self.head_came = False
        self.streaming = False
        self.expecting = False
        self.slow = False
        self.reset = False
        self._flow: ResponseFlow | None = None
        self._released = False
        self._switch: ResponseHead | None = None
        self._close_client = False
        self._unread = False
        self._wait_first = True
        self._whole_reusable = False
        self._size = 0

    # Without a wait.

    @property
    def flow(self) -> ResponseFlow:
        """The response, unless it came whole."""
        flow = self._flow
        if flow is None:
            flow = self._flow = ResponseFlow(self.request.head.method, self.client.shared.settings.heads)
        return flow

    def start(self, now: float) -> None:
        """Send the request, as far as the connection takes it. Sets `failure` if that is dead."""
        self.started = True
        request = self.request
        request.enter_instance()
        payload = request.payload()
        try:
            sent = self.pipe.write(payload)
        except OSError:
            self.failure = self.upstream.failed()
            return
        self.sent = sent > 0
        if sent < len(payload):
            self.unsent = payload[sent:]
        request.began = now
        limit = self.service.state.policy.attempt_timeout
        self.deadline = request.deadline if limit is None else min(request.deadline, now + limit)

    def take_whole(self, data: bytes) -> bool:
        """Take the instance's first bytes if they are a whole response, with nothing about it that wants a second look;
        what goes to the client is in `out` then. False: nothing was taken."""
        request = self.request
        settings, asked = request.shared.settings, request.head
        end = data.find(b"\r\n\r\n") + 4
        if (
            end < 4
            or end > settings.limits.head
            or self._flow is not None
            or asked.minor == 0
            or asked.method == b"HEAD"
            or request.closes_client()
        ):
            return False
        try:
            head = settings.heads.response(data[:end])
        except ProtocolError:
            return False
        status, size = head.status, len(data) - end
        if size != head.size or request.may_drop(status):
            return False
        extra = settings.via + request.explanation() if settings.config.response_headers else settings.via
        onward = head.onward.get((head.usual, extra, False, False)) or client_head(head, head.usual, extra=extra)
        self.out = onward + data[end:] if size else onward
        self.head_came = True
        self._size = size
        self._whole_reusable = head.keep_alive
        request.answered()
        request.begin_response(status)
        return True

    @property
    def is_sent(self) -> bool:
        """Whether all of the request was sent."""
        body = self.request.body
        return not self.unsent and (body is None or body.finished)

    def take(self, data: bytes) -> bytes:
        """What goes to the client for what came from the instance. Sets `failure` if the head makes no sense.

        Raises:
            CutError: the body makes no sense.
        """
        flow = self.flow
        if self.head_came:
            try:
                return flow.body(data)
            except ProtocolError as error:
                self.request.problem = error
                raise CutError from None
        out = b""
        try:
            head = flow.receive(data)
            while head is not None:
                if head.status >= 200:
                    return out + self._begin(head) if out else self._begin(head)
                if head.status == 101:
                    self._begin_switch(head)
                    return out
                out += self._interim(head)
                head = flow.receive(b"")
        except ProtocolError as error:
            self.request.problem = error
            self.failure = Failure.BROKEN
        return out

    def end(self) -> bytes:
        """The instance ended the connection: what goes to the client. Sets `failure` if the head did not come.

        Raises:
            CutError: the response is not whole.
        """
        flow = self.flow
        if self.head_came:
            rest = None if self.reset else flow.end()
            if rest is None:
                raise CutError
            return rest
        if flow.any_byte:
            self.failure = Failure.BROKEN
        else:
            self.failure = self.upstream.failed()
        return b""

    def _interim(self, head: ResponseHead) -> bytes:
        if self.expecting:
            # The instance asked for the body: from here on the client is waited for, in its own time.
            self.expecting = False
            if self.scope is not None:
                self.scope.deadline = math.inf
        return self.client.interim(head)

    def _begin(self, head: ResponseHead) -> bytes:
        request, flow = self.request, self.flow
        if request.drops_answer(head.status, sent=self.sent):
            self.failure = Failure.STATUS
            return b""
        settings = self.client.shared.settings
        self._unread = request.body is not None and not (request.body.finished and not self.streaming)
        extra = settings.via + request.explanation() if settings.config.response_headers else settings.via
        out, self._close_client = self.client.begin_response(request, head, flow, extra, unread=self._unread)
        self.head_came = True
        self.deadline = math.inf
        if self.scope is not None:
            self.scope.deadline = math.inf
        request.answered()
        request.begin_response(head.status)
        # The response may last for hours.
        request.end_search()
        return out

    def _begin_switch(self, head: ResponseHead) -> None:
        """The instance switches to another protocol: from here on this is a tunnel (RFC 9110, 7.8)."""
        if not self.request.head.upgrade or self.streaming:
            raise ProtocolError(502, "bad_upgrade", "a switch of protocols that nobody asked for")
        self._switch = head
        if self.scope is not None:
            self.scope.deadline = math.inf

    @property
    def was_whole(self) -> bool:
        """The response was taken whole."""
        return self._flow is None

    @property
    def is_complete(self) -> bool:
        """Whether all of the response came."""
        return self.flow.complete if self._flow is not None else self.head_came

    @property
    def needs_task(self) -> bool:
        """Whether the request's task has to go on: the attempt failed, or the connection becomes a tunnel."""
        return self.failure is not None or self._switch is not None

    def complete(self) -> None:
        """Settle the request: all of its response went to the client."""
        request = self.request
        request.received += self._size if self._flow is None else self._flow.size
        request.outcome = _SERVED
        if self._flow is not None:
            self.client.end_response(self._flow)
        if self._close_client:
            request.close_client(unread=self._unread)
        else:
            request.client_end = _KEEP

    def release(self, now: float, *, watched: bool = False) -> None:
        """Give the connection back, close it, or reset it if something on it was cut short. The first call counts.

        Args:
            now: by trio.current_time().
            watched: nothing that happened to the connection can have gone unseen.
        """
        if self._released:
            return
        self._released = True
        self.request.leave_instance()
        flow = self._flow
        if flow is None:
            whole, reusable = self.head_came, self._whole_reusable
        else:
            whole = flow.complete and self.is_sent and not self.streaming
            reusable = flow.reusable and self.failure is None and not self.reset
        upstream = self.upstream
        if reusable and whole and not upstream.ending:
            self.service.pool.put(upstream, now, self.service.pool_size, watched=watched)
        elif whole:
            upstream.pipe.close()
        else:
            upstream.pipe.abort()

    # With waits.

    async def respond(self) -> None:
        """Pass the response on, until its end or a failure."""
        client = self.client
        chunks = 0
        if self.out:
            out, self.out = self.out, b""
            await client.send(out)
        while not (self.is_complete or self.needs_task):
            data = await self._receive()
            out = self.take(data) if data else self.end()
            if out:
                await client.send(out)
            # A short read most likely emptied a plain connection: waiting at once spares a read that would say so.
            self._wait_first = len(data) < CHUNK and self.pipe.plain is not None
            chunks += 1
            if chunks >= TURN:
                chunks = 0
                await checkpoint()
        if self.is_complete and not self._wait_first:
            self.upstream.look_behind()
        if self._switch is not None:
            await self._tunnel(self._switch)
        elif self.failure is None:
            self.complete()

    async def _tunnel(self, head: ResponseHead) -> None:
        request = self.request
        request.answered()
        request.begin_response(101)
        first = client_head(head, Framing.NONE, extra=request.explanation()) + bytes(self.flow.rest)
        self.flow.complete = await run_tunnel(request, self.service.state, self.upstream.pipe, first)

    async def _receive(self) -> bytes:
        """Wait for bytes from the instance; empty at its end, or a reset.

        Raises:
            ClientLeftError: the client reset its connection meanwhile.
            AttemptTimeoutError: nothing came in time.
        """
        pipe = self.pipe
        wait = self._wait_first
        while True:
            if wait:
                if self.scope is not None:
                    if self.head_came:
                        self.client.await_transfer()
                    await pipe.wait_readable()
                else:
                    await self._wait()
            try:
                received = pipe.read(CHUNK)
            except OSError:
                self.reset = True
                return b""
            if received is not None:
                return received
            wait = True

    async def _wait(self) -> None:
        if self.slow:
            await self._wait_watching()
            return
        patience = self.client.shared.patience
        patience.add(self, trio.current_time() if self.head_came else self.request.started)
        try:
            await self.pipe.wait_readable()
        except trio.ClosedResourceError:
            if not self.slow:
                raise
            await self._wait_watching()
        finally:
            patience.waiting.pop(self, None)

    def on_slow(self) -> None:
        """See `Waiter.on_slow`."""
        self.slow = True
        self.pipe.interrupt()

    def on_deadline(self) -> None:
        """See `Waiter.on_deadline`: it asks for no time."""

    async def _wait_watching(self) -> None:
        self.slow = False
        client = self.client
        if self.head_came:
            client.await_transfer()
        with trio.CancelScope(deadline=self.deadline) as scope:
            await client.watched(self.pipe.wait_readable)
        if client.left:
            raise ClientLeftError
        if scope.cancelled_caught:
            raise AttemptTimeoutError
        client.deadline = math.inf
