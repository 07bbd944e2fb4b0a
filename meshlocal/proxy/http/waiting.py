"""How those who wait for an instance are reminded of the time, at little cost while the instance is quick.

To begin a cancel scope for each wait, or to watch the client, would cost more than all else that a small request takes.
So one task looks a hundred times a second at who has waited for `PATIENCE`, and tells them. Few get that far, and they
can be told once more, at a time that they choose. While nobody waits, the task sleeps.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import count
from typing import Protocol

import trio

from meshlocal.client.connecting import PATIENCE

_TICKS_AT_REST = 100
_MANY = 4096


class Waiter(Protocol):
    """Who waits for an instance. None of these may block."""

    def lose_patience(self) -> None:
        """It has waited for `PATIENCE`."""
        ...

    def waits_for(self, what: object) -> bool:
        """Whether it still waits for what it asked to be told of."""
        ...

    def lose_hope(self) -> None:
        """The time has come that it asked to be told of."""
        ...


class Patience:
    """Tells those who wait how late it is.

    Attributes:
        waiting: since when each one waits, by trio.current_time(). They add and remove themselves.
    """

    __slots__ = ("_asked", "_many", "_numbers", "_rested", "_resting", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[Waiter, float] = {}
        self._asked: list[tuple[float, int, Waiter, object]] = []
        self._many = _MANY
        self._numbers = count()
        self._resting = False
        self._rested = trio.Event()

    def add(self, waiter: Waiter, now: float) -> None:
        """Begin to wait."""
        self.waiting[waiter] = now
        if self._resting:
            self._resting = False
            # Not at once: this may be called where Trio is about to sleep, and would not look again before it does.
            trio.lowlevel.current_trio_token().run_sync_soon(self._rested.set)

    def ask(self, time: float, waiter: Waiter, what: object) -> None:
        """Have a waiter that lost its patience told of a time, if it waits for the same then."""
        if len(self._asked) >= self._many:
            self._asked = [asked for asked in self._asked if asked[2].waits_for(asked[3])]
            heapify(self._asked)
            self._many = max(_MANY, 2 * len(self._asked))
        heappush(self._asked, (time, next(self._numbers), waiter, what))

    async def run(self) -> None:
        """Tell the time, until cancelled."""
        idle = 0
        while True:
            await trio.sleep(PATIENCE)
            now = trio.current_time()
            while self._asked and self._asked[0][0] <= now:
                _, _, waiter, what = heappop(self._asked)
                if waiter.waits_for(what):
                    waiter.lose_hope()
            if self.waiting:
                idle = 0
                self._tell_waiting(now - PATIENCE)
                continue
            idle += 1
            if idle > _TICKS_AT_REST:
                idle = 0
                self._rested = trio.Event()
                self._resting = True
                with trio.move_on_at(self._asked[0][0] if self._asked else float("inf")):
                    await self._rested.wait()
                self._resting = False

    def _tell_waiting(self, limit: float) -> None:
        for waiter, since in list(self.waiting.items()):
            if since > limit:
                return
            # One that was told may have ended another's wait.
            if self.waiting.pop(waiter, None) is not None:
                waiter.lose_patience()
