"""A token bucket."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.rates import TokenBucket


def test_a_burst_and_then_the_rate() -> None:
    bucket = TokenBucket(2, 3, 100.0)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(100.5) for _ in range(2)] == [True, False]
    assert [bucket.take(1000.0) for _ in range(4)] == [True, True, True, False]


def test_what_is_owed_takes_time() -> None:
    bucket = TokenBucket(10, 100, 0.0)
    assert bucket.spend(100, 0.0) == 0
    assert bucket.spend(30, 0.0) == pytest.approx(3.0)
    assert bucket.spend(0, 2.0) == pytest.approx(1.0)
    assert bucket.spend(0, 3.0) == 0


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(1, 2, 100.0)
    assert bucket.take(100.0)
    assert bucket.take(50.0)
    assert not bucket.take(50.5)
    assert bucket.take(51.5)


@given(
    st.integers(1, 1000), st.integers(1, 1000), st.lists(st.tuples(st.floats(0, 5), st.integers(1, 2000)), max_size=50)
)
def test_never_more_than_burst_and_rate(rate: int, burst: int, steps: list[tuple[float, int]]) -> None:
    """Whoever waits as long as told has spent, at any time, no more than the burst, the rate, and the last amount."""
    bucket = TokenBucket(rate, burst, 0.0)
    now, spent = 0.0, 0
    for pause, amount in steps:
        now += pause
        assert spent <= burst + rate * now + 1e-6 * (1 + spent)
        spent += amount
        now += bucket.spend(amount, now)
