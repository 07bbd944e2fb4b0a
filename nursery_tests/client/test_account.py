"""A request's account: each attempt and each end counted once, everything given back (R1, F3, H1, limits)."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.client.account import Account
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import Outcome, RequestKey
from meshlocal.policy import model
from meshlocal.policy.config import AttemptPolicy, ServiceConfig
from meshlocal.policy.config_health import EjectionConfig, LimitsConfig
from meshlocal.policy.limits import Limit
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import ServiceKey, ServiceSnapshot, make_instance
from meshlocal.policy.retry import Decision, Failure, RetryBudget

B = ServiceKey("b")


@pytest.fixture(autouse=True)
def _a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshlocal.client.fitness.anyio.current_time", lambda: 1.0)


def service(size: int = 2, **limits: int) -> ServiceState:
    config = ServiceConfig(limits=LimitsConfig(**limits))
    made = ServiceState(
        B, Selector(Locality({"node": "n1"})), AttemptPolicy(), random.Random(1), EjectionConfig(failures=1), config
    )
    instances = [make_instance("10.0.0.1", 1 + each, labels={"node": f"n{1 + each}"}) for each in range(size)]
    made.publish(ServiceSnapshot(B, "v", model.index(instances)))
    return made


def begun(state: ServiceState, *limits: Limit) -> Account:
    account = Account(0.0)
    assert account.begin(state, 10.0, *(limits or (Limit.REQUESTS,))) is None
    return account


def assert_nothing_is_held(state: ServiceState) -> None:
    assert set(state.circuit.now.values()) == {0}
    assert (state.in_use, state.statistics.connecting, state.fitness.under_way) == (0, 0, {})


def test_a_request_that_is_served() -> None:
    state = service()
    account = begun(state)
    assert account.try_next(0.5) is not None
    account.enter_instance()
    assert sum(state.fitness.under_way.values()) == state.in_use == state.circuit.now[Limit.REQUESTS] == 1
    account.answered()
    assert account.end(Outcome.SERVED)
    assert state.statistics.requests == {RequestKey("node", "", Outcome.SERVED): 1}
    assert state.statistics.attempts == {("node", "answered"): 1}
    assert state.statistics.picks == {("node", ""): 1}
    assert_nothing_is_held(state)


def test_the_first_outcome_counts() -> None:
    """R1: exactly once, whatever comes of it later."""
    state = service()
    account = begun(state)
    account.try_next(0.0)
    assert account.end(Outcome.CLIENT_LEFT)
    assert not account.end(Outcome.SERVED)
    account.end(Outcome.ERROR)
    assert state.statistics.requests == {RequestKey("node", "", Outcome.CLIENT_LEFT): 1}
    assert state.statistics.attempts == {("node", "abandoned"): 1}
    assert_nothing_is_held(state)


def test_what_is_held_may_outlive_the_count() -> None:
    """As with an application's stream: counted once it is connected, held until it is closed."""
    state = service()
    account = begun(state, Limit.CONNECTIONS, Limit.REQUESTS)
    account.try_next(0.0)
    account.connected(1.0)
    account.enter_instance()
    assert account.end(Outcome.SERVED, hold=True)
    assert state.circuit.now[Limit.CONNECTIONS] == state.in_use == 1
    assert not account.end(Outcome.SERVED)
    assert not account.end(Outcome.SERVED)
    assert_nothing_is_held(state)
    assert state.statistics.attempts == {("node", "connected"): 1}


@pytest.mark.parametrize("limit", ["connections", "requests"])
def test_a_limit_that_is_full(limit: str) -> None:
    """What it had entered before is given back, and it counts as limited."""
    state = service(**{limit: 1})
    first = begun(state, Limit.CONNECTIONS, Limit.REQUESTS)
    second = Account(0.0)
    assert second.begin(state, 10.0, Limit.CONNECTIONS, Limit.REQUESTS) == limit
    assert second.error == f"limit_{limit}"
    second.end(Outcome.LIMITED)
    assert state.circuit.now[Limit.CONNECTIONS] == state.circuit.now[Limit.REQUESTS] == 1
    first.end(Outcome.SERVED)
    assert_nothing_is_held(state)
    assert state.statistics.requests[RequestKey("", "", Outcome.LIMITED)] == 1


def test_those_that_wait_are_limited_and_counted() -> None:
    state = service(waiting=1)
    one, two = begun(state), begun(state)
    assert one.start_waiting()
    assert not two.start_waiting()
    assert two.error == "limit_waiting"
    # For a snapshot as many may wait as there are.
    assert two.start_waiting(limited=False)
    assert (state.statistics.connecting, state.circuit.now[Limit.WAITING]) == (2, 1)
    two.stop_waiting()
    one.stop_waiting()
    one.stop_waiting()
    assert one.start_waiting()
    for each in (one, two):
        each.end(Outcome.NO_INSTANCE)
    assert_nothing_is_held(state)


def test_a_failure_is_told_counted_and_goes_on() -> None:
    """H1, A2: by one table for all protocols."""
    state = service()
    account = begun(state)
    first = account.try_next(0.0)
    assert first is not None
    assert account.attempt_failed(Failure.CONNECT, 0.5, "refused", errno=111) is Decision.NEXT
    assert not state.fitness.health.is_admitted(first.instance.key[:2])
    second = account.try_next(0.6)
    assert second is not None
    assert account.attempt_failed(Failure.NO_RESPONSE, 0.7, sent=True, idempotent=False) is Decision.ANSWER
    assert account.try_next(0.8) is None
    account.end(Outcome.FAILED)
    assert [(each.error, each.errno) for each in account.failures or ()] == [("refused", 111), ("no_response", 0)]
    assert list(map(str, account.failures or ())) == ["10.0.0.1:1 (node) refused", "10.0.0.1:2 (other) no_response"]
    assert state.statistics.attempts == {("node", "refused"): 1, ("other", "no_response"): 1}
    assert state.statistics.requests == {RequestKey("other", "local_failed", Outcome.FAILED): 1}
    assert account.error == "no_response"
    counted = {place: dict(each.failures) for place, each in state.statistics.instances.items()}
    assert counted == {("10.0.0.1", 1): {"refused": 1}, ("10.0.0.1", 2): {"no_response": 1}}


def test_what_is_counted_of_an_instance_goes_with_it() -> None:
    state = service(3)
    for _ in range(3):
        account = begun(state)
        while account.try_next(0.5) is not None:
            account.attempt_failed(Failure.CONNECT, 0.6, "refused")
        account.end(Outcome.FAILED)
    kept = make_instance("10.0.0.1", 2, labels={"node": "n2"})
    assert len(state.statistics.instances) == 3
    before = state.statistics.instances[kept.key[:2]]
    state.publish(ServiceSnapshot(B, "w", model.index([kept])))
    assert state.statistics.instances == {kept.key[:2]: before}


def test_how_long_a_connection_took() -> None:
    """From the attempt's beginning, of the instance and of its tier; and a response, of its instance."""
    state = service()
    account = begun(state)
    pick = account.try_next(0.9)
    assert pick is not None
    account.connected(1.0)
    account.took(2.0)
    counts = state.statistics.instances[pick.instance.key[:2]]
    assert (counts.attempts, counts.worked) == (1, 1)
    assert counts.connect.total == state.statistics.connects["node"].total == pytest.approx(0.1)
    assert counts.response.total == 2.0
    refused = begun(state)
    refused.took(5.0)
    pooled = begun(state)
    again = pooled.try_next(2.0)
    assert again is not None
    pooled.reached(None)
    assert state.statistics.connects["node"].count == 1, "a connection that was there before took no time"
    assert counts.response.count == 1, "a request that no instance was tried for says nothing of one"


def test_an_answer_that_is_dropped_is_settled() -> None:
    """A3, H1: it takes a live instance to give an answer."""
    state = service()
    account = begun(state)
    first = account.try_next(0.0)
    assert first is not None
    budget = RetryBudget(1.0, 10)
    assert account.drop_answer(0.1, budget, 503, sent=True, idempotent=True, held=True)
    assert not account.trying
    assert account.try_next(0.2) is not None
    assert not account.drop_answer(0.3, budget, 503, sent=True, idempotent=True, held=True)
    account.answered()
    account.end(Outcome.SERVED)
    assert state.statistics.attempts == {("node", "status"): 1, ("other", "answered"): 1}
    assert state.fitness.health.is_admitted(first.instance.key[:2])


def test_an_instance_that_falls_silent_after_its_connect_is_ejected() -> None:
    """H1: that is no attempt of its own."""
    state = service()
    account = begun(state)
    pick = account.try_next(0.0)
    assert pick is not None
    account.connected(1.0)
    account.fell_silent("reset")
    account.end(Outcome.CUT)
    assert not state.fitness.health.is_admitted(pick.instance.key[:2])
    assert state.statistics.attempts == {("node", "connected"): 1}


def test_one_that_never_had_a_service_counts_nowhere() -> None:
    account = Account(0.0)
    assert (account.pick, account.tier, account.reason, account.attempts) == (None, "", "", 0)
    assert account.end(Outcome.NO_INSTANCE)
    assert not account.end(Outcome.NO_INSTANCE)


STEPS: dict[str, Callable[[Account], object]] = {
    "next": lambda account: account.trying or account.try_next(0.0),
    "enter": lambda account: account.enter_instance(),
    "leave": lambda account: account.leave_instance(),
    "wait": lambda account: account.start_waiting() if not account.waiting else None,
    "stop": lambda account: account.stop_waiting(),
    "connected": lambda account: account.trying and account.connected(1.0),
    "answered": lambda account: account.trying and account.answered(),
    "abandoned": lambda account: account.trying and account.abandoned(),
    "failed": lambda account: account.trying and account.attempt_failed(Failure.CONNECT, 0.0, "refused"),
    "dropped": lambda account: (
        account.trying and account.drop_answer(0.0, RetryBudget(1, 9), 503, sent=True, idempotent=True, held=True)
    ),
    "end": lambda account: account.end(Outcome.ERROR),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=12))
def test_whatever_happens_each_pick_is_one_attempt_and_nothing_is_left(steps: list[str]) -> None:
    """R1: cancelled at any point, too."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("meshlocal.client.fitness.anyio.current_time", lambda: 1.0)
        state = service(3, waiting=1)
        account = begun(state)
        for step in steps:
            STEPS[step](account)
            if step == "end":
                break
        account.end(Outcome.CLIENT_LEFT)
        assert sum(state.statistics.requests.values()) == 1
        assert sum(state.statistics.attempts.values()) == sum(state.statistics.picks.values()) == account.attempts
        counted = state.statistics.instances.values()
        assert sum(each.attempts for each in counted) == account.attempts
        assert sum(each.worked + sum(each.failures.values()) for each in counted) == account.attempts
        assert_nothing_is_held(state)
