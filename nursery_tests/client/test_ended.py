"""What is told of requests that ended: which are kept, and what those who follow hear (R1)."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import pytest

from meshlocal.client.account import Account
from meshlocal.client.ended import ATTEMPTS_KEPT, KEPT, EndedRequest
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import Outcome
from meshlocal.policy import model
from meshlocal.policy.config import AttemptPolicy
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import ServiceKey, ServiceSnapshot, make_instance
from meshlocal.policy.retry import Failure
from nursery_tests.logged import entry, events

B = ServiceKey("b")


@pytest.fixture(autouse=True)
def _a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshlocal.client.fitness.anyio.current_time", lambda: 1.0)


def service(size: int = 2) -> ServiceState:
    policy = AttemptPolicy(max_attempts=None)
    made = ServiceState(B, Selector(Locality({"node": "n1"})), policy, random.Random(1), EjectionConfig())
    instances = [make_instance("10.0.0.1", 1 + each, labels={"node": f"n{1 + each}"}) for each in range(size)]
    made.publish(ServiceSnapshot(B, "v", model.index(instances)))
    return made


def begun(state: ServiceState) -> Account:
    account = Account(10.0)
    assert account.begin(state, 100.0) is None
    return account


def served_nearby(state: ServiceState) -> None:
    account = begun(state)
    account.try_next(10.0)
    account.answered()
    account.end(Outcome.SERVED, 10.5)


def served_elsewhere(state: ServiceState) -> None:
    account = begun(state)
    account.try_next(10.25)
    account.attempt_failed(Failure.CONNECT, 10.5, "refused")
    account.try_next(10.75)
    account.answered()
    account.end(Outcome.SERVED, 12.0)


class Listener:
    def __init__(self) -> None:
        self.heard: list[EndedRequest] = []
        self.asked: list[tuple[float, str, bool]] = []
        self.listens = True

    def wants(self, now: float, reason: str, stumbled: bool) -> bool:
        self.asked.append((now, reason, stumbled))
        return self.listens

    def ended(self, request: EndedRequest) -> None:
        self.heard.append(request)


def test_a_request_that_left_the_node_is_kept_with_its_attempts() -> None:
    """R1: why it left, and of each attempt which instance, what failed, and how long it took."""
    state = service()
    served_elsewhere(state)
    [request] = state.told.recent
    assert (request.tier, request.reason, request.outcome) == ("other", "local_failed", "served")
    assert (request.started, request.seconds, request.ended) == (10.0, 2.0, 12.0)
    assert request.instance is not None
    assert (request.instance.node, request.attempts) == ("n2", 2)
    [failed] = request.failures
    assert (failed.pick.instance.node, failed.tier, failed.error) == ("n1", "node", "refused")
    assert (failed.began, failed.seconds) == (10.25, 0.25)


@pytest.mark.parametrize("outcome", [Outcome.SERVED, Outcome.CLIENT_LEFT, Outcome.RETURNED, Outcome.DRAINED])
def test_what_stays_in_the_first_tier_and_fares_well_is_not_kept(outcome: Outcome) -> None:
    state = service()
    account = begun(state)
    account.try_next(10.0)
    account.answered()
    account.end(outcome, 10.5)
    assert not state.told.recent


@pytest.mark.parametrize(
    "outcome", [Outcome.CUT, Outcome.FAILED, Outcome.DEADLINE, Outcome.ERROR, Outcome.REFUSED, Outcome.LIMITED]
)
def test_what_fails_is_kept_wherever_it_was(outcome: Outcome) -> None:
    state = service()
    account = begun(state)
    account.try_next(10.0)
    account.end(outcome, 10.5)
    assert [each.outcome for each in state.told.recent] == [outcome]


def test_no_instance_is_kept_too() -> None:
    """A6."""
    state = service(0)
    account = begun(state)
    assert account.try_next(10.0) is None
    account.end(Outcome.NO_INSTANCE, 10.5)
    [request] = state.told.recent
    assert (request.instance, request.tier, request.attempts, request.failures) == (None, "", 0, ())


def test_as_many_are_kept_as_the_page_shows_and_each_ends_once() -> None:
    state = service()
    for _ in range(KEPT + 3):
        served_elsewhere(state)
    assert len(state.told.recent) == KEPT
    account = begun(state)
    account.try_next(10.0)
    account.end(Outcome.CUT, 11.0, hold=True)
    account.end(Outcome.FAILED, 12.0)
    assert [each.outcome for each in state.told.recent][-2:] == ["served", "cut"]


def test_of_many_attempts_the_first_and_the_last_are_kept() -> None:
    state = service(3 * ATTEMPTS_KEPT)
    account = begun(state)
    while account.try_next(10.0) is not None:
        account.attempt_failed(Failure.CONNECT, 10.0, f"failed_{account.attempts}")
    account.end(Outcome.FAILED, 11.0)
    [request] = state.told.recent
    first = range(1, 1 + ATTEMPTS_KEPT // 2)
    last = range(1 + 3 * ATTEMPTS_KEPT - ATTEMPTS_KEPT // 2, 1 + 3 * ATTEMPTS_KEPT)
    assert [each.error for each in request.failures] == [f"failed_{each}" for each in (*first, *last)]
    assert request.attempts == 3 * ATTEMPTS_KEPT


@pytest.mark.parametrize(("serve", "stumbled"), [(served_nearby, False), (served_elsewhere, True)])
def test_who_follows_hears_of_each_until_he_leaves(serve: Callable[[ServiceState], None], stumbled: bool) -> None:
    state, listener, other = service(), Listener(), Listener()
    state.told.follow(listener)
    state.told.follow(other)
    serve(state)
    state.told.leave(listener)
    state.told.leave(listener)
    serve(state)
    assert [each.stumbled for each in listener.heard] == [stumbled]
    assert [each.stumbled for each in other.heard] == [stumbled, stumbled]
    assert not any(each.failed for each in other.heard)
    assert other.heard[0].asked.protocol == "tcp"
    assert [(each.ended, each.reason, each.stumbled) for each in other.heard] == other.asked
    other.listens = False
    serve(state)
    assert (len(other.asked), len(other.heard)) == (3, 2)


def test_at_debug_each_request_has_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """What was picked, and what became of each attempt; nothing of it at any other level."""
    state = service()
    with caplog.at_level(logging.INFO, "meshlocal"):
        served_elsewhere(state)
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, "meshlocal"):
        served_nearby(state)
        served_elsewhere(state)
    assert events(caplog.records) == ["request ended", "request ended"]
    near, far = (entry(each).fields for each in caplog.records)
    assert (near["instance"], near["tier"], near["reason"], near["failed"]) == ("10.0.0.1:1", "node", None, None)
    assert (far["node"], far["reason"], far["attempts"]) == ("n2", "local_failed", 2)
    assert far["failed"] == "10.0.0.1:1 (node) refused after 0.250000 s"
