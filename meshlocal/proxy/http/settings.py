"""What the configuration says of http listeners, made ready for use."""

from __future__ import annotations

from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.model import ServiceKey
from meshlocal.policy.routing import PrefixRoute, Router
from meshlocal.wire.http1.known import KnownHeads
from meshlocal.wire.http1.request import HeadLimits
from meshlocal.wire.http2_heads import KnownCalls


class HttpSettings:
    """Made anew with each configuration; a connection reads the current ones for each request (S2).

    Attributes:
        config: what they were made of.
        limits: of heads.
        heads: reads them.
        calls: reads those of HTTP/2.
        router: finds a request's service.
        via: the whole Via field line to add; empty for none.
        via_fields: the same for HTTP/2.
        plain: requests go on with the fields that they came with.
        append_forwarded: X-Forwarded-For and -Proto are added.
        strip_forwarded: they are removed.
    """

    __slots__ = (
        "_proxy",
        "append_forwarded",
        "calls",
        "config",
        "heads",
        "limits",
        "plain",
        "router",
        "strip_forwarded",
        "via",
        "via_fields",
    )

    def __init__(self, proxy: ProxyConfig) -> None:
        http = proxy.http
        self._proxy = proxy
        self.config = http
        self.limits = HeadLimits(http.max_head, http.max_headers, http.max_target)
        self.heads = KnownHeads(self.limits)
        self.calls = KnownCalls(self.limits)
        named = [*proxy.services, *(listen.service for listen in proxy.listen if listen.service is not None)]
        self.router = Router(
            (
                PrefixRoute(route.prefix, route.service, route.host.lower() if route.host is not None else None)
                for route in http.routes
            ),
            http.cluster_domain,
            named,
        )
        self.via = f"via: 1.1 {http.via}\r\n".encode() if http.via else b""
        self.via_fields: tuple[tuple[bytes, bytes], ...] = ((b"via", f"2 {http.via}".encode()),) if http.via else ()
        self.append_forwarded = http.x_forwarded == "append"
        self.strip_forwarded = http.x_forwarded == "remove"
        self.plain = not (http.via or self.append_forwarded or self.strip_forwarded)

    def service_of(self, host: bytes, target: bytes) -> ServiceKey | None:
        """The registry's name of the service that a request is for; None if its host is nobody's."""
        name = self.router.route(host, target)
        return self._proxy.service_key(name) if name is not None else None

    def service_of_tunnel(self, host: bytes) -> ServiceKey | None:
        """The registry's name of the service that a CONNECT is for; None if its host is nobody's."""
        name = self.router.by_host(host.decode("ascii", "replace"))
        return self._proxy.service_key(name) if name is not None else None
