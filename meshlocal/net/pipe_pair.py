"""A relay over pipes in the relay loop: as `meshlocal.net.flows` does it for plain sockets, for what is TLS on a side.

Both sockets are registered once, edge-triggered; an event lets the direction go on that waits for it. What pipes hold
makes no event, so that a direction reads until its source has nothing more (`Pipe.may_hold`).
"""

from __future__ import annotations

import errno
import logging
import select
from functools import partial

import trio

from meshlocal.net.pipe import Pipe
from meshlocal.net.relay_loop import RelayLoop
from meshlocal.net.relay_state import RelayCounters, RelayResult, RelayState
from meshlocal.net.ways import Need, Way

_log = logging.getLogger(__name__)

_READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_WRITABLE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
_SPLIT = select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class PipePair:
    """Two connections that are one to their users, until both ended or one failed.

    Args:
        loop: serves it.
        client, upstream: the connections, each over a socket that is registered nowhere else.
        counters: what is moved.
        early: what was read of the client already.

    Attributes:
        task: waits for its end.
    """

    __slots__ = ("_done", "_loop", "_numbers", "_state", "_token", "_ways", "task")

    def __init__(
        self, loop: RelayLoop, client: Pipe, upstream: Pipe, counters: RelayCounters, early: bytes | bytearray
    ) -> None:
        self._loop = loop
        self._state = state = RelayState(counters)
        there = Way(client, upstream, "client", state, loop.time, early)
        back = Way(upstream, client, "upstream", state, loop.time)
        self._ways = there, back
        self._numbers = client.fileno(), upstream.fileno()
        self._token = trio.lowlevel.current_trio_token()
        self._done = False
        self.task: trio.lowlevel.Task | None = None

    async def run(self) -> RelayResult:
        """Relay, and wait for the end; cancellation is the end, too. The pipes stay the caller's."""
        there, back = self._ways
        loop = self._loop
        try:
            # What they hold already makes no event.
            for way in self._ways:
                self._go(way)
            if not self._done:
                for number, reading, writing in zip(self._numbers, (there, back), (back, there), strict=True):
                    loop.attend(number, partial(self._on_event, reading, writing), partial(self._on_closing, reading))
                self.task = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._abandon)
        finally:
            self._leave()
        return self._state.result()

    def _abandon(self, _: object) -> trio.lowlevel.Abort:
        self.task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _leave(self) -> None:
        """From here on, nothing that happens to the sockets is ours."""
        if self._done:
            # What has these numbers now may be somebody else's.
            return
        self._done = True
        for number in self._numbers:
            self._loop.neglect(number)

    def _on_event(self, reading: Way, writing: Way, mask: int) -> None:
        """Something happened to the socket that one way reads from, and the other writes to."""
        if mask & _WRITABLE and writing.need is Need.ROOM:
            self._go(writing)
        if mask & _READABLE and not self._done:
            if mask & _SPLIT:
                reading.split = True
            if reading.need is Need.INPUT:
                self._go(reading)
            elif (
                mask & select.EPOLLHUP
                and not reading.is_unix
                and (reading.ended or reading.need is Need.NOTHING)
                and writing.need is not Need.NOTHING
            ):
                # A side that had ended its stream reset its connection: what is still to be sent to it can go nowhere.
                reading.source_failed(errno.ECONNRESET)
                self._end()

    def _go(self, way: Way) -> None:
        if self._done:
            return
        try:
            way.move()
        except Exception:  # noqa: BLE001 - a fault of ours in one relay must not take Trio's sleep from all others
            _log.exception("relay failed by a fault in the proxy")
            way.source_failed(errno.EIO)
        if way.need is Need.TURN:
            # Others have theirs: Trio's tasks, and all that has an event.
            self._token.run_sync_soon(self._go_on, way)
        elif way.cut or all(each.need is Need.NOTHING for each in self._ways):
            self._end()

    def _go_on(self, way: Way) -> None:
        if not self._done and way.need is Need.TURN:
            self._go(way)

    def _on_closing(self, reading: Way) -> None:
        """A task closes the socket that one way reads from."""
        reading.source_failed(errno.EBADF)
        self._end()

    def _end(self) -> None:
        if not self._done:
            self._leave()
            if self.task is not None:
                self._loop.finish(self)
