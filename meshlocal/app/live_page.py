"""The proxy's page: what it shows, and what keeps it up to date.

The page is a document that draws what `/live` says, and is told of each change by server-sent events. `/live` has one
line of JSON for each of its parts, so that a part that did not change is not told again: the proxy itself, all its
services in brief, their last ten minutes, and one service in detail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec
import trio

import meshlocal
from meshlocal.admin.messages import Request, Response
from meshlocal.admin.streaming import LINES
from meshlocal.app import html
from meshlocal.app.explaining import step_view
from meshlocal.app.history import History, Sample
from meshlocal.app.proxy import ProxyProcess
from meshlocal.app.request_view import request_view
from meshlocal.app.security_facts import security_facts
from meshlocal.app.views import counts_view, health_view, summary
from meshlocal.client.latency import Latency
from meshlocal.client.place import unknown_labels
from meshlocal.client.services import ServiceState
from meshlocal.net.slices import pieces
from meshlocal.net.wall_clock import wall_clock
from meshlocal.policy.exposure import of_proxy
from meshlocal.policy.model import Instance, ServiceKey
from meshlocal.policy.picker import Picker, explain_reason
from meshlocal.policy.steps import Steps

SHOWN = 500
"""Instances of a service that the page lists; /services has all."""

STEPS_SHOWN = 20
"""Steps of the next request's plan."""

_LINKS = ("/services", "/metrics", "/config", "/readyz", "/livez")
_BODY = html.template("live.html")
_STYLE = html.content("live.css")
_SCRIPT = html.content("live.js")
_STYLE_SOURCE = html.source(f"\n{_STYLE}")
_SCRIPT_SOURCE = html.source(f"\n{_SCRIPT}")
_POLICY = f"script-src {_SCRIPT_SOURCE}; connect-src 'self'"


class LivePage:
    """The page, and what it draws.

    Args:
        process: the proxy.
        history: of its services.
    """

    def __init__(self, process: ProxyProcess, history: History) -> None:
        self._process = process
        self._history = history

    def page(self, request: Request) -> Response:
        """The document."""
        body = _BODY.substitute(style=_STYLE, script=_SCRIPT, facts=self._facts())
        title = f"meshlocal proxy {meshlocal.__version__}"
        return html.page(title, _LINKS, [html.Html(body)], styles=_STYLE_SOURCE, policy=_POLICY)

    def live(self, request: Request) -> Steps[Response]:
        """What it draws, a line of JSON for each part; `?service=` names the one that is told of in detail."""
        name = next(iter(request.values("service")), "")
        services = list(self._process.services)
        lines = [msgspec.json.encode({"part": "proxy", "facts": str(self._facts())})]
        yield
        briefs = []
        for service in services:
            briefs.append(self._brief(service))
            yield
        lines.append(msgspec.json.encode({"part": "services", "services": briefs}))
        yield
        samples: dict[ServiceKey, list[Sample]] = {}
        for piece in pieces(services):
            samples |= {service.key: list(self._history.of(service).samples) for service in piece}
            yield
        lines.append(msgspec.json.encode({"part": "history", "services": samples}))
        yield
        chosen = self._process.services.get(ServiceKey(name))
        if chosen is not None:
            detail = yield from self._detail(chosen)
            lines.append(msgspec.json.encode({"part": "detail", **detail}, enc_hook=str))
        return Response(200, LINES, b"\n".join(lines) + b"\n")

    # The proxy.

    def _facts(self) -> html.Html:
        return html.Html(html.facts(self._state()) + "".join(self._listeners()))

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
        rows = (
            (
                html.code(f"{listener.configured.scheme}://{bound}"),
                listener.service or "each request's own, by its host",
                listener.accept_errors,
            )
            for listener in self._process.listeners.current
            for bound in listener.bound
        )
        yield html.table("Listeners", ("Address", "Service", "Accept errors"), rows)

    # Its services.

    def _brief(self, service: ServiceState) -> dict[str, Any]:
        statistics, picker = service.statistics, service.picker
        done = summary(statistics.requests, service.tiers[0])
        return {
            "name": service.key,
            "state": _standing(picker),
            "first": service.tiers[0],
            "near": done.near,
            "away": done.reached - done.near,
            "failed": done.total - done.reached,
            "since": self._history.of(service).since(statistics, service.tiers[0]),
            "open": statistics.open,
            "connecting": statistics.connecting,
            "tiers": picker.tier_sizes() if picker is not None else {},
            "ejected": len(service.fitness.health),
            "latency": self._latencies(service),
        }

    def _latencies(self, service: ServiceState) -> dict[str, dict[str, list[float | None]]]:
        """By kind and tier, p50 and p99 in seconds."""
        recent = self._history.of(service)
        return {
            name: {tier: _quantiles(latency) for tier, latency in found.items()}
            for name, kind in (("response", "responses"), ("connect", "connects"))
            if (found := recent.latency(service.statistics, kind))
        }

    def _detail(self, service: ServiceState) -> Steps[dict[str, Any]]:
        statistics, picker, now, first = service.statistics, service.picker, trio.current_time(), service.tiers[0]
        done = summary(statistics.requests, first)
        detail: dict[str, Any] = {
            "name": service.key,
            "state": _standing(picker),
            "version": picker.snapshot.version if picker is not None else None,
            **self._spoken_to(service),
            "requests": [
                {"tier": tier, "reason": _why(reason, first), "outcome": outcome, "count": count}
                for tier, reason, outcome, count in done.rows
            ],
            "recent": [request_view(each, now, wall_clock()) for each in reversed(service.told.recent)],
            "plan": [],
            "instances": [],
            "known": 0,
        }
        yield
        if picker is None:
            return detail
        names = picker.selector.tiers
        picks = islice(picker.preview(service.cursors, service.fitness.gate()), STEPS_SHOWN)
        detail["plan"] = [
            {**step_view(step, pick, names), "reason": _why(pick.reason or "", first)}
            for step, pick in enumerate(picks, start=1)
        ]
        detail["known"] = len(picker.snapshot.instances)
        for piece in pieces(picker.shown(SHOWN)):
            detail["instances"] += [_instance(service, picker, each, now) for each in piece]
            yield
        return detail

    def _spoken_to(self, service: ServiceState) -> Mapping[str, Any]:
        tls = self._process.config.proxy.service(service.key).tls
        if tls is None:
            return {"spoken": "in plaintext", "doubtful": False}
        skipped = service.statistics.tls_skipped
        told = f"{tls.summary} (attempts so far: {skipped})" if tls.skip_tiers else tls.summary
        return {"spoken": told, "doubtful": bool(skipped)}


def _standing(picker: Picker | None) -> str:
    """What is wrong with what is known of a service; empty if nothing is."""
    if picker is None:
        return "nothing heard of it yet"
    return "no registry knows it: requests are refused" if picker.snapshot.unknown else ""


def _instance(service: ServiceState, picker: Picker, instance: Instance, now: float) -> dict[str, Any]:
    why = picker.selector.left_out(instance)
    return {
        "instance": str(instance.key),
        "node": instance.node,
        "tier": picker.selector.tiers[picker.selector.tier(instance)] if why is None else "",
        "left_out": why or "",
        **health_view(service.fitness, instance, now),
        **counts_view(service.statistics.instances.get(instance.key[:2])),
    }


def _quantiles(latency: Latency) -> list[float | None]:
    return [round(value, 6) if value is not None else None for value in map(latency.quantile, (50, 99))]


def _why(reason: str, first: str) -> str:
    return explain_reason(reason, first) if reason else ""


def _time(seconds: float) -> str:
    """A time span in the unit that suits it."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s"
