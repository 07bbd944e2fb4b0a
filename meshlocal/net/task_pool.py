"""Tasks that are kept: each serves one job after another, and waits in between.

To start a task and to end it costs more than to let one go on that waits: a coroutine, a context, a place in a nursery.
And who was given a job that somebody else finished meanwhile, as the relay loop does with short connections, has not
even to be woken for it.

A task that waits is in its nursery as one that works: a nursery that is cancelled ends it. But one that waits keeps its
nursery open, too, so tasks are kept only for as long as `TaskPool.keeping` is entered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import trio

from meshlocal.net.relay_loop import current_loop

Job = TypeVar("Job")


class KeptTask(Generic[Job]):
    """A task that waits, for a job or with one: a `meshlocal.net.relay_loop.Sleeper`.

    Attributes:
        job: what it was given, and has not begun yet.
    """

    __slots__ = ("job", "task")

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.job: Job | None = None


class TaskPool(Generic[Job]):
    """Tasks for jobs of a kind. For use where there is a relay loop.

    Args:
        serve: does a job to its end; what it raises ends the task, as in any nursery.
        most: how many tasks wait at most.
    """

    def __init__(self, serve: Callable[[Job], Awaitable[None]], most: int) -> None:
        self._serve = serve
        self._most = most
        self._idle: list[KeptTask[Job]] = []
        self._waiting = 0
        self._keepers = 0

    def __len__(self) -> int:
        """How many wait for a job."""
        return len(self._idle)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """While this is entered, once or several times over, tasks are kept. At its end, those that have no job end."""
        self._keepers += 1
        try:
            yield
        finally:
            self._keepers -= 1
            if not self._keepers:
                idle, self._idle = self._idle, []
                for kept in idle:
                    _resume(kept)

    def start(self, nursery: trio.Nursery, job: Job) -> None:
        """Start a task for a job. It will look for further ones, which may be of other nurseries, in this one."""
        nursery.start_soon(self._run, job)

    def take(self, job: Job) -> KeptTask[Job] | None:
        """A task for the job, in the nursery that it was started in; None if none waits for one.

        It begins when it goes on (`RelayLoop.finish`, `RelayLoop.defer`), or when its nursery is cancelled, unless it
        is given back before.
        """
        if not self._idle:
            return None
        kept = self._idle.pop()
        kept.job = job
        return kept

    def give_back(self, kept: KeptTask[Job]) -> None:
        """A task that was taken need not begin: its job is done. From the relay loop only."""
        loop = current_loop.get()
        assert loop is not None
        loop.recall(kept)
        kept.job = None
        if kept.task is None:
            return  # it goes on already, and finds out itself
        if self._keepers:
            self._idle.append(kept)
        else:
            loop.finish(kept)

    async def _run(self, job: Job | None) -> None:
        kept: KeptTask[Job] = KeptTask()
        while True:
            if job is not None:
                await self._serve(job)
                job = None  # what it held is not to wait, too
            if not self._keepers or self._waiting >= self._most:
                return
            job = await self._next(kept)

    async def _next(self, kept: KeptTask[Job]) -> Job | None:
        """Wait for a job; None: there are no more, or this one is done."""

        def abort(_: object) -> trio.lowlevel.Abort:
            if kept.job is None:
                self._idle.remove(kept)
                return trio.lowlevel.Abort.SUCCEEDED
            # It has something to bring to an end, and learns there that it was cancelled.
            loop = current_loop.get()
            if loop is not None:
                loop.recall(kept)
            _resume(kept)
            return trio.lowlevel.Abort.FAILED

        kept.task = trio.lowlevel.current_task()
        self._idle.append(kept)
        self._waiting += 1
        try:
            await trio.lowlevel.wait_task_rescheduled(abort)
        finally:
            self._waiting -= 1
        job, kept.job = kept.job, None
        return job


def _resume(kept: KeptTask[Job]) -> None:
    task, kept.task = kept.task, None
    assert task is not None
    trio.lowlevel.reschedule(task)
