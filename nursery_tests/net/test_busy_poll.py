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

    def __init__(self, gaps: Iterable[float], *, limit: float = LIMIT, woken: float = WOKEN) -> None:
        self.now = 1.0
        self._woken = woken
        self.slept = 0.0
        self.sleeps: list[float] = []
        self.yields = 0
        self._gaps = iter(gaps)
        self._due = self.now + next(self._gaps)
        self.busy_poll = BusyPoll(self._poll, clock=lambda: self.now, give_way=self._give_way)
        self.busy_poll.limit = limit

    def _poll(self, timeout: float, most: int) -> Events:
        assert most == 16
        assert timeout >= 0
        if timeout:
            self.sleeps.append(timeout)
            until = min(self._due, self.now + timeout)
            self.slept += max(0.0, until - self.now)
            self.now = max(self.now, until) + self._woken
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
    for _ in range(4 * 61):
        world.step()
    spent = world.busy_poll.in_vain
    for _ in range(50):
        assert world.step()[1] == pytest.approx(WOKEN)
        assert world.step()[1] <= LOOK
    # One of those that sleep is tried.
    assert world.busy_poll.in_vain - spent <= LIMIT + LOOK


@pytest.mark.parametrize("limit", [10e-6, LIMIT])
@pytest.mark.parametrize("woken", [5e-6, WOKEN, 120e-6])
def test_it_wakes_up_again_for_what_comes_at_once_again(limit: float, woken: float) -> None:
    """However long it takes to be woken."""
    world = World(itertools.chain([5e-3] * 50, endless(limit / 2)), limit=limit, woken=woken)
    for _ in range(50 + 4 * 61):
        world.step()
    assert all(world.step()[1] <= LOOK for _ in range(50))


def test_what_comes_a_little_late_is_slept_for() -> None:
    """Though a wait for it lasts less than the limit and what it takes to be woken."""
    for gap in (55e-6, 60e-6, 65e-6):
        world = World(endless(gap), woken=5e-6)
        for _ in range(610):
            world.step()
        assert world.busy_poll.in_vain <= (8 + 10) * (LIMIT + LOOK)


def test_a_rhythm_of_three_is_known_by_what_came_before() -> None:
    world = World(endless(20e-6, 20e-6, 900e-6))
    for _ in range(3 * 61):
        world.step()
    spent = world.busy_poll.in_vain
    late = [world.step()[1] for _ in range(30)]
    assert sum(each > LOOK for each in late) == 10
    assert world.busy_poll.in_vain - spent <= LIMIT + LOOK


def test_what_is_there_already_is_given_at_once() -> None:
    world = World(endless(0.0))
    for _ in range(20):
        found, lasted = world.step()
        assert found == EVENT
        assert lasted == pytest.approx(LOOK)
    assert not world.yields


def test_a_time_that_ran_out_is_nothing_that_came() -> None:
    world = World([10.0], limit=800e-6)
    for _ in range(200):
        assert world.step(900e-6)[0] == []
    assert world.busy_poll.in_vain <= (8 + 4) * (800e-6 + LOOK)


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
    # Beside a third: one in 61 that was tried, what that one may give back to a counter, and what the eight of them
    # begin with above what a wait in vain leaves.
    assert vain <= waits / 3 + 3 * waits / 61 + 16 / 3
    assert world.busy_poll.in_vain <= vain * (LIMIT + 2 * LOOK)
