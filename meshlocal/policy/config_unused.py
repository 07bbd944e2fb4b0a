"""What a configuration says that nothing takes up: it is valid, and most likely misspelt."""

from __future__ import annotations

from collections.abc import Iterator

from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.problems import did_you_mean, format_path


def unused_keys(proxy: ProxyConfig) -> Iterator[str]:
    """A line for each key of the proxy's section that does nothing."""
    yield from _unused_services(proxy)
    discovery = proxy.discovery
    if discovery.cache_file is not None and discovery.urls and discovery.urls[0].scheme == "file":
        yield "proxy.discovery.cache_file is not used: an instances file needs none"


def _unused_services(proxy: ProxyConfig) -> Iterator[str]:
    if any(listen.service is None for listen in proxy.listen):
        return  # a request may name any service
    named = {proxy.service_key(listen.service) for listen in proxy.listen if listen.service is not None}
    named |= {proxy.service_key(route.service) for route in proxy.http.routes}
    for name in proxy.services:
        if proxy.service_key(name) not in named:
            path = format_path(("proxy", "services", name))
            yield f"{path} is not used: no listener and no route names it{did_you_mean(name, sorted(named))}"
