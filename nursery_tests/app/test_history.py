"""app/history: the last ten minutes of each service, in samples, at a bounded size."""

from __future__ import annotations

import random

import trio
import trio.testing

from meshlocal.app.history import INTERVAL, SAMPLES, History
from meshlocal.client.latency import Latency
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import Outcome, RequestKey
from meshlocal.policy.config import AttemptPolicy
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import ServiceKey
from meshlocal.policy.steps import finish


def service(name: str = "b") -> ServiceState:
    return ServiceState(ServiceKey(name), Selector(Locality({"node": "n1"})), AttemptPolicy(), random.Random(1))


def count(state: ServiceState, tier: str, outcome: Outcome, number: int = 1) -> None:
    state.statistics.requests[RequestKey(tier, "" if tier == "node" else "no_local", outcome)] += number


def test_what_ended_in_each_interval() -> None:
    """Near, away, and failed wherever that was; what was there before is not of the last ten minutes."""
    state = service()
    count(state, "node", Outcome.SERVED, 100)
    history = History(lambda: [state])
    finish(history.sample())
    assert list(history.of(state).samples) == []
    count(state, "node", Outcome.SERVED, 3)
    count(state, "other", Outcome.CUT, 2)
    count(state, "node", Outcome.FAILED)
    count(state, "", Outcome.NO_INSTANCE)
    assert history.of(state).since(state.statistics, "node") == (3, 2, 2)
    finish(history.sample())
    assert history.of(state).since(state.statistics, "node") == (0, 0, 0)
    finish(history.sample())
    assert list(history.of(state).samples) == [(3, 2, 2), (0, 0, 0)]


def test_ten_minutes_are_kept() -> None:
    state = service()
    history = History(lambda: [state])
    for number in range(SAMPLES + 5):
        count(state, "node", Outcome.SERVED, number)
        finish(history.sample())
    samples = history.of(state).samples
    assert len(samples) == SAMPLES
    assert samples[-1] == (SAMPLES + 4, 0, 0)


def test_another_first_tier_makes_no_requests_that_never_were() -> None:
    """S2: a reload that prefers another label."""
    state = service()
    history = History(lambda: [state])
    finish(history.sample())
    count(state, "node", Outcome.SERVED, 5)
    recent = history.of(state)
    recent.sample(state.statistics, "node")
    recent.sample(state.statistics, "zone")
    assert all(number >= 0 for sample in recent.samples for number in sample)
    recent.sample(state.statistics, "zone")
    assert recent.samples[-1] == (0, 0, 0)


def test_latency_is_of_the_last_minutes() -> None:
    """Not of all time: what was slow an hour ago says nothing of now."""
    state = service()
    history = History(lambda: [state])
    finish(history.sample())
    state.statistics.responses["node"].add(5.0)
    state.statistics.connects["other"].add(0.003)
    found = history.of(state).latency(state.statistics, "responses")
    assert {tier: latency.count for tier, latency in found.items()} == {"node": 1}
    for _ in range(12):
        finish(history.sample())
    state.statistics.responses["node"].add(0.002)
    [latency] = history.of(state).latency(state.statistics, "responses").values()
    assert (latency.count, (latency.quantile(99) or 0) < 0.01) == (1, True)
    assert history.of(state).latency(state.statistics, "connects") == {}


def test_a_latency_since_another_time() -> None:
    latency = Latency()
    latency.add(0.002)
    before = latency.counts.copy()
    latency.add(3.0)
    later = latency.since(before)
    assert later.count == 1
    assert 2.5 < (later.quantile(50) or 0) <= 5.0
    assert latency.since(()).counts == latency.counts


def test_a_service_that_is_forgotten_is_forgotten_here() -> None:
    states = [service("b"), service("c")]
    history = History(lambda: states)
    finish(history.sample())
    assert len(history._recent) == 2
    del states[1]
    assert len(history._recent) == 1


async def test_samples_are_of_ten_seconds(autojump_clock: trio.testing.MockClock) -> None:
    state = service()
    history = History(lambda: [state])
    with trio.move_on_after(3.5 * INTERVAL):
        await history.run()
    assert len(history.of(state).samples) == 3
