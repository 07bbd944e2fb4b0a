"""Circuit limits of a service and of the whole proxy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.config_health import LimitsConfig
from meshlocal.policy.limits import Circuit, Limit

EACH = pytest.mark.parametrize("what", Limit)


@EACH
def test_without_limits_everything_enters(what: Limit) -> None:
    circuit = Circuit(LimitsConfig(), Circuit(LimitsConfig()))
    assert all(circuit.enter(what) for _ in range(1000))
    assert circuit.whole is not None
    assert circuit.now[what] == circuit.whole.now[what] == 1000


@EACH
def test_beyond_the_limit_nothing_enters_until_something_left(what: Limit) -> None:
    circuit = Circuit(LimitsConfig(**{what.value: 2}))
    assert [circuit.enter(what) for _ in range(4)] == [True, True, False, False]
    circuit.leave(what)
    assert [circuit.enter(what) for _ in range(2)] == [True, False]
    assert circuit.refused == {**dict.fromkeys(Limit, 0), what: 3}


@EACH
def test_the_wholes_limit_is_over_all_services(what: Limit) -> None:
    whole = Circuit(LimitsConfig(**{what.value: 3}))
    one, other = Circuit(LimitsConfig(), whole), Circuit(LimitsConfig(), whole)
    assert [one.enter(what), other.enter(what), one.enter(what), other.enter(what)] == [True, True, True, False]
    assert (one.now[what], other.now[what], whole.now[what]) == (2, 1, 3)
    assert (one.refused[what], other.refused[what], whole.refused[what]) == (0, 0, 1)


def test_what_is_limited_limits_nothing_else() -> None:
    circuit = Circuit(LimitsConfig(requests=1))
    assert [circuit.enter(Limit.REQUESTS), circuit.enter(Limit.CONNECTIONS), circuit.enter(Limit.WAITING)] == [True] * 3


def test_a_lower_limit_lets_what_is_under_way_go_on() -> None:
    circuit = Circuit(LimitsConfig(requests=5))
    for _ in range(5):
        circuit.enter(Limit.REQUESTS)
    circuit.limits = LimitsConfig(requests=2)
    for _ in range(4):
        assert not circuit.enter(Limit.REQUESTS)
        circuit.leave(Limit.REQUESTS)
    assert circuit.enter(Limit.REQUESTS)


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from(Limit), st.booleans()), max_size=60))
def test_the_whole_is_the_sum_and_no_limit_is_passed(steps: list[tuple[int, Limit, bool]]) -> None:
    whole = Circuit(LimitsConfig(connections=4, requests=3))
    services = [Circuit(LimitsConfig(connections=3, waiting=2), whole), Circuit(LimitsConfig(requests=2), whole)]
    for which, what, enters in steps:
        circuit = services[which]
        if enters:
            circuit.enter(what)
        elif circuit.now[what]:
            circuit.leave(what)
        for each in Limit:
            assert whole.now[each] == sum(service.now[each] for service in services)
            for circuit in (whole, *services):
                limit = getattr(circuit.limits, each)
                assert limit is None or circuit.now[each] <= limit


@pytest.mark.parametrize("what", Limit)
def test_asking_for_room_says_what_entering_would_and_takes_none(what: Limit) -> None:
    whole = Circuit(LimitsConfig(**{what.value: 2}))
    one, other = Circuit(LimitsConfig(**{what.value: 1}), whole), Circuit(LimitsConfig(), whole)
    assert one.has_room(what)
    assert one.has_room(what)
    assert one.enter(what)
    assert not one.has_room(what)
    assert (one.refused[what], whole.refused[what]) == (1, 0)
    assert other.enter(what)
    assert not other.has_room(what)
    assert (other.refused[what], whole.refused[what]) == (0, 1)
    other.leave(what)
    assert other.has_room(what)
    assert (one.now[what], other.now[what], whole.now[what]) == (1, 0, 1)
