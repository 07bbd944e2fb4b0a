"""The directions of established connections, and how each moves its bytes (`meshlocal.net.relay_loop`).

Theory of operation. A direction reads, writes at once, and keeps what the sink would not take; until that is gone it
reads no more. Edge-triggered events come again whenever something changed after the last read or write, so that a read
that did not fill its space needs no second one to find the socket empty (epoll(7), Q9). After one that did, the
direction gives way to all others before it goes on. Its reads grow, from `FIRST` to `LARGEST` bytes, for as long as its
sink takes each of them whole, and are small again when it does not: so what is held for a slow reader is little, and
for one that stalls amid a fast transfer `LARGEST` at most. Once `HELD_MOST` bytes are held in all, reads are `SCANT`,
so that a crowd of readers that stall cannot take the memory.

Large reads cost milliseconds, and everybody else in the loop waits for them. So all directions together move no more
than `TURN_BYTES` in large reads in one turn; those that are left have theirs first in the next.

Nothing here waits: an epoll instance tells when there is something to do, and what ended is handed to `_finish`.
"""

from __future__ import annotations

import errno
import mmap
import select
import socket
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress

import trio

from meshlocal.net.log import get_log
from meshlocal.net.relay_state import RelayResult, RelayState, Side
from meshlocal.net.sockets import is_unix

_log = get_log(__name__)

FIRST = 128 * 1024
"""Bytes that a direction's first read may give: larger than most messages, whose end needs no second one then."""

LARGEST = 1024 * 1024
"""Bytes that one read may give, and the most that a direction holds."""

TURN_BYTES = 2 * LARGEST
"""Bytes that large reads move in one turn of the loop, before others have theirs: some two milliseconds."""

READS = 4
"""Reads in a row of a direction that reads until there is nothing, before others have their turn."""

HELD_MOST = 64 * LARGEST
"""Bytes held for sinks that take nothing, in all, from which on reads are `SCANT`."""

SCANT = 4096
"""Bytes that a read gives while too much is held."""

FLOW_EVENTS = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
"""What an epoll instance tells of a socket that is read, edge-triggered."""

UNIX_EVENTS = FLOW_EVENTS | select.EPOLLRDNORM
"""The same of a Unix socket, whose bytes are so told from TCP's: for them one read is not enough (`is_unix`)."""

ALL_EVENTS = FLOW_EVENTS | select.EPOLLOUT
"""The same of a socket that is waited for to take bytes, too."""


class Flow:
    """One direction.

    Attributes:
        space: where its next read goes: as much of the loop's buffer as it may fill, which is `limit` bytes.
        rest: what the sink would not take yet; empty if nothing is held.
        ready: it reads when bytes come: nothing is held, and it has not ended.
        split: something ends a read before all is read: the source's end or failure, or urgent data (tcp(7)), which
            both paths leave out, or what a Unix socket has. So this direction reads until there is nothing.
        ended: nothing more is moved this way.
        armed: the loop has been told to hear when the sink takes bytes again.
        events: what the loop is to tell of the source.
        twin: the other direction; there is none once the pair is done.
    """

    __slots__ = (
        "armed",
        "counters",
        "ended",
        "events",
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

    twin: Flow

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
        self.split = is_unix(source)
        self.ended = False
        self.armed = False
        self.events = UNIX_EVENTS if self.split else FLOW_EVENTS


class Pair:
    """Two connections that are one to their users.

    Attributes:
        state: what the relay has come to.
        done: it has ended.
        task: waits for that.
        on_end: called at that instead, at the end of the loop's turn, until a task waits; it closes both sockets. Tasks
            that it wakes go on at once if the relay failed; after a clean end, it is only by `RelayLoop.finish` that
            they do.
    """

    __slots__ = ("_flows", "done", "fds", "on_end", "state", "task")

    def __init__(self, flows: Flows, state: RelayState, fds: tuple[int, int]) -> None:
        self._flows = flows
        self.state = state
        self.fds = fds
        self.done = False
        self.task: trio.lowlevel.Task | None = None
        self.on_end: Callable[[], None] | None = None

    async def join(self) -> RelayResult:
        """Wait for the end. Cancellation is the end, too."""
        self.on_end = None
        if not self.done:
            self.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abandon)
        return self.state.result()

    def _abandon(self, _: object) -> trio.lowlevel.Abort:
        self.task = None
        self._flows._remove(self)
        return trio.lowlevel.Abort.SUCCEEDED


class Flows:
    """The directions under way that share an epoll instance and a buffer."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._flows: dict[int, Flow] = {}
        """By the file descriptor of a socket: the direction that reads from it, whose twin writes to it."""
        self._again: dict[Flow, None] = {}
        """The flows that have gone on for long enough, and are served once others were; each once."""
        self._view = _buffer(LARGEST)
        self._first = self._view[:FIRST]
        self._left = TURN_BYTES
        """Bytes that large reads may still move in this turn."""
        self.held = 0
        """Bytes that are held for sinks, in all."""
        self._now = 0.0
        """When the events that are served now were told, by Trio's clock."""

    @abstractmethod
    def _finish(self, pair: Pair) -> None:
        """Both directions have ended, or one side has failed; it may be called more than once."""

    def _make(self, pair: Pair, client: socket.socket, upstream: socket.socket) -> tuple[Flow, Flow]:
        """Both directions: from the client, and back."""
        there = Flow(pair, "client", client, upstream, self._first)
        back = Flow(pair, "upstream", upstream, client, self._first)
        there.twin, back.twin = back, there
        client_fd, upstream_fd = pair.fds
        self._flows[client_fd] = there
        self._flows[upstream_fd] = back
        return there, back

    def _remove(self, pair: Pair) -> None:
        # The sockets stay registered until their holder closes them: an event of one that is not in the table is
        # passed over, and comes once.
        pair.done = True
        for fd in pair.fds:
            flow = self._flows.pop(fd, None)
            if flow is not None:
                self._drop_rest(flow)
                # Otherwise it would take the garbage collector to free them, whose pauses stop all traffic.
                del flow.twin

    def _serve(self, flow: Flow) -> None:
        if flow.pair.done:
            return
        try:
            self._move(flow)
        except Exception:  # noqa: BLE001 - see `_fault`
            self._fault(flow)

    def _fault(self, flow: Flow) -> None:
        """In the place of an exception: a fault of ours in one relay must not take Trio's sleep from all others."""
        _log.exception("relay failed by a fault in the proxy")
        flow.pair.state.fail(flow.side, errno.EIO)
        self._finish(flow.pair)

    def _move(self, flow: Flow) -> None:
        """Move what there is to move one way, or as much as one read gives."""
        if flow.rest:
            self._send_rest(flow)
        if self._left <= 0 and flow.limit > FIRST:
            # Others have had as much as there is for all in this turn.
            self._again[flow] = None
            return
        left = READS
        while flow.ready:
            size = -1
            try:
                size = flow.receive(flow.space)
                sent = flow.send(self._view[:size]) if size else 0
            except OSError as error:
                self._stopped(flow, size, error)
                return
            if size > FIRST:
                self._left -= size
            if not 0 < size == sent < flow.limit:
                self._after(flow, size, sent)
                return
            self._count(flow, sent)
            if not flow.split:
                return
            left -= 1
            if not left:
                # A source that goes on and on has its next turn when others had theirs.
                self._again[flow] = None
                return

    def _count(self, flow: Flow, sent: int) -> None:
        if not sent:
            return
        counters = flow.counters
        counters.last_activity = self._now
        if flow.outward:
            counters.client_to_upstream += sent
        else:
            counters.upstream_to_client += sent

    def _stopped(self, flow: Flow, size: int, error: OSError) -> None:
        """A read failed, or the write of the `size` bytes that it gave, if it is not -1."""
        if isinstance(error, BlockingIOError):
            if size > 0:
                self._hold(flow, 0, size)
        elif size < 0:
            flow.pair.state.fail(flow.side, error.errno or errno.EIO)
            self._finish(flow.pair)
        else:
            self._sink_failed(flow, error)

    def _after(self, flow: Flow, size: int, sent: int) -> None:
        """What comes after a read that gave the source's end, or more than the sink took, or all that it may."""
        self._count(flow, sent)
        if not size:
            self._end(flow)
        elif sent < size:
            self._hold(flow, sent, size)
        else:
            if size < LARGEST and self.held < HELD_MOST:
                flow.limit = min(2 * size, LARGEST)
                flow.space = self._view[: flow.limit]
            self._again[flow] = None

    def _hold(self, flow: Flow, sent: int, size: int) -> None:
        """Keep what the sink did not take of a read."""
        # A copy of its own, for the buffer belongs to all.
        flow.rest = memoryview(bytes(self._view[sent:size]))
        flow.ready = False
        flow.space = self._first
        flow.limit = len(self._first)
        before, self.held = self.held, self.held + size - sent
        if before < HELD_MOST <= self.held:
            self._set_first(SCANT)
        self._arm(flow)

    def _let_go(self, size: int) -> None:
        """Note that so many bytes are held no longer."""
        before, self.held = self.held, self.held - size
        if before > HELD_MOST // 2 >= self.held and len(self._first) == SCANT:
            self._set_first(FIRST)

    def _drop_rest(self, flow: Flow) -> None:
        if flow.rest:
            self._let_go(len(flow.rest))
            flow.rest = b""

    def _set_first(self, size: int) -> None:
        """How much a direction reads at first, from now on and of those that there are."""
        self._first = self._view[:size]
        for flow in self._flows.values():
            flow.space = self._first
            flow.limit = size

    def _send_rest(self, flow: Flow) -> None:
        try:
            sent = flow.send(flow.rest)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._sink_failed(flow, error)
            return
        self._count(flow, sent)
        self._let_go(sent)
        if sent == len(flow.rest):
            flow.rest = b""
            flow.ready = True
        else:
            flow.rest = memoryview(flow.rest)[sent:]
            flow.ready = False
            self._arm(flow)

    def _arm(self, flow: Flow) -> None:
        """Hear when the sink takes bytes again. Most sinks are never full, and their sockets make no such events.

        Each time anew: that makes an event of a sink that takes bytes already, which a look at its edges alone misses.
        """
        flow.armed = True
        # While the relay begins the sink is not there yet, and is registered with this later. ENOENT says so.
        with suppress(FileNotFoundError):
            self._epoll.modify(flow.sink.fileno(), flow.twin.events | select.EPOLLOUT)

    def _end(self, flow: Flow) -> None:
        """The source's end: pass it on."""
        flow.ended = True
        flow.ready = False
        state = flow.pair.state
        if state.failed is None:
            # Otherwise the source died while the other direction wrote to it: its last bytes end here, not its stream.
            state.first_end = state.first_end or flow.side
            if flow.twin.ended and flow.pair.on_end is not None:
                # Both sides have ended, and are closed at the end of this turn, which tells the sink as much.
                self._finish(flow.pair)
                return
            try:
                flow.sink.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._sink_failed(flow, error)
                return
        if flow.twin.ended:
            self._finish(flow.pair)

    def _sink_failed(self, flow: Flow, error: OSError) -> None:
        """The sink is dead. What it sent before is still delivered, so the other direction goes on to its end."""
        flow.ended = True
        flow.ready = False
        self._drop_rest(flow)
        flow.pair.state.fail(flow.twin.side, error.errno or errno.EIO)
        # A dead socket gives what it received and then its end. Should this one be alive after all (the system had no
        # memory for it), it is made to do the same.
        with suppress(OSError):
            flow.sink.shutdown(socket.SHUT_RD)
        if flow.twin.ended:
            self._finish(flow.pair)
        else:
            self._again[flow.twin] = None


def _buffer(size: int) -> memoryview:
    """Memory whose place in its pages makes copies into it and out of it fast.

    A copy in the kernel takes four times as long if its target lies 16 bytes further in a page than its source (AMD's
    `rep movsb`). The kernel's own buffers mostly begin with a page, and large blocks of malloc 16 bytes into one.
    """
    middle = mmap.PAGESIZE // 2
    return memoryview(mmap.mmap(-1, middle + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[middle:]
