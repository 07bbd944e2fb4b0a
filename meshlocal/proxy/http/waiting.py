"""How those who wait for an instance are reminded of the time, at little cost while the instance is quick.

To begin a cancel scope for each wait, or to watch the client, would cost more than all else that a small request takes.
So one task looks a hundred times a second at who has waited for `SLOW`, and tells them. Few get that far, and they
can be told once more, at a time that they choose. The task sleeps while nobody waits, and from one look on in which
nobody had begun to (P3); with a request or more in each hundredth of a second it goes on looking, as it costs more to
wake it than to let it look.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import count
from typing import Protocol

import trio

from meshlocal.client.connecting import SLOW

_MANY = 1024
"""Reminders, from which on those that were called off are thrown away before their time."""


class Waiter(Protocol):
    """Who waits for an instance. None of these may block."""

    def on_slow(self) -> None:
        """Called once the waiter has waited for `SLOW`."""
        ...

    def on_deadline(self) -> None:
        """The time has come that it asked to be told of."""
        ...


class Reminder:
    """A time that a waiter is to be told of.

    It holds the waiter for no longer than that waits: what waited for seconds may have megabytes behind it.
    """

    __slots__ = ("waiter",)

    def __init__(self, waiter: Waiter) -> None:
        self.waiter: Waiter | None = waiter

    def call_off(self) -> None:
        """Let go of the waiter: it is told of nothing any more."""
        self.waiter = None


class Patience:
    """Tells those who wait how late it is.

    Attributes:
        waiting: since when each one waits, by trio.current_time(). They add and remove themselves.
    """

    __slots__ = ("_added", "_asked", "_many", "_numbers", "_rested", "_resting", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[Waiter, float] = {}
        self._asked: list[tuple[float, int, Reminder]] = []
        self._many = _MANY
        self._numbers = count()
        self._added = False
        self._resting = False
        self._rested = trio.Event()

    def add(self, waiter: Waiter, now: float) -> None:
        """Note that a waiter waits since `now`."""
        self.waiting[waiter] = now
        self._added = True
        if self._resting:
            self._wake()

    def ask(self, time: float, waiter: Waiter) -> Reminder:
        """Have a waiter that was told once be told of a time, too."""
        if len(self._asked) >= self._many:
            self._asked = [asked for asked in self._asked if asked[2].waiter is not None]
            heapify(self._asked)
            self._many = max(_MANY, 2 * len(self._asked))
        reminder = Reminder(waiter)
        heappush(self._asked, (time, next(self._numbers), reminder))
        if self._resting:
            self._wake()
        return reminder

    def _wake(self) -> None:
        self._resting = False
        # Not at once: this may be called where Trio is about to sleep, and would not look again before it does.
        trio.lowlevel.current_trio_token().run_sync_soon(self._rested.set)

    async def run(self) -> None:
        """Tell the time, until cancelled."""
        rests = not self.waiting
        while True:
            if rests:
                self._rested = trio.Event()
                self._resting = True
                with trio.move_on_at(self._asked[0][0] if self._asked else float("inf")):
                    await self._rested.wait()
                self._resting = False
            else:
                await trio.sleep(SLOW)
            now = trio.current_time()
            while self._asked and (self._asked[0][2].waiter is None or self._asked[0][0] <= now):
                waiter = heappop(self._asked)[2].waiter
                if waiter is not None:
                    waiter.on_deadline()
            added, self._added = self._added, False
            self._tell_waiting(now - SLOW)
            rests = not (added or self.waiting)

    def _tell_waiting(self, limit: float) -> None:
        for waiter, since in list(self.waiting.items()):
            if since > limit:
                return
            # One that was told may have ended another's wait.
            if self.waiting.pop(waiter, None) is not None:
                waiter.on_slow()
