"""The relay's fast path: bytes are moved in the place where Trio would sleep.

Theory of operation. A task that waits for a socket costs Trio two system calls and two task switches per message, far
more than the message itself. So the sockets of established connections do not go through Trio at all: they are
registered, once and edge-triggered, with an epoll instance of this loop's own. Trio's epoll instance is registered
there as well. Whenever Trio is about to sleep it calls its instruments (`trio.abc.Instrument.before_io_wait`), and
this one sleeps in its stead: it waits on its own epoll instance for as long as Trio would have, moves whatever bytes
come, and returns as soon as Trio itself has something to do: an event of its own, a deadline, or a relay that ended.

Everything stays in one thread and under the rule of structured concurrency: a connection's task waits in `relay` until
its relay has ended, cancelling it takes the sockets out of the loop at once, and no other task, thread or lock is
involved.

A direction reads, writes at once, and keeps what the sink would not take; until that is gone it reads no more.
Edge-triggered events come again whenever something changed after the last read or write, so that a read that did not
fill its space needs no second one to find the socket empty (epoll(7), Q9). After one that did, the direction gives way
to all others before it goes on. Its reads grow, from `FIRST` to `LARGEST` bytes, for as long as its sink takes each of
them whole, and are small again when it does not: so what is held for a slow reader is little, and for one that stalls
amid a fast transfer `LARGEST` at most.

What else wants its sockets served in that place does it with `watch`: its handlers are called for each event, and must
neither wait nor raise; `finish` lets a task of its go on. What such a handler sends, it sends `at_end` of the turn,
after those of all other sockets that have an event now: to wake a process that sleeps costs its sender more than all
else in a send, and who gets several messages in a row is woken once. `listen` is `watch` for sockets from which
connections are accepted: their handler may start a task for each, and `begin` to relay before that has made a step.

The one thing that Trio does not offer is the file descriptor of its epoll instance; `trio_epoll` finds it. Where it
cannot, `meshlocal.net.relay` moves the bytes with two tasks a connection, and says so.
"""

from __future__ import annotations

import errno
import mmap
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import trio

from meshlocal.net.log import get_log
from meshlocal.net.relay import RelayCounters, RelayResult, RelayState, Side, current_loop
from meshlocal.net.sockets import on_close

_log = get_log(__name__)

FIRST = 128 * 1024
"""Bytes that a direction's first read may give: larger than most messages, whose end needs no second one then."""

LARGEST = 1024 * 1024
"""Bytes that one read may give, and the most that a direction holds."""

LINGER = 0.002
"""Seconds that a task for which nothing waits may have to wait for Trio to wake for another reason: one whose relay
came to a clean end, or that was started for a connection for which there is nothing to do yet."""

_READ_EVENTS = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_FLOW_EVENTS = _READ_EVENTS | select.EPOLLPRI
_ALL_EVENTS = _FLOW_EVENTS | select.EPOLLOUT
_BYTES = select.EPOLLIN
_READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_WRITABLE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
_SPLIT = select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_BATCH = 256

_ROUND = 32
"""Calls that may wait for the end of a turn: those who wait for them wait no longer than that many take."""


class _Flow:
    """One direction.

    Attributes:
        space: where its next read goes: as much of the loop's buffer as it may fill, which is `limit` bytes.
        rest: what the sink would not take yet; empty if nothing is held.
        ready: it reads when bytes come: nothing is held, and it has not ended.
        split: something ends a read before all is read: the source's end or failure, or urgent data (tcp(7)), which
            both paths leave out. So this direction reads until there is nothing.
        ended: nothing more is moved this way.
        armed: the loop has been told to hear when the sink takes bytes again.
        twin: the other direction.
    """

    __slots__ = (
        "armed",
        "counters",
        "ended",
        "limit",
        "outward",
        "pair",
        "ready",
        "receive",
        "rest",
        "send",
        "side",
        "sink",
        "source",
        "space",
        "split",
        "twin",
    )

    twin: _Flow

    def __init__(self, pair: Pair, side: Side, source: socket.socket, sink: socket.socket, space: memoryview) -> None:
        self.pair = pair
        self.side = side
        self.source = source
        self.sink = sink
        # What each message needs is one look-up away.
        self.counters = pair.state.counters
        self.outward = side == "client"
        self.receive = source.recv_into
        self.send = sink.send
        self.space = space
        self.limit = len(space)
        self.rest: memoryview | bytes = b""
        self.ready = True
        self.split = False
        self.ended = False
        self.armed = False


class Pair:
    """Two connections that are one to their users.

    Attributes:
        state: what the relay has come to.
        done: it has ended.
        task: waits for that.
    """

    __slots__ = ("_loop", "done", "fds", "state", "task")

    def __init__(self, loop: RelayLoop, state: RelayState, fds: tuple[int, int]) -> None:
        self._loop = loop
        self.state = state
        self.fds = fds
        self.done = False
        self.task: trio.lowlevel.Task | None = None

    async def join(self) -> RelayResult:
        """Wait for the end. Cancellation is the end, too."""
        if not self.done:
            self.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abandon)
        return self.state.result()

    def _abandon(self, _: object) -> trio.lowlevel.Abort:
        self.task = None
        self._loop._remove(self)
        return trio.lowlevel.Abort.SUCCEEDED


class Waiter(Protocol):
    """What has a task that waits for what the loop does."""

    task: trio.lowlevel.Task | None
    """Rescheduled, and set to None, once it is finished."""


class RelayLoop(trio.abc.Instrument):
    """Moves the bytes of all relays of one Trio run. Made by `open_relay_loop`.

    Args:
        trio_epoll: the file descriptor of Trio's epoll instance.

    Attributes:
        handlers: by the file descriptor of a socket that `watch` or `listen` was called for, what is called with its
            events.
        time: `trio.current_time`, at a fraction of its cost.
    """

    def __init__(self, trio_epoll: int) -> None:
        self._trio = trio_epoll
        self.time = trio.lowlevel.current_clock().current_time
        self._token = trio.lowlevel.current_trio_token()
        self._epoll = select.epoll()
        self._flows: dict[int, _Flow] = {}
        """By the file descriptor of a socket: the direction that reads from it, whose twin writes to it."""
        self._again: list[_Flow] = []
        self.handlers: dict[int, Callable[[int], None]] = {}
        self._finished: list[Waiter] = []
        self._last: list[Callable[[], None]] = []
        self._turning = False
        self._sleeping = False
        self._started = False
        self._urgent = False
        self._view = _buffer(LARGEST)
        self._first = self._view[:FIRST]
        self._now = 0.0
        try:
            self._epoll.register(trio_epoll, select.EPOLLIN)
        except BaseException:
            self._epoll.close()
            raise

    def __len__(self) -> int:
        """Relays under way."""
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

    def at_end(self, call: Callable[[], None]) -> None:
        """Call this once the handlers of the other sockets were called; at once, if no turn is under way.

        It must neither wait nor raise. No task runs before it.
        """
        if self._turning:
            self._last.append(call)
        else:
            call()

    def listen(self, listener: socket.socket, handler: Callable[[int], None]) -> None:
        """Call the handler once a turn while connections wait to be accepted, until `unlisten`.

        Not once an edge: a handler that takes one connection at a time never has to ask whether there is another.
        """
        fd = listener.fileno()
        self._register(fd, select.EPOLLIN)
        self.handlers[fd] = handler

    def unlisten(self, listener: socket.socket) -> None:
        """The end of `listen`."""
        fd = listener.fileno()
        if self.handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def started(self, *, soon: bool) -> None:
        """A handler has started a task, or several; `soon`: it has work to do that waits for nothing.

        Otherwise it makes its first step when Trio wakes for another reason, within `LINGER`, as others their last.
        """
        self._started = True
        self._urgent = self._urgent or soon

    def finish(self, waiter: Waiter) -> None:
        """Let a task go on; from a handler or from another task."""
        self._finished.append(waiter)
        self._urgent = True
        if not self._sleeping:
            self._reschedule()

    def begin(
        self, client: socket.socket, upstream: socket.socket, counters: RelayCounters, early: bytes | bytearray = b""
    ) -> Pair:
        """Begin to relay, for a task that will `join` the pair. Whoever closes one of the sockets ends it."""
        pair = Pair(self, RelayState(counters), (client.fileno(), upstream.fileno()))
        there = _Flow(pair, "client", client, upstream, self._first)
        back = _Flow(pair, "upstream", upstream, client, self._first)
        there.twin, back.twin = back, there
        self._now = self.time()
        client_fd, upstream_fd = pair.fds
        self._flows[client_fd] = there
        self._flows[upstream_fd] = back
        try:
            # A client has most likely said something already. What it said before the registration is read here, and
            # what comes later is an event.
            there.rest = bytes(early)
            self._move(there)
            if not pair.done:
                self._register(client_fd, _ALL_EVENTS if back.armed else _FLOW_EVENTS)
                self._register(upstream_fd, _ALL_EVENTS if there.armed else _FLOW_EVENTS)
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

    def _remove(self, pair: Pair) -> None:
        # The sockets stay registered until their holder closes them: an event of one that is not in the table is
        # passed over, and comes once.
        pair.done = True
        for fd in pair.fds:
            self._flows.pop(fd, None)

    def _closing(self, sock: socket.socket) -> None:
        """A task closes a socket: its relay, if it has one, ends."""
        fd = sock.fileno()
        self.handlers.pop(fd, None)
        flow = self._flows.get(fd)
        if flow is not None and flow.source is sock:
            flow.pair.state.fail(flow.side, errno.EBADF)
            self._finish(flow.pair)
            self._reschedule()

    # What Trio calls when it would sleep.

    def before_io_wait(self, timeout: float) -> None:
        """Sleep in Trio's stead, and move bytes (see the module)."""
        if not self._flows and not self.handlers:
            return
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
        remaining = timeout
        while not self._turn(0 if self._again else remaining):
            now = time.perf_counter()
            remaining = until - now
            if self._started or self._finished:
                told = min(told, now + LINGER)
                if self._urgent or now >= told:
                    self._reschedule()
                    # Trio computed its timeout before it called, and would sleep for all of it.
                    self._token.run_sync_soon(_nothing)
                    return
                remaining = min(until, told) - now
            if now >= until:
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

    def _turn(self, timeout: float) -> bool:
        """Wait for events, and serve them; tells whether Trio has one of its own."""
        again = self._again
        if again:
            self._again = []
        trio_ready = False
        try:
            events = self._epoll.poll(timeout, _BATCH)
        except InterruptedError:  # pragma: no cover - PEP 475 retries, unless a signal handler raised
            events = []
        self._now = now = self.time()
        flows, view = self._flows, self._view
        last = self._last
        self._turning = True
        for fd, mask in events:
            flow = flows.get(fd)
            if flow is None:
                handler = self.handlers.get(fd)
                if handler is not None:
                    handler(mask)
                    if len(last) >= _ROUND:
                        self._end_round()
                else:
                    trio_ready = trio_ready or fd == self._trio
            elif mask == _BYTES and flow.ready:
                # What nearly every message is, so it is `_move` without a call.
                try:
                    size = -1
                    try:
                        size = flow.receive(flow.space)
                        sent = flow.send(view[:size]) if size else 0
                    except OSError as error:
                        self._stopped(flow, size, error)
                        continue
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
        if last:
            self._end_round()
        self._turning = False
        for flow in again:
            self._serve(flow)
        return trio_ready

    def _end_round(self) -> None:
        last = self._last
        for call in last:  # which may add to it
            call()
        last.clear()

    def _serve(self, flow: _Flow) -> None:
        if flow.pair.done:
            return
        try:
            self._move(flow)
        except Exception:  # noqa: BLE001 - see `_fault`
            self._fault(flow)

    def _fault(self, flow: _Flow) -> None:
        """In the place of an exception: a fault of ours in one relay must not take Trio's sleep from all others."""
        _log.exception("relay failed by a fault in the proxy")
        flow.pair.state.fail(flow.side, errno.EIO)
        self._finish(flow.pair)

    def _move(self, flow: _Flow) -> None:
        """Move what there is to move one way, or as much as one read gives."""
        if flow.rest:
            self._send_rest(flow)
        while flow.ready:
            size = -1
            try:
                size = flow.receive(flow.space)
                sent = flow.send(self._view[:size]) if size else 0
            except OSError as error:
                self._stopped(flow, size, error)
                return
            if not 0 < size == sent < flow.limit:
                self._after(flow, size, sent)
                return
            self._count(flow, sent)
            if not flow.split:
                return

    def _count(self, flow: _Flow, sent: int) -> None:
        if not sent:
            return
        counters = flow.counters
        counters.last_activity = self._now
        if flow.outward:
            counters.client_to_upstream += sent
        else:
            counters.upstream_to_client += sent

    def _stopped(self, flow: _Flow, size: int, error: OSError) -> None:
        """A read failed, or the write of the `size` bytes that it gave, if it is not -1."""
        if isinstance(error, BlockingIOError):
            if size > 0:
                self._hold(flow, 0, size)
        elif size < 0:
            flow.pair.state.fail(flow.side, error.errno or errno.EIO)
            self._finish(flow.pair)
        else:
            self._sink_failed(flow, error)

    def _after(self, flow: _Flow, size: int, sent: int) -> None:
        """What comes after a read that gave the source's end, or more than the sink took, or all that it may."""
        self._count(flow, sent)
        if not size:
            self._end(flow)
        elif sent < size:
            self._hold(flow, sent, size)
        else:
            if size < LARGEST:
                flow.limit = min(2 * size, LARGEST)
                flow.space = self._view[: flow.limit]
            self._again.append(flow)

    def _hold(self, flow: _Flow, sent: int, size: int) -> None:
        """Keep what the sink did not take of a read."""
        # A copy of its own, for the buffer belongs to all.
        flow.rest = memoryview(bytes(self._view[sent:size]))
        flow.ready = False
        flow.space = self._first
        flow.limit = len(self._first)
        self._arm(flow)

    def _send_rest(self, flow: _Flow) -> None:
        try:
            sent = flow.send(flow.rest)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._sink_failed(flow, error)
            return
        self._count(flow, sent)
        if sent == len(flow.rest):
            flow.rest = b""
            flow.ready = True
        else:
            flow.rest = memoryview(flow.rest)[sent:]
            flow.ready = False
            self._arm(flow)

    def _arm(self, flow: _Flow) -> None:
        """Hear when the sink takes bytes again. Most sinks are never full, and their sockets make no such events.

        Each time anew: that makes an event of a sink that takes bytes already, which a look at its edges alone misses.
        """
        flow.armed = True
        # While the relay begins the sink is not there yet, and is registered with this later. ENOENT says so.
        with suppress(FileNotFoundError):
            self._epoll.modify(flow.sink.fileno(), _ALL_EVENTS)

    def _end(self, flow: _Flow) -> None:
        """The source's end: pass it on."""
        flow.ended = True
        flow.ready = False
        state = flow.pair.state
        if state.failed is None:
            # Otherwise the source died while the other direction wrote to it: its last bytes end here, not its stream.
            state.first_end = state.first_end or flow.side
            try:
                flow.sink.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._sink_failed(flow, error)
                return
        if flow.twin.ended:
            self._finish(flow.pair)

    def _sink_failed(self, flow: _Flow, error: OSError) -> None:
        """The sink is dead. What it sent before is still delivered, so the other direction goes on to its end."""
        flow.ended = True
        flow.ready = False
        flow.rest = b""
        flow.pair.state.fail(flow.twin.side, error.errno or errno.EIO)
        # A dead socket gives what it received and then its end. Should this one be alive after all (the system had no
        # memory for it), it is made to do the same.
        with suppress(OSError):
            flow.sink.shutdown(socket.SHUT_RD)
        if flow.twin.ended:
            self._finish(flow.pair)
        else:
            self._again.append(flow.twin)

    def _finish(self, pair: Pair) -> None:
        if not pair.done:
            self._remove(pair)
            self._finished.append(pair)
            # Both ends know of a clean end already, so that what is left to do can wait for Trio's next turn: waking it
            # costs as much as moving two messages. A failed one has a side yet to be reset.
            self._urgent = self._urgent or pair.state.failed is not None


def _buffer(size: int) -> memoryview:
    """Memory whose place in its pages makes copies into it and out of it fast.

    A copy in the kernel takes four times as long if its target lies 16 bytes further in a page than its source (AMD's
    `rep movsb`). The kernel's own buffers mostly begin with a page, and large blocks of malloc 16 bytes into one.
    """
    middle = mmap.PAGESIZE // 2
    return memoryview(mmap.mmap(-1, middle + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[middle:]


def trio_epoll() -> int | None:
    """The file descriptor of this Trio run's epoll instance; None if it has none, or keeps it where we cannot see."""
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        runner = GLOBAL_RUN_CONTEXT.runner
        if runner.is_guest:
            # Another event loop sleeps then, in which there is no place for this one.
            return None
        return runner.io_manager._epoll.fileno()
    except (ImportError, AttributeError):
        return None


@contextmanager
def open_relay_loop() -> Iterator[RelayLoop | None]:
    """While this is open, the relays of this Trio run go through a loop of their own.

    Yields:
        The loop; None if Trio does not show its epoll instance, so that relays take the path with two tasks. Relays
        must have ended at the exit.
    """
    number = trio_epoll()
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
