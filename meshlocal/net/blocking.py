"""Functions that may block, such as a look at a file, away from the event loop (behaviour rule P1).

A file system that hangs (a network file system whose server is away, a FUSE daemon that stopped) holds whoever asks
it, for as long as it likes, and no signal ends that. So it is asked from a thread, by one call at a time, and its
caller waits for no longer than a limit. The thread that hangs is left to itself; until it comes back, further calls
fail at once instead of hanging beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, Unpack

import anyio
import anyio.to_thread

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

LIMIT = 10.0
"""Seconds that a call may take, unless its caller says otherwise: more than any file system that works takes."""


class BlockedError(TimeoutError):
    """A call did not come back in time, or one before it has not come back yet."""


class Blocking:
    """Runs functions that may block in a thread, one after the other.

    Args:
        what: who is asked, for the error: `the file system`.
        limit: seconds that a call may take.
    """

    def __init__(self, what: str = "the file system", limit: float = LIMIT) -> None:
        self._what = what
        self._limit = limit
        self._lock = anyio.Lock()
        self._hanging = False

    @property
    def hanging(self) -> bool:
        """A call was given up that has not come back yet."""
        return self._hanging

    async def run(self, function: Callable[[Unpack[Ts]], T], *args: *Ts, waits: float = 0.0) -> T:
        """Call the function in a thread; returns what it returns, raises what it raises.

        When the caller is cancelled, the function goes on by itself, and what it returns is dropped.

        Args:
            function: what may block.
            args: its arguments.
            waits: seconds for which the function itself waits, beside what it is held up for.

        Raises:
            BlockedError: it did not come back in time, or one that was given up has not come back yet.
        """
        async with self._lock:
            if self._hanging:
                raise BlockedError(f"{self._what} still does not answer")
            with anyio.move_on_after(self._limit + waits):
                return await anyio.to_thread.run_sync(self._call, function, args, abandon_on_cancel=True)
        raise BlockedError(f"{self._what} does not answer within {self._limit:g} s")

    def _call(self, function: Callable[[Unpack[Ts]], T], args: tuple[*Ts]) -> T:
        # In the thread. A call that comes back, however late, makes room for the next.
        self._hanging = True
        try:
            return function(*args)
        finally:
            self._hanging = False
