"""Where listed and watched objects go: into the table, and from there to the hub."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, Protocol, TypeAlias, TypeVar

import msgspec

from meshlocal.discovery.kubernetes.api import DataError
from meshlocal.discovery.kubernetes.listwatch import Change
from meshlocal.discovery.kubernetes.mapping import ObjectKey, Part, part_of_endpoints, part_of_slice
from meshlocal.discovery.kubernetes.objects import (
    UNREADABLE,
    Endpoints,
    EndpointSlice,
    Identity,
    Node,
    decode_any,
    decode_endpoints,
    decode_node,
    decode_slice,
)
from meshlocal.discovery.kubernetes.table import EndpointTable
from meshlocal.net.log import get_log
from meshlocal.net.slices import pieces
from meshlocal.policy.model import ModelError
from meshlocal.policy.steps import Steps

_log = get_log(__name__)

MAX_REMEMBERED = 1000
"""Malformed objects whose problems are remembered, so that they are told once."""


WarnOnce = Callable[[str, ObjectKey], None]
"""Told of what is odd about an object, and says so the first time only."""


class _HasMetadata(Protocol):
    @property
    def metadata(self) -> Identity: ...


_T = TypeVar("_T", bound=_HasMetadata)


class ObjectStore(Generic[_T]):
    """A `Store` of one kind of object.

    An object that cannot be read is reported, and changes nothing: what it said before stays.

    Args:
        kind: what messages call an object, such as `EndpointSlice`.
        decode: reads one.
        put: takes what was read.
        remove: takes the key of an object that is gone.
        publish: called when everything that came is put.
        hold: while what it gives is entered, nobody publishes: what is put belongs together.
    """

    def __init__(
        self,
        kind: str,
        decode: Callable[[msgspec.Raw], _T],
        put: Callable[[_T], None],
        remove: Callable[[ObjectKey], None],
        publish: Callable[[], None],
        hold: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._kind = kind
        self._decode = decode
        self._put = put
        self._remove = remove
        self._publish = publish
        self._hold = hold
        self._staged: list[tuple[ObjectKey, _T]] = []
        """What a list has named so far: nothing of it is held before all of it has come (D8)."""
        self._held: set[ObjectKey] = set()
        self._listed: set[ObjectKey] = set()
        self._unreadable: dict[ObjectKey, str] = {}

    @property
    def unreadable(self) -> int:
        """Objects whose last state could not be read."""
        return len(self._unreadable)

    def begin(self) -> None:
        """See `Store.begin`."""
        self._listed = set()
        self._staged = []

    def listed(self, item: msgspec.Raw) -> None:
        """See `Store.listed`."""
        try:
            key, found = self._read(item)
        except DataError as error:
            # Nobody knows whose it is. What is held of it will go at the end of the list.
            _log.error("kubernetes object refused", kind=self._kind, problem=str(error))
            return
        self._listed.add(key)
        if found is not None:
            self._staged.append((key, found))

    def commit(self) -> Steps[None]:
        """See `Store.commit`."""
        staged, self._staged = self._staged, []
        with self._hold():
            for piece in pieces(staged):
                for key, found in piece:
                    self._take(key, found)
                yield
            for gone in pieces(sorted((self._held | self._unreadable.keys()) - self._listed)):
                for key in gone:
                    self._drop(key)
                yield
            self._listed = set()
        self._publish()

    def changed(self, change: Change, item: msgspec.Raw) -> str:
        """See `Store.changed`."""
        if change == "DELETED":
            identity = self._identify(item)
            self._drop(ObjectKey(identity.namespace, identity.name))
            return identity.resource_version
        key, found = self._read(item)
        if found is None:
            return self._identify(item).resource_version
        self._take(key, found)
        return found.metadata.resource_version

    def flush(self) -> None:
        """See `Store.flush`."""
        self._publish()

    def _drop(self, key: ObjectKey) -> None:
        self._unreadable.pop(key, None)
        if key in self._held:
            self._held.remove(key)
            self._remove(key)

    def _read(self, item: msgspec.Raw) -> tuple[ObjectKey, _T | None]:
        """An object and its key; no object, and it is reported, if it cannot be read.

        Raises:
            DataError: nor does it say what it is.
        """
        try:
            found = self._decode(item)
        except (*UNREADABLE, ModelError) as error:
            meta = self._identify(item)
            key = ObjectKey(meta.namespace, meta.name)
            self._refuse(key, str(error))
            return key, None
        return ObjectKey(found.metadata.namespace, found.metadata.name), found

    def _take(self, key: ObjectKey, found: _T) -> None:
        try:
            self._put(found)
        except ModelError as error:
            self._refuse(key, str(error))
            return
        self._unreadable.pop(key, None)
        self._held.add(key)

    def _identify(self, item: msgspec.Raw) -> Identity:
        try:
            return decode_any(item).metadata
        except UNREADABLE as error:
            raise DataError(f"an object that does not say what it is: {error}") from None

    def _refuse(self, key: ObjectKey, problem: str) -> None:
        if self._unreadable.get(key) == problem:
            return
        if len(self._unreadable) < MAX_REMEMBERED:
            self._unreadable[key] = problem
        served = "what it said before" if key in self._held else "nothing of it"
        _log.error("kubernetes object refused", kind=self._kind, object=name_of(key), problem=problem, served=served)


AnyStore: TypeAlias = "ObjectStore[EndpointSlice] | ObjectStore[Endpoints] | ObjectStore[Node]"


def name_of(key: ObjectKey) -> str:
    """`NAMESPACE/NAME`, or only the name of an object that is in no namespace."""
    return f"{key.namespace}/{key.name}" if key.namespace else key.name


class _PartPutter:
    """Puts parts into the table, and tells what is wrong with them."""

    def __init__(self, kind: str, table: EndpointTable, warn_once: WarnOnce) -> None:
        self._kind = kind
        self._table = table
        self._warn_once = warn_once

    def put(self, part: Part) -> None:
        for problem in self._table.put(part):
            _log.error("kubernetes endpoint left out", kind=self._kind, object=name_of(part.key), problem=problem)
        if part.fqdn:
            self._warn_once("slices of DNS names are left out: only addresses can be dialled", part.key)
        if part.truncated:
            self._warn_once("an Endpoints object holds only some of its service's addresses", part.key)


Hold: TypeAlias = "Callable[[], AbstractContextManager[None]]"


def slice_store(
    table: EndpointTable, publish: Callable[[], None], warn_once: WarnOnce, hold: Hold = nullcontext
) -> ObjectStore[EndpointSlice]:
    """The store of EndpointSlices."""
    putter = _PartPutter("EndpointSlice", table, warn_once)
    return ObjectStore(
        "EndpointSlice", decode_slice, lambda item: putter.put(part_of_slice(item)), table.remove, publish, hold
    )


def endpoints_store(
    table: EndpointTable, publish: Callable[[], None], warn_once: WarnOnce, hold: Hold = nullcontext
) -> ObjectStore[Endpoints]:
    """The store of v1 Endpoints."""
    putter = _PartPutter("Endpoints", table, warn_once)

    def put(item: Endpoints) -> None:
        part = part_of_endpoints(item)
        if part is None:
            table.remove(ObjectKey(item.metadata.namespace, item.metadata.name))
        else:
            putter.put(part)

    return ObjectStore("Endpoints", decode_endpoints, put, table.remove, publish, hold)


def node_store(table: EndpointTable, publish: Callable[[], None], hold: Hold = nullcontext) -> ObjectStore[Node]:
    """The store of Nodes, of which only the topology counts."""
    return ObjectStore(
        "Node",
        decode_node,
        lambda item: table.set_node(item.metadata.name, item.metadata.labels),
        lambda key: table.set_node(key.name, None),
        publish,
        hold,
    )
