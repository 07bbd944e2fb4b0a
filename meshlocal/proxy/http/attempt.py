"""One request on one connection to one instance, until its response has ended.

`start` sends the request, `take` turns what the instance sends into what the client gets, `end` hears that it sends no
more, `release` gives the connection back. None of these waits, so a lane can drive an attempt as well as a task can;
`run` is how a task does it, from the start or from wherever the lane left it.

A task that waits for a quick instance takes neither a nursery nor a cancel scope. What streams a body up has both
(`meshlocal.proxy.http.pump`).
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import checkpoint, notify_closing, wait_readable

from meshlocal.client.statistics import Outcome
from meshlocal.net.sockets import abort, close
from meshlocal.policy.retry import Failure
from meshlocal.proxy.http.account import told
from meshlocal.proxy.http.ends import AttemptTimeoutError, ClientLeftError, CutError, End
from meshlocal.proxy.http.pool import Upstream
from meshlocal.proxy.http.service import HttpService
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.messages import ResponseFlow
from meshlocal.wire.http1.response import Framing, ResponseHead
from meshlocal.wire.http1.rewrite import client_head

if TYPE_CHECKING:
    from meshlocal.proxy.http.exchange import Exchange

CHUNK = 65536
"""Bytes read at once."""

TURN = 16
"""Full chunks that are moved in a row before other tasks get their turn."""


class Attempt:
    """One try.

    Args:
        exchange: the request.
        service: what it is for.
        upstream: the connection; it is put back, closed or reset in the end.

    Attributes:
        sent: some of the request may have reached the instance.
        unsent: what the connection would not take at once.
        out: what the client's connection would not take, before a task took over.
        failure: how it failed, once that is known.
        head_came: the final head did.
        impatient: it waited for too long to go on without a watch on the client and the clock.
        reset: the connection failed, rather than ended.
        streaming: the request's body is being sent by another task.
        scope: of the wait for a head, while `streaming`; its deadline is the instance's.
        deadline: when the instance must have answered.
        began: when the request was sent, by trio.current_time(); what the attempt shows of its instance is from then.
    """

    __slots__ = (
        "_close_client",
        "_counted",
        "_switch",
        "_unread",
        "_wait_first",
        "began",
        "connection",
        "deadline",
        "exchange",
        "expecting",
        "failure",
        "flow",
        "head_came",
        "impatient",
        "out",
        "reset",
        "scope",
        "sent",
        "service",
        "sock",
        "started",
        "streaming",
        "unsent",
        "upstream",
    )

    def __init__(self, exchange: Exchange, service: HttpService, upstream: Upstream) -> None:
        connection = exchange.connection
        self.exchange = exchange
        self.connection = connection
        self.service = service
        self.upstream = upstream
        self.sock = upstream.sock
        self.flow = ResponseFlow(exchange.head.method, connection.forwarder.settings.heads)
        self.deadline = exchange.deadline
        self.began = exchange.started
        self.scope: trio.CancelScope | None = None
        self.failure: Failure | None = None
        self.started = False
        self.sent = False
        self.unsent = b""
        self.out = b""
        self.head_came = False
        self.streaming = False
        self.expecting = False
        self.impatient = False
        self.reset = False
        self._switch: ResponseHead | None = None
        self._close_client = False
        self._counted = False
        self._unread = False
        self._wait_first = True

    # Without a wait.

    def resume(self) -> None:
        """Go on where a `Quick` was that had sent the whole request."""
        self.started = self.sent = True
        self._limit(self.exchange.started)

    def take_over_count(self) -> None:
        """That the request is under way on the instance was counted, and is this attempt's to undo."""
        self._counted = True

    def _limit(self, now: float) -> None:
        self.began = now
        limit = self.service.state.policy.attempt_timeout
        if limit is not None:
            self.deadline = min(self.deadline, now + limit)

    def start(self) -> None:
        """Send the request, as far as the connection takes it. Sets `failure` if that is dead."""
        self.started = True
        exchange, state = self.exchange, self.service.state
        if exchange.pick is not None and not self._counted:
            state.fitness.begin(exchange.pick.instance)
            self._counted = True
        payload = exchange.payload()
        try:
            sent = self.sock.send(payload)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.failure = Failure.STALE if self.upstream.used else Failure.NO_RESPONSE
            return
        self.sent = sent > 0
        if sent < len(payload):
            self.unsent = payload[sent:]
        self._limit(trio.current_time())

    @property
    def is_sent(self) -> bool:
        """All of the request was sent."""
        body = self.exchange.body
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
                self.exchange.problem = error
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
            self.exchange.problem = error
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
            self.failure = Failure.STALE if self.upstream.used else Failure.NO_RESPONSE
        return b""

    def _interim(self, head: ResponseHead) -> bytes:
        if self.expecting:
            # The instance asked for the body: from here on the client is waited for, in its own time.
            self.expecting = False
            if self.scope is not None:
                self.scope.deadline = math.inf
        return client_head(head, Framing.NONE) if self.exchange.head.minor == 1 else b""

    def _begin(self, head: ResponseHead) -> bytes:
        exchange, connection, service, flow = self.exchange, self.connection, self.service, self.flow
        status = head.status
        if status in service.state.policy.retry_on and exchange.retries_answer(service, self.sent):
            self.failure = Failure.STATUS
            return b""
        request, forwarder = exchange.head, connection.forwarder
        settings = forwarder.settings
        http10 = request.minor == 0
        self._unread = exchange.body is not None and not (exchange.body.finished and not self.streaming)
        close_client = self._close_client = (
            not request.keep_alive
            or forwarder.draining
            or self._unread
            or (http10 and flow.closes_client(head, http10=True))
        )
        extra = settings.via + told(exchange) if settings.config.response_headers else settings.via
        out = flow.begin(head, http10=http10, close=close_client, extra=extra, announce=http10 and not close_client)
        self.head_came = True
        self.deadline = math.inf
        if self.scope is not None:
            self.scope.deadline = math.inf
        if exchange.pick is not None:
            service.state.fitness.worked(exchange.pick.instance, self.began)
        exchange.status = status
        exchange.outcome = Outcome.CUT
        connection.begun = True
        return out

    def _begin_switch(self, head: ResponseHead) -> None:
        """The instance switches to another protocol: from here on this is a tunnel (RFC 9110, 7.8)."""
        if not self.exchange.head.upgrade or self.streaming:
            raise ProtocolError(502, "bad_upgrade", "a switch of protocols that nobody asked for")
        self._switch = head
        if self.scope is not None:
            self.scope.deadline = math.inf

    @property
    def needs_task(self) -> bool:
        """It failed, or becomes a tunnel."""
        return self.failure is not None or self._switch is not None

    def complete(self) -> None:
        """All of the response went to the client."""
        exchange, connection = self.exchange, self.connection
        exchange.received += self.flow.size
        exchange.outcome = Outcome.SERVED
        if not self._close_client:
            exchange.end = End.KEEP
        else:
            # A client that did not ask for it may be sending its next request.
            linger = self._unread or exchange.head.keep_alive or connection.has_input()
            exchange.end = End.LINGER if linger else End.CLOSE

    def release(self, now: float, *, watched: bool = False) -> None:
        """Give the connection back, close it, or reset it if something on it was cut short.

        Args:
            now: by trio.current_time().
            watched: nothing that happened to the connection can have gone unseen.
        """
        upstream = self.upstream
        if self._counted:
            self._counted = False
            assert self.exchange.pick is not None
            self.service.state.fitness.end(self.exchange.pick.instance)
        sent = self.is_sent and not self.streaming
        if self.flow.reusable and sent and self.failure is None and not (self.reset or upstream.ending):
            self.service.pool.put(upstream, now, self.connection.forwarder.settings.config.pool_size, watched=watched)
        elif self.flow.complete and sent:
            close(upstream.sock)
        else:
            abort(upstream.sock)

    # With waits.

    async def run(self) -> Failure | None:
        """Send the request, and pass the response on.

        Returns:
            How it failed; None if the response went to the client.

        Raises:
            ClientLeftError: the client reset its connection.
            CutError: the response broke off.
            ProtocolError: the rest of the request's body is malformed.
        """
        try:
            if not self.started and self.failure is None:
                self.start()
            if self.failure is None and not self.is_sent and not self.head_came:
                # Imported here: many proxies see no large body in all their life.
                from meshlocal.proxy.http.pump import respond_streaming

                await respond_streaming(self)
            else:
                await self.respond()
        except AttemptTimeoutError:
            self.failure = Failure.BROKEN if self.flow.any_byte else Failure.TIMEOUT
        finally:
            self.release(trio.current_time())
        return self.failure

    async def respond(self) -> None:
        """Pass the response on, until its end or a failure."""
        connection, flow = self.connection, self.flow
        chunks = 0
        if self.out:
            out, self.out = self.out, b""
            await connection.send(out)
        while not (flow.complete or self.needs_task):
            data = await self._receive()
            out = self.take(data) if data else self.end()
            if out:
                await connection.send(out)
            # A short read most likely emptied the connection: waiting at once spares a read that would say so.
            self._wait_first = len(data) < CHUNK
            chunks += 1
            if chunks >= TURN:
                chunks = 0
                await checkpoint()
        if flow.complete and not self._wait_first:
            self.upstream.look_behind()
        if self._switch is not None:
            await self._tunnel(self._switch)
        elif self.failure is None:
            self.complete()

    async def _tunnel(self, head: ResponseHead) -> None:
        exchange = self.exchange
        # Imported here: few requests ask for it.
        from meshlocal.proxy.http.tunnel import run_tunnel

        if exchange.pick is not None:
            self.service.state.fitness.worked(exchange.pick.instance, self.began)
        self.connection.begun = True
        exchange.status = 101
        exchange.outcome = Outcome.CUT
        first = client_head(head, Framing.NONE, extra=told(exchange)) + bytes(self.flow.rest)
        self.flow.complete = await run_tunnel(exchange, self.service.state, self.sock, first)

    async def _receive(self) -> bytes:
        """Wait for bytes from the instance; empty at its end, or a reset.

        Raises:
            ClientLeftError: the client reset its connection meanwhile.
            AttemptTimeoutError: nothing came in time.
        """
        sock = self.sock
        wait = self._wait_first
        while True:
            if wait:
                if self.scope is not None:
                    if self.head_came:
                        self.connection.await_transfer()
                    await wait_readable(sock)
                else:
                    await self._wait()
            try:
                return sock.recv(CHUNK)
            except BlockingIOError:
                wait = True
            except OSError:
                self.reset = True
                return b""

    async def _wait(self) -> None:
        if self.impatient:
            await self._wait_watching()
            return
        patience = self.connection.forwarder.patience
        patience.add(self, trio.current_time() if self.head_came else self.exchange.started)
        try:
            await wait_readable(self.sock)
        except trio.ClosedResourceError:
            if not self.impatient:
                raise
            await self._wait_watching()
        finally:
            patience.waiting.pop(self, None)

    def on_slow(self) -> None:
        """See `Waiter.on_slow`."""
        self.impatient = True
        notify_closing(self.sock)

    def on_deadline(self) -> None:
        """See `Waiter.on_deadline`: it asks for no time."""

    async def _wait_watching(self) -> None:
        self.impatient = False
        connection = self.connection
        if self.head_came:
            connection.await_transfer()
        with trio.CancelScope(deadline=self.deadline) as scope:
            await connection.watched(partial(wait_readable, self.sock))
        if connection.left:
            raise ClientLeftError
        if scope.cancelled_caught:
            raise AttemptTimeoutError
        connection.deadline = math.inf
