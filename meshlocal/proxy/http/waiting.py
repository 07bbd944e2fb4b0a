"""How a task waits for an instance at little cost while the instance is quick.

A cancel scope and a nursery that watches the client cost more than all else that a small request takes. So a task
begins to wait with neither, and one task for all looks a hundred times a second at those that have waited for
`PATIENCE`: they are woken, and then wait on with both.
"""

from __future__ import annotations

from typing import Protocol

import trio

from meshlocal.client.connecting import PATIENCE

_TICKS_AT_REST = 100


class Waiter(Protocol):
    """Who waits for an instance."""

    def lose_patience(self) -> None:
        """Wake up, and wait on in another way. Does not block."""
        ...


class Patience:
    """Wakes those that have waited for `PATIENCE`.

    Attributes:
        waiting: since when each one waits, by trio.current_time(). They add and remove themselves.
    """

    __slots__ = ("_rested", "_resting", "waiting")

    def __init__(self) -> None:
        self.waiting: dict[Waiter, float] = {}
        self._resting = False
        self._rested = trio.Event()

    def add(self, waiter: Waiter, now: float) -> None:
        """Begin to wait."""
        self.waiting[waiter] = now
        if self._resting:
            self._resting = False
            self._rested.set()

    async def run(self) -> None:
        """Look at who waits, until cancelled; rests when nobody does."""
        idle = 0
        while True:
            await trio.sleep(PATIENCE)
            if not self.waiting:
                idle += 1
                if idle > _TICKS_AT_REST:
                    idle = 0
                    self._rested = trio.Event()
                    self._resting = True
                    await self._rested.wait()
                continue
            idle = 0
            limit = trio.current_time() - PATIENCE
            for waiter, since in list(self.waiting.items()):
                if since > limit:
                    break
                del self.waiting[waiter]
                waiter.lose_patience()
