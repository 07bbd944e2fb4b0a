"""Who watches a discovery server, as plain data: for its pages, and for the command line's table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from meshlocal.wire.pb import discovery_pb2 as pb


def watcher_view(message: pb.Watcher) -> dict[str, Any]:
    """What is shown of a watcher; times in seconds."""
    caller = message.caller
    return {
        "name": caller.name or None,
        "node": caller.node or None,
        "software": caller.software or None,
        "address": message.address,
        "identity": message.identity or None,
        "age": message.age_seconds,
        "behind": round(message.behind_ms / 1000, 3),
        "services": {each.service: each.version or None for each in message.services},
    }


def behind_first(views: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """In the order in which they want attention: what is behind the longest, then by node and name."""
    return sorted(views, key=lambda each: (-each["behind"], each["node"] or "", each["name"] or ""))
