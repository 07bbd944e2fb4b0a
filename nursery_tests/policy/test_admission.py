"""Plans that pass instances over: ejected ones and full ones (O1, O2, O5, F3, R1, R2)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy import model
from meshlocal.policy.admission import Admission
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.health import Health, State
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import Conditions, HostPort, Instance, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.policy.picker import Cursors, PassedOver, Pick, Picker, Reason

B = ServiceKey("b")


def at(last: int, node: str, *, terminating: bool = False) -> Instance:
    conditions = Conditions(ready=not terminating, terminating=terminating)
    return make_instance(f"10.0.0.{last}", 9000, "grpc", {"node": node}, conditions)


def picker(*instances: Instance) -> Picker:
    snapshot = ServiceSnapshot(B, "v", model.index(instances))
    return Picker.build(Selector(Locality({"node": "n1"})), snapshot)


def place(instance: Instance) -> HostPort:
    return instance.key[:2]


def health(ejected: Iterable[Instance] = ()) -> Health:
    made = Health(EjectionConfig(failures=1), random.Random(0))
    for instance in ejected:
        made.failed(place(instance), 0.0)
    return made


def gate(
    of: Health, now: float = 1.0, spill: int | None = None, under_way: Mapping[HostPort, int] | None = None
) -> Admission:
    return Admission(of, now, spill, under_way or {})


def cursors() -> Cursors:
    return Cursors(random.Random(0))


def walk(of: Picker, with_gate: Admission, on: Cursors | None = None) -> list[Pick]:
    return list(iter(of.plan(on or cursors(), with_gate).next, None))


def lasts(picks: Iterable[Pick]) -> list[int]:
    return [int(pick.instance.key.address.rpartition(".")[2]) for pick in picks]


LOCAL, N2, N3 = at(1, "n1"), at(2, "n2"), at(3, "n3")


@given(st.data())
def test_every_instance_once_ejected_ones_last_in_tier_order(data: st.DataObject) -> None:
    """O1, O5, F3: admitted by tiers, then full ones, then ejected ones by tiers; and the preview says the same."""
    numbers = data.draw(st.lists(st.integers(1, 20), unique=True, max_size=12))
    instances = [
        at(number, data.draw(st.sampled_from(["n1", "n2"])), terminating=data.draw(st.booleans())) for number in numbers
    ]
    of = picker(*instances)
    ejected = {place(each) for each in instances if data.draw(st.booleans())}
    full = {place(each): 5 for each in instances if data.draw(st.booleans())}
    made = health(each for each in instances if place(each) in ejected)
    on = Cursors(random.Random(data.draw(st.integers(0, 99))))
    for _ in range(data.draw(st.integers(0, 3))):
        of.plan(on, gate(made)).next()
    shown = list(of.preview(on, gate(made, spill=5, under_way=full)))
    picks = walk(of, gate(made, spill=5, under_way=full), on)
    assert shown == picks
    assert sorted(lasts(picks)) == sorted(numbers)

    def rank(pick: Pick) -> tuple[int, bool, int]:
        where = place(pick.instance)
        round_ = 2 if where in ejected else 1 if where in full and not pick.tier else 0
        return round_, pick.last_resort, pick.tier

    assert [rank(pick) for pick in picks] == sorted(rank(pick) for pick in picks)
    named = [None, PassedOver.FULL, PassedOver.EJECTED]
    assert [pick.passed_over for pick in picks] == [named[rank(pick)[0]] for pick in picks]


@given(st.data())
def test_a_gate_without_objections_changes_nothing(data: st.DataObject) -> None:
    """O1, O2."""
    of = picker(*(at(number, data.draw(st.sampled_from(["n1", "n2"]))) for number in range(1, 9)))
    one, other = cursors(), cursors()
    for _ in range(data.draw(st.integers(0, 5))):
        assert list(iter(of.plan(one).next, None)) == walk(of, gate(health()), other)


def test_a_request_that_found_its_local_instances_ejected_says_so() -> None:
    """R1."""
    picks = walk(picker(LOCAL, N2), gate(health([LOCAL])))
    assert [(pick.instance, pick.reason) for pick in picks] == [(N2, Reason.LOCAL_EJECTED), (LOCAL, None)]


def test_a_request_that_tried_a_local_instance_in_vain_says_that() -> None:
    """R1: what it did counts more than what it did not."""
    other = at(4, "n1")
    picks = walk(picker(LOCAL, other, N2), gate(health([LOCAL])))
    assert [pick.reason for pick in picks] == [None, Reason.LOCAL_FAILED, None]


def test_a_full_local_instance_spills_to_the_next_tier() -> None:
    """F3, R1: N requests under way, and no more while another tier takes them."""
    of = picker(LOCAL, N2)
    below = walk(of, gate(health(), spill=5, under_way={place(LOCAL): 4}))
    assert [(pick.instance, pick.reason) for pick in below] == [(LOCAL, None), (N2, Reason.LOCAL_FAILED)]
    full = walk(of, gate(health(), spill=5, under_way={place(LOCAL): 5}))
    assert [(pick.instance, pick.reason) for pick in full] == [(N2, Reason.SPILL), (LOCAL, None)]


def test_spill_goes_to_the_nodes_other_instances_first() -> None:
    """F3, O1."""
    other = at(4, "n1")
    picks = walk(picker(LOCAL, other, N2), gate(health(), spill=5, under_way={place(LOCAL): 9}))
    assert [pick.instance for pick in picks] == [other, N2, LOCAL]


def test_instances_of_other_tiers_are_never_full() -> None:
    """F3."""
    picks = walk(picker(LOCAL, N2, N3), gate(health(), spill=1, under_way={place(N2): 9, place(N3): 9}))
    assert picks[0].instance == LOCAL
    assert all(pick.passed_over is None for pick in picks)


def test_full_comes_before_ejected() -> None:
    """F3, O5: a full instance works, an ejected one probably does not."""
    other = at(4, "n1")
    picks = walk(picker(LOCAL, other, N2), gate(health([N2, other]), spill=1, under_way={place(LOCAL): 1}))
    assert [pick.instance for pick in picks] == [LOCAL, other, N2]


def test_one_request_makes_the_trial_in_the_instances_own_place() -> None:
    """H1, F1: the trial costs the request what a failed attempt costs, and the others nothing."""
    of, made = picker(LOCAL, N2), health([LOCAL])
    first, second = walk(of, gate(made, 10.0)), walk(of, gate(made, 10.0))
    assert [pick.instance for pick in first] == [LOCAL, N2]
    assert [pick.instance for pick in second] == [N2, LOCAL]


def test_a_look_at_the_plan_is_no_trial() -> None:
    """R2, H1."""
    of, made = picker(LOCAL, N2), health([LOCAL])
    for _ in range(3):
        shown = list(of.preview(cursors(), gate(made, 10.0)))
        assert [pick.instance for pick in shown] == [LOCAL, N2]
    assert made.standing(place(LOCAL), 10.0).state is State.EJECTED
    assert walk(of, gate(made, 10.0))[0].instance == LOCAL


def test_the_load_of_an_ejected_instance_spreads_evenly() -> None:
    """O2."""
    others = [at(number, "n2") for number in range(2, 7)]
    of, on = picker(*others), cursors()
    made = health(others[:1])
    served: Counter[Any] = Counter()
    for _ in range(400):
        pick = of.plan(on, gate(made)).next()
        assert pick is not None
        served[place(pick.instance)] += 1
    assert sorted(served.values()) == [100, 100, 100, 100]
