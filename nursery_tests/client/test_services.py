"""What is known of services: snapshots that arrive while other things change."""

from __future__ import annotations

import random

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
