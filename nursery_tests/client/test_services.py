"""What is known of services: snapshots that arrive while other things change."""

from __future__ import annotations

import random

import pytest

from meshlocal.client.services import ServiceState
from meshlocal.policy import model
from meshlocal.policy.config import AttemptPolicy, ServiceConfig
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import Instance, ServiceKey, ServiceSnapshot, make_instance

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
