"""net/busy_poll: awake where something comes at once, asleep elsewhere, and in vain a third of the time at most."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.net.busy_poll import BusyPoll, Events

LIMIT = 50e-6
LOOK = 1e-6
"""Seconds that the world of these tests takes to look once."""

WOKEN = 30e-6
"""Seconds that it takes to be woken."""

EVENT: Events = [(7, 1)]


class World:
    """A clock that moves as it is looked at, and events that come so many seconds after each other."""

    def __init__(self, gaps: Iterable[float]) -> None:
        self.now = 1.0
        self.slept = 0.0
        self.sleeps: list[float] = []
        self.yields = 0
        self._gaps = iter(gaps)
        self._due = self.now + next(self._gaps)
        self.busy_poll = BusyPoll(self._poll, clock=lambda: self.now, give_way=self._give_way)
        self.busy_poll.limit = LIMIT

    def _poll(self, timeout: float, most: int) -> Events:
        assert most == 16
        assert timeout >= 0
        if timeout:
            self.sleeps.append(timeout)
            until = min(self._due, self.now + timeout)
            self.slept += max(0.0, until - self.now)
            self.now = max(self.now, until) + WOKEN
        else:
            self.now += LOOK
        return EVENT if self.now >= self._due else []

    def _give_way(self) -> None:
        self.yields += 1

    def step(self, timeout: float = 1.0) -> tuple[Events, float]:
        """One wait; its events, and how long they had been there when it gave them."""
        found = self.busy_poll.wait(timeout, 16)
        late = self.now - self._due
        if found:
            # What comes next comes so much after this one was dealt with.
            self._due = self.now + next(self._gaps)
        return found, late


def endless(*gaps: float) -> Iterator[float]:
    return itertools.cycle(gaps)


def test_what_comes_at_once_is_waited_for_awake() -> None:
    world = World(endless(20e-6))
    for _ in range(100):
        found, late = world.step()
        assert found == EVENT
        assert late <= LOOK
    assert not world.sleeps
    assert world.busy_poll.found == pytest.approx(100 * 20e-6, rel=0.1)
    assert world.busy_poll.in_vain == 0


def test_what_comes_late_is_slept_for() -> None:
    world = World(endless(5e-3))
    for _ in range(100):
        assert world.step()[0] == EVENT
    assert len(world.sleeps) == 100
    # Each of the patterns that it may have been in when it began is tried once.
    assert world.busy_poll.in_vain <= 8 * (LIMIT + LOOK)
    assert world.busy_poll.found == 0


def test_an_answer_is_waited_for_awake_and_the_next_request_asleep() -> None:
    world = World(endless(900e-6, 40e-6))
    for _ in range(20):
        world.step()
    spent = world.busy_poll.in_vain
    for _ in range(50):
        assert world.step()[1] == pytest.approx(WOKEN)
        assert world.step()[1] <= LOOK
    assert world.busy_poll.in_vain == spent


def test_it_wakes_up_again_for_what_comes_at_once_again() -> None:
    world = World(itertools.chain(itertools.repeat(5e-3, 50), endless(20e-6)))
    for _ in range(50):
        world.step()
    waits = 0
    while world.step()[1] > LOOK:
        waits += 1
        assert waits < 20
    assert all(world.step()[1] <= LOOK for _ in range(50))


def test_others_may_run_between_two_looks() -> None:
    world = World(endless(20e-6))
    world.step()
    assert world.yields == pytest.approx(20, abs=1)


def test_it_sleeps_for_what_is_left_of_the_time() -> None:
    world = World([10.0])
    assert world.step(0.25)[0] == []
    assert world.sleeps == [pytest.approx(0.25 - LIMIT, abs=2 * LOOK)]


def test_time_that_others_took_is_no_reason_to_sleep_for_ever() -> None:
    """A negative timeout would mean none."""
    world = World([10.0])

    def taken() -> None:
        world.now += 1.0

    world.busy_poll = BusyPoll(world._poll, clock=lambda: world.now, give_way=taken)
    world.busy_poll.limit = LIMIT
    assert world.step(0.25)[0] == []
    assert world.now < 3


@pytest.mark.parametrize("timeout", [0.0, LIMIT / 2, LIMIT])
def test_a_time_no_longer_than_the_limit_is_left_to_the_system(timeout: float) -> None:
    world = World([10.0])
    assert world.step(timeout)[0] == []
    assert not world.yields
    assert world.sleeps == ([timeout] if timeout else [])


def test_without_a_limit_it_always_sleeps() -> None:
    world = World(endless(20e-6))
    world.busy_poll.limit = 0.0
    for _ in range(20):
        assert world.step()[0] == EVENT
    assert len(world.sleeps) == 20
    assert not world.yields


@given(st.lists(st.sampled_from([0.0, 5e-6, 45e-6, 55e-6, 90e-6, 120e-6, 1e-3]), min_size=1, max_size=300))
def test_a_third_of_all_waits_at_most_are_awake_in_vain(gaps: list[float]) -> None:
    world = World([*gaps, 1.0])
    waits = vain = 0
    for _ in gaps:
        before = world.busy_poll.in_vain
        assert world.step()[0] == EVENT
        waits += 1
        vain += world.busy_poll.in_vain > before
    # Each of the eight counters begins at most two above what a wait in vain leaves it at, and falls by two for each.
    assert vain <= waits / 3 + 16 / 3
    assert world.busy_poll.in_vain <= vain * (LIMIT + 2 * LOOK)
