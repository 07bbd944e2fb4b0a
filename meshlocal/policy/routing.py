"""Which service an HTTP request is for, by its path or its host."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from meshlocal.policy.model import ModelError, ServiceKey, parse_service_key


class PrefixRoute(NamedTuple):
    """A route of the config.

    Attributes:
        prefix: of the path, from its first slash; it ends at a slash or at the path's end.
        service: where to.
        host: only for this host, in small letters and without a port; None for any.
    """

    prefix: str
    service: ServiceKey
    host: str | None = None


_LONGEST = 255
_MOST_FOUND = 1024
"""Hosts whose service is remembered, and bytes of each: a quarter of a megabyte in all."""


class Router:
    """Finds the service of a request.

    Routes come first, those with a host before those without, longer prefixes before shorter ones. Paths are compared
    as they were sent, neither decoded nor with dot segments removed. A host that no route has is a service's name:
    `b`, `b.ns`, `b.ns.svc` or `b.ns.svc.DOMAIN`, in any case.

    Args:
        routes: of the config.
        domain: the cluster's domain.
        named: services that the config names: such a name may have any number of dots.
    """

    def __init__(
        self, routes: Iterable[PrefixRoute] = (), domain: str = "cluster.local", named: Collection[str] = ()
    ) -> None:
        ordered = sorted(routes, key=lambda route: (route.host is None, -len(route.prefix)))
        self._routes = [
            (route.host.encode() if route.host is not None else None, route.prefix.encode(), route.service)
            for route in ordered
        ]
        self._suffixes = (f".svc.{domain.lower().strip('.')}", ".svc")
        self._named = {name.lower(): ServiceKey(name) for name in named}
        self._found: dict[bytes, ServiceKey | None] = {}

    def route(self, host: bytes, target: bytes) -> ServiceKey | None:
        """The service's name as the request says it; None if the host is nobody's.

        Args:
            host: without a port.
            target: in origin-form.
        """
        if self._routes:
            folded = host.lower()
            for wanted, prefix, service in self._routes:
                if (wanted is None or wanted == folded) and _begins(target, prefix):
                    return service
        try:
            return self._found[host]
        except KeyError:
            found = self.by_host(host.decode("ascii", "replace"))
            if len(host) <= _LONGEST:
                # What is longer is no host's name (RFC 1035, 2.3.4); clients can make up as many as they like.
                if len(self._found) >= _MOST_FOUND:
                    self._found.clear()
                self._found[host] = found
            return found

    def by_host(self, host: str) -> ServiceKey | None:
        """The service that a host names; None if it can be none, an IP address for example."""
        name = host.lower().removesuffix(".")
        if name in self._named:
            return self._named[name]
        qualified = False
        for suffix in self._suffixes:
            if name.endswith(suffix):
                name, qualified = name.removesuffix(suffix), True
                break
        if name in self._named:
            return self._named[name]
        labels = name.split(".")
        if len(labels) > 2 or (qualified and len(labels) != 2) or not all(labels) or labels[-1].isdigit():
            return None
        try:
            return parse_service_key(name)
        except ModelError:
            return None


def _begins(target: bytes, prefix: bytes) -> bool:
    """Whether a target's path has the prefix, as whole segments."""
    if not target.startswith(prefix):
        return False
    return prefix.endswith(b"/") or target[len(prefix) : len(prefix) + 1] in (b"", b"/", b"?")
