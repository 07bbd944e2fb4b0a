"""The proxy's admin pages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec
import trio

import meshlocal
from meshlocal.admin.messages import Request, Response
from meshlocal.admin.metrics_page import metrics_route
from meshlocal.admin.server import AsyncRoute, Route
from meshlocal.app import html
from meshlocal.app.followed_pages import TAP
from meshlocal.app.proxy import ProxyProcess
from meshlocal.app.readiness import Readiness
from meshlocal.app.security_facts import security_facts
from meshlocal.app.tapping import Taps
from meshlocal.app.views import (
    counts_view,
    explain_in_steps,
    health_view,
    instance_view,
    left_out_in_steps,
    sorted_in_steps,
    summary,
)
from meshlocal.client.place import unknown_labels
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import InstanceStatistics
from meshlocal.net.slices import pieces
from meshlocal.net.wall_clock import wall_clock
from meshlocal.policy.addresses import DiscoveryUrl, ListenAddress, SocketAddress
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.exposure import of_proxy
from meshlocal.policy.health import State
from meshlocal.policy.locality import LeftOut
from meshlocal.policy.model import EndpointKey, Instance, ServiceKey
from meshlocal.policy.picker import Picker, explain_reason
from meshlocal.policy.sources import SourceUrl
from meshlocal.policy.steps import Steps

METRICS_MODULES = ("meshlocal.app.http_metrics", "meshlocal.app.process_metrics", "meshlocal.app.proxy_metrics")
"""What `ProxyProcess.collectors` imports."""

_STEPS_SHOWN = 500
"""Steps of a plan that its page lists."""

_SHOWN = 200
"""Instances of a service that the overview page lists; /services has all."""


def proxy_routes(process: ProxyProcess) -> Mapping[str, Route | AsyncRoute]:
    """Every page of a proxy, by path."""
    pages = _ProxyPages(process)
    taps = Taps(pages.find, trio.current_time, wall_clock)
    return {
        "/": pages.overview,
        TAP: taps.page,
        "/livez": livez,
        "/readyz": lambda request: readyz(process.readiness),
        "/metrics": metrics_route(process.collectors, METRICS_MODULES),
        "/config": lambda request: json_response(config_view(process.config)),
        "/services": pages.services,
        "/explain": pages.explain,
    }


def livez(request: Request) -> Response:
    """The process runs: the event loop answers."""
    return plain(200, "alive")


def readyz(readiness: Readiness) -> Response:
    """Whether the process may be sent work, and if not, why."""
    return plain(200, "ready") if readiness.ready else plain(503, f"not ready: {readiness.reason}")


def plain(status: int, line: str) -> Response:
    """One line of text."""
    return Response(status, "text/plain; charset=utf-8", f"{line}\n".encode())


def json_response(value: object) -> Response:
    """A value as indented JSON."""
    body = json.dumps(value, indent=2, ensure_ascii=False, default=str).encode() + b"\n"
    return Response(200, "application/json", body)


def json_in_steps(services: Iterable[Iterable[dict[str, Any]]]) -> Steps[Response]:
    """Services as JSON, in steps.

    Args:
        services: of each its facts, and then its instances, of which it may have thousands.
    """
    out = [b"["]
    for position, parts in enumerate(services):
        rows = iter(parts)
        facts = msgspec.json.encode(next(rows), enc_hook=str)
        out.append((b",\n " if position else b"\n ") + facts[:-1] + b',"instances":[')
        first = True
        for piece in pieces(rows):
            encoded = [msgspec.json.encode(row, enc_hook=str) for row in piece]
            out.append((b"\n  " if first else b",\n  ") + b",\n  ".join(encoded))
            first = False
            yield
        out.append(b"]}")
        yield
    out.append(b"\n]\n")
    return Response(200, "application/json", b"".join(out))


def config_view(config: msgspec.Struct) -> Any:
    """The configuration in force, as the file would have it."""
    return _as_data(config)


def _as_data(value: object) -> Any:
    if isinstance(value, SocketAddress | ListenAddress | DiscoveryUrl | SourceUrl):
        return str(value)
    if isinstance(value, msgspec.Struct):
        pairs = ((name, getattr(value, name)) for name in value.__struct_fields__)
        return {name: _as_data(item) for name, item in pairs if item is not msgspec.UNSET}
    if isinstance(value, Mapping):
        return {str(key): _as_data(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_as_data(item) for item in value]
    return value


class _ProxyPages:
    def __init__(self, process: ProxyProcess) -> None:
        self._process = process

    def find(self, name: str) -> ServiceState | None:
        """The service that is followed by this name."""
        services, config = self._process.services, self._process.config.proxy
        # A bare name is one of the proxy's own namespace, as it is to a listener.
        return services.get(ServiceKey(name)) or services.get(config.service_key(ServiceKey(name)))

    def services(self, request: Request) -> Steps[Response]:
        """What the picker sees, whole."""
        views = []
        for service in list(self._process.services):
            left_out: Mapping[EndpointKey, LeftOut] = {}
            keys: list[EndpointKey] = []
            picker = service.picker
            if picker is not None:
                left_out = yield from left_out_in_steps(picker)
                keys = yield from sorted_in_steps(picker.snapshot.instances)
            views.append(self._service_view(service, picker, keys, left_out))
        response = yield from json_in_steps(views)
        return response

    def explain(self, request: Request) -> Steps[Response]:
        """The plan of the next request (R2)."""
        name = next(iter(request.values("service")), "")
        services, config = self._process.services, self._process.config.proxy
        service = self.find(name)
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
        view["tls"] = _tls_view(config, service)
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

    def _service_view(
        self,
        service: ServiceState,
        picker: Picker | None,
        keys: Sequence[EndpointKey],
        left_out: Mapping[EndpointKey, LeftOut],
    ) -> Iterator[dict[str, Any]]:
        view: dict[str, Any] = {"service": service.key, "known": None, "version": None, "tls": None, "tiers": {}}
        if picker is None:
            yield view
            return
        names = picker.selector.tiers
        now = trio.current_time()
        view["tls"] = _tls_view(self._process.config.proxy, service)
        view.update(known=not picker.snapshot.unknown, version=picker.snapshot.version, tiers=picker.tier_sizes())
        yield view
        for key in keys:
            instance = picker.snapshot.instances[key]
            why = left_out.get(key)
            tier = names[picker.selector.tier(instance)] if why is None else None
            health = health_view(service.fitness, instance, now)
            counts = counts_view(service.statistics.instances.get(key[:2]))
            yield {**instance_view(instance), "tier": tier, "left_out": why, "health": health, "counts": counts}

    def overview(self, request: Request) -> Steps[Response]:
        """The page that shows a person the proxy as a whole."""
        process = self._process
        links = ["/services", "/metrics", "/config", "/readyz", "/livez"]
        parts = [html.facts(self._state()), *self._listeners()]
        for service in list(process.services):
            for part in self._service(service):
                if part is not None:
                    parts.append(part)
                yield
        title = f"meshlocal proxy {meshlocal.__version__}"
        return html.page(title, links, parts, refresh=html.REFRESH)

    def _state(self) -> Iterator[tuple[str, Sequence[object]]]:
        process, services, feed = self._process, self._process.services, self._process.feed.status
        node = [html.code(services.locality.node)] if services.locality.node else []
        if services.node_unmatched:
            node.append(html.bad("no instance of any watched service is on it"))
        wanting = unknown_labels(services.locality, "proxy.") if services.is_selecting else ()
        yield "node", [*node, *map(html.bad, wanting)]
        if process.worker:
            told = f"{process.worker}, which this page is of; /metrics adds up all, /workers lists them, ?worker= asks"
            yield "worker", [f"{told} another"]
        reason = process.readiness.reason
        yield "state", [html.bad(f"not ready: {reason}") if reason else html.good("ready")]
        age = feed.age(trio.current_time())
        told = "nothing heard yet" if age is None else f"current {_time(age)} ago"
        if feed.stale:
            told += ", from the cache file: stale until discovery confirms it"
        yield from security_facts(process.followed(), process.workload, of_proxy(process.config.proxy))
        if not process.config.proxy.discovery.urls:
            yield "discovery", ["none: every listener has a fixed address"]
            return
        state = html.good("connected") if feed.connected else html.bad(feed.problem or "not connected yet")
        yield "discovery", [html.code(feed.source), state]
        yield "what is known", [told]

    def _listeners(self) -> Iterator[html.Html]:
        yield html.heading("Listeners")
        rows = (
            (
                html.code(f"{listener.configured.scheme}://{bound}"),
                listener.service or "each request's own, by its host",
                listener.accept_errors,
            )
            for listener in self._process.listeners.current
            for bound in listener.bound
        )
        yield html.table(("Address", "Service", "Accept errors"), rows)

    def _spoken_to(self, service: ServiceState) -> object:
        tls = self._process.config.proxy.service(service.key).tls
        if tls is None:
            return "in plaintext"
        skipped = service.statistics.tls_skipped
        told = f"{tls.summary} (attempts so far: {skipped})" if tls.skip_tiers else tls.summary
        return html.bad(told) if skipped else told

    def _service(self, service: ServiceState) -> Iterator[html.Html | None]:
        """The parts of the page that show one service; None between two of them that take their time."""
        yield html.heading(f"Service {service.key}")
        picker = service.picker
        if picker is None:
            yield html.paragraph(html.bad("nothing heard of it yet"))
            return
        if picker.snapshot.unknown:
            yield html.paragraph(html.bad("no registry knows it: requests are refused"))
        statistics = service.statistics
        first = picker.selector.tiers[0]
        done = summary(statistics.requests, first)
        bar = [html.share(done.near, done.reached), f"of {done.reached} requests that reached an instance"]
        sizes = ", ".join(f"{size} in tier {tier}" for tier, size in picker.tier_sizes().items())
        yield html.facts(
            [
                (
                    "same " + first,
                    bar if done.reached else ["no request reached an instance"] if done.total else ["no request yet"],
                ),
                ("now", [f"{statistics.open} connections open, {statistics.connecting} clients waiting"]),
                ("spoken to", [self._spoken_to(service)]),
                ("usable", [sizes, html.link(f"/explain?service={quote(service.key)}", "the next request's plan")]),
            ]
        )
        if done.total:
            rows = ((tier or None, _why(reason, first), outcome, count) for tier, reason, outcome, count in done.rows)
            yield html.table(("Requests to tier", "Why not the first", "Outcome", "Count"), rows)
        shown = []
        for piece in pieces(picker.shown(_SHOWN)):
            shown += piece
            yield None
        if len(picker.snapshot.instances) > len(shown):
            told = f"The first {len(shown)} of {len(picker.snapshot.instances)} instances; /services has all:"
            yield html.paragraph(told)
        if not shown:
            return
        names = picker.selector.tiers
        now = trio.current_time()
        lines = []
        for each in shown:
            why = picker.selector.left_out(each)
            lines.append(
                (
                    html.code(each.key),
                    each.node or None,
                    names[picker.selector.tier(each)],
                    html.bad(why) if why else None,
                    _health(service, each, now) if why is None else None,
                    service.fitness.under_way.get(each.key[:2], 0),
                    *_counts_cells(service.statistics.instances.get(each.key[:2])),
                )
            )
            yield None
        columns = ("Instance", "Node", "Tier", "Left out", "Health", "Under way")
        yield html.table((*columns, "Attempts", "Failed", "Connect p50", "Response p50, p99"), lines)


def _tls_view(config: ProxyConfig, service: ServiceState) -> dict[str, Any] | None:
    """How a service's instances are spoken to, if not in plaintext."""
    tls = config.service(service.key).tls
    if tls is None:
        return None
    return {
        "server_name": tls.server_name,
        "identity": tls.identity,
        "port": tls.port,
        "skip_tiers": list(tls.skip_tiers),
        "plaintext_attempts": service.statistics.tls_skipped,
    }


def _counts_cells(counts: InstanceStatistics | None) -> tuple[object, ...]:
    """What was counted of an instance, as cells of its row."""
    if counts is None:
        return (0, None, None, None)
    failed = ", ".join(f"{word} {count}" for word, count in sorted(counts.failures.items()))
    response = [counts.response.quantile(share) for share in (50, 99)]
    return (
        counts.attempts,
        html.bad(failed) if failed else None,
        _brief(counts.connect.quantile(50)),
        ", ".join(map(_brief, response)) if response[0] is not None else None,
    )


def _brief(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _plan_page(service: str, view: Mapping[str, Any]) -> Steps[Response]:
    """The plan as a table, of no more steps than somebody would read."""
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
        html.paragraph("What the next request tries, in this order, while each attempt fails."),
        html.table(("Step", "Instance", "Node", "Tier", "Why not the first tier", "Why so late"), steps),
        html.heading("Left out"),
        html.table(("Instance", "Node", "Why"), left_out),
    ]
    title = f"meshlocal proxy {meshlocal.__version__}: plan of {service}, seen from node {view['node'] or 'unknown'}"
    return html.page(title, ["/", "/services"], parts)


def _health(service: ServiceState, instance: Instance, now: float) -> object:
    """The instance's state in the table of `meshlocal.policy.health`, in a few words."""
    standing = service.fitness.health.standing(instance.key[:2], now)
    if standing.state is State.ADMITTED:
        return f"{standing.failures} failed in a row" if standing.failures else html.good(standing.state)
    return html.bad(
        f"{standing.state}: {standing.cause}" + (f", {standing.left:.1f} s left" if standing.left is not None else "")
    )


def _why(reason: str, nearest: str) -> object:
    if not reason:
        return None
    word, _, words = explain_reason(reason, nearest).partition(": ")
    return html.Html(html.code(word) + (f": {html.text(words)}" if words else ""))


def _time(seconds: float) -> str:
    """A time span in the unit that suits it."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s"
