"""Retries by rules A2 to A4, and their budget."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.retry import IDEMPOTENT_METHODS, Decision, Failure, RetryBudget, decide

OF_RFC_9110 = [b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"]
OF_OTHERS = [b"PROPFIND", b"SEARCH", b"QUERY"]
"""Idempotent as well, by the documents that define them (RFC 4918, 9.1; RFC 5323, 2)."""
METHODS = [*OF_RFC_9110, *OF_OTHERS, b"POST", b"PATCH", b"CONNECT", b"LOCK"]


def expected(failure: Failure, method: bytes, key: bool, sent: bool, held: bool) -> Decision:
    """Rule A3 in its own words."""
    repeatable = method in OF_RFC_9110 or method in OF_OTHERS or key
    if not held:
        return Decision.ANSWER
    match failure:
        case Failure.CONNECT | Failure.REFUSED:
            return Decision.NEXT  # nothing was sent, or provably not processed
        case Failure.STALE:
            return Decision.SAME if repeatable or not sent else Decision.ANSWER
        case Failure.NO_RESPONSE | Failure.RESET | Failure.TIMEOUT | Failure.STATUS:
            return Decision.NEXT if repeatable or not sent else Decision.ANSWER
        case Failure.BROKEN:
            return Decision.ANSWER


@pytest.mark.parametrize("failure", Failure)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_failure_and_state(failure: Failure, method: bytes) -> None:
    """Rules A2, A3 and A4: each method x failure x state."""
    for key, sent, held in itertools.product((False, True), repeat=3):
        decision = decide(failure, sent=sent, idempotent=method in IDEMPOTENT_METHODS or key, held=held)
        assert decision is expected(failure, method, key, sent, held), (key, sent, held)


def test_budget_floor_and_share() -> None:
    budget = RetryBudget(0.2, 3)
    assert [budget.retry(0.0) for _ in range(5)] == [True, True, True, False, False]
    for _ in range(100):
        budget.request(0.5)
    assert sum(budget.retry(0.5) for _ in range(50)) == 17  # a fifth of 100, less the three before


def test_budget_window_slides() -> None:
    budget = RetryBudget(0.5, 0)
    for second in range(10):
        for _ in range(10):
            budget.request(float(second))
    assert sum(budget.retry(9.5) for _ in range(100)) == 50
    assert not budget.retry(10.5)  # one slot of requests left the window, and all retries are within it still
    assert not budget.retry(25.0)  # everything left it
    for _ in range(4):
        budget.request(25.0)
    assert [budget.retry(25.1) for _ in range(3)] == [True, True, False]


def test_budget_after_a_short_pause() -> None:
    budget = RetryBudget(1.0, 0)
    budget.request(0.0)
    assert budget.retry(7.0)  # the request is within the last ten seconds
    assert not budget.retry(7.0)
    assert not budget.retry(12.0)


def test_budget_forgets_what_is_older_than_ten_seconds_while_requests_go_on() -> None:
    """A3: second by second, requests and retries alike."""
    budget = RetryBudget(0.5, 0)
    for _ in range(100):
        budget.request(0.5)
    assert sum(budget.retry(0.5) for _ in range(100)) == 50
    for second in range(1, 30):
        budget.request(second + 0.5)
    # Of the last ten seconds there are ten requests, and no retry.
    assert sum(budget.retry(29.5) for _ in range(100)) == 5


def test_budget_forgets_retries_by_its_floor_as_well() -> None:
    """A3: so many are allowed in each ten seconds, not once."""
    budget = RetryBudget(0.0, 2)
    allowed = []
    for second in range(40):
        budget.request(float(second))
        allowed.append(budget.retry(float(second)))
    assert [second for second, each in enumerate(allowed) if each] == [0, 1, 10, 11, 20, 21, 30, 31]


@given(
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    st.integers(0, 3),
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 1.0, 2.5, 7.0, 9.5, 30.0]), st.booleans()), max_size=60),
)
def test_budget_is_of_the_last_ten_seconds(share: float, floor: int, steps: list[tuple[float, bool]]) -> None:
    """A3: whatever comes when. What is between nine and ten seconds old may count or not."""
    budget, now = RetryBudget(share, floor), 0.0
    requests: list[float] = []
    retries: list[float] = []
    for gap, is_request in steps:
        now += gap
        if is_request:
            budget.request(now)
            requests.append(now)
            continue
        (requests_9, requests_10), (retries_9, retries_10) = [
            (sum(at >= now - 9 for at in of), sum(at > now - 10 for at in of)) for of in (requests, retries)
        ]
        allowed = budget.retry(now)
        if retries_10 < floor or retries_10 + 1 <= requests_9 * share:
            assert allowed
        if retries_9 >= floor and retries_9 + 1 > requests_10 * share:
            assert not allowed
        if allowed:
            retries.append(now)


def test_budget_of_nothing() -> None:
    budget = RetryBudget(0.0, 0)
    budget.request(0.0)
    assert not budget.retry(0.0)
