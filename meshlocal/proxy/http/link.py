"""One HTTP/2 connection of the proxy's: its bytes, in the relay's loop or in a task, and what its streams are owed."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol

import trio
from trio.lowlevel import checkpoint

from meshlocal.net.pipe import Pipe, finish_writing
from meshlocal.net.relay_loop import RelayLoop
from meshlocal.net.sockets import is_unix
from meshlocal.net.wakeup import Wakeup
from meshlocal.wire.http2 import ErrorCode, Event, Http2Error, Http2Protocol

CHUNK = 65_536
"""Bytes read at once."""

TURN = 262_144
"""Bytes that are read in a row before other connections get their turn."""

WRITE = 262_144
"""Bytes taken from the engine at once."""

LAST_WORDS = 1.0
"""Seconds that a peer has, when its connection ends, to take what is left and to end its own side."""

STOPPED = "stopped"
"""Why a connection ends with the proxy."""

_ALIVE = b"mlalive."
_ENDING = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class Passing(Protocol):
    """A stream with bytes on their way out on a link."""

    id: int

    def accepted(self, left: int) -> None:
        """All but `left` bytes of what was queued went out."""
        ...


class Link:
    """One HTTP/2 connection. Its class says what events mean, and what its end does.

    Args:
        pipe: its bytes; closed or cut by `run`.
        protocol: its frames.
        loop: the relay's loop, which moves its bytes if they are a socket's; None if there is none.
        window: bytes of one stream that the peer may send before it is given credit.

    Attributes:
        pipe: as given.
        protocol: as given.
        over: it takes nothing more, and ends.
        problem: why, in a few words; empty for an end in good order.
        late: what came and has its turn yet to come; nothing is read before.
        owing: streams with bytes on their way out.
        heard: when something last came, by trio.current_time().
        pinged: when a PING was sent that nothing was heard since; 0: none was.
        writes: how often something was sent.
    """

    __slots__ = (
        "_dirty",
        "_eof",
        "_fd",
        "_given",
        "_handled",
        "_loop",
        "_more",
        "_room",
        "_sending",
        "_settling",
        "_short_is_all",
        "_tell",
        "_time",
        "_unsent",
        "_unsettled",
        "_wakes",
        "_wakeup",
        "heard",
        "late",
        "over",
        "owing",
        "pinged",
        "pipe",
        "problem",
        "protocol",
        "writes",
    )

    def __init__(self, pipe: Pipe, protocol: Http2Protocol, loop: RelayLoop | None, window: int) -> None:
        self.pipe = pipe
        self.protocol = protocol
        self._loop = loop if pipe.plain is not None else None
        self._time = self._loop.time if self._loop is not None else trio.current_time
        # Its tasks may be wanted from within the loop all the same: by the other ends of its streams.
        self._wakes = loop
        self._wakeup = Wakeup(loop)
        self._fd = pipe.plain.fileno() if pipe.plain is not None else -1
        # Behind a short read of a socket there is nothing, and more makes another event (epoll(7), Q9).
        self._short_is_all = pipe.plain is not None and not is_unix(pipe.plain)
        self._unsent: bytes | memoryview = b""
        self._dirty = False
        self._more = False
        self._eof = False
        self._settling = False
        self._unsettled = False
        self._sending: trio.CancelScope | None = None
        self._room: trio.Event | None = None
        self._given = 0
        self._handled = 0
        self._tell = min(window // 8, 8192)
        self.over = False
        self.problem = ""
        self.late: Sequence[Event] = ()
        self.owing: dict[Passing, None] = {}
        self.heard = self._time()
        self.pinged = 0.0
        self.writes = 0

    # What its class says.

    handlers: ClassVar[dict[type[Event], Callable[[Any, Any], None]]] = {}
    """What is called with the link for each kind of event. May not wait."""

    batch: ClassVar[int] = 1024
    """Events that are handled in a row before other connections get their turn."""

    def on_caught_up(self) -> None:
        """What was late was handled. May not wait."""

    def on_over(self) -> None:
        """It is over: end what its streams are for. May not wait."""
        raise NotImplementedError

    # What its streams call.

    def give(self, stream_id: int, size: int) -> None:
        """Give the peer credit for bytes of a stream. It is told now and then: the engine saves up as well."""
        self.protocol.acknowledge(stream_id, size)
        self._given += size
        if self._given >= self._tell:
            self._given = 0
            self.touch()

    def touch(self) -> None:
        """There may be something to send: it goes out at the end of the turn."""
        if not self._dirty:
            self._dirty = True
            if self._loop is not None:
                self._loop.at_end(self.flush)
            else:
                self._wakeup.set()

    def flush(self) -> None:
        """Send what there is, as far as the peer takes it, and give credit for what went out."""
        self._dirty = False
        if self._unsent or (self.over and not self.protocol.finished):
            return
        data = self.protocol.data_to_send(WRITE)
        if data:
            self.writes += 1
            try:
                sent = self.pipe.write(data)
            except OSError as error:
                self.lose(_why(error))
                return
            if sent < len(data):
                # The task waits for room.
                self._unsent = memoryview(data)[sent:]
                self._wakeup.set()
                return
            if len(data) >= WRITE:
                # The end of what was taken may stand within the frames of a stream.
                self.touch()
                return
        if self.owing:
            self._settle()

    def _settle(self) -> None:
        """Tell streams what went out. One that is told may send, and so come here again: then it is gone on with."""
        self._unsettled = True
        if self._settling:
            return
        self._settling = True
        waiting = self.protocol.waiting
        try:
            while self._unsettled:
                self._unsettled = False
                for stream in list(self.owing):
                    if stream in self.owing:
                        left = waiting(stream.id)
                        if not left:
                            del self.owing[stream]
                        stream.accepted(left)
        finally:
            self._settling = False

    def finish(self, problem: str = "", code: int = ErrorCode.NO_ERROR, last_stream_id: int = 0) -> None:
        """End it, and say so to the peer."""
        if not self.over:
            self.protocol.send_goaway(last_stream_id, code, problem.encode("ascii", "replace"))
            self._end(problem)

    def lose(self, problem: str) -> None:
        """End it: its peer is gone, or hears nothing any more."""
        if not self.over:
            self._unsent = b""
            self._eof = True
            self._end(problem)

    def _end(self, problem: str) -> None:
        self.over = True
        self.late = ()
        self.problem = problem
        self.on_over()
        self._wakeup.set()
        if self._sending is not None:
            # Not at once: Trio may be about to sleep, and would not look again before it does.
            trio.lowlevel.current_trio_token().run_sync_soon(self._sending.cancel)

    def keep_alive(self, now: float, interval: float, timeout: float) -> None:
        """See that the peer is there: a PING when nothing came for `interval` seconds, and the end when nothing comes
        for `timeout` seconds after it (RFC 9113, 6.7)."""
        if self.pinged:
            if self.pinged + timeout <= now:
                self.lose(f"nothing came for {timeout:g} s after a PING")
        elif self.heard + interval <= now:
            self.pinged = now
            self.protocol.ping(_ALIVE)
            self.touch()

    @property
    def lost(self) -> bool:
        """Whether its peer is gone, or hears nothing any more."""
        return self._eof

    # Reading.

    def on_event(self, mask: int) -> None:
        """The socket has an event, or may have more than was read."""
        self._handled = 0
        for _ in range(TURN // CHUNK):
            if self.over:
                return
            if self._unsent:
                # A peer that takes nothing is not heard either: what it asks for would wait here without bound (P2).
                self._more = True
                return
            if self._handled >= self.batch:
                break
            if self.late:
                self._handle(self.late)
                if not self.late:
                    self.on_caught_up()
                continue
            try:
                data = self.pipe.read(CHUNK)
            except OSError as error:
                self.lose(_why(error))
                return
            if data is None:
                return
            if not data:
                self.lose("")
                return
            self.receive(data)
            if self.late:
                continue
            if len(data) < CHUNK and not mask & _ENDING and self._short_is_all:
                return
        self._more = True
        self._wakeup.set()

    def receive(self, data: bytes) -> None:
        """Take bytes that came."""
        self.heard = self._time()
        self.pinged = 0.0
        protocol = self.protocol
        try:
            events = protocol.receive(data)
        except Http2Error as error:
            self._break(error)
            return
        self._handle(events)
        if protocol.unsent:
            self.touch()

    def _handle(self, events: Sequence[Event]) -> None:
        self.late = ()
        if len(events) > self.batch:
            self.late, events = events[self.batch :], events[: self.batch]
        self._handled += len(events)
        handlers = self.handlers
        for event in events:
            handler = handlers.get(type(event))
            if handler is not None and not self.over:
                handler(self, event)

    def _break(self, error: Http2Error) -> None:
        """The peer broke the rules: the engine has said so to it."""
        if not self.over:
            self._end(f"{ErrorCode.name_of(error.error_code)}: {error}")

    # Its task.

    async def serve(self) -> None:
        """Move its bytes until it is over, then close it."""
        clean = False
        try:
            await self._serve()
            clean = True
        finally:
            if not self.over:
                self.lose(STOPPED)
            self.close(clean=clean)

    def close(self, *, clean: bool) -> None:
        """Close the connection; cut it if its peer is gone, or did not come to hear of the end."""
        if self._loop is not None:
            self._loop.handlers.pop(self._fd, None)
        if clean and not self._eof:
            self.pipe.close()
        else:
            self.pipe.abort()

    async def _serve(self) -> None:
        loop = self._loop
        if loop is not None:
            assert self.pipe.plain is not None
            loop.watch(self.pipe.plain)
            loop.handlers[self._fd] = self.on_event
            # What came while nobody listened makes no event.
            loop.as_turn(partial(self.on_event, 0))
            self.touch()
            await self._attend()
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read)
                self.touch()
                await self._attend()
                nursery.cancel_scope.cancel()
        if not self._eof:
            with trio.move_on_after(LAST_WORDS):
                await self._say_goodbye()

    async def _read(self) -> None:
        while not self.over:
            self.on_event(0)
            if not self._more:
                await self.pipe.wait_readable()
            elif self._unsent:
                self._room = trio.Event()
                await self._room.wait()
            else:
                self._more = False
                await checkpoint()

    async def _attend(self) -> None:
        """Do what has to wait."""
        while not self.over:
            await self._wakeup.wait()
            if self._loop is None and self._dirty:
                self.flush()
            if self._unsent:
                with trio.CancelScope() as self._sending:
                    await self._send_rest()
                self._sending = None
                self.flush()
                if self._room is not None and not self._unsent:
                    self._room.set()
            if self._loop is not None and self._more:
                self._more = False
                self._loop.as_turn(partial(self.on_event, _ENDING))

    async def _say_goodbye(self) -> None:
        """Send what is left, and read on for a moment: to close with bytes unread would reset the connection, and its
        peer might lose what was said last."""
        if self._loop is not None:
            self._loop.handlers.pop(self._fd, None)
        await self._send_rest()
        self._unsent = self.protocol.data_to_send()
        await self._send_rest()
        try:
            await finish_writing(self.pipe)
            while self.pipe.read(CHUNK) != b"":
                await self.pipe.wait_readable()
        except OSError:
            return  # it is gone, and wanted no more

    async def _send_rest(self) -> None:
        while self._unsent:
            await self.pipe.wait_writable()
            if self._eof:
                return
            try:
                self._unsent = memoryview(self._unsent)[self.pipe.write(self._unsent) :]
            except OSError as error:
                self._unsent = b""
                self._eof = True
                self.lose(_why(error))


def _why(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
