"""One request on one connection to one instance, until its response has ended.

A request that is whole, sent and answered without a wait that matters takes neither a nursery nor a cancel scope. What
streams has both: one task sends the body while the other looks for a response, which may well come before the body's
end, and once the body has ended the first one watches the client.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import checkpoint, notify_closing, wait_readable, wait_writable

from meshlocal.client.statistics import Outcome
from meshlocal.net.sockets import abort, close
from meshlocal.policy.retry import Failure
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
    """

    __slots__ = (
        "_body_error",
        "_connection",
        "_deadline",
        "_exchange",
        "_expecting",
        "_flow",
        "_head_came",
        "_impatient",
        "_pumping",
        "_reading",
        "_reset",
        "_scope",
        "_service",
        "_sock",
        "_upstream",
        "_wait_first",
        "sent",
    )

    def __init__(self, exchange: Exchange, service: HttpService, upstream: Upstream) -> None:
        self._exchange = exchange
        self._connection = exchange.connection
        self._service = service
        self._upstream = upstream
        self._sock = upstream.sock
        self._flow = ResponseFlow(exchange.head.method, exchange.connection.forwarder.settings.limits)
        self._deadline = exchange.deadline
        self._scope: trio.CancelScope | None = None
        self._body_error: ProtocolError | None = None
        self._head_came = False
        self._impatient = False
        self._pumping = False
        self._reading = False
        self._reset = False
        self._expecting = False
        self._wait_first = True
        self.sent = False

    async def run(self) -> Failure | None:
        """Send the request, and pass the response on.

        Returns:
            How it failed; None if the response went to the client, and the exchange's `end` tells the rest.

        Raises:
            ClientLeftError: the client reset its connection.
            CutError: the response broke off.
            ProtocolError: the rest of the request's body is malformed.
        """
        whole = False
        try:
            failure = await self._run()
            whole = failure is None
            return failure
        except AttemptTimeoutError:
            return Failure.BROKEN if self._flow.any_byte else Failure.TIMEOUT
        finally:
            self._release(whole)

    def _release(self, whole: bool) -> None:
        upstream, flow = self._upstream, self._flow
        body = self._exchange.body
        if flow.reusable and (body is None or body.finished) and not self._reset and not self._pumping:
            config = self._connection.forwarder.settings.config
            self._service.pool.put(upstream, trio.current_time(), config.pool_size)
        elif whole and flow.complete:
            close(upstream.sock)
        else:
            abort(upstream.sock)

    async def _run(self) -> Failure | None:
        exchange = self._exchange
        payload = exchange.payload()
        try:
            sent = self._sock.send(payload)
        except BlockingIOError:
            sent = 0
        except OSError:
            return Failure.STALE if self._upstream.used else Failure.NO_RESPONSE
        self.sent = sent > 0
        timeout = self._service.state.policy.attempt_timeout
        if timeout is not None:
            self._deadline = min(self._deadline, trio.current_time() + timeout)
        body = exchange.body
        if sent == len(payload) and (body is None or body.finished):
            return await self._respond()
        return await self._respond_pumping(payload[sent:])

    # The response.

    async def _respond(self) -> Failure | None:
        exchange, connection, flow = self._exchange, self._connection, self._flow
        try:
            head = await self._receive_head()
        except ProtocolError as error:
            exchange.problem = error
            return Failure.BROKEN
        if head is None:
            if flow.any_byte:
                return Failure.BROKEN
            return Failure.STALE if self._upstream.used else Failure.NO_RESPONSE
        self._head_came = True
        status = head.status
        if status == 101:
            return await self._switch(head)
        if status in self._service.state.policy.retry_on and exchange.retries_answer(self._service, self.sent):
            return Failure.STATUS
        request = exchange.head
        http10 = request.minor == 0
        unsent = exchange.body is not None and (self._pumping or not exchange.body.finished)
        close_client = (
            not request.keep_alive or connection.forwarder.draining or unsent or flow.closes_client(head, http10=http10)
        )
        settings = connection.forwarder.settings
        extra = settings.via + exchange.told() if settings.config.response_headers else settings.via
        try:
            out = flow.begin(head, http10=http10, close=close_client, extra=extra, announce=http10 and not close_client)
        except ProtocolError as error:
            exchange.problem = error
            return Failure.BROKEN
        if self._scope is not None:
            self._scope.deadline = math.inf
        self._deadline = math.inf
        exchange.status = status
        exchange.outcome = Outcome.CUT
        connection.begun = True
        await connection.send(out)
        if not flow.complete:
            await self._pass_on()
        exchange.received += flow.size
        exchange.outcome = Outcome.SERVED
        if not close_client:
            exchange.end = End.KEEP
        elif unsent or connection.early:
            exchange.end = End.LINGER
        else:
            exchange.end = End.CLOSE
        return None

    async def _receive_head(self) -> ResponseHead | None:
        """The final head, or that of a switch of protocols; None if the connection ended before it."""
        flow, connection = self._flow, self._connection
        while True:
            data = await self._receive()
            if not data:
                return None
            head = flow.receive(data)
            while head is not None:
                if head.status >= 200 or head.status == 101:
                    return head
                if self._expecting:
                    # It asked for the body: from here on the client is waited for.
                    self._expecting = False
                    if self._reading and self._scope is not None:
                        self._scope.deadline = math.inf
                if self._exchange.head.minor == 1:
                    await connection.send(client_head(head, Framing.NONE))
                head = flow.receive(b"")

    async def _pass_on(self) -> None:
        """The rest of the body."""
        flow, connection = self._flow, self._connection
        chunks = 0
        while not flow.complete:
            data = await self._receive()
            if not data:
                rest = None if self._reset else flow.end()
                if rest is None:
                    raise CutError
                out = rest
            else:
                try:
                    out = flow.body(data)
                except ProtocolError as error:
                    self._exchange.problem = error
                    raise CutError from None
            if out:
                await connection.send(out)
            # A short read most likely emptied the connection: waiting at once spares a read that would say so.
            self._wait_first = len(data) < CHUNK
            chunks += 1
            if chunks >= TURN:
                chunks = 0
                await checkpoint()

    async def _switch(self, head: ResponseHead) -> Failure | None:
        """The instance switches to another protocol: from here on this is a tunnel (RFC 9110, 7.8)."""
        exchange = self._exchange
        if not exchange.head.upgrade or self._pumping:
            exchange.problem = ProtocolError(502, "bad_upgrade", "a switch of protocols that nobody asked for")
            return Failure.BROKEN
        # Imported here: few requests ask for it.
        from meshlocal.proxy.http.tunnel import run_tunnel

        self._connection.begun = True
        exchange.status = 101
        exchange.outcome = Outcome.CUT
        first = client_head(head, Framing.NONE, extra=exchange.told()) + bytes(self._flow.rest)
        self._flow.complete = await run_tunnel(exchange, self._service.state, self._sock, first)
        return None

    # Waiting for the instance.

    async def _receive(self) -> bytes:
        """Wait for bytes from the instance; empty at its end, or a reset.

        Raises:
            ClientLeftError: the client reset its connection meanwhile.
            AttemptTimeoutError: nothing came in time.
        """
        sock = self._sock
        wait = self._wait_first
        while True:
            if wait:
                if self._scope is not None:
                    await wait_readable(sock)
                else:
                    await self._wait()
            try:
                return sock.recv(CHUNK)
            except BlockingIOError:
                wait = True
            except OSError:
                self._reset = True
                return b""

    async def _wait(self) -> None:
        patience = self._connection.forwarder.patience
        patience.add(self, trio.current_time() if self._head_came else self._exchange.started)
        try:
            await wait_readable(self._sock)
        except trio.ClosedResourceError:
            if not self._impatient:
                raise
            await self._wait_watching()
        finally:
            patience.waiting.pop(self, None)
        self._impatient = False

    def lose_patience(self) -> None:
        """See `Waiter.lose_patience`."""
        self._impatient = True
        notify_closing(self._sock)

    async def _wait_watching(self) -> None:
        connection = self._connection
        if self._head_came:
            connection.await_transfer()
        with trio.CancelScope(deadline=self._deadline) as scope:
            await connection.watched(partial(wait_readable, self._sock))
        if connection.left:
            raise ClientLeftError
        if scope.cancelled_caught:
            raise AttemptTimeoutError
        connection.deadline = math.inf

    # The request's body.

    async def _respond_pumping(self, rest: bytes) -> Failure | None:
        """Send what is left of the request, and look for a response meanwhile."""
        exchange, connection = self._exchange, self._connection
        self._pumping = True
        self._expecting = exchange.head.expect_continue
        failure: Failure | None = Failure.TIMEOUT
        raised: Exception | None = None
        with trio.CancelScope(deadline=self._deadline) as self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, rest, nursery.cancel_scope)
                try:
                    failure = await self._respond()
                except (ClientLeftError, CutError) as error:
                    raised = error
                nursery.cancel_scope.cancel()
        if raised is not None:
            raise raised
        if failure is not Failure.TIMEOUT:
            return failure
        if connection.left:
            raise ClientLeftError
        if self._body_error is not None:
            raise self._body_error
        raise AttemptTimeoutError

    async def _pump(self, rest: bytes, responding: trio.CancelScope) -> None:
        exchange, connection = self._exchange, self._connection
        try:
            if rest:
                await self._send(rest)
            body = exchange.body
            while body is not None and not body.finished:
                self._reading = True
                if not self._expecting:
                    self._restart_clock(math.inf)
                piece = await exchange.read_body()
                self._reading = self._expecting = False
                self._restart_clock(self._limit())
                if piece:
                    await self._send(piece)
            self._pumping = False
            if not exchange.head.upgrade:
                await connection.watch(responding)
        except _UpstreamError:
            # It may have answered before it closed: whoever waits for that finds out.
            return
        except ClientLeftError:
            connection.left = True
            responding.cancel()
        except ProtocolError as error:
            if not connection.begun:
                self._body_error = error
                responding.cancel()

    def _limit(self) -> float:
        policy = self._service.state.policy
        limit = policy.response_deadline
        return limit if policy.attempt_timeout is None else min(limit, policy.attempt_timeout)

    def _restart_clock(self, limit: float) -> None:
        """The instance has this many seconds from now on: as long as a body moves, its time does not run (A1)."""
        if self._scope is not None and not self._head_came:
            now = trio.current_time()
            self._scope.deadline = now + limit
            self._exchange.deadline = now + self._service.state.policy.response_deadline

    async def _send(self, data: bytes) -> None:
        """Send bytes to the instance.

        Raises:
            _UpstreamError: the connection is dead.
        """
        sock = self._sock
        rest = memoryview(data)
        try:
            while True:
                try:
                    sent = sock.send(rest)
                except BlockingIOError:
                    sent = 0
                if sent:
                    self.sent = True
                    rest = rest[sent:]
                    if not rest:
                        return
                await wait_writable(sock)
        except OSError:
            raise _UpstreamError from None


class _UpstreamError(Exception):
    """The connection to the instance takes nothing more."""
