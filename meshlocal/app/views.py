"""What a proxy knows, as plain data: for the admin pages, and for the command line's tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshlocal.policy.model import Instance
from meshlocal.policy.picker import Cursors, Pick, Picker


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
        }
        for step, pick in enumerate(picks, start=1)
    ]


def explain_view(picker: Picker, cursors: Cursors) -> dict[str, Any]:
    """The plan that the next request gets, and what is in no plan, each with its reason (R2)."""
    locality = picker.selector.locality
    return {
        "service": picker.snapshot.service,
        "known": not picker.snapshot.unknown,
        "version": picker.snapshot.version,
        "node": locality.node or None,
        "prefer": list(locality.prefer),
        "tiers": dict(picker.tier_sizes()),
        "plan": plan_view(picker, picker.preview(cursors)),
        "left_out": [
            {"instance": str(instance.key), "node": instance.node or None, "why": why}
            for instance, why in sorted(picker.left_out(), key=lambda pair: pair[0].key)
        ],
    }
