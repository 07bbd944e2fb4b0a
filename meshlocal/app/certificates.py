"""What a process proves itself with, made of a configuration: of files, or by an agent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from meshlocal.net.following import Followed
from meshlocal.net.tls import expiring
from meshlocal.net.wall_clock import wall_clock
from meshlocal.policy.addresses import unix_path
from meshlocal.policy.backoff import UniformSource
from meshlocal.policy.config import ProxyConfig

if TYPE_CHECKING:
    from meshlocal.app.tracing import CollectorFiles
    from meshlocal.net.workload_api import WorkloadApi
    from meshlocal.proxy.tls import ProxyTls


def make_workload(address: str | None, rng: UniformSource) -> WorkloadApi | None:
    """A client of the SPIFFE agent at an address; None: there is none."""
    if address is None:
        return None
    # Imported here: a proxy without an agent needs no gRPC for it.
    from meshlocal.net.workload_api import WorkloadApi

    return WorkloadApi(unix_path(address), rng)


def make_tls(config: ProxyConfig, workload: WorkloadApi | None) -> ProxyTls | None:
    """What a configuration needs of TLS; None if nothing. It reads files.

    Raises:
        FileProblemError: one cannot be used.
    """
    services = (service.tls for service in config.services.values())
    if not any(listen.is_tls for listen in config.listen) and all(tls is None for tls in services):
        return None
    # Imported here: a proxy without TLS holds no code for it.
    from meshlocal.proxy.tls import ProxyTls

    return ProxyTls(config, workload)


def make_collector(config: ProxyConfig) -> CollectorFiles | None:
    """What a configuration needs of files for its collector of spans; None: there is no collector. It reads files.

    Raises:
        FileProblemError: one cannot be used.
    """
    if config.tracing.endpoint is None:
        return None
    # Imported here: a proxy without tracing holds no code for it.
    from meshlocal.app.tracing import CollectorFiles

    return CollectorFiles(config.tracing)


def expiring_now(followed: Callable[[], Iterable[Followed[Any]]]) -> Iterator[str]:
    """What is to be said of own certificates that end soon."""
    return expiring(followed(), wall_clock())
