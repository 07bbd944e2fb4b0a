"""Where a caller of services stands, as its configuration says."""

from __future__ import annotations

from meshlocal.net.dial import usable_families
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.locality import Locality
from meshlocal.policy.model import NODE


def locality_of(config: ProxyConfig) -> Locality:
    """Where the config says that the caller stands, on this host as it is now."""
    labels = dict(config.labels)
    if config.node_name:
        labels[NODE] = config.node_name
    return Locality(labels, config.prefer, config.within, usable_families())
