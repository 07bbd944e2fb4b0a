"""What is known of services: snapshots that arrive while other things change, and which services are followed."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import trio
import trio.testing
from hypothesis import example, given
from hypothesis import strategies as st

from meshlocal.client.services import ServiceState, ServiceTable
from meshlocal.policy import model
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.config import AttemptPolicy, ProxyConfig, ServiceConfig
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.config_http import HttpConfig
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import Conditions, Instance, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.policy.picker import Picker
from meshlocal.wire.discovery_codec import change_from_message
from meshlocal.wire.pb import discovery_pb2 as pb

B = ServiceKey("b")
N1, N2 = Locality({"node": "n1"}), Locality({"node": "n2"})


def at(last: int, node: str) -> Instance:
    return make_instance(f"10.0.0.{last}", 9000, labels={"node": node})


def snapshot(*instances: Instance, version: str = "v") -> ServiceSnapshot:
    return ServiceSnapshot(B, version, model.index(instances))


def test_what_was_prepared_is_swapped_in_only_if_it_still_fits() -> None:
    """S2: a reload between the steps and the publication changes the place that the picker was made for."""
    state = ServiceState(B, Selector(N1), AttemptPolicy(), random.Random(1))
    one = snapshot(at(1, "n1"), at(2, "n2"))
    for _ in state.prepare(one):
        pass
    state.publish(one)
    assert state.picker is not None
    assert state.picker.tier_sizes() == {"node": 1, "other": 1}

    two = snapshot(at(1, "n1"), at(2, "n2"), at(3, "n2"), version="w")
    for _ in state.prepare(two):
        pass
    state.reselect(Selector(N2), AttemptPolicy(), EjectionConfig(), ServiceConfig())
    state.publish(two)
    assert state.picker.tier_sizes() == {"node": 2, "other": 1}

    for _ in state.prepare(two):
        pass
    state.publish(three := snapshot(at(9, "n2"), version="x"))
    assert state.picker.snapshot is three
    assert state.picker.tier_sizes() == {"node": 1, "other": 0}


def test_a_second_port_name_is_said_whenever_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    """Once for the same names: with a change, and again when a reload lets them all be used."""
    crowd = [make_instance(f"10.0.1.{number}", 9000, "grpc") for number in range(1, 9)]
    other = make_instance("10.0.2.1", 9001, "http")
    state = ServiceState(B, Selector(N1), AttemptPolicy(), random.Random(1))
    state.publish(snapshot(*crowd))
    state.publish(snapshot(*crowd[1:], version="w"))
    assert not caplog.records
    state.publish(snapshot(*crowd, other, version="x"))
    state.publish(snapshot(*crowd, other, at(3, "n2"), version="y"))
    said = [record for record in caplog.records if "several port names" in record.message]
    assert len(said) == 2  # the last instance has no port name at all, which is another one
    state.reselect(Selector(N1, "grpc"), AttemptPolicy(), EjectionConfig(), ServiceConfig())
    state.publish(snapshot(*crowd, other, version="z"))
    assert len([record for record in caplog.records if "several port names" in record.message]) == 2


def unready(last: int, node: str) -> Instance:
    return make_instance(f"10.0.0.{last}", 9000, labels={"node": node}, conditions=Conditions(ready=False))


def ejected(state: ServiceState, instance: Instance) -> None:
    for _ in range(3):
        state.fitness.failed(instance, "refused")


async def test_an_ejected_instance_that_becomes_ready_is_tried_at_once() -> None:
    """F1: a rollout brings the new instance up at the old one's address."""
    state = ServiceState(B, Selector(N1), AttemptPolicy(), random.Random(1))
    state.publish(snapshot(at(1, "n1"), at(2, "n2")))
    ejected(state, at(1, "n1"))
    plan = state.plan()
    assert plan is not None
    assert [pick.instance for pick in iter(plan.next, None)] == [at(2, "n2"), at(1, "n1")]
    state.publish(snapshot(unready(1, "n1"), at(2, "n2"), version="w"))
    # A change of something else says nothing of it.
    state.publish(snapshot(unready(1, "n1"), at(3, "n2"), version="x"))
    assert not state.fitness.health.is_due(("10.0.0.1", 9000), trio.current_time())
    state.publish(snapshot(at(1, "n1"), at(3, "n2"), version="y"))
    plan = state.plan()
    assert plan is not None
    pick = plan.next()
    assert pick is not None
    assert pick.instance == at(1, "n1")


def by_host(**http: object) -> ServiceTable:
    return ServiceTable(ProxyConfig(http=HttpConfig(**http)), N1, random.Random(1))  # type: ignore[arg-type]  # any keys


async def test_what_is_known_is_kept_while_discovery_is_away() -> None:
    """D7: however long nobody used it; what no registry knew, or was never heard of, is no loss."""
    made = by_host(service_idle_timeout=10.0)
    made.is_away = lambda: True
    known, unknown, unheard = ServiceKey("known"), ServiceKey("unknown"), ServiceKey("unheard")
    for key in (known, unknown, unheard):
        made.demand(key, 0.0)
    made.publish(ServiceSnapshot(known, "v", model.index([at(1, "n1")])))
    made.publish(ServiceSnapshot(unknown, "v", {}, unknown=True))
    assert made.drop_unused(1000.0) > 0
    assert made.keys == [known]
    made.is_away = lambda: False
    made.drop_unused(1000.0)
    assert made.keys == []


async def test_a_full_table_gives_up_what_is_known_last() -> None:
    """D7: bounded by count; the longest unused goes first, and before it what nothing is known of."""
    made = by_host(max_services=3)
    first, second, unheard, fourth, fifth = (ServiceKey(name) for name in ("first", "second", "unheard", "4", "5"))
    for at_time, key in enumerate((first, second, unheard)):
        made.demand(key, float(at_time))
    for key in (first, second):
        made.publish(ServiceSnapshot(key, "v", model.index([at(1, "n1")])))
    made.demand(fourth, 10.0)
    assert made.keys == [first, second, fourth]
    made.publish(ServiceSnapshot(fourth, "v", model.index([at(1, "n1")])))
    made.demand(fifth, 11.0)
    assert made.keys == [second, fourth, fifth]


async def test_a_partition_makes_one_question_of_all_services(autojump_clock: trio.testing.MockClock) -> None:
    """D5: every service fails at once, for every proxy; each question is a new connection."""
    made = by_host(max_services=100)
    asked: list[tuple[float, ServiceKey]] = []
    made.on_failing = lambda key: asked.append((trio.current_time(), key))
    keys = [ServiceKey(f"s{number}") for number in range(40)]
    for key in keys:
        made.demand(key, 0.0)
        made.publish(ServiceSnapshot(key, "v", model.index([at(1, "n1")])))
    for _ in range(300):
        await trio.sleep(0.1)
        for key in keys:
            made[key].fitness.failed(at(1, "n1"), "refused")
    times = sorted({when for when, _ in asked})
    assert 2 <= len(times) <= 3
    assert all(later - earlier >= 10.0 for earlier, later in pairwise(times))
    # Nobody's question is lost: each goes with the next.
    assert {key for _, key in asked} == set(keys)


async def test_unknown_names_do_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    made = by_host()
    for number in range(200):
        key = ServiceKey(f"made-up-{number}")
        made.demand(key, 0.0)
        made.publish(ServiceSnapshot(key, "v", {}, unknown=True))
    assert caplog.text.count("no registry knows the service") == 1


IDLE = 100.0


def config(*services: str, most: int = 256) -> ProxyConfig:
    """With a listener for each of these services."""
    listen = tuple(ListenAddress.parse(f"tcp://127.0.0.1:0={service}") for service in services)
    return ProxyConfig(listen=listen, http=HttpConfig(service_idle_timeout=IDLE, max_services=most))


def table(*services: str, most: int = 256) -> ServiceTable:
    return ServiceTable(config(*services, most=most), N1, random.Random(1))


def demand(of: ServiceTable, name: str, now: float) -> ServiceState:
    state = of.demand(ServiceKey(name), now)
    assert state is not None
    return state


def followed(of: ServiceTable) -> set[str]:
    return set(of.keys)


def test_what_no_request_asked_for_in_a_while_is_followed_no_longer() -> None:
    """Each by its own last request; a request that is under way, or a listener, keeps its service."""
    made = table("configured")
    told: list[set[str]] = []
    made.on_followed = lambda keys: told.append(set(keys))
    for number, name in enumerate(("old", "busy", "young", "asked again")):
        demand(made, name, float(number))
    demand(made, "configured", 4.0)
    demand(made, "asked again", 50.0)
    demand(made, "busy", 1.0).in_use += 1
    del told[:]

    assert made.drop_unused(99.0) == pytest.approx(1.0)
    assert not told
    assert made.drop_unused(100.0) == pytest.approx(2.0)
    assert followed(made) == {"configured", "busy", "young", "asked again"}
    assert made.drop_unused(102.0) == pytest.approx(48.0)
    assert followed(made) == {"configured", "busy", "asked again"}
    assert made.drop_unused(1000.0) == pytest.approx(IDLE)
    assert followed(made) == {"configured", "busy"}

    state = demand(made, "busy", 1000.0)
    state.in_use -= 1
    assert made.drop_unused(1050.0) == pytest.approx(50.0)
    made.drop_unused(1100.0)
    assert followed(made) == {"configured"}
    assert told[-1] == {"configured"}
    made.drop_unused(1e9)
    assert followed(made) == {"configured"}


def test_a_service_that_gets_a_listener_is_no_longer_dropped() -> None:
    """S2: a request named it first; it keeps its state. Once no listener names it any more, it goes with the reload."""
    made = table("configured")
    state = demand(made, "b", 0.0)
    other = demand(made, "on demand", 0.0)
    made.reconfigure(config("b"), N1)
    assert followed(made) == {"b", "on demand"}
    assert (made[ServiceKey("b")], made[ServiceKey("on demand")]) == (state, other)
    made.drop_unused(1000.0)
    assert followed(made) == {"b"}
    made.reconfigure(config("c"), N1)
    assert followed(made) == {"c"}


def test_a_reload_reaches_what_requests_asked_for() -> None:
    """S2: another place, and other limits."""
    made = table()
    state = demand(made, "b", 0.0)
    made.publish(snapshot(at(1, "n1"), at(2, "n2"), at(3, "n2")))
    assert state.picker is not None
    assert state.picker.tier_sizes() == {"node": 1, "other": 2}
    made.reconfigure(ProxyConfig(services={B: ServiceConfig(spill=7)}), N2)
    assert made.get(B) is state
    assert state.picker.tier_sizes() == {"node": 2, "other": 1}
    assert state.fitness.spill == 7


async def test_one_more_than_may_be_followed_takes_the_place_of_an_unused_one() -> None:
    """First of what nobody knows, then of what was not asked for the longest time; never of one that is in use."""
    made = table("configured", most=3)
    oldest, _, unknown = (demand(made, name, float(number)) for number, name in enumerate(("one", "two", "nobody")))
    made.publish(ServiceSnapshot(unknown.key, "v", {}, unknown=True))
    demand(made, "three", 3.0)
    assert followed(made) == {"configured", "one", "two", "three"}
    oldest.in_use += 1
    demand(made, "four", 4.0)
    assert followed(made) == {"configured", "one", "three", "four"}
    for name in ("three", "four"):
        demand(made, name, 5.0).in_use += 1
    assert made.demand(ServiceKey("five"), 6.0) is None
    assert followed(made) == {"configured", "one", "three", "four"}
    assert made.demand(ServiceKey("configured"), 6.0) is not None


def _named(*addresses: str) -> list[pb.Instance]:
    return [
        pb.Instance(
            endpoint=pb.NetworkEndpoint(address=each, port=80), labels=pb.Labels(labels={"node": "n1", "x": "2"})
        )
        for each in addresses
    ]


HOSTS = st.lists(st.sampled_from([f"10.0.0.{last}" for last in range(1, 13)]), max_size=4)


@given(HOSTS, HOSTS)
@example(["10.0.0.2", "10.0.0.2"], [])
@example([], ["10.0.0.2", "10.0.0.2"])
@example(["10.0.0.12"], ["10.0.0.12"])
def test_a_change_that_names_a_thing_twice_costs_no_other_instance(upserted: list[str], removed: list[str]) -> None:
    """D1: the picker is the snapshot's, whatever a server sends to get there."""
    state = ServiceState(B, Selector(Locality({"node": "n1"})), AttemptPolicy(), random.Random(1))
    instances = [make_instance(f"10.0.0.{last}", 80, labels={"node": "n1"}) for last in range(1, 11)]
    before = ServiceSnapshot(B, "1", model.index(instances))
    state.publish(before)
    message = pb.ServiceChange(
        service="b",
        base_version="1",
        version="2",
        upserted=_named(*upserted),
        removed=[each.endpoint for each in _named(*removed)],
    )
    change = change_from_message(message, lambda service, error: None)
    after = model.apply(before, change)
    state.publish(after, change)
    assert state.picker is not None
    built = Picker.build(state.selector, after)
    assert list(state.picker.shown(100)) == list(built.shown(100))
    assert len(state.picker) == len(after.instances)


def test_a_fixed_address_is_asked_of_no_registry() -> None:
    """It is known at once, and on this node, wherever that is; whether others are on it is said of them alone (L5)."""
    listen = (ListenAddress.parse("tls://127.0.0.1:1=@10.0.0.9:9000"), ListenAddress.parse("tcp://127.0.0.1:2=b"))
    config = ProxyConfig(listen=listen, namespace="shop")
    table = ServiceTable(config, N1, random.Random(1))
    assert table.keys == ["b.shop"]
    assert list(table.waiting()) == ["b.shop"]
    fixed = table[ServiceKey("@10.0.0.9:9000")]
    for locality in (N1, N2, Locality({})):
        table.reconfigure(config, locality)
        assert fixed.picker is not None
        (pick,) = fixed.preview()
        assert (str(pick.instance.key), pick.instance.node) == ("10.0.0.9:9000", locality.node)
    table.reconfigure(config, N1)
    table.publish(ServiceSnapshot(ServiceKey("b.shop"), "v", model.index([at(1, "n2")])))
    assert table.node_unmatched
    table.reconfigure(ProxyConfig(listen=listen[:1]), N1)
    assert table.keys == []
    assert not table.node_unmatched
