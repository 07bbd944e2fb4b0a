"""How a task drives a request on a connection to an instance, whose body may stream while that answers already.

Two tasks: one sends the body, the other looks for the response and passes it on. When the body has ended, the first one
watches the client. The instance's time runs only while it is its turn: not while the client is waited for (A1).
"""

from __future__ import annotations

import math

import trio

from meshlocal.policy.retry import Failure
from meshlocal.proxy.http.ends import AttemptTimeoutError, ClientLeftError, CutError
from meshlocal.proxy.http.h1.upstream import H1Upstream
from meshlocal.wire.http1.errors import ProtocolError


async def drive(upstream: H1Upstream) -> Failure | None:
    """Send a request, and pass its response on, from the start or from wherever the lane left it.

    Returns:
        How it failed; None if the response went to the client.

    Raises:
        ClientLeftError: the client reset its connection.
        CutError: the response broke off.
        ProtocolError: the rest of the request's body is malformed.
    """
    try:
        if not upstream.started and upstream.failure is None:
            upstream.start(trio.current_time())
        if upstream.failure is None and not upstream.is_sent and not upstream.head_came:
            await respond_streaming(upstream)
        else:
            await upstream.respond()
    except AttemptTimeoutError:
        upstream.failure = Failure.BROKEN if upstream.flow.any_byte else Failure.TIMEOUT
    finally:
        upstream.release(trio.current_time())
    return upstream.failure


async def respond_streaming(upstream: H1Upstream) -> None:
    """Send what is left of the request, and pass the response on meanwhile.

    Raises:
        ClientLeftError: the client reset its connection.
        CutError: the response broke off.
        AttemptTimeoutError: no head came in time.
        ProtocolError: the rest of the request's body is malformed.
    """
    body = upstream.request.body
    upstream.streaming = body is not None and not body.finished
    # A client that has begun with its body does not wait to be asked for it.
    upstream.expecting = upstream.streaming and upstream.request.head.expect_continue and not (body and body.size)
    raised: Exception | None = None
    responded = False
    pump = _Pump(upstream)
    with trio.CancelScope(deadline=upstream.deadline) as upstream.scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run, nursery.cancel_scope)
            try:
                await upstream.respond()
                responded = True
            except (ClientLeftError, CutError) as error:
                raised = error
            nursery.cancel_scope.cancel()
    upstream.scope = None
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

    def __init__(self, upstream: H1Upstream) -> None:
        self._upstream = upstream
        self.raised: Exception | None = None

    async def run(self, responding: trio.CancelScope) -> None:
        upstream = self._upstream
        client = upstream.client
        try:
            await self._send_all()
            if upstream.request.head.upgrade:
                # Whatever the client says next may be for the other protocol already.
                return
            await client.watch(responding)
            if client.left:
                self.raised = ClientLeftError()
        except _UpstreamError:
            # It may have answered before it closed: whoever waits for that finds out.
            return
        except ClientLeftError as error:
            self.raised = error
            responding.cancel()
        except ProtocolError as error:
            # What the instance says already is worth more than what is wrong with the rest.
            if not upstream.request.response_begun:
                self.raised = error
                responding.cancel()

    async def _send_all(self) -> None:
        upstream = self._upstream
        request, body = upstream.request, upstream.request.body
        if upstream.unsent:
            await self._send(upstream.unsent)
            upstream.unsent = b""
        while body is not None and not body.finished:
            if not upstream.expecting:
                self._restart_clock(math.inf)
            piece = await request.read_body()
            upstream.expecting = False
            self._restart_clock(self._limit())
            if piece:
                await self._send(piece)
        upstream.streaming = False

    def _limit(self) -> float:
        policy = self._upstream.service.state.policy
        limit = policy.response_deadline
        return limit if policy.attempt_timeout is None else min(limit, policy.attempt_timeout)

    def _restart_clock(self, limit: float) -> None:
        upstream = self._upstream
        if upstream.scope is not None and not upstream.head_came:
            now = trio.current_time()
            upstream.scope.deadline = now + limit
            upstream.request.deadline = now + upstream.service.state.policy.response_deadline

    async def _send(self, data: bytes) -> None:
        """Send bytes to the instance.

        Raises:
            _UpstreamError: the connection is dead.
        """
        pipe = self._upstream.pipe
        rest = memoryview(data)
        try:
            while True:
                sent = pipe.write(rest)
                if sent:
                    self._upstream.sent = True
                    rest = rest[sent:]
                    if not rest:
                        return
                await pipe.wait_writable()
        except OSError:
            raise _UpstreamError from None


class _UpstreamError(Exception):
    """The connection to the instance takes nothing more."""
