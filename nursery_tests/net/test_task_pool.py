"""net/task_pool: a task serves one job after another, no more are kept than may be, and none outlives its nursery."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from meshlocal.net.relay_loop import DEFERRAL, RelayLoop, open_relay_loop
from meshlocal.net.task_pool import KeptTask, TaskPool


@pytest.fixture
async def loop() -> AsyncIterator[RelayLoop]:
    with open_relay_loop() as made:
        assert made is not None
        yield made


class Work:
    """What the jobs of a pool do: each is noted with the task that does it, at its beginning and at its end.

    Attributes:
        begun: the task of each job, by its name.
        cancelled: jobs that learnt of that.
        gates: a job of that name waits there.
    """

    def __init__(self, most: int = 8) -> None:
        self.pool: TaskPool[str] = TaskPool(self._serve, most)
        self.begun: dict[str, trio.lowlevel.Task] = {}
        self.ended: list[str] = []
        self.cancelled: list[str] = []
        self.gates: dict[str, trio.Event] = {}

    async def _serve(self, job: str) -> None:
        assert job not in self.begun
        self.begun[job] = trio.lowlevel.current_task()
        try:
            if job in self.gates:
                await self.gates[job].wait()
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self.cancelled.append(job)
            raise
        self.ended.append(job)

    async def idle(self, nursery: trio.Nursery, *jobs: str) -> list[trio.lowlevel.Task]:
        """As many tasks that wait for a job, after these."""
        for job in jobs:
            self.gates[job] = trio.Event()
            self.pool.start(nursery, job)
        await wait_all_tasks_blocked()
        for job in jobs:
            self.gates[job].set()
        await wait_all_tasks_blocked()
        return [self.begun[job] for job in jobs]

    def take(self, job: str) -> KeptTask[str]:
        kept = self.pool.take(job)
        assert kept is not None
        return kept


async def test_a_task_serves_one_job_after_another(loop: RelayLoop) -> None:
    work = Work()
    async with trio.open_nursery() as nursery:
        with work.pool.keeping():
            assert work.pool.take("none yet") is None
            [task] = await work.idle(nursery, "first")
            assert len(work.pool) == 1
            for job in ("second", "third"):
                loop.finish(work.take(job))
                assert len(work.pool) == 0
                await wait_all_tasks_blocked()
                assert len(work.pool) == 1
    assert work.ended == ["first", "second", "third"]
    assert set(work.begun.values()) == {task}


async def test_a_deferred_task_begins_a_little_later(loop: RelayLoop) -> None:
    """With nothing else to wake Trio."""
    work = Work()
    async with trio.open_nursery() as nursery:
        with work.pool.keeping():
            await work.idle(nursery, "first")
            before = trio.current_time()
            work.gates["second"] = trio.Event()
            loop.defer(work.take("second"))
            await trio.lowlevel.checkpoint()
            assert "second" not in work.begun
            with trio.fail_after(5):
                while "second" not in work.begun:
                    await wait_all_tasks_blocked(DEFERRAL / 10)
            assert trio.current_time() - before >= DEFERRAL * 0.9
            work.gates["second"].set()
    assert work.ended == ["first", "second"]


async def test_who_is_given_back_need_not_begin(loop: RelayLoop) -> None:
    work = Work()
    async with trio.open_nursery() as nursery:
        with work.pool.keeping():
            [task] = await work.idle(nursery, "first")
            kept = work.take("done by another")
            loop.defer(kept)
            work.pool.give_back(kept)
            assert len(work.pool) == 1
            await trio.sleep(2 * DEFERRAL)
            loop.finish(work.take("second"))
            await wait_all_tasks_blocked()
    assert work.begun == {"first": task, "second": task}


async def test_who_is_given_back_when_it_was_about_to_begin_serves_again(loop: RelayLoop) -> None:
    """It was let go on, and the job was done before it came to that: it waits anew, and is not given one before."""
    work = Work()
    async with trio.open_nursery() as nursery:
        with work.pool.keeping():
            [task] = await work.idle(nursery, "first")
            kept = work.take("done by another")
            loop.finish(kept)
            work.pool.give_back(kept)
            assert work.pool.take("second") is None
            await wait_all_tasks_blocked()
            loop.finish(work.take("third"))
            await wait_all_tasks_blocked()
    assert work.begun == {"first": task, "third": task}


async def test_who_is_given_back_too_late_to_be_kept_ends(loop: RelayLoop) -> None:
    work = Work()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            with work.pool.keeping():
                await work.idle(nursery, "first")
                kept = work.take("done by another")
                loop.defer(kept)
            work.pool.give_back(kept)
    assert set(work.begun) == {"first"}
    assert len(work.pool) == 0


async def test_no_more_are_kept_than_may_be(loop: RelayLoop) -> None:
    """One that was taken, and has not begun, is one of them."""
    work = Work(most=3)
    async with trio.open_nursery() as nursery:
        with work.pool.keeping():
            await work.idle(nursery, "1", "2", "3", "4", "5")
            assert len(work.pool) == len(nursery.child_tasks) == 3
            loop.defer(work.take("6"))
            await work.idle(nursery, "7")
            assert len(nursery.child_tasks) == 3
    assert sorted(work.ended) == ["1", "2", "3", "4", "5", "6", "7"]


async def test_tasks_are_kept_until_the_last_who_wants_them(loop: RelayLoop) -> None:
    work = Work()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            with work.pool.keeping():
                with work.pool.keeping():
                    await work.idle(nursery, "1", "2")
                assert len(work.pool) == 2
                # One with a job goes on when they are dismissed.
                loop.defer(work.take("3"))
            assert len(work.pool) == 0
        assert len(nursery.child_tasks) == 0
    assert sorted(work.ended) == ["1", "2", "3"]


async def test_none_is_kept_for_nobody(loop: RelayLoop) -> None:
    work = Work()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            await work.idle(nursery, "1")
            assert len(work.pool) == len(nursery.child_tasks) == 0


async def test_cancellation_ends_those_that_wait(loop: RelayLoop) -> None:
    """Those of that nursery only."""
    work = Work()
    async with trio.open_nursery() as other:
        with work.pool.keeping():
            [left] = await work.idle(other, "other")
            async with trio.open_nursery() as nursery:
                await work.idle(nursery, "1", "2")
                nursery.cancel_scope.cancel()
            assert len(work.pool) == 1
            loop.finish(work.take("3"))
            await wait_all_tasks_blocked()
    assert work.begun["3"] is left
    assert work.cancelled == []


@pytest.mark.parametrize("how", ["deferred", "finished", "neither"])
async def test_cancellation_reaches_the_job_that_was_given(loop: RelayLoop, how: str) -> None:
    """It has something to bring to an end; and nothing of its task is left in the loop."""
    work = Work()
    with work.pool.keeping():
        async with trio.open_nursery() as nursery:
            await work.idle(nursery, "first")
            kept = work.take("second")
            if how == "deferred":
                loop.defer(kept)
            elif how == "finished":
                loop.finish(kept)
            nursery.cancel_scope.cancel()
        assert work.cancelled == ["second"]
        assert len(work.pool) == 0
        await trio.sleep(2 * DEFERRAL)


async def test_what_a_job_raises_ends_its_task_and_its_nursery(loop: RelayLoop) -> None:
    async def fail(job: str) -> None:
        raise ValueError(job)

    pool: TaskPool[str] = TaskPool(fail, 8)
    with pool.keeping(), pytest.raises(ExceptionGroup) as raised:
        async with trio.open_nursery() as nursery:
            pool.start(nursery, "bad")
    assert [str(each) for each in raised.value.exceptions] == ["bad"]
    assert len(pool) == 0
