"""The fast lane: plain requests, served in the place where Trio would sleep.

Theory of operation. Most requests are a head and perhaps a short body, for an instance that has a connection waiting
and answers at once. To wait for their bytes in a task would cost more than all the rest. So while a connection is idle
its task sleeps in `Lane.wait`, and its sockets are served by the relay's loop (`meshlocal.net.relay_loop`):

    on_client    bytes from the client: a request begins, and is sent
    on_upstream  bytes from the instance: they are passed on; at the response's end the connection is idle again

Requests, and responses that came in one piece, are sent at the end of the loop's turn (`RelayLoop.at_end`).

A request is kept as a `Quick` for as long as nothing about it is unusual, and is an `Exchange` with its `Attempt` from
then on. At the first thing that is not plain at all the task takes over, at whatever point that is: what came of a
head, a request that was begun, an attempt that was sent, a response half passed on, or that did not come in time. So
the lane has no rules of its own; what it calls is what the task would call, in the same order, and it knows nothing of
retries, refusals or deadlines.
"""

from __future__ import annotations

import math
import select
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import Abort, checkpoint, current_task, wait_task_rescheduled

from meshlocal.client.statistics import Outcome
from meshlocal.net.sockets import abort
from meshlocal.policy.limits import Limit
from meshlocal.policy.retry import Failure
from meshlocal.proxy.http.answers import TOO_MANY_REQUESTS
from meshlocal.proxy.http.attempt import CHUNK, Attempt
from meshlocal.proxy.http.ends import ClientLeftError, End, Expiry
from meshlocal.proxy.http.exchange import Exchange
from meshlocal.proxy.http.quick import Quick, is_usual
from meshlocal.proxy.http.waiting import Reminder
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.messages import RequestBody
from meshlocal.wire.http1.request import RequestHead

if TYPE_CHECKING:
    from meshlocal.net.relay_loop import RelayLoop
    from meshlocal.proxy.http.connection import ClientConnection
    from meshlocal.proxy.http.service import HttpService

TURN = 4
"""Full chunks that the lane passes on in a row; a response that has more of them goes to its task."""

_ENDING = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_DEAD = select.EPOLLHUP | select.EPOLLERR


class Lane:
    """One client's connection in the loop.

    Attributes:
        task: sleeps until there is something for it.
        received: for the task: what came of a request that it has to begin itself; empty: nothing.
        exchange: for the task: the request that was begun.
        attempt: the one that was sent for it.
        raised: what that met.
        end: for the task: what becomes of the connection; None if it goes on.
    """

    __slots__ = (
        "_connection",
        "_fd",
        "_handed_over",
        "_loop",
        "_more",
        "_quick",
        "_registered",
        "_reminder",
        "_sent_in",
        "attempt",
        "end",
        "exchange",
        "raised",
        "received",
        "task",
    )

    def __init__(self, connection: ClientConnection, loop: RelayLoop) -> None:
        self._connection = connection
        self._loop = loop
        self._fd = connection.socket.fileno()
        self._registered = False
        self._more = False
        self._handed_over = False
        self._sent_in = 0
        self._reminder: Reminder | None = None
        self._quick: Quick | None = None
        self.task: trio.lowlevel.Task | None = None
        self.exchange: Exchange | None = None
        self.attempt: Attempt | None = None
        self.raised: Exception | None = None
        self.end: End | None = None

    async def wait(self) -> None:
        """Serve requests until there is something for the task. Nothing may have been received that is not served."""
        self.exchange = self.attempt = self.raised = self.end = None
        loop = self._loop
        if not self._registered:
            loop.watch(self._connection.socket)
            self._registered = True
        loop.handlers[self._fd] = self.on_client
        self._handed_over = False
        try:
            # What came while nobody listened makes no event, nor does an end behind it.
            self._read_client(more=True)
            if self._handed_over:
                await checkpoint()
            else:
                self.task = current_task()
                await wait_task_rescheduled(self._abandon)
        except BaseException:
            self._give_up()
            raise

    def _abandon(self, _: object) -> Abort:
        self.task = None
        # Before the task is told: a request that came meanwhile would be forwarded, and its client cut.
        self._loop.handlers.pop(self._fd, None)
        return Abort.SUCCEEDED

    def _give_up(self) -> None:
        """The task was cancelled."""
        if self._quick is not None:
            self._unfold(self._quick)
        self._leave()
        if self.exchange is not None:
            now = trio.current_time()
            self._connection.exchange = None
            self.exchange.outcome = Outcome.DRAINED
            self.exchange.abandon(self.attempt, now)
            self.exchange.finish(now)

    def _leave(self) -> None:
        handlers = self._loop.handlers
        handlers.pop(self._fd, None)
        self._call_off()
        if self.attempt is not None:
            handlers.pop(self.attempt.upstream.number, None)
            self._connection.forwarder.patience.waiting.pop(self, None)

    def _unfold(self, quick: Quick) -> Attempt | None:
        connection = self._connection
        self._quick = None
        connection.begun = False
        self.exchange, self.attempt = quick.unfold()
        connection.exchange = self.exchange
        if self.attempt is not None:
            self._loop.handlers[self.attempt.upstream.number] = self.on_upstream
        return self.attempt

    def _hand_over(self) -> None:
        if self._quick is not None:
            self._unfold(self._quick)
        self._leave()
        self._handed_over = True
        if self.task is not None:
            self._loop.finish(self)

    def on_slow(self) -> None:
        """See `Waiter.on_slow`.

        A client that leaves makes an event here too, so that all that is wanted is to be told when the instance's time
        is over. Once its head came it has the connection's time, which is swept with all others'.
        """
        attempt = self.attempt if self._quick is None else self._unfold(self._quick)
        if attempt is None:
            return
        if attempt.head_came:
            self._connection.await_transfer()
        else:
            self._reminder = self._connection.forwarder.patience.ask(attempt.deadline, self)

    def on_deadline(self) -> None:
        """See `Waiter.on_deadline`."""
        self._reminder = None
        if self.attempt is not None and not self.attempt.head_came and not self._handed_over:
            self._give_to_task()

    def _call_off(self) -> None:
        """Nobody need be reminded of the request's time."""
        if self._reminder is not None:
            self._reminder.call_off()
            self._reminder = None

    def _give_to_task(self) -> None:
        """The task is to go on, with a watch on the client and the clock."""
        if self._quick is not None:
            self._unfold(self._quick)
        if self.attempt is not None:
            self.attempt.impatient = True
        self._hand_over()

    # The client.

    def on_client(self, mask: int) -> None:
        """The client's socket has an event."""
        if self.exchange is None and self._quick is None:
            # An end that came with the request makes no event of its own.
            self._read_client(more=bool(mask & _ENDING))
            return
        # It sends its next request, or ended its stream, before the response: that has its turn. But a reset ends all.
        self._more = True
        if mask & _DEAD:
            self._give_to_task()

    def _read_client(self, *, more: bool) -> None:
        """Read, and begin with what came; `more`: there may be something behind it."""
        self._more = more
        try:
            received = self._connection.socket.recv(CHUNK)
        except BlockingIOError:
            self._more = False
            return
        except OSError:
            self.end = End.ABORT
            self._hand_over()
            return
        if not received:
            self.end = End.CLOSE
            self._hand_over()
            return
        if len(received) == CHUNK:
            # What is behind a read that was full makes no event of its own.
            self._more = True
        try:
            begun = self._begin(received)
        except Exception as error:  # noqa: BLE001 - the loop is no place to raise; the task does
            self.raised = error
            begun = False
        if not begun:
            if self.exchange is None and self._quick is None:
                # It stands there for the task, and for who looks for connections that wait for nothing.
                self._connection.early += received
            self._hand_over()

    def _begin(self, received: bytes) -> bool:
        """Begin with a request and send it; False if a task has to go on with it, or to begin."""
        connection = self._connection
        forwarder = connection.forwarder
        end = received.find(b"\r\n\r\n") + 4
        heads = forwarder.settings.heads
        if end < 4 or end > heads.limits.head or forwarder.draining:
            return False
        try:
            head = heads.request(received if end == len(received) else received[:end])
        except ProtocolError:
            return False
        if not _is_plain(head, len(received) - end):
            return False
        now = self._loop.time()
        service = forwarder.find_known(connection.service, head, now)
        if service is None:
            return False
        body: RequestBody | None = None
        if end < len(received):
            policy, config = service.state.policy, forwarder.settings.config
            if len(received) - end > policy.replay_buffer or (
                config.max_body is not None and len(received) - end > config.max_body
            ):
                return False
            body = RequestBody(head, limit=None, hold=policy.replay_buffer)
            body.feed(received[end:])
        connection.deadline = math.inf
        if body is None and is_usual(connection, head, service):
            return self._begin_quick(head, service, now)
        connection.begun = False
        exchange = self.exchange = connection.exchange = Exchange(connection, head, now, body)
        connection.fresh = False
        if not exchange.begin_with(service):
            return False
        attempt = self.attempt = exchange.first_attempt()
        if attempt is None:
            return False
        self._loop.handlers[attempt.upstream.number] = self.on_upstream
        forwarder.patience.add(self, now)
        self._loop.at_end(self._send_request)
        return True

    def _begin_quick(self, head: RequestHead, service: HttpService, now: float) -> bool:
        connection = self._connection
        connection.fresh = False
        # It is not idle.
        connection.expiry = Expiry.TRANSFER
        if not service.state.circuit.enter(Limit.REQUESTS):
            exchange = self.exchange = connection.exchange = Exchange(connection, head, now)
            exchange.refusal = TOO_MANY_REQUESTS
            connection.begun = False
            return False
        quick = self._quick = Quick(connection, head, service, now)
        upstream = quick.upstream
        if upstream is None:
            return False
        self._loop.handlers[upstream.number] = self.on_answer
        self._loop.at_end(self._send_quick)
        return True

    def _send_quick(self) -> None:
        quick = self._quick
        if quick is None or quick.upstream is None:
            return
        self._connection.forwarder.patience.add(self, self._loop.time())
        try:
            payload = quick.payload()
            try:
                sent = quick.upstream.sock.send(payload)
            except BlockingIOError:
                sent = 0
            if sent == len(payload):
                quick.sent = True
                self._sent_in = self._loop.turns
                return
            attempt = self._unfold(quick)
            assert attempt is not None
            if sent:
                attempt.resume()
                attempt.unsent = payload[sent:]
        except OSError:
            attempt = self._unfold(quick)
            assert attempt is not None
            attempt.failure = Failure.STALE
        except Exception as error:  # noqa: BLE001 - the loop is no place to raise; the task does
            self.raised = error
        self._hand_over()

    def _send_request(self) -> None:
        attempt = self.attempt
        if self._handed_over or attempt is None:
            return
        try:
            if not (attempt.exchange.idempotent or attempt.upstream.is_silent()):
                # What is to be sent on it could not be sent again (A4).
                attempt.failure = Failure.STALE
            else:
                attempt.start()
                self._sent_in = self._loop.turns
        except Exception as error:  # noqa: BLE001 - the loop is no place to raise; the task does
            self.raised = error
            self._hand_over()
            return
        if attempt.failure is not None or attempt.unsent:
            self._hand_over()

    # The instance.

    def on_answer(self, mask: int) -> None:
        """The socket of the instance that a `Quick` was sent to has an event."""
        quick = self._quick
        if quick is None or quick.upstream is None or not quick.sent or self._sent_in == self._loop.turns:
            if quick is not None:
                self._unfold(quick)
            self.on_upstream(mask)
            return
        failed = False
        try:
            data = quick.upstream.sock.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data, failed = b"", True
        try:
            if data and quick.answer(data):
                if mask & _ENDING:
                    quick.upstream.ending = True
                elif len(data) == CHUNK:
                    quick.upstream.look_behind()
                self._loop.at_end(self._send_answer)
                return
            attempt = self._unfold(quick)
            assert attempt is not None
            attempt.reset = failed
            self._pass_on(mask, data)
        except Exception as error:  # noqa: BLE001 - the loop is no place to raise; the task does
            self.raised = error
            self._hand_over()

    def _send_answer(self) -> None:
        quick = self._quick
        if quick is None:
            return
        out = quick.out
        try:
            sent = self._connection.socket.send(out)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.raised = ClientLeftError()
            self._hand_over()
            return
        if sent < len(out):
            attempt = self._unfold(quick)
            assert attempt is not None
            attempt.out = out[sent:]
            self._hand_over()
            return
        now = self._loop.time()
        connection = self._connection
        connection.forwarder.patience.waiting.pop(self, None)
        self._quick = None
        try:
            quick.finish(now)
        except Exception as error:  # noqa: BLE001 - the loop is no place to raise; the task does
            if quick.upstream is not None and quick.upstream.pool is None:
                abort(quick.upstream.sock)
            self.raised = error
            self._hand_over()
            return
        connection.await_request(now)
        if self._more:
            self._read_client(more=True)

    def on_upstream(self, mask: int) -> None:
        """The instance's socket has an event."""
        attempt = self.attempt
        if attempt is not None and (not attempt.started or self._sent_in == self._loop.turns):
            # Its end, or what nobody asked for, before the request was sent: not the connection to send it on. The
            # events of a turn are older than all that is sent in it.
            attempt.failure = Failure.STALE
            self._hand_over()
            return
        try:
            self._pass_on(mask)
        except Exception as error:  # noqa: BLE001 - the loop is no place to raise; the task does
            self.raised = error
            self._hand_over()

    def _pass_on(self, mask: int, data: bytes | None = None) -> None:
        """Read what came, unless it is `data`, and pass it on."""
        attempt, client = self.attempt, self._connection.socket
        assert attempt is not None
        sock, flow = attempt.sock, attempt.flow
        for _ in range(TURN):
            try:
                if data is None:
                    data = sock.recv(CHUNK)
            except BlockingIOError:
                return
            except OSError:
                attempt.reset = True
                data = b""
            out = attempt.take(data) if data else attempt.end()
            if flow.complete and not attempt.needs_task:
                if mask & _ENDING:
                    attempt.upstream.ending = True
                elif len(data) == CHUNK:
                    attempt.upstream.look_behind()
                attempt.out = out
                self._loop.at_end(self._send_rest)
                return
            if out:
                try:
                    sent = client.send(out)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    raise ClientLeftError from None
                if sent < len(out):
                    attempt.out = out[sent:]
                    break
            if attempt.needs_task:
                break
            if mask & _ENDING:
                attempt.upstream.ending = True
            if len(data) < CHUNK and not mask & _ENDING:
                # Behind a short read there is nothing, and more makes another event (epoll(7), Q9).
                if attempt.head_came and (
                    self._connection.deadline != math.inf or self not in self._connection.forwarder.patience.waiting
                ):
                    # It is looked at by the sweep only, from here on or already.
                    self._connection.await_transfer()
                return
            data = None
        self._hand_over()

    def _send_rest(self) -> None:
        """Send what completes the response."""
        attempt = self.attempt
        if self._handed_over or attempt is None:
            return
        out = attempt.out
        try:
            sent = self._connection.socket.send(out) if out else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self.raised = ClientLeftError()
            self._hand_over()
            return
        if sent < len(out):
            attempt.out = out[sent:]
            self._hand_over()
            return
        attempt.out = b""
        try:
            self._complete()
        except Exception as error:  # noqa: BLE001 - the loop is no place to raise; the task does
            self.raised = error
            self._hand_over()

    def _complete(self) -> None:
        """The response went to the client: be ready for the next request."""
        connection, exchange, attempt = self._connection, self.exchange, self.attempt
        assert exchange is not None
        assert attempt is not None
        now = self._loop.time()
        connection.forwarder.patience.waiting.pop(self, None)
        self._call_off()
        self.exchange = self.attempt = connection.exchange = None
        attempt.complete()
        # The pool, or who closes it, takes the handler's place.
        attempt.release(now, watched=True)
        exchange.answered()
        exchange.finish(now)
        if exchange.end is not End.KEEP:
            self.end = exchange.end
            self._hand_over()
            return
        connection.await_request(now)
        if self._more:
            self._read_client(more=True)


def _is_plain(head: RequestHead, behind: int) -> bool:
    """Whether a request is all there, with `behind` bytes behind its head, and nothing about it wants a task."""
    return (
        not (head.chunked or head.expect_continue or head.upgrade or (head.content_length or 0) != behind)
        and head.method != b"CONNECT"
    )
