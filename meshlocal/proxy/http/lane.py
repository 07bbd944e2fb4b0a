"""The fast lane: plain requests, served in the place where Trio would sleep.

Theory of operation. Most requests are a head and perhaps a short body, for an instance that has a connection waiting
and answers at once. To wait for their bytes in a task would cost more than all the rest. So while a connection is idle
its task sleeps in `Lane.wait`, and its sockets are served by the relay's loop (`meshlocal.net.relay_loop`):

    on_client    bytes from the client: a request begins, and is sent
    on_upstream  bytes from the instance: they are passed on; at the response's end the connection is idle again

Requests, and responses that came in one piece, are sent at the end of the loop's turn (`RelayLoop.at_end`).

The lane decides nothing. It calls what a task would call (`HttpRequest`, `H1Upstream`, `HttpService`), in the same
order. At the first thing that is not plain the task takes over, at whatever point that is: what came of a head, a
request that was begun, an attempt that was sent, a response half passed on, or that did not come in time. Of retries,
refusals and deadlines the lane knows nothing.
"""

from __future__ import annotations

import math
import select
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import Abort, checkpoint, current_task, wait_task_rescheduled

from meshlocal.client.statistics import Outcome
from meshlocal.net.pipe import PlainPipe
from meshlocal.policy.retry import Failure
from meshlocal.proxy.http.ends import ClientLeftError, End, Expiry
from meshlocal.proxy.http.h1.client import CHUNK, H1Client
from meshlocal.proxy.http.h1.upstream import H1Upstream
from meshlocal.proxy.http.request import HttpRequest
from meshlocal.proxy.http.waiting import Reminder
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.messages import RequestBody

if TYPE_CHECKING:
    from meshlocal.net.relay_loop import RelayLoop
from meshlocal.net.sockets import is_unix

LANE_TURN = 4
"""Full chunks that the lane passes on in a row; a response that has more of them goes to its task."""

_ENDING = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_DEAD = select.EPOLLHUP | select.EPOLLERR
_KEEP, _TRANSFER = End.KEEP, Expiry.TRANSFER


class Lane:
    """One client's connection in the loop.

    Attributes:
        task: sleeps until there is something for it; None while it does not.
        request: for the task: the request that was begun; None if none was.
        upstream: for the task: the attempt that began for it; None if none did.
        raised: for the task: what that met; None if it met nothing.
        end: for the task: what becomes of the connection; None if it goes on.
    """

    __slots__ = (
        "_client",
        "_fd",
        "_handed_over",
        "_kept",
        "_loop",
        "_more",
        "_patience",
        "_pipe",
        "_registered",
        "_reminder",
        "_sent_in",
        "_shared",
        "_unix",
        "end",
        "raised",
        "request",
        "task",
        "upstream",
    )

    def __init__(self, client: H1Client, loop: RelayLoop) -> None:
        self._client = client
        self._shared = client.shared
        self._patience = client.shared.patience
        self._loop = loop
        assert isinstance(client.pipe, PlainPipe)
        self._pipe = client.pipe
        self._fd = client.pipe.plain.fileno()
        self._unix = is_unix(client.pipe.plain)
        self._registered = False
        self._more = False
        self._handed_over = False
        self._kept: HttpRequest | None = None
        self._sent_in = 0
        self._reminder: Reminder | None = None
        self.task: trio.lowlevel.Task | None = None
        self.request: HttpRequest | None = None
        self.upstream: H1Upstream | None = None
        self.raised: Exception | None = None
        self.end: End | None = None

    async def wait(self) -> None:
        """Serve requests until there is something for the task. Nothing may have been received that is not served."""
        self.request = self.upstream = self.raised = self.end = None
        loop = self._loop
        if not self._registered:
            loop.watch(self._pipe.plain)
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

    def forget(self) -> None:
        """The task has served what it was given."""
        self.request = self.upstream = self.raised = None

    def _abandon(self, _: object) -> Abort:
        self.task = None
        # Before the task is told: a request that came meanwhile would be forwarded, and its client cut.
        self._loop.handlers.pop(self._fd, None)
        return Abort.SUCCEEDED

    def _give_up(self) -> None:
        """End what is under way: the connection's task was cancelled."""
        self._leave()
        request, upstream = self.request, self.upstream
        if request is not None:
            now = trio.current_time()
            request.outcome = Outcome.DRAINED
            if upstream is not None:
                upstream.release(now)
            request.finish(now)

    def _leave(self) -> None:
        handlers = self._loop.handlers
        handlers.pop(self._fd, None)
        self._call_off()
        if self.upstream is not None:
            handlers.pop(self.upstream.upstream.number, None)
            self._patience.waiting.pop(self, None)

    def _hand_over(self) -> None:
        self._leave()
        self._kept = None
        self._handed_over = True
        if self.task is not None:
            self._loop.finish(self)

    def _hand_over_raised(self, error: Exception) -> None:
        """The loop is no place to raise: the task does."""
        self.raised = error
        self._hand_over()

    def on_slow(self) -> None:
        """See `Waiter.on_slow`.

        A client that leaves makes an event here too, so that all that is wanted is to be told when the instance's time
        is over. Once its head came it has the connection's time, which is swept with all others'.
        """
        upstream = self.upstream
        if upstream is None:
            return
        if upstream.head_came:
            self._client.await_transfer()
        else:
            self._reminder = self._patience.ask(upstream.deadline, self)

    def on_deadline(self) -> None:
        """See `Waiter.on_deadline`."""
        self._reminder = None
        if self.upstream is not None and not self.upstream.head_came and not self._handed_over:
            self._give_to_task()

    def _call_off(self) -> None:
        """Have nobody reminded of the request's time any more."""
        if self._reminder is not None:
            self._reminder.call_off()
            self._reminder = None

    def _give_to_task(self) -> None:
        """The task is to go on, with a watch on the client and the clock."""
        if self.upstream is not None:
            self.upstream.slow = True
        self._hand_over()

    # The client.

    def on_client(self, mask: int) -> None:
        """The client's socket has an event."""
        if self.request is None:
            # An end that came with the request makes no event of its own; nor does what is behind a Unix socket's read.
            self._read_client(more=self._unix or bool(mask & _ENDING))
            return
        # It sends its next request, or ended its stream, before the response: that has its turn. But a reset ends all.
        self._more = True
        if mask & _DEAD:
            self._give_to_task()

    def _read_client(self, *, more: bool) -> None:
        """Read, and begin with what came; `more`: there may be something behind it."""
        self._more = more
        try:
            received = self._pipe.plain.recv(CHUNK)
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
            if self.request is None:
                # It stands there for the task, and for who looks for connections that wait for nothing.
                self._client.early += received
            self._hand_over()

    def _begin(self, received: bytes) -> bool:
        """Begin with a request, to be sent; False if a task has to go on with it, or to begin."""
        client, shared = self._client, self._shared
        settings = shared.settings
        end = received.find(b"\r\n\r\n") + 4
        if end < 4 or end > settings.limits.head or shared.draining:
            return False
        behind = len(received) - end
        try:
            head = settings.heads.request(received[:end] if behind else received)
        except ProtocolError:
            return False
        if head.plain_size != behind:
            return False
        now = self._loop.time()
        service = shared.find_known(client.service, head, now)
        if service is None:
            return False
        body: RequestBody | None = None
        if behind:
            most = settings.config.max_body
            if behind > service.state.policy.replay_buffer or (most is not None and behind > most):
                return False
            body = RequestBody(head, limit=None, hold=service.state.policy.replay_buffer)
            body.feed(received[end:])
        client.deadline = math.inf
        client.fresh = False
        # It is not idle.
        client.expiry = _TRANSFER
        request, self._kept = self._kept, None
        if request is None:
            request = HttpRequest(client, head, now, body)
        else:
            request.renew(head, now, body)
        self.request = client.request = request
        if not request.admit(service):
            return False
        pick = request.try_next(now)
        # Who sends on it looks at it then, if it has to be sure.
        kept = service.reuse(pick, sure=False) if pick is not None else None
        if kept is None:
            return False
        self.upstream = H1Upstream(request, service, kept)
        if kept.sock is None:
            # Its bytes are not the socket's: a task goes on with it.
            return False
        self._loop.handlers[kept.number] = self.on_upstream
        self._patience.add(self, now)
        self._loop.at_end(self._send_request)
        return True

    def _send_request(self) -> None:
        request, upstream = self.request, self.upstream
        if self._handed_over or upstream is None or request is None:
            return
        try:
            if not (request.idempotent or upstream.upstream.is_silent()):
                # What is to be sent on it could not be sent again (A4).
                upstream.failure = Failure.STALE
            else:
                upstream.start(self._loop.time())
                self._sent_in = self._loop.turns
        except Exception as error:  # noqa: BLE001 - see `_hand_over_raised`
            self._hand_over_raised(error)
            return
        if upstream.failure is not None or upstream.unsent:
            self._hand_over()

    # The instance.

    def on_upstream(self, mask: int) -> None:
        """The instance's socket has an event."""
        upstream = self.upstream
        if upstream is not None and (not upstream.started or self._sent_in == self._loop.turns):
            # Its end, or what nobody asked for, before the request was sent: not the connection to send it on. The
            # events of a turn are older than all that is sent in it.
            upstream.failure = Failure.STALE
            self._hand_over()
            return
        try:
            self._pass_on(mask)
        except Exception as error:  # noqa: BLE001 - see `_hand_over_raised`
            self._hand_over_raised(error)

    def _pass_on(self, mask: int) -> None:
        """Read what came, and pass it on."""
        upstream, client = self.upstream, self._client
        assert upstream is not None
        sock = upstream.upstream.sock
        assert sock is not None
        for _ in range(LANE_TURN):
            try:
                data = sock.recv(CHUNK)
            except BlockingIOError:
                return
            except OSError:
                upstream.reset = True
                data = b""
            whole = bool(data) and not upstream.head_came and upstream.take_whole(data)
            out = upstream.out if whole else upstream.take(data) if data else upstream.end()
            if whole or (upstream.is_complete and not upstream.needs_task):
                if mask & _ENDING:
                    upstream.upstream.ending = True
                elif len(data) == CHUNK or upstream.upstream.is_unix:
                    upstream.upstream.look_behind()
                upstream.out = out
                self._loop.at_end(self._send_rest)
                return
            if out:
                try:
                    sent = self._pipe.plain.send(out)
                except BlockingIOError:
                    sent = 0
                except OSError:
                    raise ClientLeftError from None
                if sent < len(out):
                    upstream.out = out[sent:]
                    break
            if upstream.needs_task:
                break
            if mask & _ENDING:
                upstream.upstream.ending = True
            if len(data) < CHUNK and not mask & _ENDING and not upstream.upstream.is_unix:
                # Behind a short read there is nothing, and more makes another event (epoll(7), Q9).
                if upstream.head_came and (client.deadline != math.inf or self not in self._patience.waiting):
                    # It is looked at by the sweep only, from here on or already.
                    client.await_transfer()
                return
        self._hand_over()

    def _send_rest(self) -> None:
        """Send what completes the response, and be ready for the next request."""
        request, upstream = self.request, self.upstream
        if self._handed_over or upstream is None or request is None:
            return
        out = upstream.out
        try:
            sent = self._pipe.plain.send(out) if out else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self._hand_over_raised(ClientLeftError())
            return
        if sent < len(out):
            upstream.out = out[sent:]
            self._hand_over()
            return
        upstream.out = b""
        try:
            self._complete(request, upstream)
        except Exception as error:  # noqa: BLE001 - see `_hand_over_raised`
            self._hand_over_raised(error)

    def _complete(self, request: HttpRequest, upstream: H1Upstream) -> None:
        client = self._client
        now = self._loop.time()
        self._patience.waiting.pop(self, None)
        if self._reminder is not None:
            self._call_off()
        upstream.complete()
        # The pool, or who closes it, takes the handler's place.
        upstream.release(now, watched=True)
        request.finish(now)
        self.request = self.upstream = client.request = None
        if upstream.was_whole:
            request.rest()
            self._kept = request
        if request.client_end is not _KEEP:
            self.end = request.client_end
            self._hand_over()
            return
        client.await_request(now)
        if self._more:
            self._read_client(more=True)
