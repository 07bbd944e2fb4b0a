"""A request's body that streams to an instance while that may answer already.

Two tasks: one sends the body, the other looks for the response and passes it on. When the body has ended, the first one
watches the client. The instance's time runs only while it is its turn: not while the client is waited for (A1).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import wait_writable

from meshlocal.proxy.http.ends import AttemptTimeoutError, ClientLeftError, CutError
from meshlocal.wire.http1.errors import ProtocolError

if TYPE_CHECKING:
    from meshlocal.proxy.http.attempt import Attempt


async def respond_streaming(attempt: Attempt) -> None:
    """Send what is left of the request, and pass the response on meanwhile.

    Raises:
        ClientLeftError: the client reset its connection.
        CutError: the response broke off.
        AttemptTimeoutError: no head came in time.
        ProtocolError: the rest of the request's body is malformed.
    """
    body = attempt.exchange.body
    attempt.streaming = body is not None and not body.finished
    # A client that has begun with its body does not wait to be asked for it.
    attempt.expecting = attempt.streaming and attempt.exchange.head.expect_continue and not (body and body.size)
    raised: Exception | None = None
    responded = False
    pump = _Pump(attempt)
    with trio.CancelScope(deadline=attempt.deadline) as attempt.scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run, nursery.cancel_scope)
            try:
                await attempt.respond()
                responded = True
            except (ClientLeftError, CutError) as error:
                raised = error
            nursery.cancel_scope.cancel()
    attempt.scope = None
    if responded:
        return
    if raised is None:
        raised = pump.raised or AttemptTimeoutError()
    raise raised


class _Pump:
    """The task that sends.

    Attributes:
        raised: why it cancelled the other task.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self.raised: Exception | None = None

    async def run(self, responding: trio.CancelScope) -> None:
        attempt = self._attempt
        connection = attempt.connection
        try:
            await self._send_all()
            if attempt.exchange.head.upgrade:
                # Whatever the client says next may be for the other protocol already.
                return
            await connection.watch(responding)
            if connection.left:
                self.raised = ClientLeftError()
        except _UpstreamError:
            # It may have answered before it closed: whoever waits for that finds out.
            return
        except ClientLeftError as error:
            self.raised = error
            responding.cancel()
        except ProtocolError as error:
            # What the instance says already is worth more than what is wrong with the rest.
            if not connection.begun:
                self.raised = error
                responding.cancel()

    async def _send_all(self) -> None:
        attempt = self._attempt
        exchange, body = attempt.exchange, attempt.exchange.body
        if attempt.unsent:
            await self._send(attempt.unsent)
            attempt.unsent = b""
        while body is not None and not body.finished:
            if not attempt.expecting:
                self._restart_clock(math.inf)
            piece = await exchange.read_body()
            attempt.expecting = False
            self._restart_clock(self._limit())
            if piece:
                await self._send(piece)
        attempt.streaming = False

    def _limit(self) -> float:
        policy = self._attempt.service.state.policy
        limit = policy.response_deadline
        return limit if policy.attempt_timeout is None else min(limit, policy.attempt_timeout)

    def _restart_clock(self, limit: float) -> None:
        attempt = self._attempt
        if attempt.scope is not None and not attempt.head_came:
            now = trio.current_time()
            attempt.scope.deadline = now + limit
            attempt.exchange.deadline = now + attempt.service.state.policy.response_deadline

    async def _send(self, data: bytes) -> None:
        """Send bytes to the instance.

        Raises:
            _UpstreamError: the connection is dead.
        """
        sock = self._attempt.sock
        rest = memoryview(data)
        try:
            while True:
                try:
                    sent = sock.send(rest)
                except BlockingIOError:
                    sent = 0
                if sent:
                    self._attempt.sent = True
                    rest = rest[sent:]
                    if not rest:
                        return
                await wait_writable(sock)
        except OSError:
            raise _UpstreamError from None


class _UpstreamError(Exception):
    """The connection to the instance takes nothing more."""
