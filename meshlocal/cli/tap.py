"""`tap`: requests of a running proxy as they end, a line each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

from meshlocal.cli.admin import Admin


def tap(admin: Admin, service: str, *, left: bool, failed: bool, as_json: bool) -> Iterator[str]:
    """The lines, until the proxy ends.

    Args:
        admin: of the proxy.
        service: whose requests.
        left: those that left the first tier.
        failed: those that failed, or an attempt of which did. With neither, all.
        as_json: as the proxy tells them.

    Raises:
        QueryError: the proxy could not be asked, or does not know the service.
    """
    wanted = {"left": "1"} if left else {}
    wanted |= {"failed": "1"} if failed else {}
    for line in admin.lines(f"/tap?{urlencode({'service': service, **wanted})}"):
        yield line.decode().rstrip() if as_json else request_line(json.loads(line))


def request_line(view: Mapping[str, Any]) -> str:
    """A request as a line, for people: when, what, what came of it, where, why there, and what failed before."""
    if "skipped" in view:
        return f"… {view['skipped']} more: too many to show"
    asked = [view["method"], view["path"], str(view.get("status", "-"))] if "method" in view else ["tcp"]
    parts = [view["time"][11:23], *asked, view["outcome"], _time(view["seconds"])]
    if "instance" in view:
        place = ", ".join(filter(None, (view.get("node"), view["tier"])))
        parts.append(f"{view['instance']} ({place})")
    if "reason" in view:
        parts.append(view["reason"])
    if "error" in view:
        parts.append(f"error={view['error']}")
    if tried := view.get("failed"):
        told = (f"{each['instance']} ({each['tier']}) {each['error']} {_time(each['seconds'])}" for each in tried)
        parts.append(f"after {', '.join(told)}")
    return "  ".join(parts)


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.1f}ms" if seconds < 1 else f"{seconds:.1f}s"
