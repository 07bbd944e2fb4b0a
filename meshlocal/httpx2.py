"""HTTP to the instances of this node first, through httpx2, on trio and on asyncio. Needs the extra `httpx2`.

    async with meshlocal.open_mesh("grpc://127.0.0.1:7070") as mesh:
        async with httpx2.AsyncClient(transport=MeshTransport(mesh)) as client:
            response = await client.get("http://b/path")

Each request follows the rules of an http listener of the proxy (A1 to A6, O1 to O5): it goes to an instance of this
node, and within the same request to another one where that is safe. The instance's address takes the place of the
URL's, the Host field stays.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any, cast

import httpcore2
import httpx2

from meshlocal.library.errors import AttemptsFailedError, DeadlineError, LimitedError, NoInstanceError
from meshlocal.library.http_errors import HttpError, HttpErrors
from meshlocal.library.http_kind import HttpKind
from meshlocal.library.http_request import Served
from meshlocal.library.http_transport import EXPIRY, MAX_CONNECTIONS, MAX_IDLE, Transport

if TYPE_CHECKING:
    from meshlocal.library.mesh import Mesh

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


class _HttpError(HttpError, httpx2.TransportError):
    theirs = httpx2.TransportError


class HttpNoInstanceError(_HttpError, NoInstanceError, httpx2.ConnectError):
    """There was no instance to try."""


class HttpLimitedError(_HttpError, LimitedError, httpx2.ConnectError):
    """As many requests as the service's limits allow were under way."""


class HttpConnectError(_HttpError, AttemptsFailedError, httpx2.ConnectError):
    """No instance could be connected; no byte of the request was sent to the last one."""


class HttpReadError(_HttpError, AttemptsFailedError, httpx2.ReadError):
    """The last instance that was tried ended its connection without a response."""


class HttpTimeoutError(_HttpError, AttemptsFailedError, httpx2.ReadTimeout):
    """The last instance that was tried did not answer in the time of an attempt."""


class HttpBrokenError(_HttpError, AttemptsFailedError, httpx2.RemoteProtocolError):
    """The last instance's response broke off within its head, or is malformed."""


class HttpDeadlineError(_HttpError, DeadlineError, httpx2.ReadTimeout):
    """The deadline of the request came before a response's head."""


_KIND = HttpKind(
    httpx2,
    httpcore2,
    HttpErrors(
        HttpNoInstanceError,
        HttpLimitedError,
        HttpConnectError,
        HttpReadError,
        HttpTimeoutError,
        HttpBrokenError,
        HttpDeadlineError,
    ),
)

LIMITS = httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_IDLE, keepalive_expiry=EXPIRY)
"""Connections to one instance, by default."""


class MeshTransport(httpx2.AsyncBaseTransport):
    """A transport for `httpx2.AsyncClient`: the host of a URL is a service's name.

    `http://b/`, `http://b.namespace/` and `http://b.namespace.svc.cluster.local/` are read as the proxy reads them; a
    port in the URL has no meaning. For hosts that are no services of a mesh, mount it under those that are:
    `httpx2.AsyncClient(mounts={"http://b": MeshTransport(mesh)})`. Speaks HTTP/1.1.

    Args:
        mesh: whose services.
        ssl_context: for https URLs, whose certificates must be for the URL's host; by default those of the system.
        limits: on the connections to one instance.

    The errors that it raises are `meshlocal.ServiceError`s and httpx2's at once.
    """

    def __init__(
        self, mesh: Mesh, *, ssl_context: ssl.SSLContext | None = None, limits: httpx2.Limits = LIMITS
    ) -> None:
        # The common code is typed for httpx, whose interface this is.
        self._transport = Transport(mesh.core, _KIND, ssl_context, cast("Any", limits))

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; see `httpx2.AsyncBaseTransport`.

        Raises:
            HttpNoInstanceError: the host names no service, or the service has no instance.
            httpx2.TransportError: no instance gave a response; also a `meshlocal.ServiceError`.
        """
        response: Any = await self._transport.send(cast("Any", request))
        assert isinstance(response, httpx2.Response)
        return response

    async def aclose(self) -> None:
        """Close every connection. Responses that are still open break off."""
        await self._transport.pools.aclose()
