"""Lines of a watch that were damaged on their way: never a traceback, and never a wrong snapshot."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlocal.discovery.kubernetes.listwatch import Limits, ListWatch, Resource
from meshlocal.discovery.kubernetes.mapping import Defaults
from meshlocal.discovery.kubernetes.stores import slice_store
from meshlocal.discovery.kubernetes.table import EndpointTable

DATA = Path(__file__).parent / "data"
LISTED = json.loads((DATA / "endpointslices.list.json").read_bytes())
LINES = [line for line in (DATA / "endpointslices.watch.jsonl").read_bytes().splitlines() if b'"BOOKMARK"' not in line]
LIMITS = Limits(max_line=100_000, backoff_initial=1, backoff_max=1)


class Body:
    def __init__(self, pieces: Any) -> None:
        self._pieces = list(pieces)

    async def receive(self) -> Any:
        await trio.lowlevel.checkpoint()
        if not self._pieces:
            await trio.sleep_forever()
        return self._pieces.pop(0)

    async def receive_all(self, limit: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return b"".join(self._pieces)


class Api:
    """One watch, which sends these pieces; lists are what the cluster holds, and once listed again, say so."""

    def __init__(self, pieces: Any, lists: Any) -> None:
        self._watch = Body(pieces)
        self._lists = list(lists)
        self.lists = 0

    @asynccontextmanager
    async def get(self, path: Any, query: Any, accept: Any) -> AsyncIterator[Any]:
        await trio.lowlevel.checkpoint()
        if "watch" in query:
            watch, self._watch = self._watch, Body([])
            yield watch
        else:
            self.lists += 1
            yield Body([json.dumps(self._lists.pop(0)).encode()])


def follow(pieces: Any, lists: Any) -> Any:
    """What is published at the end, and how often everything was listed."""
    table = EndpointTable(Defaults())
    services: dict[str, Any] = {}

    def publish() -> None:
        for service, instances in table.take().items():
            if instances is None:
                del services[service]
            else:
                services[service] = instances

    store = slice_store(table, publish, lambda what, key: None)
    api: Any = Api(pieces, lists)

    async def main() -> None:
        watch = ListWatch(api, Resource("/things", "things"), store, Random(0), lambda _: None, LIMITS)
        with trio.move_on_after(60):
            await watch.run()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return services, api.lists


def held(*events: Any) -> Any:
    """What the cluster's slices are after these events."""
    slices = {key_of(item): item for item in LISTED["items"]}
    for event in events:
        if event["type"] == "DELETED":
            slices.pop(key_of(event["object"]), None)
        else:
            slices[key_of(event["object"])] = event["object"]
    return slices


def key_of(item: Any) -> Any:
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]


def list_of(slices: Any) -> Any:
    return {"metadata": {"resourceVersion": "900"}, "items": list(slices.values())}


_damage = st.lists(
    st.tuples(st.sampled_from(["flip", "drop", "insert", "swap", "repeat"]), st.floats(0, 0.9999), st.integers(1, 255)),
    min_size=1,
    max_size=3,
)


def damaged(line: Any, damage: Any) -> Any:
    found = bytearray(line)
    for what, where, value in damage:
        at = int(where * len(found))
        if what == "flip":
            found[at] ^= value
        elif what == "drop":
            del found[at : at + value]
        elif what == "insert":
            found[at:at] = bytes([value])
        elif what == "swap":
            found[at : at + 2] = found[at : at + 2][::-1]
        else:
            found[at:at] = found[at : at + value]
        if not found:
            return b""
    return bytes(found)


@settings(max_examples=80, deadline=None)
@given(
    index=st.integers(0, len(LINES) - 2),
    damage=_damage,
    sizes=st.lists(st.integers(100, 3000), min_size=1, max_size=5),
)
def test_a_damaged_line(index: Any, damage: Any, sizes: Any, reference: Any) -> None:
    """It is taken for what it still says, or refused with what the object said before left, or all is listed again."""
    line = damaged(LINES[index], damage)
    good = json.loads(LINES[index + 1])
    truth = held(json.loads(LINES[index]), good)
    stream = line + b"\n" + LINES[index + 1] + b"\n"
    pieces: list[bytes] = []
    for size in sizes * (len(stream) // sum(sizes) + 1):
        pieces, stream = [*pieces, stream[:size]], stream[size:]
    services, lists = follow([piece for piece in pieces if piece], [LISTED, list_of(truth)])
    found = reference.read(services)
    if lists == 2:
        assert found == reference.meaning(truth)
        return
    assert found in list(taken(line, good, reference))


def taken(line: Any, good: Any, reference: Any) -> Iterator[Any]:
    """What may be published without a list: each line that the damaged bytes now make taken, or refused."""
    states: list[list[Any]] = [[]]
    for piece in filter(bytes.strip, line.split(b"\n")):
        try:
            # What nobody reads of a line may be any bytes.
            event = json.loads(piece.decode("utf-8", "replace"), strict=False)
            _ = key_of(event["object"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        states += [[*state, event] for state in states]
    for state in states:
        try:
            yield reference.meaning(held(*state, good))
        except (KeyError, TypeError, AttributeError):
            # An object that makes no sense; it must have been refused.
            continue


@settings(max_examples=80, deadline=None)
@given(line=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_any_bytes(line: Any, reference: Any) -> None:
    """Bytes from nowhere end in a list, and nothing else."""
    services, lists = follow([line + b"\n"], [LISTED, list_of(held())])
    assert reference.read(services) == reference.meaning(held())
    assert lists == (2 if any(line.split(b"\n")) else 1)


_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), value=_json)
def test_any_value_anywhere_in_an_object(data: Any, value: Any, reference: Any) -> None:
    """An object with anything at any place of it is taken for what it says, or refused."""
    event = json.loads(LINES[data.draw(st.integers(0, 25))])
    place = event
    while True:
        step = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        inner = place[step]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            place[step] = value
            break
        place = inner
    line = json.dumps(event).encode()
    good = json.loads(LINES[-1])
    services, lists = follow([line + b"\n" + LINES[-1] + b"\n"], [LISTED, list_of(held(good))])
    found = reference.read(services)
    if lists == 2:
        assert found == reference.meaning(held(good))
    else:
        assert found in list(taken(line, good, reference))


@pytest.mark.parametrize("nested", [b"[" * 200_000, b'{"a":' * 50_000])
def test_nesting_without_measure(nested: Any, reference: Any) -> None:
    """Neither a crash nor a traceback: of a line, of an object, and of a field that nobody reads."""
    limits_line = nested[:90_000]
    object_line = b'{"type":"ADDED","object":' + limits_line
    field_line = b'{"type":"ADDED","object":{"metadata":{"name":"x","resourceVersion":"8","x":' + limits_line + b"}}}"
    for line in (limits_line, object_line, field_line):
        services, lists = follow([line + b"\n"], [LISTED, list_of(held())])
        assert reference.read(services) == reference.meaning(held())
        assert lists == 2


def test_the_recordings_are_read_without_loss(reference: Any) -> None:
    """The whole of the recorded watch, undamaged: the product and the second account say the same at each line."""
    for count in range(0, len(LINES), 4):
        services, lists = follow([line + b"\n" for line in LINES[:count]], [LISTED])
        assert reference.read(services) == reference.meaning(held(*map(json.loads, LINES[:count])))
        assert lists == 1
    assert msgspec.json.decode(LINES[-1])["object"]["endpoints"] is None
