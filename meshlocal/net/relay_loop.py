"""The relay's fast path: bytes are moved in the place where Trio would sleep.

Theory of operation. A task that waits for a socket costs Trio two system calls and two task switches per message, far
more than the message itself. So the sockets of established connections do not go through Trio at all: they are
registered, once and edge-triggered, with an epoll instance of this loop's own. Trio's epoll instance is registered
there as well. Whenever Trio is about to sleep it calls its instruments (`trio.abc.Instrument.before_io_wait`), and
this one sleeps in its stead: it waits on its own epoll instance for as long as Trio would have, moves whatever bytes
come, and returns as soon as Trio itself has something to do: an event of its own, a deadline, or a relay that ended.

Everything stays in one thread and under the rule of structured concurrency: a connection's task waits in `relay` until
its relay has ended, cancelling it takes the sockets out of the loop at once, and no other task, thread or lock is
involved. A connection that is over before its task made a step is handed to whoever began it, in the same place
(`Pair.on_end`). How a direction moves its bytes stands in `meshlocal.net.flows`.

What else wants its sockets served in that place does it with `watch`: its handlers are called for each event, and must
neither wait nor raise (one that raises costs its connection); `finish` lets a task of its go on. What such a handler
sends, it sends `at_end` of the turn, after those of all other sockets that have an event now: to wake a process that
sleeps costs its sender more than all else in a send, and who gets several messages in a row is woken once. `listen` is
`watch` for sockets from which connections are accepted: their handler may start a task for each, and `begin` to relay
before that has made a step.

The one thing that Trio does not offer is the file descriptor of its epoll instance; `trio_epoll` finds it. Where it
cannot, `meshlocal.net.relay` moves the bytes with two tasks a connection, and says so.
"""

from __future__ import annotations

import errno
import itertools
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import trio
from trio.lowlevel import RunVar

from meshlocal.net.busy_poll import BusyPoll
from meshlocal.net.flows import ALL_EVENTS, FIRST, TURN_BYTES, Flow, Flows, Pair
from meshlocal.net.log import get_log
from meshlocal.net.relay_state import RelayCounters, RelayResult, RelayState
from meshlocal.net.sockets import is_unix, on_close
from meshlocal.net.trio_internals import epoll_fileno

_log = get_log(__name__)

END_WAIT = 0.002
"""Seconds that a task for which nothing waits may have to wait for Trio to wake for another reason: one whose relay
came to a clean end, or that was started for a connection for which there is nothing to do yet."""

DEFERRAL = 0.02
"""Seconds that a task is deferred by, which waits for nothing but to be told that there is no need for it."""

_READ_EVENTS = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_BYTES = select.EPOLLIN
_READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_WRITABLE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
_SPLIT = select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_DEAD = select.EPOLLHUP | select.EPOLLERR
_BATCH = 256

_ROUND = 32
"""Calls that may wait for the end of a turn: those who wait for them wait no longer than that many take."""


class Sleeper(Protocol):
    """What has a task that waits for what the loop does."""

    task: trio.lowlevel.Task | None
    """Rescheduled, and set to None, once it is finished, or was deferred for long enough."""


class RelayLoop(Flows, trio.abc.Instrument):
    """Moves the bytes of all relays of one Trio run. Made by `open_relay_loop`.

    Args:
        trio_epoll: the file descriptor of Trio's epoll instance.

    Attributes:
        handlers: by the file descriptor of a socket that `watch` or `listen` was called for, what is called with its
            events.
        busy_poll: how it waits for events; off, until its `limit` is set.
        time: `trio.current_time`, at a fraction of its cost.
        crowd: how many sockets have an event in this turn.
        turns: how often it looked for events. Those of a turn are older than all that is sent in it.
        died: set when a fault took it out of Trio's sleep: no relay, accept or lane of it goes on, or ever will.
        problem: that fault, in a word; empty while it lives.
    """

    def __init__(self, trio_epoll: int) -> None:
        self._trio = trio_epoll
        self.time = trio.lowlevel.current_clock().current_time
        self._token = trio.lowlevel.current_trio_token()
        super().__init__(select.epoll())
        self.busy_poll = BusyPoll(self._epoll.poll)
        self._wait = self.busy_poll.wait
        self.handlers: dict[int, Callable[[int], None]] = {}
        self._closers: dict[int, Callable[[], None]] = {}
        """By the same number: who wants to know that a task closes the socket."""
        self._finished: list[Sleeper] = []
        self._deferred: dict[Sleeper, float] = {}
        """When each is due, by `time.perf_counter`, the first one first."""
        self._over: list[Pair] = []
        self._last: list[Callable[[], None]] = []
        self.turns = 0
        self.crowd = 0
        self.died = trio.Event()
        self.problem = ""
        self._turning = False
        self._sleeping = False
        self._started = False
        self._urgent = False
        try:
            self._epoll.register(trio_epoll, select.EPOLLIN)
        except BaseException:
            self._epoll.close()
            raise

    def __len__(self) -> int:
        """How many relays are under way."""
        return len(self._flows) // 2

    def close(self) -> None:
        """Release the epoll instance. No relay may be under way."""
        self._epoll.close()

    # What tasks call.

    async def relay(
        self, client: socket.socket, upstream: socket.socket, counters: RelayCounters, early: bytes | bytearray
    ) -> RelayResult:
        """See `meshlocal.net.relay.relay`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        return await self.begin(client, upstream, counters, early).join()

    def watch(self, sock: socket.socket) -> None:
        """Call the socket's handler, if there is one at the time, when bytes come or its peer ends: once an edge.

        For as long as the socket is open, which its holder closes with `sockets.close` or `abort`.
        """
        self._register(sock.fileno(), _READ_EVENTS)

    def attend(self, number: int, handler: Callable[[int], None], closing: Callable[[], None]) -> None:
        """Call a socket's handler once an edge, of bytes that come as of room for more, and `closing` if a task closes
        the socket; until `neglect`, by which nothing is left of either but a registration that is passed over.

        Args:
            number: the socket's descriptor.
            handler: gets what happened, as epoll_wait(2) tells it.
            closing: called before the socket is closed.
        """
        self.handlers[number] = handler
        self._closers[number] = closing
        self._register(number, ALL_EVENTS)

    def neglect(self, number: int) -> None:
        """Take back an `attend`, if there was one."""
        self.handlers.pop(number, None)
        self._closers.pop(number, None)

    def at_end(self, call: Callable[[], None]) -> None:
        """Call this once the handlers of the other sockets were called; at once, if no turn is under way.

        It must neither wait nor raise. No task runs before it.
        """
        if self._turning:
            self._last.append(call)
        else:
            call()

    def as_turn(self, call: Callable[[], None]) -> None:
        """Call this from a task as a turn calls a handler: what it leaves to `at_end` is called once, behind it."""
        self._turning = True
        try:
            call()
        finally:
            if self._last:
                self._end_round()
            self._turning = False

    def listen(self, listener: socket.socket, handler: Callable[[int], None]) -> None:
        """Call the handler once a turn while connections wait to be accepted, until `unlisten`.

        Not once an edge: a handler that takes one connection at a time never has to ask whether there is another.
        """
        fd = listener.fileno()
        self._register(fd, select.EPOLLIN)
        self.handlers[fd] = handler

    def unlisten(self, listener: socket.socket) -> None:
        """Call the listener's handler no longer; without a `listen` before, this does nothing."""
        fd = listener.fileno()
        if self.handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def started(self, *, soon: bool) -> None:
        """A handler has started a task, or several; `soon`: it has work to do that waits for nothing.

        Otherwise it makes its first step when Trio wakes for another reason, within `END_WAIT`, as others their last.
        """
        self._started = True
        self._urgent = self._urgent or soon

    def finish(self, waiter: Sleeper) -> None:
        """Let a task go on; from a handler or from another task."""
        self._finished.append(waiter)
        self._urgent = True
        if not self._sleeping:
            self._reschedule()

    def defer(self, waiter: Sleeper) -> None:
        """Let a task go on in `DEFERRAL`, or somewhat sooner if others do, unless it is recalled before."""
        assert waiter not in self._deferred
        self._deferred[waiter] = time.perf_counter() + DEFERRAL

    def recall(self, waiter: Sleeper) -> None:
        """A task that was deferred need not go on."""
        self._deferred.pop(waiter, None)

    def begin(
        self, client: socket.socket, upstream: socket.socket, counters: RelayCounters, early: bytes | bytearray = b""
    ) -> Pair:
        """Begin to relay, for a task that will `join` the pair. Whoever closes one of the sockets ends it."""
        pair = Pair(self, RelayState(counters), (client.fileno(), upstream.fileno()))
        there, back = self._make(pair, client, upstream)
        self._now = self.time()
        try:
            # A client has most likely said something already. What it said before the registration is read here, and
            # what comes later is an event.
            there.rest = bytes(early)
            self.held += len(there.rest)
            self._move(there)
            if not pair.done:
                self._register(pair.fds[0], there.events | (select.EPOLLOUT if back.armed else 0))
                self._register(pair.fds[1], back.events | (select.EPOLLOUT if there.armed else 0))
        except BaseException:
            self._remove(pair)
            raise
        return pair

    def _register(self, fd: int, events: int) -> None:
        try:
            self._epoll.register(fd, events)
        except FileExistsError:
            # The socket went through an earlier relay, and was not closed after it.
            self._epoll.modify(fd, events)

    def _closing(self, sock: socket.socket) -> None:
        """A task closes a socket: its relay, if it has one, ends."""
        fd = sock.fileno()
        self.handlers.pop(fd, None)
        closing = self._closers.pop(fd, None)
        if closing is not None:
            closing()
            self._reschedule()
        flow = self._flows.get(fd)
        if flow is not None and flow.source is sock:
            flow.pair.state.fail(flow.side, errno.EBADF)
            self._finish(flow.pair)
            self._reschedule()

    # What Trio calls when it would sleep.

    def before_io_wait(self, timeout: float) -> None:
        """Sleep in Trio's stead, and move bytes (see the module)."""
        if self.problem or (not self._flows and not self.handlers and not self._deferred):
            return
        try:
            self._instead_of_trio(timeout)
        except Exception as error:  # noqa: BLE001 - Trio would drop the instrument, and say so to nobody who acts
            self.problem = f"{type(error).__name__}: {error}"
            _log.exception("the relay loop failed by a fault in the proxy")
            self._token.run_sync_soon(self.died.set)

    def _instead_of_trio(self, timeout: float) -> None:
        if timeout <= 0:
            # Trio has tasks to run, and comes back at once.
            self._turn(0)
            self._reschedule()
            self._started = self._urgent = False
            return
        self._sleeping = True
        try:
            self._sleep(timeout)
        finally:
            self._sleeping = self._started = self._urgent = False

    def _sleep(self, timeout: float) -> None:
        until = time.perf_counter() + timeout
        told = until
        remaining = min(until, next(iter(self._deferred.values()), until)) - time.perf_counter()
        while not self._turn(0 if self._again else max(remaining, 0)):
            now = time.perf_counter()
            remaining = until - now
            if self._urgent or self._started or self._finished or self._deferred:
                if self._started or self._finished:
                    told = min(told, now + END_WAIT)
                first = min(told, next(iter(self._deferred.values()), told))
                if self._urgent or now >= first:
                    self._reschedule()
                    # Trio computed its timeout before it called, and would sleep for all of it.
                    self._token.run_sync_soon(_nothing)
                    return
                remaining = first - now
            elif now >= until:
                if trio.lowlevel.current_statistics().seconds_to_next_deadline <= 0:
                    self._token.run_sync_soon(_nothing)
                # Otherwise it waits for all tasks to be blocked (`trio.testing`), and nothing may disturb it.
                return
        # Trio finds an event of its own when it looks itself, and runs these tasks then.
        self._reschedule()

    def _reschedule(self) -> None:
        if self._finished:
            finished, self._finished = self._finished, []
            self._urgent = False
            for waiter in finished:
                if waiter.task is not None:
                    trio.lowlevel.reschedule(waiter.task)
                    waiter.task = None
        if self._deferred:
            self._reschedule_deferred()

    def _reschedule_deferred(self) -> None:
        """If one is due, all that soon are: a pass of Trio's costs more than a step. Others may be recalled yet."""
        now = time.perf_counter()
        if next(iter(self._deferred.values())) > now:
            return
        soon = now + DEFERRAL / 2
        due = list(itertools.takewhile(lambda waiter: self._deferred[waiter] <= soon, self._deferred))
        for waiter in due:
            del self._deferred[waiter]
            if waiter.task is not None:
                trio.lowlevel.reschedule(waiter.task)
                waiter.task = None

    def _turn(self, timeout: float) -> bool:
        """Wait for events, and serve them; tells whether Trio has one of its own."""
        again = self._again
        if again:
            self._again = {}
        trio_ready = False
        try:
            events = self._wait(timeout, _BATCH)
        except InterruptedError:  # pragma: no cover - PEP 475 retries, unless a signal handler raised
            events = []
        self.turns += 1
        self.crowd = len(events)
        self._now = now = self.time()
        self._left = TURN_BYTES
        flows, view = self._flows, self._view
        last = self._last
        self._turning = True
        for fd, mask in events:
            flow = flows.get(fd)
            if flow is None:
                handler = self.handlers.get(fd)
                if handler is not None:
                    try:
                        handler(mask)
                    except Exception:  # noqa: BLE001 - see `_handler_fault`
                        self._handler_fault(fd, mask)
                    if len(last) >= _ROUND:
                        self._end_round()
                else:
                    trio_ready = trio_ready or fd == self._trio
            elif mask == _BYTES and flow.ready and (self._left > 0 or flow.limit <= FIRST):
                # What nearly every message is, so it is `_move` without a call.
                try:
                    size = -1
                    try:
                        size = flow.receive(flow.space)
                        sent = flow.send(view[:size]) if size else 0
                    except OSError as error:
                        self._stopped(flow, size, error)
                        continue
                    if size > FIRST:
                        self._left -= size
                    if 0 < size == sent < flow.limit:
                        counters = flow.counters
                        counters.last_activity = now
                        if flow.outward:
                            counters.client_to_upstream += sent
                        else:
                            counters.upstream_to_client += sent
                    else:
                        self._after(flow, size, sent)
                except Exception:  # noqa: BLE001 - see `_fault`
                    self._fault(flow)
            else:
                writing = flow.twin
                if mask & _WRITABLE and writing.rest:
                    self._serve(writing)
                if mask & _READABLE:
                    if mask & _SPLIT:
                        flow.split = True
                    if flow.ready:
                        self._serve(flow)
                    elif mask & _DEAD and flow.ended and not flow.pair.done:
                        self._source_died(flow)
        if last:
            self._end_round()
        left: dict[Flow, None] = {}
        one_had_its_turn = False
        for flow in again:
            if flow in self._again:  # it had an event as well
                continue
            if not one_had_its_turn:
                # One in any case: those that have events might take all that may be moved, turn after turn.
                one_had_its_turn = True
                self._left = max(self._left, 1)
            if self._left > 0:
                self._serve(flow)
            else:
                left[flow] = None
        if left:
            # They come first among those without events in the next turn.
            self._again = left | self._again
        self._turning = False
        if self._over:
            self._hand_back()
        return trio_ready

    def _source_died(self, flow: Flow) -> None:
        """A side that had ended its stream reset its connection: what is still to be sent to it can go nowhere."""
        try:
            number = flow.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except OSError as error:
            number = error.errno or 0
        if not number and is_unix(flow.source):
            # A Unix socket tells of its other end's close, which TCP does not; what is sent there will fail.
            return
        flow.pair.state.fail(flow.side, number or errno.ECONNRESET)
        self._finish(flow.pair)

    def _hand_back(self) -> None:
        """Only now that no event is left may sockets be closed: the numbers of theirs would be those of others."""
        over, self._over = self._over, []
        for pair in over:
            assert pair.on_end is not None
            # Of a failure others may be told, whose tasks Trio does not see before it wakes.
            self._urgent = self._urgent or pair.state.failed is not None
            try:
                pair.on_end()
            except Exception:  # noqa: BLE001 - the loop is no place to raise, and all others have their turn
                _log.exception("connection failed by a fault in the proxy")

    def _end_round(self) -> None:
        last = self._last
        for call in last:  # which may add to it
            try:
                call()
            except Exception:  # noqa: BLE001 - the loop is no place to raise, and all others have their turn
                # A deadline ends what this one was to go on with.
                _log.exception("what was to be sent was lost by a fault in the proxy")
        last.clear()

    def _handler_fault(self, fd: int, mask: int) -> None:
        """In the place of an exception: a fault of ours in one connection must not take Trio's sleep from all others.

        The connection is shut down, which is an event, so that its handler can end what it has to end.
        """
        _log.exception("connection failed by a fault in the proxy")
        if mask & select.EPOLLHUP:
            # That was it.
            self.handlers.pop(fd, None)
            return
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            # The handler closed it before it failed.
            self.handlers.pop(fd, None)
            return
        try:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        finally:
            sock.detach()

    def _finish(self, pair: Pair) -> None:
        if pair.done:
            return
        self._remove(pair)
        if pair.on_end is not None and self._turning:
            self._over.append(pair)
            return
        # Otherwise its task finds out, if it has not made a step yet.
        pair.on_end = None
        self._finished.append(pair)
        # Both ends know of a clean end already, so that what is left to do can wait for Trio's next turn: waking it
        # costs as much as moving two messages. A failed one has a side yet to be reset.
        self._urgent = self._urgent or pair.state.failed is not None


current_loop: RunVar[RelayLoop | None] = RunVar("meshlocal.relay.loop", default=None)
"""What moves the bytes of this Trio run, if there is a loop for it."""


@contextmanager
def open_relay_loop() -> Iterator[RelayLoop | None]:
    """While this is open, the relays of this Trio run go through a loop of their own.

    Yields:
        The loop; None if Trio does not show its epoll instance, so that relays take the path with two tasks. Relays
        must have ended at the exit.
    """
    number = epoll_fileno()
    if number is None:
        _log.warning("relays take the slow path", problem="this version of Trio hides its epoll instance")
        yield None
        return
    loop = RelayLoop(number)
    trio.lowlevel.add_instrument(loop)
    current_loop.set(loop)
    on_close.set(loop._closing)
    try:
        yield loop
    finally:
        current_loop.set(None)
        on_close.set(None)
        with suppress(KeyError):  # Trio drops an instrument that raised
            trio.lowlevel.remove_instrument(loop)
        loop.close()


def _nothing() -> None:
    """What wakes Trio need not do more."""
