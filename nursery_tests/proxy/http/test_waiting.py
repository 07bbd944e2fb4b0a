"""How those who wait for an instance are told the time (A1, A8)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable

import trio
import trio.lowlevel
from trio.testing import MockClock

from meshlocal.client.connecting import SLOW
from meshlocal.proxy.http.waiting import Patience


def in_time(told: float, time: float) -> bool:
    """Whether one was told of a time when it had come, and no more than two ticks later."""
    return time - 1e-6 <= told <= time + 2.1 * SLOW


class Waiter:
    """Who waits.

    Attributes:
        impatient: when it was told that it has waited for long.
        hopeless: when it was told that its time has come.
        ends: whose waits it ends when it has waited for long.
    """

    def __init__(self, patience: Patience, ends: Iterable[Waiter] = ()) -> None:
        self.impatient: list[float] = []
        self.hopeless: list[float] = []
        self.ends = ends
        self._patience = patience

    def on_slow(self) -> None:
        self.impatient.append(trio.current_time())
        for other in self.ends:
            self._patience.waiting.pop(other, None)

    def on_deadline(self) -> None:
        self.hopeless.append(trio.current_time())


async def test_who_waits_is_told_once(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """When it has waited for as long as is patient, and not before; whoever waits no longer is not told."""
    patience = Patience()
    nursery.start_soon(patience.run)
    early, ended, late = Waiter(patience), Waiter(patience), Waiter(patience)
    began = trio.current_time()
    for each in (early, ended):
        patience.add(each, began)
    await trio.sleep(SLOW / 2)
    patience.add(late, began + SLOW / 2)
    del patience.waiting[ended]
    await trio.sleep(10 * SLOW)
    (told,) = early.impatient
    assert in_time(told, began + SLOW)
    (told,) = late.impatient
    assert in_time(told, began + 1.5 * SLOW)
    assert not ended.impatient
    assert not patience.waiting
    nursery.cancel_scope.cancel()


async def test_who_is_told_may_end_anothers_wait(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """That one is not told then."""
    patience = Patience()
    nursery.start_soon(patience.run)
    others = [Waiter(patience), Waiter(patience)]
    first = Waiter(patience, others[:1])
    for each in (first, *others):
        patience.add(each, trio.current_time())
    await trio.sleep(10 * SLOW)
    assert [len(each.impatient) for each in (first, *others)] == [1, 0, 1]
    nursery.cancel_scope.cancel()


async def test_who_asks_is_told_of_its_time(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """In whatever order they ask; unless it calls that off."""
    patience = Patience()
    nursery.start_soon(patience.run)
    began = trio.current_time()
    waiters = {seconds: Waiter(patience) for seconds in (3.0, 1.0, 2.0, 4.0)}
    reminders = {seconds: patience.ask(began + seconds, each) for seconds, each in waiters.items()}
    reminders[2.0].call_off()
    await trio.sleep(3.5)
    assert not waiters[2.0].hopeless
    assert not waiters[4.0].hopeless
    for seconds in (1.0, 3.0):
        (told,) = waiters[seconds].hopeless
        assert in_time(told, began + seconds)
    nursery.cancel_scope.cancel()


class Steps(trio.abc.Instrument):
    """Counts what all tasks do."""

    count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += 1


async def test_nothing_is_done_while_nobody_waits(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """And yet whoever asked is told in time, and whoever begins to wait, too."""
    patience = Patience()
    nursery.start_soon(patience.run)
    asked, waiter = Waiter(patience), Waiter(patience)
    patience.ask(trio.current_time() + 100, asked)
    await trio.sleep(10)
    steps = Steps()
    trio.lowlevel.add_instrument(steps)
    for times in range(1, 4):
        await trio.sleep(40)
        began = trio.current_time()
        patience.add(waiter, began)
        await trio.sleep(10)
        assert len(waiter.impatient) == times
        assert in_time(waiter.impatient[-1], began + SLOW)
    trio.lowlevel.remove_instrument(steps)
    (told,) = asked.hopeless
    assert in_time(told, 100.0)
    # A few each time that it was woken. In two minutes there would be 12,000 ticks.
    assert steps.count < 100
    nursery.cancel_scope.cancel()


async def test_those_who_wait_no_longer_are_not_kept(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """However long the time is that they asked for: a busy proxy would hold an hour's requests; nobody else is lost."""
    patience = Patience()
    nursery.start_soon(patience.run)
    waits: dict[Waiter, float] = {}
    gone: list[weakref.ref[Waiter]] = []
    many = 30_000
    waiter: Waiter | None = None
    for number in range(many):
        waiter = Waiter(patience)
        time = trio.current_time() + 3600 + number * 7919 % many / many
        reminder = patience.ask(time, waiter)
        if number % 100:
            reminder.call_off()
            gone.append(weakref.ref(waiter))
        else:
            waits[waiter] = time
    waiter = None
    gc.collect()
    assert sum(each() is not None for each in gone) == 0
    await trio.sleep(3602)
    for each, time in waits.items():
        (told,) = each.hopeless
        assert in_time(told, time)
    nursery.cancel_scope.cancel()
