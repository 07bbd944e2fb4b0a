"""A task that waits until it is wanted, by another task or from within the relay's loop."""

from __future__ import annotations

import trio
from trio.lowlevel import Abort, checkpoint, current_task, reschedule, wait_task_rescheduled

from meshlocal.net.relay_loop import RelayLoop


class Wakeup:
    """What one task waits for, again and again; wanted before it waits, it does not wait at all.

    An event of Trio's, set where Trio is about to sleep, would be noticed only once it wakes.

    Args:
        loop: that the task may be wanted from; None if there is none.

    Attributes:
        task: that waits now.
    """

    __slots__ = ("_loop", "_wanted", "task")

    def __init__(self, loop: RelayLoop | None) -> None:
        self._loop = loop
        self._wanted = False
        self.task: trio.lowlevel.Task | None = None

    def set(self) -> None:
        """Have the task go on."""
        if self.task is None:
            self._wanted = True
        elif self._loop is not None:
            # It is told in time, and once: until then it counts as one that waits.
            if not self._wanted:
                self._wanted = True
                self._loop.finish(self)
        else:
            reschedule(self.task)
            self.task = None

    async def wait(self) -> None:
        """Wait until it is wanted."""
        if self._wanted:
            self._wanted = False
            await checkpoint()
            return
        self.task = current_task()
        try:
            await wait_task_rescheduled(self._abandon)
        finally:
            self._wanted = False

    def _abandon(self, _: object) -> Abort:
        self.task = None
        return Abort.SUCCEEDED
