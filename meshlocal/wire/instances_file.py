"""The instances file: services and their instances, as a person writes them down.

    zone: z1                # optional: the label `zone` of instances that have none
    cluster: c1             # optional: likewise
    services:
      b:
        - {address: 10.0.1.10, port: 9000, port_name: grpc, labels: {node: n1}}
        - {address: 10.0.2.10, port: 9000, port_name: grpc, labels: {node: n2}, ready: false}
      idle: []              # known, but without instances

An instance has `address` and `port`, and may have `port_name`, `protocol` (default `tcp`), `labels`, and the
conditions `ready`, `serving` (both true by default) and `terminating` (false). Labels are text: a number or a boolean
is refused rather than guessed at, since `1.20` would become `1.2`. The labels `service` and `registry` are set here.

The format is YAML (see `meshlocal.wire.yaml_document`), and so JSON too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from meshlocal.policy.model import (
    CLUSTER,
    READY,
    REGISTRY,
    SERVICE,
    ZONE,
    Conditions,
    EndpointKey,
    Instance,
    ModelError,
    ServiceKey,
    make_instance,
    parse_service_key,
)
from meshlocal.policy.problems import KeyPath, Problem, describe, format_path, unknown_key
from meshlocal.wire.yaml_document import YamlDocument, YamlError, parse_yaml

MAX_PROBLEMS = 20
"""Problems that one error lists."""

_FILE_KEYS = ("zone", "cluster", "services")
_INSTANCE_KEYS = ("address", "port", "port_name", "protocol", "labels", "ready", "serving", "terminating")
_KNOWN = frozenset(_INSTANCE_KEYS)
_CONDITIONS = frozenset(("ready", "serving", "terminating"))


class InstancesFile(msgspec.Struct, frozen=True):
    """What a file says.

    Attributes:
        zone: the file's, else the one that was passed in; may be empty.
        cluster: likewise.
        services: the instances of each service, in the file's order.
    """

    zone: str
    cluster: str
    services: Mapping[ServiceKey, tuple[Instance, ...]]


class InstancesFileError(ValueError):
    """A file that cannot be used. Its text has a line for each of `problems` (the first `MAX_PROBLEMS`).

    `omitted` says how many more there are.
    """

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems[:MAX_PROBLEMS])
        self.omitted = len(problems) - len(self.problems)
        more = [f"and {self.omitted} more"] if self.omitted else []
        super().__init__("\n".join([*map(str, self.problems), *more]))


def parse_instances_file(text: str, name: str, *, zone: str = "", cluster: str = "") -> InstancesFile:
    """Read an instances file.

    Args:
        text: its content.
        name: what errors call it, such as its path.
        zone: the zone where the file names none; empty: none.
        cluster: likewise.

    Raises:
        InstancesFileError: anything is wrong: each problem with its line and the path of its key.
    """
    try:
        document = parse_yaml(text, name)
    except YamlError as error:
        raise InstancesFileError([Problem("", error.message, f"{name}:{error.line}")]) from None
    reader = _Reader(_File(document))
    found = reader.read_file(zone, cluster)
    if found is None or reader.problems:
        raise InstancesFileError(reader.problems)
    return found


def parse_instance(text: bytes, name: str, added: Mapping[str, str]) -> Instance:
    """Read one instance, as JSON: the same that stands in a file's list.

    Args:
        text: a mapping with `address` and `port`.
        name: what errors call it.
        added: labels that it has beside its own; `service` and `registry` are always among them.

    Raises:
        InstancesFileError: anything is wrong: each problem with the path of its key.
    """
    try:
        data = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InstancesFileError([Problem("", f"is no JSON: {error}", name)]) from None
    reader = _Reader(_Place(name))
    instance = reader._read_instance((), data, added)
    if instance is None or reader.problems:
        raise InstancesFileError(reader.problems)
    return instance


class _Place:
    """Where an instance stands that is no part of a file.

    Args:
        name: of the place.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.data: object = None

    def where(self, path: KeyPath) -> str:
        """See `_Document.where`: it has one line."""
        return self.name


class _File:
    """A file, line by line."""

    def __init__(self, document: YamlDocument) -> None:
        self.data: object = document.data
        self._document = document

    def where(self, path: KeyPath) -> str:
        """The file, and the line of a key."""
        return f"{self._document.name}:{self._document.line_of(path)}"


class _Reader:
    def __init__(self, document: _File | _Place) -> None:
        self.problems: list[Problem] = []
        self._document = document

    def _refuse(self, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(format_path(path), message, self._document.where(path)))

    def read_file(self, zone: str, cluster: str) -> InstancesFile | None:
        data = self._document.data
        if not isinstance(data, dict):
            self._refuse((), f"expected a mapping with the key services, got {describe(data)}")
            return None
        for key in data:
            if key not in _FILE_KEYS:
                self._refuse((key,), unknown_key(key, _FILE_KEYS))
        zone = self._read_default(data, ZONE, zone)
        cluster = self._read_default(data, CLUSTER, cluster)
        if "services" not in data:
            self._refuse((), "the key services is missing")
            return None
        services = data["services"]
        if not isinstance(services, dict):
            hint = "; write {} for none" if services is None else ""
            self._refuse(("services",), f"expected a mapping of services, got {describe(services)}{hint}")
            return None
        added = {label: value for label, value in ((ZONE, zone), (CLUSTER, cluster)) if value}
        found = {ServiceKey(key): self._read_service(key, items, added) for key, items in services.items()}
        return InstancesFile(zone, cluster, found)

    def _read_default(self, data: dict[str, Any], key: str, default: str) -> str:
        value = data.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self._refuse((key,), f"expected text, got {describe(value)}; put it between quotes")
            return default
        return value.strip() or default

    def _read_service(self, service: str, items: object, added: Mapping[str, str]) -> tuple[Instance, ...]:
        path = ("services", service)
        try:
            parse_service_key(service)
        except ModelError as error:
            self._refuse(path, error.what)
            return ()
        if not isinstance(items, list):
            hint = "; write [] for none" if items is None else ""
            self._refuse(path, f"expected a list of instances, got {describe(items)}{hint}")
            return ()
        added = {**added, SERVICE: service, REGISTRY: "file"}
        found: dict[EndpointKey, Instance] = {}
        first: dict[EndpointKey, int] = {}
        for position, item in enumerate(items):
            here = (*path, position)
            instance = self._read_instance(here, item, added)
            if instance is None:
                continue
            if instance.key in found:
                other = (*path, first[instance.key])
                _, _, line = self._document.where(other).rpartition(":")
                self._refuse(here, f"{instance.key} is already {format_path(other)}, on line {line}")
                continue
            found[instance.key] = instance
            first[instance.key] = position
        return tuple(found.values())

    def _read_instance(self, path: KeyPath, item: object, added: Mapping[str, str]) -> Instance | None:
        if not isinstance(item, dict):
            self._refuse(path, f"expected a mapping with address and port, got {describe(item)}")
            return None
        before = len(self.problems)
        if not _KNOWN.issuperset(item):
            for key in item:
                if key not in _KNOWN:
                    self._refuse((*path, key), unknown_key(key, _INSTANCE_KEYS))
        for key in ("address", "port"):
            if key not in item:
                self._refuse(path, f"the key {key} is missing")
        address = self._read_text(path, item, "address")
        port = item.get("port", 0)
        if type(port) is not int:
            self._refuse((*path, "port"), f"expected a whole number, got {describe(port)}")
        port_name = self._read_text(path, item, "port_name")
        protocol = self._read_text(path, item, "protocol")
        labels = self._read_labels((*path, "labels"), item.get("labels"), added)
        conditions = READY if _CONDITIONS.isdisjoint(item) else self._read_conditions(path, item)
        if len(self.problems) > before:
            return None
        try:
            return make_instance(address, port, port_name, labels, conditions, protocol)
        except ModelError as error:
            self._refuse((*path, *error.where.split(".", 1)), error.what)
            return None

    def _read_text(self, path: KeyPath, item: dict[str, Any], key: str) -> str:
        value = item.get(key, "")
        if isinstance(value, str):
            return value
        if value is None and key not in ("address", "port"):
            return ""
        hint = "" if value is None or isinstance(value, dict | list) else "; put it between quotes"
        self._refuse((*path, key), f"expected text, got {describe(value)}{hint}")
        return ""

    def _read_labels(self, path: KeyPath, value: object, added: Mapping[str, str]) -> dict[str, str]:
        if value is None:
            return dict(added)
        if not isinstance(value, dict):
            self._refuse(path, f"expected a mapping of labels, got {describe(value)}")
            return {}
        for name, text in value.items():
            if not isinstance(text, str):
                hint = "; put it between quotes" if isinstance(text, bool | int | float) else ""
                self._refuse((*path, name), f"expected text, got {describe(text)}{hint}")
            elif name in (SERVICE, REGISTRY) and text != added[name]:
                self._refuse((*path, name), f"is always '{added[name]}' here")
        return {**added, **value}

    def _read_conditions(self, path: KeyPath, item: dict[str, Any]) -> Conditions:
        values = {key: item[key] for key in sorted(_CONDITIONS & item.keys()) if item[key] is not None}
        for key, value in values.items():
            if not isinstance(value, bool):
                self._refuse((*path, key), f"expected true or false, got {describe(value)}")
        return Conditions(**values)
