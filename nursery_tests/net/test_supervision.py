"""net/supervision: a task that fails begins again, and harms nobody else (P1)."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from meshlocal.net.supervision import MANY, WHILE, Supervision, TaskDeadError, dead_in


class Flaky:
    """A task that fails so many times, and then goes on for ever."""

    def __init__(self, failures: int, *, lasts: float = 0.0) -> None:
        self.left = failures
        self.lasts = lasts
        self.begun: list[float] = []

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self.begun.append(trio.current_time())
        task_status.started()
        await trio.sleep(self.lasts)
        if self.left:
            self.left -= 1
            raise RuntimeError("broken")
        await trio.sleep_forever()


async def test_a_task_that_fails_begins_again_later_and_later(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """P1: with backoff, counted and logged by its name."""
    supervision, flaky = Supervision(random.Random(1)), Flaky(6)
    with trio.move_on_after(100):
        await supervision.keep("look after things", flaky.run)
    assert len(flaky.begun) == 7
    pauses = [after - before for before, after in zip(flaky.begun, flaky.begun[1:], strict=False)]
    for position, pause in enumerate(pauses):
        assert 0.05 * 2**position <= pause <= 0.1 * 2**position
    assert supervision.failures == {"look after things": 6}
    assert 'task="look after things"' in caplog.text
    assert "RuntimeError: broken" in caplog.text


async def test_a_task_that_returns_has_failed_unless_it_may(autojump_clock: trio.testing.MockClock) -> None:
    supervision = Supervision(random.Random(1))

    async def returns() -> None:
        await trio.lowlevel.checkpoint()

    await supervision.keep("one-off", returns, may_end=True)
    assert supervision.failures == {}
    with trio.move_on_after(1):
        await supervision.keep("for ever", returns)
    assert supervision.failures["for ever"] > 1


async def test_a_task_beside_the_data_path_may_fail_for_ever(autojump_clock: trio.testing.MockClock) -> None:
    supervision, flaky = Supervision(random.Random(1)), Flaky(10**6)
    with trio.move_on_after(86400) as scope:
        await supervision.keep("write the cache", flaky.run)
    assert scope.cancelled_caught
    assert 86400 / 30 <= len(flaky.begun) <= 86400 / 15 + 20


async def test_a_vital_task_that_cannot_be_mended_is_dead(autojump_clock: trio.testing.MockClock) -> None:
    """P1: ten failures within a minute; who is told of it is told before the error is raised."""
    supervision, flaky = Supervision(random.Random(1)), Flaky(10**6)
    told: list[tuple[str, str]] = []
    supervision.on_dead = lambda task, problem: told.append((task, problem))
    with pytest.raises(TaskDeadError) as raised:
        await supervision.keep("accept", flaky.run, vital=True)
    assert len(flaky.begun) == MANY
    assert raised.value.task == "accept"
    assert "RuntimeError: broken" in raised.value.problem
    assert [task for task, _ in told] == ["accept"]


async def test_a_vital_task_that_fails_now_and_then_goes_on(autojump_clock: trio.testing.MockClock) -> None:
    """Its backoff begins anew, too, once it has lasted."""
    supervision, flaky = Supervision(random.Random(1)), Flaky(30, lasts=WHILE)
    with trio.move_on_after(35 * WHILE):
        await supervision.keep("accept", flaky.run, vital=True)
    assert len(flaky.begun) == 31
    pauses = [after - before - WHILE for before, after in zip(flaky.begun, flaky.begun[1:], strict=False)]
    assert max(pauses) <= 0.1


async def test_death_passes_through_groups_and_other_supervised_tasks(autojump_clock: trio.testing.MockClock) -> None:
    supervision = Supervision(random.Random(1))

    async def outer() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            supervision.die("relay loop", "gone")

    with pytest.raises(ExceptionGroup) as raised:
        await supervision.keep("outer", outer)
    dead = dead_in(raised.value)
    assert dead is not None
    assert (dead.task, dead.problem) == ("relay loop", "gone")
    assert dead_in(ValueError()) is None


async def test_what_does_not_start_is_for_its_starter_to_see(autojump_clock: trio.testing.MockClock) -> None:
    supervision = Supervision(random.Random(1))

    async def never_starts(*, task_status: trio.TaskStatus[None]) -> None:
        raise RuntimeError("port in use")

    async def begin(*, task_status: trio.TaskStatus[None]) -> None:
        await supervision.start("admin server", never_starts, task_status=task_status)

    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="port in use"), flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            await nursery.start(begin)
    assert supervision.failures == {}


async def test_what_started_begins_again_and_says_so_once(autojump_clock: trio.testing.MockClock) -> None:
    supervision, flaky = Supervision(random.Random(1)), Flaky(3)

    async def begin(*, task_status: trio.TaskStatus[None]) -> None:
        await supervision.start("admin server", flaky.run, task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(begin)
        await trio.sleep(10)
        assert len(flaky.begun) == 4
        nursery.cancel_scope.cancel()


async def test_cancellation_is_no_failure_and_loses_nothing_that_was_raised_beside_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    supervision = Supervision(random.Random(1))

    async def fails_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise RuntimeError("in its cleanup")

    async def task() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails_when_cancelled)
            nursery.start_soon(trio.sleep_forever)

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervision.keep, "quiet", trio.sleep_forever)
            nursery.start_soon(supervision.keep, "loud", task)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert supervision.failures in ({}, {"loud": 1})
    assert "in its cleanup" in caplog.text
