"""The bytes of the cache file (D2)."""

from __future__ import annotations

import json
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy import model
from meshlocal.policy.model import Conditions, Instance, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.wire.snapshot_cache import CachedSnapshot, CacheError, decode_cache, encode_cache

instances = st.builds(
    make_instance,
    st.sampled_from(["10.0.0.1", "10.0.0.2", "fd00::1"]),
    st.integers(1, 65535),
    st.text(max_size=10),
    st.dictionaries(st.text(min_size=1, max_size=10), st.text(max_size=10), max_size=3),
    st.builds(Conditions, st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from(["tcp", "udp"]),
)


@st.composite
def snapshots(draw: st.DrawFn) -> CachedSnapshot:
    name = ServiceKey(draw(st.sampled_from(["b", "b.ns", "c_1"])))
    listed: list[Instance] = draw(st.lists(instances, max_size=5))
    snapshot = ServiceSnapshot(name, draw(st.text(max_size=8)), model.index(listed), draw(st.booleans()))
    return CachedSnapshot(snapshot, draw(st.floats(0, 2e9)))


def example() -> list[CachedSnapshot]:
    b = make_instance("10.0.0.1", 9000, "grpc", {"node": "n1"})
    return [CachedSnapshot(ServiceSnapshot(ServiceKey("b"), "v1", model.index([b])), 1e9)]


def file_of(body: bytes, version: int = 1) -> bytes:
    return b"meshlocal snapshots %d crc32 %08x\n" % (version, zlib.crc32(body)) + body


@given(st.lists(snapshots(), max_size=4))
def test_what_is_written_is_read(cached: list[CachedSnapshot]) -> None:
    assert decode_cache(encode_cache(cached)) == cached


@given(st.data())
def test_a_file_cut_anywhere_is_refused(data: st.DataObject) -> None:
    whole = encode_cache(example())
    with pytest.raises(CacheError):
        decode_cache(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.data())
def test_a_file_changed_anywhere_is_refused(data: st.DataObject) -> None:
    whole = bytearray(encode_cache(example()))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CacheError):
        decode_cache(bytes(whole))


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda made: st.lists(made, max_size=3) | st.dictionaries(st.sampled_from(["service", "instances"]), made),
    max_leaves=5,
).map(lambda value: json.dumps(value).encode())


@given(st.binary(max_size=200) | JSON)
def test_garbage_is_refused_as_that_whatever_it_is(garbage: bytes) -> None:
    """And no snapshot is read out of it; but an empty list is a list."""
    with pytest.raises(CacheError):
        decode_cache(garbage)
    found: list[CachedSnapshot] = []
    with suppress(CacheError):
        found = decode_cache(file_of(garbage))
    assert found == []


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is empty"),
        (b"\0" * 100, "is no file of snapshots"),
        (file_of(b"[]", version=2), "is of version 2; this is version 1"),
        (b"meshlocal snapshots 1 crc32 00000000\n[]", "was cut or changed: its checksum does not fit"),
        (file_of(b"{}"), "Expected `array`, got `object`"),
        (file_of(b"[" * 100_000), ""),
        (
            file_of(json.dumps([{"service": "no such!", "version": "", "followed_at": 0, "instances": []}]).encode()),
            "is no service name",
        ),
        (
            file_of(
                json.dumps(
                    [{"service": "b", "version": "", "followed_at": 0, "instances": [{"address": "x", "port": 1}]}]
                ).encode()
            ),
            "neither an IPv4 nor an IPv6 address",
        ),
    ],
)
def test_what_is_wrong_is_said(data: bytes, problem: str) -> None:
    with pytest.raises(CacheError) as refused:
        decode_cache(data)
    assert problem in str(refused.value)
