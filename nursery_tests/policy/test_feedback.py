"""When discovery is asked again because every attempt fails (D5)."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.feedback import INTERVAL, Feedback


def feedback() -> Feedback:
    return Feedback(random.Random(0))


def test_asks_once_every_attempt_failed_for_a_while() -> None:
    made = feedback()
    assert [made.failed(now) for now in (0.0, 0.5, 0.9, 1.0)] == [False, False, False, True]


def test_two_failures_far_apart_are_not_enough() -> None:
    made = feedback()
    assert [made.failed(now) for now in (0.0, 100.0)] == [False, False]


def test_a_success_starts_anew() -> None:
    made = feedback()
    for now in range(100):
        assert not made.failed(now)
        assert not made.failed(now + 0.5)
        assert made.failing
        made.succeeded()
        assert not made.failing


@given(st.lists(st.floats(0, 3), max_size=200))
def test_never_asks_more_often_than_once_an_interval(gaps: list[float]) -> None:
    made, now, asked = feedback(), 0.0, []
    for gap in gaps:
        now += gap
        if made.failed(now):
            asked.append(now)
    assert all(later - earlier >= INTERVAL for earlier, later in itertools.pairwise(asked))
    assert made.asked == len(asked)


def test_asks_again_while_it_goes_on() -> None:
    made = feedback()
    assert 6 <= sum(made.failed(now / 10) for now in range(1000)) <= 10
