"""HTTP to the instances of this node first, through httpx, on trio and on asyncio. Needs the extra `httpx`.

    async with meshlocal.open_mesh("grpc://127.0.0.1:7070") as mesh:
        async with httpx.AsyncClient(transport=MeshTransport(mesh)) as client:
            response = await client.get("http://b/path")

Each request follows the rules of an http listener of the proxy (A1 to A6, O1 to O5): it goes to an instance of this
node, and within the same request to another one where that is safe. The instance's address takes the place of the
URL's, the Host field stays.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import anyio.lowlevel
import httpx

from meshlocal.library.http_errors import (
    HttpBrokenError,
    HttpConnectError,
    HttpDeadlineError,
    HttpLimitedError,
    HttpNoInstanceError,
    HttpReadError,
    HttpTimeoutError,
)
from meshlocal.library.http_pools import InstancePools
from meshlocal.library.http_request import MeshRequest, Served
from meshlocal.policy.retry import RetryBudget
from meshlocal.policy.routing import Router

if TYPE_CHECKING:
    from meshlocal.library.mesh import Mesh
    from meshlocal.policy.model import ServiceKey

__all__ = [
    "HttpBrokenError",
    "HttpConnectError",
    "HttpDeadlineError",
    "HttpLimitedError",
    "HttpNoInstanceError",
    "HttpReadError",
    "HttpTimeoutError",
    "MeshTransport",
    "Served",
]

LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=60.0)
"""Connections to one instance, by default."""


class MeshTransport(httpx.AsyncBaseTransport):
    """A transport for `httpx.AsyncClient`: the host of a URL is a service's name.

    `http://b/`, `http://b.namespace/` and `http://b.namespace.svc.cluster.local/` are read as the proxy reads them; a
    port in the URL has no meaning. For hosts that are no services of a mesh, mount it under those that are:
    `httpx.AsyncClient(mounts={"http://b": MeshTransport(mesh)})`. Speaks HTTP/1.1.

    Args:
        mesh: whose services.
        ssl_context: for https URLs, whose certificates must be for the URL's host; by default those of the system.
        limits: on the connections to one instance.

    The errors that it raises are `meshlocal.ServiceError`s and httpx's at once.
    """

    def __init__(self, mesh: Mesh, *, ssl_context: ssl.SSLContext | None = None, limits: httpx.Limits = LIMITS) -> None:
        self._core = mesh.core
        self._pools = InstancePools(mesh.core, ssl_context, limits)
        self._budgets: dict[ServiceKey, RetryBudget] = {}
        self._router = Router(domain=mesh.core.config.http.cluster_domain, named=mesh.core.config.services)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; see `httpx.AsyncBaseTransport`.

        Raises:
            HttpNoInstanceError: the host names no service, or the service has no instance.
            httpx.TransportError: no instance gave a response; also a `meshlocal.ServiceError`.
        """
        await anyio.lowlevel.checkpoint()
        if request.url.scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol(f"{request.url.scheme}: is neither http nor https")
        named = self._router.by_host(request.url.host)
        if named is None:
            raise HttpNoInstanceError(f"{request.url.host}: the host names no service", request.url.host)
        key = self._core.config.service_key(named)
        state = self._core.demand(key)
        budget = self._budgets.get(key)
        if budget is None:
            # Services that nobody follows any more need none, whatever hosts an application was made to ask for.
            followed = self._core.services
            self._budgets = {each: kept for each, kept in self._budgets.items() if followed.get(each) is not None}
            http = self._core.config.http
            budget = self._budgets[key] = RetryBudget(http.retry_percent / 100, http.retry_floor)
        return await MeshRequest(self._pools, state, budget, request).run()

    async def aclose(self) -> None:
        """Close every connection. Responses that are still open break off."""
        await self._pools.aclose()
