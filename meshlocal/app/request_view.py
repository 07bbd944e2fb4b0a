"""A request that ended, as data: for the page, and for who taps."""

from __future__ import annotations

from typing import Any

from meshlocal.client.ended import EndedRequest
from meshlocal.net.sockets import format_address
from meshlocal.net.wall_clock import utc_text


def request_view(request: EndedRequest, now: float, wall: float) -> dict[str, Any]:
    """Only what there is to say of it.

    Args:
        request: what is known of it.
        now: by its clock.
        wall: the time of day at that moment, in seconds since 1970.
    """
    asked, instance = request.asked, request.instance
    view = {
        "time": utc_text(wall - (now - request.ended), milliseconds=True),
        "service": request.service,
        "client": format_address(request.peer) if request.peer is not None else None,
        "protocol": asked.protocol if asked.protocol == "tcp" else f"HTTP/{asked.protocol}",
        "method": asked.method,
        "path": asked.path,
        "status": asked.status,
        "request_id": asked.request_id,
        "trace_id": asked.trace_id,
        "outcome": request.outcome,
        "instance": str(instance.key) if instance is not None else None,
        "node": instance.node if instance is not None else None,
        "tier": request.tier,
        "reason": request.reason,
        "error": request.error,
        "attempts": request.attempts,
        "failed": [
            {
                "instance": str(each.pick.instance.key),
                "node": each.pick.instance.node,
                "tier": each.tier,
                "error": each.error,
                "seconds": round(each.seconds, 6),
            }
            for each in request.failures
        ],
        "seconds": round(request.seconds, 6),
    }
    return {key: value for key, value in view.items() if value or key in ("attempts", "seconds")}
