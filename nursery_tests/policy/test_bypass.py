"""Where connects to a tcp listener go, past the proxy or not (B1, H1, L4, O2)."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.bypass import LATER, WHY_NOT, NoBypass, decide, is_crowded
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.health import Health
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import Conditions, Instance, ServiceKey, ServiceSnapshot, index, make_instance
from meshlocal.policy.picker import Cursors, Picker

LISTENER = ("127.0.0.1", 80)
A, B = ("127.0.0.1", 9001), ("127.0.0.1", 9002)


def at(place: tuple[str, int], node: str = "n1", conditions: Conditions | None = None) -> Instance:
    return make_instance(*place, labels={"node": node}, conditions=conditions or Conditions())


def picker(*instances: Instance, node: str = "n1") -> Picker:
    snapshot = ServiceSnapshot(ServiceKey("b"), "1", index(instances))
    return Picker.build(Selector(Locality({"node": node} if node else {})), snapshot)


def health(failures: int = 1) -> Health:
    return Health(EjectionConfig(failures=failures, time=5.0), Random(0))


def own(host: str) -> bool:
    return host in ("127.0.0.1", "::1", "10.0.0.1")


TERMINATING = Conditions(ready=False, serving=True, terminating=True)


@pytest.mark.parametrize(
    ("made", "instances", "why_not"),
    [
        (None, (), NoBypass.NO_SNAPSHOT),
        (picker(), (), NoBypass.NO_LOCAL),
        (picker(at(A, "n2")), (), NoBypass.NO_LOCAL),
        (picker(at(A, ""), node=""), (), NoBypass.NO_LOCAL),
        (picker(at(A, conditions=TERMINATING)), (), NoBypass.NO_LOCAL),
        (picker(at(A, conditions=Conditions(ready=False))), (), NoBypass.NO_LOCAL),
        (picker(at(A), at(B), at(("10.0.0.9", 80), "n2")), (A, B), None),
        (picker(at(A), at(B, conditions=TERMINATING)), (A,), None),
        (picker(at(A), at(("10.0.0.9", 80))), (), NoBypass.ELSEWHERE),
        (picker(at(A), at(("10.0.0.1", 80))), (("10.0.0.1", 80), A), None),
        (picker(at(A), at(("::1", 80))), (), NoBypass.FAMILY),
        (picker(*(at(("127.0.0.1", port)) for port in range(1, 6))), (), NoBypass.MANY),
        (picker(*(at(("127.0.0.1", port)) for port in range(1, 50))), (), NoBypass.MANY),
    ],
)
def test_where_connects_go(
    made: Picker | None, instances: tuple[tuple[str, int], ...], why_not: NoBypass | None
) -> None:
    again = LATER if why_not is NoBypass.ELSEWHERE else None
    assert decide(made, health(), 0.0, LISTENER, own, 4) == (instances, why_not, again)


def test_an_instance_under_two_port_names_has_one_turn() -> None:
    both = (make_instance(*A, name, {"node": "n1"}) for name in ("a", "b"))
    assert decide(picker(*both), health(), 0.0, LISTENER, own, 4).instances == (A,)


def test_what_is_ejected_is_left_out_until_its_trial_which_the_proxy_makes() -> None:
    """H1: while one is due, requests reach the proxy; what it finds out decides."""
    fit = health()
    made = picker(at(A), at(B))
    fit.failed(A, 0.0)
    decision = decide(made, fit, 1.0, LISTENER, own, 4)
    assert (decision.instances, decision.why_not) == ((B,), None)
    assert decision.again is not None
    due = 1.0 + decision.again
    assert decide(made, fit, due, LISTENER, own, 4) == ((), NoBypass.TRIAL, None)
    assert fit.claim(A, due)
    on_trial = decide(made, fit, due, LISTENER, own, 4)
    assert (on_trial.instances, on_trial.again) == ((B,), 5.0)
    fit.succeeded(A, due)
    assert decide(made, fit, due, LISTENER, own, 4) == ((A, B), None, None)


def test_where_all_are_ejected_the_proxy_goes_on() -> None:
    fit = health()
    fit.failed(A, 0.0)
    decision = decide(picker(at(A)), fit, 1.0, LISTENER, own, 4)
    assert (decision.instances, decision.why_not) == ((), NoBypass.UNFIT)
    fit.checks_failed(A)
    assert decide(picker(at(A)), fit, 1.0, LISTENER, own, 4) == ((), NoBypass.UNFIT, None)


def test_whose_accept_queue_is_full_is_left_out() -> None:
    """A2: the proxy goes on after a quarter of a second, where the kernel would try again after one."""
    made = picker(at(A), at(B))
    assert decide(made, health(), 1.0, LISTENER, own, 4, {A}) == ((B,), None, None)
    assert decide(made, health(), 1.0, LISTENER, own, 4, {A, B}) == ((), NoBypass.CROWDED, None)


@pytest.mark.parametrize(
    ("waiting", "most", "before", "crowded"),
    [
        (0, 128, False, False),
        (127, 128, False, False),
        (128, 128, False, True),
        (129, 128, False, True),
        (128, 128, True, True),
        (65, 128, True, True),
        (64, 128, True, False),
        (0, 0, False, False),
        (1, 0, False, True),
        (1, 0, True, True),
        (0, 0, True, False),
    ],
)
def test_when_a_queue_is_full(waiting: int, most: int, before: bool, crowded: bool) -> None:
    assert is_crowded(waiting, most, before) is crowded


def test_who_is_ejected_elsewhere_does_not_hold_it_up() -> None:
    """Only what a connect could go to must be of this host."""
    fit = health()
    fit.failed(("10.0.0.9", 80), 0.0)
    assert decide(picker(at(A), at(("10.0.0.9", 80))), fit, 1.0, LISTENER, own, 4).instances == (A,)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["n1", "n2"]), st.booleans()), max_size=8),
    st.sets(st.integers(1, 6)),
)
def test_only_what_the_picker_would_give_first(drawn: list[tuple[int, str, bool]], ejected: set[int]) -> None:
    """B1: each instance of a list is one that the next requests would be given, of the first tier, admitted."""
    made = picker(*(at(("127.0.0.1", n), node, Conditions(ready=ready)) for n, node, ready in drawn))
    fit = health()
    for number in ejected:
        fit.failed(("127.0.0.1", number), 0.0)
    decision = decide(made, fit, 1.0, LISTENER, own, 16)
    given_first = {
        pick.instance.key[:2]
        for pick in made.preview(Cursors(Random(0)))
        if pick.tier == 0 and not pick.last_resort and fit.is_admitted(pick.instance.key[:2])
    }
    assert set(decision.instances) == given_first
    assert (decision.why_not is None) == bool(decision.instances)


def test_every_reason_has_words() -> None:
    assert WHY_NOT.keys() == set(NoBypass)


def test_health_tells_of_each_change_that_matters() -> None:
    """Whoever keeps a list of what is admitted hears when it may be another."""
    told: list[str] = []
    fit = health(failures=2)
    fit.on_change = lambda: told.append("x")

    def changes(act: object) -> int:
        before = len(told)
        assert callable(act)
        act()
        return len(told) - before

    assert changes(lambda: fit.failed(A, 0.0)) == 0
    assert changes(lambda: fit.failed(A, 0.0)) == 1
    assert changes(lambda: fit.claim(A, 1.0)) == 0
    assert changes(lambda: fit.claim(A, 10.0)) == 1
    assert changes(lambda: fit.abandoned(A, 10.0)) == 1
    assert changes(lambda: fit.ready_again(A, 10.0)) == 1
    assert changes(lambda: fit.succeeded(A, 11.0)) == 1
    assert changes(lambda: fit.succeeded(A, 11.0)) == 0
    assert changes(lambda: fit.checks_failed(A)) == 1
    assert changes(lambda: fit.checks_failed(A)) == 0
    assert changes(lambda: fit.check_passed(A, 12.0)) == 1
    assert changes(lambda: fit.misbehaved(A, 13.0)) == 1
