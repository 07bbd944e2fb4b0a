"""The discovery server's admin pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec

import meshlocal
from meshlocal.admin.messages import Request, Response
from meshlocal.admin.metrics_page import metrics_route
from meshlocal.admin.server import AsyncRoute, Route
from meshlocal.app import html
from meshlocal.app.common_pages import config_view, json_in_steps, json_response, livez, plain, readyz
from meshlocal.app.discovery import DiscoveryProcess
from meshlocal.app.log_page import LOG, log_page
from meshlocal.app.security_facts import security_facts
from meshlocal.app.views import instance_view, sorted_in_steps
from meshlocal.app.watch_page import watch_page
from meshlocal.app.watchers import watcher_view
from meshlocal.discovery.hub import Hub
from meshlocal.discovery.source import source_details
from meshlocal.discovery.watches import MOST_LISTED
from meshlocal.net.slices import pieces
from meshlocal.policy.hosts import host_of
from meshlocal.policy.hot_nodes import HotNode, hot_nodes
from meshlocal.policy.model import EndpointKey, ServiceSnapshot
from meshlocal.policy.steps import STEP, Steps
from meshlocal.wire.pb import discovery_pb2 as pb

_SHOWN = 100
"""Rows of a table that the overview lists."""

_NODES_SHOWN = 10
"""Nodes of a service that it names."""

METRICS_MODULES = ("meshlocal.app.discovery_metrics", "meshlocal.app.process_metrics")
"""What `DiscoveryProcess.collectors` imports."""


def discovery_routes(process: DiscoveryProcess) -> Mapping[str, Route | AsyncRoute]:
    """Every page of a discovery server, by path."""
    return {
        "/": lambda request: _overview(process),
        "/livez": livez,
        "/readyz": lambda request: _readyz(process),
        "/metrics": metrics_route(process.collectors, METRICS_MODULES),
        "/config": lambda request: json_response(config_view(process.config)),
        "/services": lambda request: _services(process.hub, request),
        LOG: log_page,
        "/proxies": lambda request: _proxies(process),
        "/watch": lambda request: _watch(process, request),
    }


def _watch(process: DiscoveryProcess, request: Request) -> Response:
    port = process.websocket_sockets[0].getsockname()[1] if process.websocket_sockets else None
    names = [snapshot.service for snapshot in process.hub.snapshots()]
    title = f"meshlocal discovery {meshlocal.__version__}: watch"
    host = host_of(request.headers.get("host", "")) or "localhost"
    host = f"[{host}]" if ":" in host else host
    return watch_page(title, host, port, names, tls=process.access.tls, token=_wants_token(process))


def _wants_token(process: DiscoveryProcess) -> bool:
    return process.config.discovery.tokens_file is not None


def _readyz(process: DiscoveryProcess) -> Response:
    if process.readiness.ready or process.hub.in_sync:
        return readyz(process.readiness)
    waiting = (
        f"{each.source.name}: {each.problem or 'no answer yet'}" for each in process.hub.sources if not each.in_sync
    )
    return plain(503, f"not ready: {process.readiness.reason}: {'; '.join(waiting)}")


def _services(hub: Hub, request: Request) -> Steps[Response]:
    views = []
    for snapshot in hub.snapshots():
        keys = yield from sorted_in_steps(snapshot.instances)
        views.append(_service_view(snapshot, keys))
    response = yield from json_in_steps(views)
    return response


def _proxies(process: DiscoveryProcess) -> Steps[Response]:
    """Who watches, and the hot nodes."""
    watchers, left_out = yield from process.service.watches.listed(MOST_LISTED)
    hot, total = yield from hot_nodes(process.service.watches.callers(), process.hub.snapshots())
    rows = []
    for each in watchers:
        rows.append(msgspec.json.encode(watcher_view(each)))
        yield
    view = {
        "proxies": msgspec.Raw(b"[\n " + b",\n ".join(rows) + b"]"),
        "left_out": left_out,
        "hot_nodes": [each._asdict() for each in hot],
        "hot_nodes_in_all": total,
    }
    return Response(200, "application/json", msgspec.json.encode(view) + b"\n")


def _service_view(snapshot: ServiceSnapshot, keys: Iterable[EndpointKey]) -> Iterator[dict[str, Any]]:
    yield {"service": snapshot.service, "version": snapshot.version}
    for key in keys:
        yield instance_view(snapshot.instances[key])


def _overview(process: DiscoveryProcess) -> Steps[Response]:
    watchers, left_out = yield from process.service.watches.listed(_SHOWN)
    hot, total = yield from hot_nodes(process.service.watches.callers(), process.hub.snapshots())
    hub, reason = process.hub, process.readiness.reason
    state = html.bad(f"not ready: {reason}") if reason else html.good("ready")
    sources = (
        (
            html.code(each.source.name),
            html.good("in sync") if each.in_sync else html.bad("not in sync yet"),
            html.bad(each.problem) if each.problem else None,
        )
        for each in hub.sources
    )
    live = process.websocket is not None
    services = []
    for snapshot in hub.snapshots():
        nodes = yield from _nodes(snapshot)
        services.append(
            (
                html.link(f"/watch#{quote(snapshot.service)}", snapshot.service) if live else snapshot.service,
                len(snapshot.instances),
                nodes,
                html.code(snapshot.version),
            )
        )
        yield
    connections = [f"{process.server.connections} by gRPC"]
    if process.websocket is not None:
        connections.append(f"{process.websocket.connections} by WebSocket")
    if process.xds_server is not None:
        connections.append(f"{process.xds_server.connections} by xDS")
    config = process.config.discovery
    told = (
        ("over TLS", process.access.tls),
        ("with a client certificate", config.tls_client_ca_file is not None or process.workload is not None),
        ("with a token", _wants_token(process)),
        (f"shown services as discovery.allow has it ({len(config.allow)} entries)", bool(config.allow)),
    )
    secured = [", ".join(words)] if (words := [word for word, on in told if on]) else []
    parts = [
        html.facts(
            [
                ("state", [state]),
                ("watches", [hub.watcher_count]),
                ("connections", [", ".join(connections), *secured]),
                *security_facts(process.followed(), process.workload, process.exposures),
            ]
        ),
        html.heading("Sources"),
        html.table("Sources", ("Source", "State", "Problem"), sources),
        *_source_tables(hub),
        *_watcher_tables(watchers, left_out, hot[:_SHOWN], total),
        html.heading("Services"),
        html.table("Services", ("Service", "Instances", "By node", "Version"), services),
    ]
    title = f"meshlocal discovery {meshlocal.__version__}"
    links = ["/watch", "/services", "/proxies", "/metrics", "/config", "/readyz", "/livez"]
    return html.page(title, links, parts, refresh=html.REFRESH)


def _nodes(snapshot: ServiceSnapshot) -> Steps[str]:
    """How many instances of a service are on each node; those with the most come first."""
    counts: Counter[str] = Counter()
    for piece in pieces(snapshot.instances.values(), STEP):
        counts.update(instance.node or "unknown" for instance in piece)
        yield
    shown = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{node}: {count}" for node, count in shown[:_NODES_SHOWN])
    return f"{named}, and {len(shown) - _NODES_SHOWN} more nodes" if len(shown) > _NODES_SHOWN else named


def _watcher_tables(
    watchers: Iterable[pb.Watcher], left_out: int, hot: Sequence[HotNode], total: int
) -> Iterator[html.Html]:
    """Who watches; and where callers outnumber instances, if they do somewhere.

    Args:
        watchers: some of those that there are.
        left_out: how many others there are.
        hot: the hottest nodes.
        total: how many hot nodes there are.
    """
    yield html.heading("Proxies and applications that follow this server")
    rows = (
        (
            each["name"],
            html.code(each["node"]) if each["node"] else html.bad("unknown"),
            html.code(each["address"]),
            each["software"],
            html.bad(f"for {each['behind']:.1f} s") if each["behind"] else html.good("no"),
            f"{each['age']} s",
            len(each["services"]),
        )
        for each in map(watcher_view, watchers)
    )
    yield html.table("Proxies", ("Name", "Node", "Address", "Software", "Behind", "Watches for", "Services"), rows)
    if left_out:
        yield html.paragraph(f"And {left_out} more; /proxies has them, with their services and versions.")
    if hot:
        yield html.heading("Hot nodes")
        yield html.paragraph("Nodes with more proxies that follow a service than ready instances of it.")
        lines = (
            (each.service, html.code(each.node), each.callers, each.instances or html.bad("none: all requests leave"))
            for each in hot
        )
        yield html.table("Hot nodes", ("Service", "Node", "Callers", "Instances"), lines)
        if total > len(hot):
            yield html.paragraph(f"And {total - len(hot)} more; /proxies names the hottest thousand.")


def _source_tables(hub: Hub) -> Iterable[html.Html]:
    for name, details in source_details(state.source for state in hub.sources):
        resources = (
            (
                html.code(each.name),
                html.good("in sync") if each.in_sync else html.bad("not in sync yet"),
                "never" if each.silence is None else f"{each.silence:.0f} s ago",
                each.lists,
                each.events,
                each.failures,
            )
            for each in details.resources
        )
        title = f"What {name} follows"
        yield html.heading(title)
        yield html.table(title, ("Resource", "State", "Last heard of", "Lists", "Events", "Failures"), resources)
        if left_out := ", ".join(f"{cause} {count}" for cause, count in details.left_out.items() if count):
            yield html.paragraph(f"Left out: {left_out}.")
