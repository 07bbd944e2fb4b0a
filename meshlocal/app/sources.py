"""From the config's source URLs to sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random

import msgspec

from meshlocal.discovery.file_source import FileSource
from meshlocal.discovery.source import Source
from meshlocal.policy.addresses import SourceUrl
from meshlocal.policy.config import DiscoveryServerConfig
from meshlocal.policy.config_build import ConfigError
from meshlocal.policy.kubernetes_options import KubernetesOptions
from meshlocal.policy.problems import Problem


def make_sources(config: DiscoveryServerConfig, rng: Random, environment: Mapping[str, str]) -> list[Source]:
    """The sources that the config names, in its order.

    It blocks while it reads what a `kubernetes:` URL needs to find its cluster.

    Args:
        config: names them, and what holds for instances that say nothing else.
        rng: for jitter.
        environment: as `os.environ`.

    Raises:
        ConfigError: a cluster is not found, or its kubeconfig cannot be used; the text names the URL.
    """
    problems: list[Problem] = []
    sources: list[Source] = []
    for position, url in enumerate(config.sources):
        try:
            sources += _make_sources(url, config, rng, environment)
        except _SourceError as error:
            problems.append(Problem(f"discovery.sources[{position}]", f"{url}: {error}"))
    if problems:
        raise ConfigError(problems)
    return sources


class _SourceError(Exception):
    """What a URL names cannot be a source."""


def _make_sources(
    url: SourceUrl, config: DiscoveryServerConfig, rng: Random, environment: Mapping[str, str]
) -> Iterator[Source]:
    zone, cluster = config.zone or "", config.cluster or ""
    if url.kubernetes is None:
        yield FileSource(Path(url.path), zone=zone, cluster=cluster)
        return
    # One that may not be read holds up its own services, and no others'.
    for namespace in url.kubernetes.namespaces or (None,):
        options = url.kubernetes
        if namespace is not None:
            options = msgspec.structs.replace(options, namespaces=(namespace,))
        yield _kubernetes_source(options, rng, environment, zone, cluster)


def _kubernetes_source(
    options: KubernetesOptions, rng: Random, environment: Mapping[str, str], zone: str, cluster: str
) -> Source:
    # Imported here: who serves a file pays for no TLS, HTTP or kubeconfigs.
    from meshlocal.discovery.kubernetes.kubeconfig import KubeconfigError
    from meshlocal.discovery.kubernetes.source import open_kubernetes_source

    try:
        return open_kubernetes_source(options, rng, environment, zone=zone, cluster=cluster)
    except KubeconfigError as error:
        raise _SourceError(str(error)) from None
