"""What a proxy knows, as plain data: for the admin pages, and for the command line's tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshlocal.client.fitness import Fitness
from meshlocal.policy.model import Instance
from meshlocal.policy.picker import Cursors, Gate, Pick, Picker


def instance_view(instance: Instance) -> dict[str, Any]:
    """One instance."""
    key = instance.key
    view: dict[str, Any] = {"address": key.address, "port": key.port, "port_name": key.port_name or None}
    if key.protocol != "tcp":
        view["protocol"] = key.protocol
    conditions = instance.conditions
    return {
        **view,
        "node": instance.node or None,
        "ready": conditions.ready,
        "serving": conditions.serving,
        "terminating": conditions.terminating,
        "labels": dict(sorted(instance.labels.items())),
    }


def health_view(fitness: Fitness, instance: Instance, now: float) -> dict[str, Any]:
    """How an instance stands (H1, H3): only what there is to say."""
    standing = fitness.health.standing(instance.key[:2], now)
    view: dict[str, Any] = {"state": standing.state, "under_way": fitness.under_way.get(instance.key[:2], 0)}
    if standing.cause is not None:
        view["cause"] = standing.cause
    if standing.failures:
        view["failures_in_a_row"] = standing.failures
    if standing.left is not None:
        view["next_trial_in"] = round(standing.left, 1)
        view["ejections"] = standing.ejections
    return view


def plan_view(picker: Picker, picks: Iterable[Pick]) -> list[dict[str, Any]]:
    """The steps of a plan, in order."""
    names = picker.selector.tiers
    return [
        {
            "step": step,
            "instance": str(pick.instance.key),
            "node": pick.instance.node or None,
            "tier": names[pick.tier],
            "reason": pick.reason,
            "last_resort": pick.last_resort,
            "passed_over": pick.passed_over,
        }
        for step, pick in enumerate(picks, start=1)
    ]


def explain_view(picker: Picker, cursors: Cursors, gate: Gate | None = None) -> dict[str, Any]:
    """The plan that the next request gets, and what is in no plan, each with its reason (R2)."""
    locality = picker.selector.locality
    return {
        "service": picker.snapshot.service,
        "known": not picker.snapshot.unknown,
        "version": picker.snapshot.version,
        "node": locality.node or None,
        "prefer": list(locality.prefer),
        "tiers": dict(picker.tier_sizes()),
        "plan": plan_view(picker, picker.preview(cursors, gate)),
        "left_out": [
            {"instance": str(instance.key), "node": instance.node or None, "why": why}
            for instance, why in sorted(picker.left_out(), key=lambda pair: pair[0].key)
        ],
    }
