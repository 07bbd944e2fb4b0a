"""Layers of plain data (flags, environment, file) → one checked `Config`, or every problem in them.

Each layer is read against the schema by itself, so that a mistake is reported where it was made even if another layer
overrides it. The layers are then merged key by key, and what spans several keys is checked last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeGuard

import msgspec.inspect as schema

from meshlocal.policy.addresses import AddressError, CollectorUrl, DiscoveryUrl, ListenAddress, SocketAddress
from meshlocal.policy.config import Config
from meshlocal.policy.config_check import check_config
from meshlocal.policy.problems import KeyPath, Problem, describe, did_you_mean, format_path, quote, unknown_key
from meshlocal.policy.sources import SourceUrl

Kind: TypeAlias = Literal["text", "list", "mapping", "value"]
Role: TypeAlias = Literal["proxy", "discovery"]


class Layer(NamedTuple):
    """Configuration from one origin.

    Attributes:
        origin: where it was read, as a person would say it: `flag`, `environment`, `config.yaml`.
        data: nested mappings, lists, texts, numbers, booleans and None.
        locate: the origin of one key, where more is known of it (`config.yaml:7`).
    """

    origin: str
    data: object
    locate: Callable[[KeyPath], str] | None = None

    def where(self, path: KeyPath) -> str:
        """The origin of one key."""
        return self.locate(path) if self.locate is not None else self.origin


class ConfigError(ValueError):
    """A configuration that cannot be used. Its text has a line for each of `problems`, of which there is at least one.

    `path`, `message` and `origin` are those of the first.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)
        self.path, self.message, self.origin = self.problems[0]


def build_config(layers: Sequence[Layer], needs: Role | None = None) -> Config:
    """Check the layers, and merge them: of two that give a key, the one that stands first wins.

    Mappings are merged key by key, lists replaced whole. A null is a value where the schema allows one
    (`max_attempts`), elsewhere the same as not giving the key.

    Args:
        layers: the strongest first: flags, environment, file.
        needs: the part that must be complete: the proxy has a listener, the discovery server a source.

    Raises:
        ConfigError: anything is wrong; it lists every problem.
    """
    problems: list[Problem] = []
    merged: dict[str, Any] = {}
    for layer in layers:
        read = _Reader(layer, problems).read(_SCHEMA, layer.data, ()) if layer.data is not None else _NOTHING
        if read is not _NOTHING:
            _merge(merged, read)
    if not problems:
        config: Config = _construct(_SCHEMA, merged)
        for path, message in check_config(config, needs):
            problems.append(Problem(format_path(path), message, _origin(layers, path)))
        if not problems:
            return config
    raise ConfigError(problems)


def kind_of(path: Sequence[str]) -> Kind | None:
    """How the schema wants the value of a key: `value` is a number, a boolean or null. None: no such key."""
    kind: schema.Type = _SCHEMA
    for step in path:
        if _is_section(kind):
            kind = next((_inner(field.type)[0] for field in kind.fields if field.name == step), schema.AnyType())
        elif isinstance(kind, schema.DictType):
            kind = _inner(kind.value_type)[0]
        else:
            return None
    if _is_section(kind) or isinstance(kind, schema.DictType):
        return "mapping"
    if isinstance(kind, schema.VarTupleType):
        return "list"
    if isinstance(kind, schema.FloatType | schema.IntType | schema.BoolType):
        return "value"
    return None if isinstance(kind, schema.AnyType) else "text"


def known_keys(path: Sequence[str] = ()) -> tuple[str, ...]:
    """The keys of the section at the path; none if there is no such section, or it takes any key."""
    kind: schema.Type = _SCHEMA
    for step in path:
        if not _is_section(kind):
            return ()
        kind = next((_inner(field.type)[0] for field in kind.fields if field.name == step), schema.AnyType())
    return tuple(field.name for field in kind.fields) if _is_section(kind) else ()


_SCHEMA = schema.type_info(Config)
_NOTHING: Any = object()
_PARSERS: Mapping[type, Callable[[str], object]] = {
    SocketAddress: SocketAddress.parse,
    ListenAddress: ListenAddress.parse,
    DiscoveryUrl: DiscoveryUrl.parse,
    SourceUrl: SourceUrl.parse,
    CollectorUrl: CollectorUrl.parse,
}


def _is_section(kind: schema.Type) -> TypeGuard[schema.StructType]:
    return isinstance(kind, schema.StructType) and kind.cls not in _PARSERS


def _inner(kind: schema.Type) -> tuple[schema.Type, bool]:
    """The type itself, and whether it may be null."""
    if isinstance(kind, schema.Metadata):
        return _inner(kind.type)
    if isinstance(kind, schema.UnionType):
        (some,) = (one for one in kind.types if not isinstance(one, schema.NoneType))
        return _inner(some)[0], True
    return kind, False


class _Reader:
    """Reads one layer: mappings of what the schema knows, with checked and converted leaves."""

    def __init__(self, layer: Layer, problems: list[Problem]) -> None:
        self._layer = layer
        self._problems = problems

    def _refuse(self, path: KeyPath, message: str) -> Any:
        self._problems.append(Problem(format_path(path), message, self._layer.where(path)))
        return _NOTHING

    def read(self, kind: schema.Type, value: object, path: KeyPath) -> Any:
        """The value as the schema wants it; `_NOTHING` if it is null or was refused."""
        kind, optional = _inner(kind)
        if value is None and optional:
            return None
        if _is_section(kind) or isinstance(kind, schema.DictType):
            return self._read_mapping(kind, value, path)
        if isinstance(kind, schema.VarTupleType):
            return self._read_list(kind, value, path)
        if isinstance(kind, schema.FloatType | schema.IntType):
            return self._read_number(kind, value, path)
        if isinstance(kind, schema.BoolType):
            if isinstance(value, bool):
                return value
            return self._refuse(path, f"expected true or false, got {describe(value)}")
        return self._read_text(kind, optional, value, path)

    def _read_mapping(self, kind: schema.StructType | schema.DictType, value: object, path: KeyPath) -> Any:
        if value is None:
            return _NOTHING
        if not isinstance(value, Mapping):
            return self._refuse(path, f"expected a mapping, got {describe(value)}")
        known = {field.name: field.type for field in kind.fields} if _is_section(kind) else None
        found: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                self._refuse(path, f"expected text as a key, got {describe(key)}")
                continue
            here = (*path, key)
            if known is None:
                assert isinstance(kind, schema.DictType)
                # A service's section may be empty, and then still names the service.
                item = {} if item is None and _is_section(kind.value_type) else item
                read = self.read(kind.value_type, item, here)
            elif key not in known:
                read = self._refuse(here, unknown_key(key, known))
            elif item is None and not _inner(known[key])[1]:
                continue
            else:
                read = self.read(known[key], item, here)
            if read is not _NOTHING:
                found[key] = read
        if _is_section(kind):
            for field in kind.fields:
                if field.required and value.get(field.name) is None:
                    self._refuse(path, f"has no {quote(field.name)}")
        return found

    def _read_list(self, kind: schema.VarTupleType, value: object, path: KeyPath) -> Any:
        if not isinstance(value, list | tuple):
            return self._refuse(path, f"expected a list, got {describe(value)}")
        items = [self.read(kind.item_type, item, (*path, position)) for position, item in enumerate(value)]
        return _NOTHING if _NOTHING in items else tuple(items)

    def _read_number(self, kind: schema.FloatType | schema.IntType, value: object, path: KeyPath) -> Any:
        whole = isinstance(kind, schema.IntType)
        name = "a whole number" if whole else "a number of seconds"
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            return self._refuse(path, f"expected {name}, got {describe(value)}")
        assert isinstance(value, int | float)
        least = kind.ge if kind.ge is not None else kind.gt
        # Written so that not-a-number is out of every range.
        within = (
            (kind.ge is None or value >= kind.ge)
            and (kind.gt is None or value > kind.gt)
            and (kind.le is None or value <= kind.le)
        )
        if not within:
            low = f"{least:g}" if kind.ge is not None else f"more than {least:g}"
            return self._refuse(path, f"expected {name}, from {low} to {kind.le:.0f}; got {describe(value)}")
        return value if whole else float(value)

    def _read_text(self, kind: schema.Type, optional: bool, value: object, path: KeyPath) -> Any:
        choices = [str(one) for one in kind.values] if isinstance(kind, schema.LiteralType) else []
        if not isinstance(value, str):
            hint = "; put it between quotes" if isinstance(value, bool | int | float) and not choices else ""
            expected = f"one of {', '.join(choices)}" if choices else "text"
            return self._refuse(path, f"expected {expected}, got {describe(value)}{hint}")
        if isinstance(kind, schema.StructType):
            if optional and value in ("none", "off"):
                return None
            try:
                return _PARSERS[kind.cls](value)
            except AddressError as error:
                return self._refuse(path, str(error))
        if choices and value not in choices:
            hint = did_you_mean(value, choices)
            return self._refuse(path, f"expected one of {', '.join(choices)}, got {describe(value)}{hint}")
        if isinstance(kind, schema.StrType):
            if kind.min_length and not value.strip():
                return self._refuse(path, "is empty")
            if kind.max_length is not None and len(value) > kind.max_length:
                return self._refuse(path, f"is longer than {kind.max_length} characters")
        return value


def _merge(strong: dict[str, Any], weak: Mapping[str, Any]) -> None:
    for key, value in weak.items():
        if key not in strong:
            strong[key] = value
        elif isinstance(value, dict) and isinstance(strong[key], dict):
            _merge(strong[key], value)


def _construct(kind: schema.Type, value: Any) -> Any:
    kind, _ = _inner(kind)
    if value is None:
        return None
    if _is_section(kind):
        kinds = {field.name: field.type for field in kind.fields}
        return kind.cls(**{name: _construct(kinds[name], item) for name, item in value.items()})
    if isinstance(kind, schema.DictType):
        return {key: _construct(kind.value_type, item) for key, item in value.items()}
    if isinstance(kind, schema.VarTupleType):
        return tuple(_construct(kind.item_type, item) for item in value)
    return value


def _origin(layers: Sequence[Layer], path: KeyPath) -> str:
    """Where the value in force was given; empty for a default."""
    return next((layer.where(path) for layer in layers if _has(layer.data, path)), "")


def _has(data: Any, path: KeyPath) -> bool:
    for step in path:
        if isinstance(data, Mapping):
            found = step in data
        else:
            found = isinstance(data, list | tuple) and isinstance(step, int) and step < len(data)
        if not found:
            return False
        data = data[step]
    return True
