"""Why a service has nothing to offer, in words."""

from __future__ import annotations

from meshlocal.client.services import ServiceState


def why_none(state: ServiceState) -> str:
    """Why a service has no instance to try."""
    if state.picker is None:
        return f"nothing was heard of it within {state.policy.first_snapshot_wait:g} s"
    if state.picker.snapshot.unknown:
        return "no registry knows it"
    left_out = sum(1 for _ in state.picker.left_out())
    return f"no usable instance; {left_out} left out" if left_out else "it has no instance"
