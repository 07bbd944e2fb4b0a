"""Versions of a service that follow from its instances alone.

Two discovery servers that read the same registry, or one before and after a
restart, give equal instances equal versions, so a watcher resumes from its
version on any of them without being sent again what it holds (D1).

A version is the sum, modulo 2**128, of a keyless BLAKE2b-128 digest of each
instance: adding, removing or changing one instance costs one digest, however
many others there are. (The construction is the additive set hash of Bellare and
Micciancio, "A New Paradigm for Collision-Free Hashing", 1997; nothing here
guards against an adversary, who could publish false instances directly.)
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import msgspec

from meshlocal.policy.model import Instance

UNKNOWN = "unknown"
"""The version of a service that no registry knows."""

_MODULUS = 1 << 128
_encode = msgspec.msgpack.Encoder(order="deterministic").encode


def digest(instance: Instance) -> int:
    """An instance's contribution to its service's version: key, labels and conditions."""
    content = _encode((instance.key, instance.labels, instance.conditions))
    return int.from_bytes(blake2b(content, digest_size=16).digest(), "big")


def total(instances: Iterable[Instance]) -> int:
    """The sum for a whole service."""
    return sum(map(digest, instances)) % _MODULUS


def changed(before: int, removed: Iterable[Instance], added: Iterable[Instance]) -> int:
    """The sum after some instances went and others came."""
    return (before - sum(map(digest, removed)) + sum(map(digest, added))) % _MODULUS


def text(value: int) -> str:
    """The version as it travels: 32 hexadecimal digits."""
    return f"{value:032x}"
