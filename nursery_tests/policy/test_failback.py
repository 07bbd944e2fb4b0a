"""The pace at which connections return to the local tier (F2)."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.config_health import FailbackConfig
from meshlocal.policy.failback import Failback


def returns(made: Failback, fit: list[bool], step: float = 0.1) -> list[float]:
    """When connections return if the local tier is fit, or not, for so many looks in a row."""
    at = []
    for number, each in enumerate(fit):
        now = number * step
        if made.may_return(now, fit=each):
            made.returned(now)
            at.append(now)
    return at


def failback(seed: int = 0) -> Failback:
    return Failback(FailbackConfig(after=10.0, interval=2.0), random.Random(seed))


@given(st.integers(0, 2**32))
def test_after_a_while_one_by_one(seed: int) -> None:
    """F2: a stable tier first, a bounded rate, jitter in both."""
    at = returns(failback(seed), [True] * 600)
    assert 10 <= at[0] <= 15.1
    assert all(0.99 <= later - earlier <= 3.11 for earlier, later in itertools.pairwise(at))


def test_a_thousand_proxies_do_not_come_together() -> None:
    """F2."""
    firsts = [returns(failback(seed), [True] * 200)[0] for seed in range(1000)]
    busiest = max(sum(second <= first < second + 0.5 for first in firsts) for second in range(20))
    assert busiest < 200


class Always:
    """A random source that gives the same share of each range."""

    def __init__(self, share: float) -> None:
        self._share = share

    def uniform(self, a: float, b: float, /) -> float:
        return a + (b - a) * self._share


@pytest.mark.parametrize(("share", "first", "gap"), [(0.0, 10.0, 1.0), (0.5, 12.5, 2.0), (1.0, 15.0, 3.0)])
def test_the_range_of_chance(share: float, first: float, gap: float) -> None:
    """F2: up to half as much again before the first one, between half and one and a half of the interval then."""
    at = returns(Failback(FailbackConfig(after=10.0, interval=2.0), Always(share)), [True] * 300)
    assert at[:4] == pytest.approx([first, first + gap, first + 2 * gap, first + 3 * gap], abs=0.31)


def test_a_thousand_proxies_do_not_keep_step() -> None:
    """F2: nor do the connections that follow the first."""
    gaps = []
    for seed in range(1000):
        first, second = returns(failback(seed), [True] * 200)[:2]
        gaps.append(second - first)
    busiest = max(sum(half / 2 <= gap < (half + 1) / 2 for gap in gaps) for half in range(8))
    assert busiest < 400


@given(st.lists(st.integers(1, 90), max_size=30))
def test_a_tier_that_flaps_gets_none(spells: list[int]) -> None:
    """F2: fit without a break."""
    fit = [value for spell in spells for value in [True] * spell + [False]]
    assert returns(failback(), fit) == []


def test_nothing_returns_while_the_tier_is_not_fit() -> None:
    """F2: also in the midst of it."""
    at = returns(failback(), [True] * 200 + [False] * 10 + [True] * 90)
    assert at
    assert max(at) < 20
