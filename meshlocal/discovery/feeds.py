"""From discovery URLs to what follows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from meshlocal.client.feed import Feed, NoFeed, SnapshotSink
from meshlocal.net.tls import SvidSource
from meshlocal.policy.backoff import UniformSource
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.policy.model import Caller, ServiceKey, ServiceSnapshot


def make_feed(
    config: DiscoveryClientConfig,
    services: Sequence[ServiceKey],
    sink: SnapshotSink,
    rng: UniformSource,
    held: Iterable[ServiceSnapshot] = (),
    workload: SvidSource | None = None,
    caller: Caller = Caller(),  # noqa: B008 - it is immutable
) -> Feed:
    """The feed that a config's discovery URLs ask for.

    Args:
        config: names the URLs; none is for who follows no services.
        services: what to follow at first.
        sink: gets every new snapshot.
        rng: for the jitter of reconnects.
        held: snapshots from before, to resume from (D2).
        workload: gives the certificate and authorities that `config` names no files of.
        caller: who follows, for the servers' operators to see.
    """
    urls = config.urls
    if not urls:
        return NoFeed()
    if urls[0].scheme == "file":
        # Imported here: who has a discovery server needs no hub in its memory, nor a YAML reader.
        from meshlocal.discovery.embedded import EmbeddedFeed
        from meshlocal.discovery.file_source import FileSource
        from meshlocal.discovery.hub import Hub

        return EmbeddedFeed(Hub([FileSource(Path(urls[0].path))], rng), str(urls[0]), services, sink)
    # Likewise: who reads a file needs no gRPC.
    from meshlocal.client.watch import DiscoveryWatch

    return DiscoveryWatch(urls, services, sink, rng, config, held, workload, caller)
