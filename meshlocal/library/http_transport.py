"""What a transport of httpx's, or of httpx2's, does with a request: finds its service, and sends it (A1 to A6)."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import anyio.lowlevel

from meshlocal.library.http_kind import HttpKind
from meshlocal.library.http_pools import InstancePools
from meshlocal.library.http_request import MeshRequest, body_of
from meshlocal.policy.retry import RetryBudget
from meshlocal.policy.routing import Router

if TYPE_CHECKING:
    import httpx

    from meshlocal.library.core import MeshCore
    from meshlocal.policy.model import ServiceKey

MAX_CONNECTIONS, MAX_IDLE, EXPIRY = 100, 20, 60.0
"""Connections to one instance, by default: in all, without a request, and the seconds that those are kept."""


class Transport:
    """What both transports have in common.

    Args:
        core: the mesh.
        kind: httpx, or httpx2.
        ssl_context: for https URLs; None: with the authorities of the system.
        limits: on the connections to one instance.

    Attributes:
        pools: connections to instances.
        budgets: of retries, of the services that are followed.
    """

    def __init__(
        self, core: MeshCore, kind: HttpKind, ssl_context: ssl.SSLContext | None, limits: httpx.Limits
    ) -> None:
        self._core = core
        self._kind = kind
        self.pools = InstancePools(core, kind, body_of(kind), ssl_context, limits)
        self.budgets: dict[ServiceKey, RetryBudget] = {}
        self._router = Router(domain=core.config.http.cluster_domain, named=core.config.services)

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Send one request.

        Raises:
            HttpNoInstanceError: the host names no service, or the service has no instance.
            httpx.TransportError: no instance gave a response; also a `meshlocal.ServiceError`.
        """
        await anyio.lowlevel.checkpoint_if_cancelled()
        if request.url.scheme not in ("http", "https"):
            raise self._kind.httpx.UnsupportedProtocol(f"{request.url.scheme}: is neither http nor https")
        named = self._router.by_host(request.url.host)
        if named is None:
            raise self._kind.errors.no_instance(f"{request.url.host}: the host names no service", request.url.host)
        key = self._core.config.service_key(named)
        state = self._core.demand(key)
        budget = self.budgets.get(key)
        if budget is None:
            # Services that nobody follows any more need none, whatever hosts an application was made to ask for.
            followed = self._core.services
            self.budgets = {each: kept for each, kept in self.budgets.items() if followed.get(each) is not None}
            http = self._core.config.http
            budget = self.budgets[key] = RetryBudget(http.retry_percent / 100, http.retry_floor)
        return await MeshRequest(self.pools, state, budget, request).run()
