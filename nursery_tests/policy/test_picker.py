"""The picker: tiers, rotation and cursors (L1 to L6, O1 to O4, R1)."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy import model
from meshlocal.policy.families import Families
from meshlocal.policy.locality import LeftOut, Locality, Selector
from meshlocal.policy.model import Conditions, Instance, ServiceKey, ServiceSnapshot, diff, make_instance
from meshlocal.policy.picker import Cursors, Pick, Picker, Reason
from meshlocal.policy.steps import STEP

B = ServiceKey("b")
N1 = Locality({"node": "n1"})


def at(last: int, node: str | None = None, *, port: int = 9000, **more: str) -> Instance:
    labels = dict(more) if node is None else {"node": node, **more}
    return make_instance(f"10.0.{last // 256}.{last % 256}", port, "grpc", labels)


def snapshot(*instances: Instance, version: str = "v") -> ServiceSnapshot:
    return ServiceSnapshot(B, version, model.index(instances))


def picker(*instances: Instance, locality: Locality = N1, port_name: str | None = None) -> Picker:
    return Picker.build(Selector(locality, port_name), snapshot(*instances))


def walk(of: Picker, cursors: Cursors) -> list[Pick]:
    plan = of.plan(cursors)
    return list(iter(plan.next, None))


class FirstPosition:
    """A random source that always says zero."""

    def randrange(self, stop: int, /) -> int:
        return 0


def still() -> Cursors:
    return Cursors(FirstPosition())


# -- strategies --------------------------------------------------------------

nodes = st.sampled_from([None, "", "  ", "n1", "n2", "n3"])
zones = st.sampled_from([None, "", "z1", "z2"])


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    labels = {}
    if (node := draw(nodes)) is not None:
        labels["node"] = node
    if (zone := draw(zones)) is not None:
        labels["zone"] = zone
    conditions = Conditions(
        ready=draw(st.booleans()), serving=draw(st.booleans()), terminating=draw(st.sampled_from([False, False, True]))
    )
    return make_instance(
        draw(st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "fd00::1"])),
        draw(st.integers(9000, 9002)),
        draw(st.sampled_from(["", "grpc"])),
        labels,
        conditions,
        draw(st.sampled_from(["tcp", "tcp", "tcp", "udp"])),
    )


localities = st.builds(
    Locality,
    st.fixed_dictionaries({"node": st.sampled_from(["", " ", "n1", "n2"]), "zone": st.sampled_from(["", "z1"])}),
    st.sampled_from([("node",), ("node", "zone"), ("zone",)]),
    st.sampled_from([None, "zone"]),
    st.builds(Families, st.booleans(), st.booleans()),
)
snapshots = st.lists(instances(), max_size=12).map(lambda listed: snapshot(*listed))
seeds = st.integers(0, 2**32)


# -- properties --------------------------------------------------------------


@given(snapshots, localities, seeds)
def test_plan_holds_each_usable_instance_once_in_tier_order(of: ServiceSnapshot, locality: Locality, seed: int) -> None:
    """O1, L3, L4: every usable instance, none twice, nearest tier first, terminating ones after all others."""
    selector = Selector(locality)
    picks = walk(Picker.build(selector, of), Cursors(random.Random(seed)))
    places = [pick.instance.key[:2] for pick in picks]
    usable = {each.key[:2] for each in of.instances.values() if selector.left_out(each) is None}
    assert len(places) == len(set(places))
    assert set(places) == usable
    ranks = [(pick.last_resort, pick.tier) for pick in picks]
    assert ranks == sorted(ranks)
    for pick in picks:
        assert pick.tier == selector.tier(pick.instance)
        assert pick.last_resort == pick.instance.conditions.terminating
        assert (pick.reason is None) == (pick.tier == 0)


@given(snapshots, localities, seeds, st.integers(0, 5))
def test_preview_is_the_plan_to_come(of: ServiceSnapshot, locality: Locality, seed: int, before: int) -> None:
    """R2: the preview is what the next request gets, and looking changes nothing."""
    built = Picker.build(Selector(locality), of)
    cursors = Cursors(random.Random(seed))
    for _ in range(before):
        built.plan(cursors).next()
    foreseen = list(built.preview(cursors))
    assert list(built.preview(cursors)) == foreseen
    assert walk(built, cursors) == foreseen


@given(st.lists(instances(), max_size=12), st.lists(instances(), max_size=4), localities, seeds, st.data())
def test_updated_equals_built_anew(
    old: list[Instance], new: list[Instance], locality: Locality, seed: int, data: st.DataObject
) -> None:
    """A picker that was updated by a change gives the same plans as one built from the new snapshot."""
    before = snapshot(*old, version="1")
    kept = [each for each in before.instances.values() if data.draw(st.integers(0, 3))]
    after = snapshot(*new, *kept, version="2")
    selector = Selector(locality)
    updated = Picker.build(selector, before).updated(after, diff(before, after))
    anew = Picker.build(selector, after)
    assert updated.matching == anew.matching
    assert updated.tier_sizes() == anew.tier_sizes()
    assert walk(updated, Cursors(random.Random(seed))) == walk(anew, Cursors(random.Random(seed)))


@given(st.integers(2, 9), st.integers(0, 8), st.integers(1, 6), seeds)
def test_one_dead_instance_spreads_evenly(size: int, dead: int, rounds: int, seed: int) -> None:
    """O2: with one dead instance each of the others gets the same share, its neighbour no more than the rest."""
    dead %= size
    of = picker(*(at(i, "n1") for i in range(size)))
    gone = at(dead, "n1").key
    cursors = Cursors(random.Random(seed))
    served: Counter[str] = Counter()
    for _ in range(rounds * (size - 1)):
        plan = of.plan(cursors)
        pick = plan.next()
        assert pick is not None
        if pick.instance.key == gone:
            pick = plan.next()
            assert pick is not None
        served[pick.instance.key.address] += 1
    assert set(served.values()) == {rounds}
    assert len(served) == size - 1


@given(st.integers(1, 8), st.integers(2, 8), seeds)
def test_requests_under_way_together_spread_evenly(together: int, size: int, seed: int) -> None:
    """O2 with requests under way at once: those that fail on the dead local instance go to different others."""
    of = picker(at(0, "n1"), *(at(i, f"n{i + 1}") for i in range(1, size + 1)))
    cursors = Cursors(random.Random(seed))
    plans = [of.plan(cursors) for _ in range(together)]
    for plan in plans:
        first = plan.next()
        assert first is not None
        assert first.tier == 0
    second = Counter(pick.instance.key.address for plan in plans if (pick := plan.next()))
    assert max(second.values()) - min(second[at(i).key.address] for i in range(1, size + 1)) <= 1


@given(st.sets(st.integers(0, 20), min_size=1), st.sets(st.integers(0, 20)), st.integers(0, 25), seeds)
def test_membership_change_moves_the_cursor_no_further_than_it_must(
    old: set[int], new: set[int], steps: int, seed: int
) -> None:
    """O3: the cursor stays on its instance; if that is removed, it goes to the next one that remains, or came."""
    before = picker(*(at(i, "n1") for i in old))
    cursors = Cursors(random.Random(seed))
    for _ in range(steps):
        before.plan(cursors).next()
    expected_next = next(before.preview(cursors)).instance
    place = int(expected_next.key.address.rpartition(".")[2])
    after_snapshot = snapshot(*(at(i, "n1") for i in new), version="2")
    after = before.updated(after_snapshot, diff(before.snapshot, after_snapshot))
    picks = walk(after, cursors)
    order = sorted(new, key=lambda i: at(i).key)
    expected = next((i for i in order if at(i).key >= at(place).key), order[0] if order else None)
    assert (picks[0].instance.key if picks else None) == (at(expected).key if expected is not None else None)


@given(st.text(max_size=3), st.text(max_size=3))
def test_unknown_equals_nothing(own: str, label: str) -> None:
    """L2: equal labels are one node, but blank equals nothing, not even blank."""
    of = picker(at(1, label), locality=Locality({"node": own}))
    (pick,) = walk(of, still())
    assert (pick.tier == 0) == bool(own.strip() and own.strip() == label.strip())


# -- tables ------------------------------------------------------------------


def test_missing_node_label_is_never_local() -> None:
    """L2: an instance without a node label is in `other`, whether or not the proxy knows its node."""
    for locality in (N1, Locality({}), Locality({"node": ""})):
        (pick,) = walk(picker(at(1), locality=locality), still())
        assert pick.tier == 1


@pytest.mark.parametrize(
    ("locality", "listed", "reason"),
    [
        (Locality({}), [at(1, "n1")], Reason.NODE_UNKNOWN),
        (Locality({"node": "  "}), [at(1, "n1")], Reason.NODE_UNKNOWN),
        (N1, [at(1, "n2")], Reason.NO_LOCAL),
        (N1, [at(1, "n1"), at(2, "n2")], Reason.LOCAL_FAILED),
        (Locality({"node": "n1"}, prefer=("zone",)), [at(1, "n1", zone="z1")], Reason.NODE_UNKNOWN),
    ],
)
def test_reason_for_leaving(locality: Locality, listed: list[Instance], reason: Reason) -> None:
    """R1: one reason for each request that leaves the first tier."""
    picks = walk(picker(*listed, locality=locality), still())
    assert {pick.reason for pick in picks if pick.tier} == {reason}


def test_prefer_orders_tiers() -> None:
    """L3: tier k is by prefer[k], less earlier tiers; the rest is `other`."""
    locality = Locality({"node": "n1", "zone": "z1"}, prefer=("node", "zone"))
    of = picker(
        at(1, "n3", zone="z2"), at(2, "n2", zone="z1"), at(3, "n1", zone="z1"), at(4, zone="z1"), locality=locality
    )
    assert of.tier_sizes() == {"node": 1, "zone": 2, "other": 1}
    assert [(pick.instance.key.address, pick.tier) for pick in walk(of, still())] == [
        ("10.0.0.3", 0),
        ("10.0.0.2", 1),
        ("10.0.0.4", 1),
        ("10.0.0.1", 2),
    ]


@pytest.mark.parametrize(
    ("instance", "why"),
    [
        (make_instance("10.0.0.1", 1, "http"), LeftOut.PORT_NAME),
        (make_instance("10.0.0.1", 1, "grpc", protocol="udp"), LeftOut.PROTOCOL),
        (make_instance("fd00::1", 1, "grpc"), LeftOut.FAMILY),
        (make_instance("::1", 1, "grpc"), None),
        (make_instance("10.0.0.1", 1, "grpc", conditions=Conditions(ready=False)), LeftOut.NOT_READY),
        (
            make_instance("10.0.0.1", 1, "grpc", conditions=Conditions(ready=False, serving=False, terminating=True)),
            LeftOut.NOT_SERVING,
        ),
        (make_instance("10.0.0.1", 1, "grpc", conditions=Conditions(ready=False, terminating=True)), None),
    ],
)
def test_left_out(instance: Instance, why: LeftOut | None) -> None:
    """L4: what is left out, and the word for why."""
    of = picker(instance, locality=Locality({"node": "n1"}, families=Families(ipv6=False)), port_name="grpc")
    assert [reason for _, reason in of.left_out()] == ([why] if why else [])
    assert len(of) == (0 if why else 1)


@pytest.mark.parametrize(("own", "label", "used"), [("z1", "z1", True), ("z1", "z2", False), ("", "", False)])
def test_within(own: str, label: str, used: bool) -> None:
    """L6: with `within`, instances elsewhere or nowhere known are not used at all."""
    of = picker(at(1, "n1", zone=label), locality=Locality({"node": "n1", "zone": own}, within="zone"))
    assert len(of) == used


def test_terminating_local_comes_after_ready_remote() -> None:
    """L4: a terminating instance that still serves is used only when nothing else is left, even a local one."""
    leaving = make_instance("10.0.0.1", 9000, "grpc", {"node": "n1"}, Conditions(ready=False, terminating=True))
    picks = walk(picker(leaving, at(2, "n2")), still())
    assert [(pick.instance.key.address, pick.reason) for pick in picks] == [
        ("10.0.0.2", Reason.NO_LOCAL),
        ("10.0.0.1", None),
    ]


def test_first_position_is_drawn_for_each_tier() -> None:
    """O4: the first position comes from the source of randomness, for each tier of each process."""
    of = picker(*(at(i, "n1") for i in range(50)), *(at(100 + i, "n2") for i in range(50)))
    firsts = {tuple(pick.instance.key.address for pick in walk(of, Cursors(random.Random(s)))[::50]) for s in range(40)}
    assert len({local for local, _ in firsts}) > 10
    assert len({remote for _, remote in firsts}) > 10


def test_one_place_under_two_port_names_is_tried_once() -> None:
    """O1: an address and port published under two names is one instance to a request."""
    http = make_instance("10.0.0.1", 9000, "http", {"node": "n1"})
    grpc = make_instance("10.0.0.1", 9000, "grpc", {"node": "n1"})
    of = picker(http, grpc, at(2, "n2"))
    assert [pick.instance.key.address for pick in walk(of, still())] == ["10.0.0.1", "10.0.0.2"]
    assert of.port_names() == {"http", "grpc"}


def test_a_plan_keeps_the_picker_it_began_with() -> None:
    """A snapshot that comes while a request is under way neither repeats nor drops an instance of its plan."""
    before = picker(at(1, "n1"), at(2, "n1"), at(3, "n2"))
    cursors = still()
    plan = before.plan(cursors)
    first = plan.next()
    after = before.updated(new := snapshot(at(9, "n1"), version="2"), diff(before.snapshot, new))
    assert after.plan(cursors).next() is not None
    rest = list(iter(plan.next, None))
    assert first is not None
    addresses = [pick.instance.key.address for pick in (first, *rest)]
    assert sorted(addresses) == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert addresses[-1] == "10.0.0.3"


def test_an_empty_tier_that_refills_goes_on_where_it_stood() -> None:
    """O3: a local tier that was empty for a while does not start again from its first instance."""
    listed = [at(i, "n1") for i in range(4)]
    full = picker(*listed)
    cursors = still()
    for _ in range(2):
        full.plan(cursors).next()
    empty = full.updated(none := snapshot(version="2"), diff(full.snapshot, none))
    assert empty.plan(cursors).next() is None
    again = empty.updated(back := snapshot(*listed, version="3"), diff(none, back))
    pick = again.plan(cursors).next()
    assert pick is not None
    assert pick.instance.key.address == "10.0.0.2"


def test_a_picker_is_built_in_steps() -> None:
    """However many instances there are, no step handles more than a few, and the result is the same."""
    crowd = [at(number, f"n{number % 3}") for number in range(5000)]
    random.Random(1).shuffle(crowd)
    whole = snapshot(*crowd)
    steps = Picker.in_steps(Selector(N1), whole)
    count, built = 0, None
    while built is None:
        try:
            next(steps)
            count += 1
        except StopIteration as done:
            built = done.value
    assert count >= len(crowd) // STEP
    expected = [sorted(each.key for each in crowd if (each.node == "n1") is local) for local in (True, False)]
    assert [list(group.keys) for group in built._groups[:2]] == expected
    assert built.matching == len(expected[0])
