"""The next request's plan, as the admin page has it: a table for people, JSON for the rest (R2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import trio

import meshlocal
from meshlocal.admin.messages import Request, Response
from meshlocal.app import html
from meshlocal.app.common_pages import plain
from meshlocal.app.explaining import bypass_lines, bypass_view, explain_in_steps, socket_lines, sockets_in_steps
from meshlocal.app.proxy import ProxyProcess
from meshlocal.app.views import tls_view
from meshlocal.client.services import ServiceState
from meshlocal.net.slices import pieces
from meshlocal.policy.picker import explain_reason
from meshlocal.policy.steps import Steps

_STEPS_SHOWN = 500
"""Steps of a plan that the page lists."""


class ExplainPage:
    """The page of one proxy.

    Args:
        process: the proxy.
        find: gives a service by what its name is asked for; None: there is none.
    """

    def __init__(self, process: ProxyProcess, find: Callable[[str], ServiceState | None]) -> None:
        self._process = process
        self._find = find

    def page(self, request: Request) -> Steps[Response]:
        """The plan: a table for browsers, JSON for the rest."""
        name = next(iter(request.values("service")), "")
        services, config = self._process.services, self._process.config.proxy
        service = self._find(name)
        if service is None:
            known = ", ".join(services.keys)
            if not name:
                return plain(404, f"which service? /explain?service=NAME; there are: {known}")
            return plain(404, f"no listener names a service {name!r}, and no request has; there are: {known}")
        if service.picker is None:
            return plain(503, f"nothing was heard of {name} yet: discovery has not answered")
        feed = self._process.feed.status
        view = yield from explain_in_steps(service.picker, service.cursors, service.fitness.gate())
        age = feed.age(trio.current_time())
        view["tls"] = tls_view(config, service)
        view["bypass"] = bypass_view(self._process.bypass, service.key)
        view["sockets"] = yield from sockets_in_steps(service.picker, service.sockets, service.security)
        view["discovery"] = {
            "connected": feed.connected,
            "problem": feed.problem,
            "from_cache_file": feed.stale,
            "age_seconds": None if age is None else round(age, 1),
        }
        # A browser asks for HTML, nothing else does.
        if "text/html" in request.headers.get("accept", ""):
            page = yield from _plan_page(service.key, view)
            return page
        encoded: list[bytes] = []
        for key in ("plan", "left_out"):
            rows = view.pop(key)
            for piece in pieces(rows):
                encoded.append(b",\n  ".join(msgspec.json.encode(row, enc_hook=str) for row in piece))
                yield
            view[key] = msgspec.Raw(b"[" + (b"\n  " if rows else b"") + b",\n  ".join(encoded) + b"]")
            encoded = []
        return Response(200, "application/json", msgspec.json.encode(view, enc_hook=str) + b"\n")


def _plan_page(service: str, view: Mapping[str, Any]) -> Steps[Response]:
    """The plan as a table, of no more steps than somebody would read.

    Args:
        service: its name.
        view: what `explain_in_steps` says of it.
    """
    plan, out = view["plan"], view["left_out"]
    steps = (
        (
            step["step"],
            html.code(step["instance"]),
            step["node"],
            step["tier"],
            _why(step["reason"] or "", view["prefer"][0]),
            step["passed_over"] or ("terminating, and serves still" if step["last_resort"] else None),
        )
        for step in plan[:_STEPS_SHOWN]
    )
    yield
    left_out = ((html.code(each["instance"]), each["node"], html.bad(each["why"])) for each in out[:_STEPS_SHOWN])
    more = [
        html.paragraph(
            f"The first {_STEPS_SHOWN} of {len(rows)} {what}; without text/html in Accept, this page has all."
        )
        for what, rows in (("steps", plan), ("instances that are left out", out))
        if len(rows) > _STEPS_SHOWN
    ]
    parts = [
        *more,
        *(html.paragraph(line) for line in (*bypass_lines(view["bypass"]), *socket_lines(view["sockets"]))),
        html.paragraph("What the next request tries, in this order, while each attempt fails."),
        html.table("The plan", ("Step", "Instance", "Node", "Tier", "Why not the first tier", "Why so late"), steps),
        html.heading("Left out"),
        html.table("Left out", ("Instance", "Node", "Why"), left_out),
    ]
    title = f"meshlocal proxy {meshlocal.__version__}: plan of {service}, seen from node {view['node'] or 'unknown'}"
    return html.page(title, ["/", "/services"], parts)


def _why(reason: str, nearest: str) -> object:
    if not reason:
        return None
    word, _, words = explain_reason(reason, nearest).partition(": ")
    return html.Html(html.code(word) + (f": {html.text(words)}" if words else ""))
