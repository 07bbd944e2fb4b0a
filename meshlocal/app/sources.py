"""From the config's source URLs to sources."""

from __future__ import annotations

from pathlib import Path

from meshlocal.discovery.file_source import FileSource
from meshlocal.discovery.source import Source
from meshlocal.policy.config import DiscoveryServerConfig


def make_sources(config: DiscoveryServerConfig) -> list[Source]:
    """The sources that the config names, in its order."""
    return [FileSource(Path(url.path), zone=config.zone or "", cluster=config.cluster or "") for url in config.sources]
