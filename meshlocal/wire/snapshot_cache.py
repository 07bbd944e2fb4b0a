"""The file that keeps snapshots over a restart: its bytes, to and from the model (behaviour rule D2).

One line that says what it is, in which version, and the CRC of the rest; the rest is JSON. A file that was cut, changed
or written by another version does not pass for one that is whole.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from meshlocal.policy.model import (
    READY,
    Conditions,
    Instance,
    ModelError,
    ServiceKey,
    ServiceSnapshot,
    index,
    make_instance,
    parse_service_key,
)

VERSION = 1

MAX_SIZE = 256 * 2**20
"""Bytes of a file at most: room for a million instances."""

_HEAD = re.compile(rb"meshlocal snapshots (\d{1,9}) crc32 ([0-9a-f]{8})\n")


class CacheError(ValueError):
    """Bytes that are no cache file. The text says why."""


class CachedSnapshot(NamedTuple):
    """A snapshot, and when its service was last followed, in seconds since 1970."""

    snapshot: ServiceSnapshot
    followed_at: float


class _Instance(msgspec.Struct, omit_defaults=True):
    address: str
    port: int
    port_name: str = ""
    protocol: str = "tcp"
    labels: dict[str, str] = {}
    ready: bool = True
    serving: bool = True
    terminating: bool = False


class _Service(msgspec.Struct, omit_defaults=True):
    service: str
    version: str
    followed_at: float
    instances: list[_Instance]
    unknown: bool = False


_decoder = msgspec.json.Decoder(list[_Service])


def encode_cache(services: Iterable[CachedSnapshot]) -> bytes:
    """Encode snapshots as the whole content of a cache file."""
    body = msgspec.json.encode(
        [
            _Service(
                snapshot.service,
                snapshot.version,
                followed_at,
                [_to_record(instance) for instance in snapshot.instances.values()],
                snapshot.unknown,
            )
            for snapshot, followed_at in services
        ]
    )
    return b"meshlocal snapshots %d crc32 %08x\n%b" % (VERSION, zlib.crc32(body), body)


def decode_cache(data: bytes) -> list[CachedSnapshot]:
    """What the file holds.

    Raises:
        CacheError: it is not whole, or not of this version.
    """
    head = _HEAD.match(data)
    if head is None:
        raise CacheError("is no file of snapshots" if data else "is empty")
    if int(head[1]) != VERSION:
        raise CacheError(f"is of version {int(head[1])}; this is version {VERSION}")
    body = data[head.end() :]
    if zlib.crc32(body) != int(head[2], 16):
        raise CacheError("was cut or changed: its checksum does not fit")
    try:
        return [_from_record(record) for record in _decoder.decode(body)]
    except (msgspec.DecodeError, ModelError, RecursionError) as error:
        raise CacheError(str(error)) from None


def _to_record(instance: Instance) -> _Instance:
    key, conditions = instance.key, instance.conditions
    return _Instance(
        key.address,
        key.port,
        key.port_name,
        key.protocol,
        dict(instance.labels),
        conditions.ready,
        conditions.serving,
        conditions.terminating,
    )


def _from_record(record: _Service) -> CachedSnapshot:
    instances = []
    for each in record.instances:
        conditions = Conditions(each.ready, each.serving, each.terminating)
        instances.append(
            make_instance(
                each.address,
                each.port,
                each.port_name,
                each.labels,
                READY if conditions == READY else conditions,
                each.protocol,
            )
        )
    key: ServiceKey = parse_service_key(record.service)
    return CachedSnapshot(ServiceSnapshot(key, record.version, index(instances), record.unknown), record.followed_at)
