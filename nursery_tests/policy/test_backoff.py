"""The delays between two tries (D1)."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.backoff import Backoff


class Always:
    """A random source that gives the same share of each range."""

    def __init__(self, share: float) -> None:
        self._share = share

    def uniform(self, a: float, b: float, /) -> float:
        return a + (b - a) * self._share


def delays(of: Backoff, count: int) -> list[float]:
    return [of.next() for _ in range(count)]


@pytest.mark.parametrize(
    ("initial", "maximum", "share", "expected"),
    [
        (1.0, 10.0, 1.0, [1, 2, 4, 8, 10, 10, 10]),
        (1.0, 10.0, 0.0, [0.5, 1, 2, 4, 5, 5, 5]),
        (1.0, 10.0, 0.5, [0.75, 1.5, 3, 6, 7.5, 7.5, 7.5]),
        (0.5, 0.5, 1.0, [0.5, 0.5, 0.5]),
        (3.0, 1.0, 1.0, [3, 3, 3]),
        (3.0, 1.0, 0.0, [1.5, 1.5, 1.5]),
    ],
)
def test_delays_double_to_the_maximum(initial: float, maximum: float, share: float, expected: list[float]) -> None:
    """D1: each is drawn from the upper half; a maximum below the first delay is that delay."""
    assert delays(Backoff(initial, maximum, Always(share)), len(expected)) == pytest.approx(expected)


def test_a_success_starts_anew() -> None:
    """D1: the next outage is met as quickly as the first one."""
    backoff = Backoff(1.0, 60.0, Always(1.0))
    assert delays(backoff, 5) == [1, 2, 4, 8, 16]
    backoff.reset()
    assert delays(backoff, 3) == [1, 2, 4]


@given(st.integers(0, 2**32), st.floats(0.001, 100), st.floats(0.001, 100), st.integers(1, 40))
def test_no_delay_hammers_and_none_lasts_for_ever(seed: int, initial: float, maximum: float, tries: int) -> None:
    """D1."""
    found = delays(Backoff(initial, maximum, random.Random(seed)), tries)
    assert min(found) >= initial / 2
    assert max(found) <= max(initial, maximum)


def test_a_fleet_that_lost_its_server_does_not_return_at_once() -> None:
    """D1: the first tries are spread over half of the delay."""
    firsts = [Backoff(1.0, 10.0, random.Random(seed)).next() for seed in range(1000)]
    busiest = max(sum(tenth / 10 <= each < (tenth + 1) / 10 for each in firsts) for tenth in range(10))
    assert busiest < 300
