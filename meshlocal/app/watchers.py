"""Who watches a discovery server, as plain data: for its pages, and for the command line's table."""

from __future__ import annotations

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
