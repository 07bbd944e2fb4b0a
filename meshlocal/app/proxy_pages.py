"""The proxy's admin pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import trio

from meshlocal.admin.messages import Request, Response
from meshlocal.admin.metrics_page import metrics_route
from meshlocal.admin.server import AsyncRoute, Route, answer
from meshlocal.app.common_pages import config_view, json_in_steps, json_response, livez, readyz
from meshlocal.app.followed_pages import LIVE, TAP
from meshlocal.app.log_page import LOG, log_page
from meshlocal.app.proxy import ProxyProcess
from meshlocal.app.views import counts_view, health_view, instance_view, left_out_in_steps, sorted_in_steps, tls_view
from meshlocal.client.services import ServiceState
from meshlocal.net.late_import import import_late
from meshlocal.net.wall_clock import wall_clock
from meshlocal.policy.locality import LeftOut
from meshlocal.policy.model import EndpointKey, ServiceKey
from meshlocal.policy.picker import Picker
from meshlocal.policy.steps import Steps

METRICS_MODULES = ("meshlocal.app.http_metrics", "meshlocal.app.process_metrics", "meshlocal.app.proxy_metrics")
"""What `ProxyProcess.collectors` imports."""

_LIVE_PAGE, _EXPLAIN_PAGE, _TAPPING = (f"meshlocal.app.{name}" for name in ("live_page", "explain_page", "tapping"))
"""What pages for people are made by: most sidecars hold none of it, for nobody looks at them."""


def proxy_routes(process: ProxyProcess) -> Mapping[str, Route | AsyncRoute]:
    """Every page of a proxy, by path."""
    pages = _ProxyPages(process)

    def live() -> Mapping[str, Route]:
        from meshlocal.app.live_page import LivePage

        page = LivePage(process, process.history)
        return {"/": page.page, LIVE: page.live}

    def tap() -> Mapping[str, Route]:
        from meshlocal.app.tapping import Taps

        return {TAP: Taps(pages.find, trio.current_time, wall_clock).page}

    def explain() -> Mapping[str, Route]:
        from meshlocal.app.explain_page import ExplainPage

        return {"/explain": ExplainPage(process, pages.find).page}

    look = _late(_LIVE_PAGE, live)
    return {
        "/": look,
        LIVE: look,
        TAP: _late(_TAPPING, tap),
        "/livez": livez,
        "/readyz": lambda request: readyz(process.readiness),
        "/metrics": metrics_route(process.collectors, METRICS_MODULES),
        "/config": lambda request: json_response(config_view(process.config)),
        "/services": pages.services,
        LOG: log_page,
        "/explain": _late(_EXPLAIN_PAGE, explain),
    }


def _late(module: str, make: Callable[[], Mapping[str, Route]]) -> AsyncRoute:
    """A route to pages whose module is imported, and which are made, once somebody asks for one."""
    made: dict[str, Route] = {}

    async def route(request: Request) -> Response:
        await import_late([module])
        if not made:
            made.update(make())
        return await answer(made[request.path], request)

    return route


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
        view["tls"] = tls_view(self._process.config.proxy, service)
        view.update(known=not picker.snapshot.unknown, version=picker.snapshot.version, tiers=picker.tier_sizes())
        yield view
        for key in keys:
            instance = picker.snapshot.instances[key]
            why = left_out.get(key)
            tier = names[picker.selector.tier(instance)] if why is None else None
            health = health_view(service.fitness, instance, now)
            counts = counts_view(service.statistics.instances.get(key[:2]))
            yield {**instance_view(instance), "tier": tier, "left_out": why, "health": health, "counts": counts}
