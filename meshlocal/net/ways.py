"""The two directions of a relay over pipes, whatever drives them: tasks (`meshlocal.net.relay`), or the relay loop
(`meshlocal.net.pipe_pair`).

Theory of operation: that of `meshlocal.net.relay`. A direction moves what it can without a wait, and says what it waits
for then.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto

from meshlocal.net.pipe import Pipe
from meshlocal.net.relay_state import RelayState, Side
from meshlocal.net.sockets import is_unix

CHUNK = 65536
"""The most bytes that one read gives, and so the most that one direction holds."""

TURN = 4
"""Chunks' worth of bytes that one direction moves in a row before others have their turn."""

LEAST = CHUNK // 4
"""Bytes that a read counts for at least: many small records cost as much as a few large ones, and hold others up."""


class Need(Enum):
    """What a direction goes on with."""

    INPUT = auto()
    """What its source gives."""
    ROOM = auto()
    """That its sink takes more."""
    TURN = auto()
    """The turns of others."""
    NOTHING = auto()
    """It is over."""


class Way:
    """One direction: from `side` to the other.

    Args:
        source: what it reads from.
        sink: what it writes to.
        side: the source's.
        state: the relay's.
        clock: tells the time, as `trio.current_time` does.
        early: goes first: what was read of the source before.

    Attributes:
        need: what it goes on with.
        ended: its source ended its stream, and the sink was told, or will be.
        split: something ends a read before all is read, such as the source's end; it reads until there is nothing.
        is_unix: the source is a Unix socket.
        cut: its source failed, so that the other direction has nobody to write to.
    """

    __slots__ = (
        "_clock",
        "_other",
        "_rest",
        "_side",
        "_sink",
        "_source",
        "_state",
        "cut",
        "ended",
        "is_unix",
        "need",
        "split",
    )

    def __init__(
        self,
        source: Pipe,
        sink: Pipe,
        side: Side,
        state: RelayState,
        clock: Callable[[], float],
        early: bytes | bytearray = b"",
    ) -> None:
        self._source = source
        self._sink = sink
        self._side: Side = side
        self._other: Side = "upstream" if side == "client" else "client"
        self._state = state
        self._clock = clock
        self._rest: bytes | memoryview = bytes(early)
        self.ended = False
        self.need = Need.INPUT
        self.split = self.is_unix = source.plain is not None and is_unix(source.plain)
        self.cut = False

    def move(self) -> Need:
        """Move what can be moved now; `need` is what comes of it."""
        self.need = need = self._move()
        return need

    def _move(self) -> Need:
        moved = 0
        source, state = self._source, self._state
        while True:
            if self._rest:
                need = self._write()
                if need is not None:
                    return need
            if self.ended:
                return self._finish()
            if moved >= TURN * CHUNK:
                return Need.TURN
            try:
                data = source.read(CHUNK)
            except OSError as error:
                self.source_failed(error.errno or errno.EIO)
                return Need.NOTHING
            if data is None:
                return Need.INPUT
            if not data:
                if state.failed is not None:
                    # The source died while the other direction wrote to it: this is where its last bytes end, not its
                    # stream.
                    return Need.NOTHING
                state.first_end = state.first_end or self._side
                self.ended = True
                try:
                    self._sink.end()
                except OSError as error:
                    self.sink_failed(error.errno or errno.EIO)
                    return Need.NOTHING
                continue
            size = len(data)
            moved += max(size, LEAST)
            try:
                sent = self._sink.write(data)
            except OSError as error:
                self.sink_failed(error.errno or errno.EIO)
                return Need.NOTHING
            self._count(sent)
            if sent < size:
                self._rest = memoryview(data)[sent:]
            elif size < CHUNK and not self.split and not source.may_hold:
                # The source is most likely empty now: to wait at once spares a read that would say so.
                return Need.INPUT

    def _write(self) -> Need | None:
        """Go on with what the sink did not take; what for, if that is not all of it."""
        try:
            while self._rest:
                sent = self._sink.write(self._rest)
                if not sent:
                    return Need.ROOM
                self._count(sent)
                self._rest = memoryview(self._rest)[sent:]
        except OSError as error:
            self.sink_failed(error.errno or errno.EIO)
            return Need.NOTHING
        self._rest = b""
        return None

    def _finish(self) -> Need:
        """Go on with the end that was passed on."""
        try:
            if self._sink.is_unsent:
                self._sink.write(b"")
            return Need.ROOM if self._sink.is_unsent else Need.NOTHING
        except OSError as error:
            self.sink_failed(error.errno or errno.EIO)
            return Need.NOTHING

    def _count(self, sent: int) -> None:
        if sent:
            counters = self._state.counters
            if self._side == "client":
                counters.client_to_upstream += sent
            else:
                counters.upstream_to_client += sent
            counters.last_activity = self._clock()

    def source_failed(self, number: int) -> None:
        """Its source is dead both ways, for a reason by its number."""
        self._state.fail(self._side, number)
        self.cut = True
        self.need = Need.NOTHING

    def sink_failed(self, number: int) -> None:
        """Its sink is dead. What that sent before is still delivered, so the other direction goes on to its end."""
        self._state.fail(self._other, number)
        self._rest = b""
        self.need = Need.NOTHING
        # A dead socket gives what it received and then its end. Should this one be alive after all (the system
        # had no memory for it), it is made to do the same.
        with suppress(OSError):
            self._sink.stop_reading()
