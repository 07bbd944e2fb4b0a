"""The plan that the next request gets, as plain data (R2): for the proxy's page, and for the command line's table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from meshlocal.app.views import left_out_in_steps, sorted_in_steps
from meshlocal.client.security import Security, reach
from meshlocal.net.slices import pieces
from meshlocal.policy.addresses import format_host_port
from meshlocal.policy.bypass import WHY_NOT
from meshlocal.policy.model import SOCKET, ServiceKey
from meshlocal.policy.picker import Cursors, Gate, Pick, Picker
from meshlocal.policy.steps import Steps, finish

if TYPE_CHECKING:
    from meshlocal.policy.unix_sockets import UnixSockets
    from meshlocal.proxy.bypass.bypass import Bypass


def step_view(step: int, pick: Pick, names: Sequence[str]) -> dict[str, Any]:
    """A step of a plan.

    Args:
        step: which one, from 1.
        pick: what is tried.
        names: of the tiers.
    """
    return {
        "step": step,
        "instance": str(pick.instance.key),
        "node": pick.instance.node or None,
        "tier": names[pick.tier],
        "reason": pick.reason,
        "last_resort": pick.last_resort,
        "passed_over": pick.passed_over,
    }


def bypass_view(bypass: Bypass | None, service: ServiceKey) -> dict[str, Any] | None:
    """Where connects to a service's listeners go, past the proxy or not; None: no bypass is configured."""
    if bypass is None:
        return None
    listeners = [
        {
            "listener": format_host_port(*each.listener),
            "instances": [format_host_port(*place) for place in each.instances],
            "why_not": None if each.why_not is None else f"{each.why_not}: {WHY_NOT[each.why_not]}",
        }
        for each in bypass.listed(service)
    ]
    return {"problem": bypass.problem, "listeners": listeners}


def bypass_lines(view: Mapping[str, Any] | None) -> list[str]:
    """What `bypass_view` tells, for people; nothing where no bypass is configured, or of another version."""
    if view is None:
        return []
    if view["problem"] is not None:
        return [f"no bypass: {view['problem']}"]
    return [
        f"bypassed: connects to {each['listener']} go to {', '.join(each['instances'])} while they listen"
        if each["why_not"] is None
        else f"not bypassed: {each['listener']}, {each['why_not']}"
        for each in view["listeners"]
    ]


def sockets_in_steps(
    picker: Picker, sockets: UnixSockets | None, security: Security | None
) -> Steps[list[dict[str, Any]] | None]:
    """The Unix sockets of a service's instances on the proxy's own node; None: no folder for them is configured.

    Args:
        picker: of the service.
        sockets: where they are.
        security: how connections to the instances are secured; None: not at all.
    """
    if sockets is None:
        return None
    found: list[dict[str, Any]] = []
    for piece in pieces(picker.snapshot.instances.values()):
        for instance in piece:
            name = instance.labels.get(SOCKET)
            if name and instance.node and instance.node == sockets.node:
                path, problem = sockets.look(name)
                if reach(instance, picker.selector.tier(instance), security, sockets).security is not None:
                    path, problem = None, "the proxy speaks TLS to it, at its port"
                found.append({"instance": str(instance.key), "path": path, "problem": problem})
        yield
    return sorted(found, key=lambda each: each["instance"])


def socket_lines(view: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """What `sockets_in_steps` tells, for people; nothing of another version."""
    return [
        f"by socket: {each['instance']} at {each['path']}, where it can be connected"
        if each["problem"] is None
        else f"not by socket: {each['instance']}, its label {SOCKET}: {each['problem']}"
        for each in view or ()
    ]


def explain_view(picker: Picker, cursors: Cursors, gate: Gate | None = None) -> dict[str, Any]:
    """The plan that the next request gets, and what is in no plan, each with its reason (R2)."""
    return finish(explain_in_steps(picker, cursors, gate))


def explain_in_steps(picker: Picker, cursors: Cursors, gate: Gate | None = None) -> Steps[dict[str, Any]]:
    """`explain_view` in steps: no step looks at more than a few instances."""
    locality = picker.selector.locality
    names = picker.selector.tiers
    plan: list[dict[str, Any]] = []
    for picks in pieces(picker.preview(cursors, gate)):
        plan += (step_view(step, pick, names) for step, pick in enumerate(picks, start=len(plan) + 1))
        yield
    left_out = yield from left_out_in_steps(picker)
    out: list[dict[str, Any]] = []
    keys = yield from sorted_in_steps(left_out)
    for piece in pieces(keys):
        for key in piece:
            instance = picker.snapshot.instances[key]
            out.append({"instance": str(key), "node": instance.node or None, "why": left_out[key]})
        yield
    return {
        "service": picker.snapshot.service,
        "known": not picker.snapshot.unknown,
        "version": picker.snapshot.version,
        "node": locality.node or None,
        "prefer": list(locality.prefer),
        "tiers": dict(picker.tier_sizes()),
        "plan": plan,
        "left_out": out,
    }
