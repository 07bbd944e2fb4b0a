"""Retries by rules A2 to A4, and their budget."""

import itertools

import pytest

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
        case Failure.NO_RESPONSE | Failure.TIMEOUT | Failure.STATUS:
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


def test_budget_of_nothing() -> None:
    budget = RetryBudget(0.0, 0)
    budget.request(0.0)
    assert not budget.retry(0.0)
