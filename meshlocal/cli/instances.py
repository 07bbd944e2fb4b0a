"""Instances as rows, and what becomes of them, for `get`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml

from meshlocal.app.views import instance_view
from meshlocal.cli.tables import Columns
from meshlocal.policy.model import NODE, REGISTRY, SERVICE, EndpointKey, Instance, ServiceSnapshot

Output = Literal["table", "wide", "json", "yaml"]
"""What an answer looks like: for people, with every column, or for machines."""


def columns(*, wide: bool) -> tuple[str, ...]:
    """What `row` has."""
    more = ("PROTOCOL", "REGISTRY") if wide else ()
    return ("ADDRESS", "PORT", "PORT NAME", "NODE", "STATE", *more, "LABELS")


def row(view: Mapping[str, Any], *, wide: bool) -> tuple[object, ...]:
    """An instance's, of its `instance_view`. Labels that have a column stand there only."""
    labels = view["labels"]
    more = (view.get("protocol", "tcp"), labels.get(REGISTRY)) if wide else ()
    rest = ",".join(f"{key}={value}" for key, value in labels.items() if key not in (NODE, SERVICE, REGISTRY))
    return (view["address"], view["port"], view["port_name"], view["node"], _state(view), *more, rest)


def _state(view: Mapping[str, Any]) -> str:
    if view["terminating"]:
        return "terminating" if view["serving"] else "terminating, not serving"
    return "ready" if view["ready"] else "not ready"


class Changes:
    """From snapshots of one service to what is printed of each: what was added, changed or removed since the last.

    All that is there at the start was added: who adds up the events has the state.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        # As wide from the start as the longest of its words.
        self._columns = Columns(("EVENT  ", *columns(wide=output == "wide")))
        self._held: Mapping[EndpointKey, Instance] | None = None

    def text(self, snapshot: ServiceSnapshot) -> str:
        """What to print, without the last line's end; empty: nothing."""
        before, now = self._held, snapshot.instances
        self._held = now
        found = [(event, instance_view(instance)) for event, instance in _differences(before or {}, now)]
        if self._output in ("table", "wide"):
            rows = [(event, *row(view, wide=self._output == "wide")) for event, view in found]
            return "\n".join(self._columns.lines(rows, header=before is None))
        events = [{"event": event, "service": snapshot.service, "instance": view} for event, view in found]
        if self._output == "json":
            return "\n".join(json.dumps(event, ensure_ascii=False) for event in events)
        return "\n".join(
            "---\n" + yaml.safe_dump(event, sort_keys=False, allow_unicode=True) for event in events
        ).rstrip()


def _differences(
    before: Mapping[EndpointKey, Instance], now: Mapping[EndpointKey, Instance]
) -> Iterator[tuple[str, Instance]]:
    """By address and port."""
    for key in sorted(before.keys() | now.keys()):
        if key not in now:
            yield "removed", before[key]
        elif key not in before:
            yield "added", now[key]
        elif before[key] != now[key]:
            yield "changed", now[key]
