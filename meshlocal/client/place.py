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


LABEL_UNKNOWN = "own label unknown"
"""The event of each of `unknown_labels`."""


def unknown_labels(locality: Locality, keys: str) -> list[str]:
    """A line for each label whose own value should be known and is not (L5).

    Args:
        locality: where the caller stands.
        keys: what the config's keys are behind, such as `proxy.`.
    """
    return [
        f"the node is unknown: no instance counts as local; set NODE_NAME, or {keys}node_name"
        if key == NODE
        else f"the {key} is unknown, though {keys}prefer names it: no instance counts as of the same {key};"
        f" set {keys}labels.{key}"
        for key in locality.unknown
    ]
