"""Reads the configuration: flags win over environment variables, these over the file, the file over the defaults.

Every key of the file has an environment variable: `MESHLOCAL_`, then the path of the key in capitals, its steps joined
by two underscores. `proxy.attempts.deadline` is `MESHLOCAL_PROXY__ATTEMPTS__DEADLINE`. The value is written

- for a text or an address: as it is (`MESHLOCAL_PROXY__ADMIN=127.0.0.1:15000`);
- for a number or a boolean: as in YAML (`5`, `0.25`, `true`, `null`);
- for a list: its items, separated by spaces or commas, or a YAML list in brackets;
- for a mapping: `zone=z1,cluster=c1`, or a YAML mapping in braces. A service's or label's name that is a step of the
  variable's name is taken in small letters, so that others need this form.

A variable that is empty or blank is as good as none. Of two that give the same key, the longer path wins.

A variable whose name has no two underscores in a row is never taken for a key. So what Kubernetes sets in every pod
beside a Service called `meshlocal-discovery` (`MESHLOCAL_DISCOVERY_PORT=tcp://10.0.0.1:7070` and its kin) does no
harm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec

from meshlocal.policy.config import Config, resolve_node_name
from meshlocal.policy.config_build import ConfigError, Layer, Role, build_config, kind_of
from meshlocal.policy.problems import Problem, describe, format_path
from meshlocal.policy.sources import find_more

LoadConfig: TypeAlias = "Callable[[], Config]"
"""Reads the whole configuration; raises ConfigError."""

PREFIX = "MESHLOCAL_"
_SERVICE_LINK = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
"""Variables that the kubelet makes of a Service's name."""


def _find_source_kinds() -> None:
    # Imported here: only who names a registry that is none of ours looks for others'.
    from meshlocal.app.sources import load_kinds

    load_kinds()


find_more.append(_find_source_kinds)

UNUSED_VARIABLE = "environment variable {} is no key of the configuration: two underscores join the steps of a key"
"""What is logged of each of `unused_variables`."""


def load_config(
    file: Path | None,
    flags: Mapping[str, object],
    environment: Mapping[str, str],
    needs: Role | None = None,
) -> Config:
    """Read and check everything. In what comes back, `proxy.node_name` is resolved (L1): a text, empty if unknown.

    It blocks while it reads the file.

    Args:
        file: the YAML file, if there is one.
        flags: dotted paths of keys (`proxy.discovery.urls`) and their values. None and an empty tuple, which stand for
            flags that were not given, are passed over.
        environment: as `os.environ`.
        needs: the part that must be complete.

    Raises:
        ConfigError: anything is wrong, or the file cannot be read.
    """
    problems: list[Problem] = []
    layers = [_flag_layer(key, value) for key, value in flags.items() if value is not None and value != ()]
    layers += _environment_layers(environment, problems)
    if file is not None:
        layers.append(_file_layer(file))
    try:
        config = build_config(layers, needs)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    node_name = resolve_node_name(config.proxy.node_name, environment)
    return msgspec.structs.replace(config, proxy=msgspec.structs.replace(config.proxy, node_name=node_name))


def unused_variables(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Variables with meshlocal's prefix that are no keys, and none of Kubernetes's either: worth a line in the log."""
    return tuple(
        sorted(
            name
            for name in environment
            if name.startswith(PREFIX) and "__" not in name and not _SERVICE_LINK.fullmatch(name)
        )
    )


def _nest(path: tuple[str, ...], value: object) -> object:
    for step in reversed(path):
        value = {step: value}
    return value


def _flag_layer(key: str, value: object) -> Layer:
    return Layer("flag", _nest(tuple(key.split(".")), value))


def _file_layer(file: Path) -> Layer:
    # Imported here: a proxy without a config file has no use for a YAML reader in its memory.
    from meshlocal.wire.yaml_document import MAX_TEXT, YamlError, parse_yaml

    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_TEXT + 1)
    except OSError as error:
        raise ConfigError([Problem("", f"cannot be read: {error.strerror or error}", str(file))]) from None
    if len(content) > MAX_TEXT:
        raise ConfigError([Problem("", f"is longer than {MAX_TEXT} bytes", str(file))])
    try:
        document = parse_yaml(content.decode(), str(file))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem("", "is not UTF-8", f"{file}:{line}")]) from None
    except YamlError as error:
        raise ConfigError([Problem("", error.message, f"{file}:{error.line}:{error.column}")]) from None
    return Layer(str(file), document.data, lambda path: f"{file}:{document.line_of(path)}")


def _environment_layers(environment: Mapping[str, str], problems: list[Problem]) -> list[Layer]:
    """A layer for each variable, those of longer paths first."""
    found: list[tuple[tuple[str, ...], str, str]] = []
    for name, text in environment.items():
        if not name.startswith(PREFIX) or "__" not in name or not text.strip():
            continue
        path = tuple(name.removeprefix(PREFIX).lower().split("__"))
        if kind_of(path) is None and _SERVICE_LINK.fullmatch(name):
            continue
        found.append((path, name, text.strip()))
    layers = []
    for path, name, text in sorted(found, key=lambda item: (-len(item[0]), item[1])):
        origin = f"environment {name}"
        try:
            layers.append(Layer(origin, _nest(path, _read_text(path, text))))
        except _ValueError as error:
            problems.append(Problem(format_path(path), str(error), origin))
    return layers


class _ValueError(ValueError):
    """A variable's text is not what its key takes."""


def _read_text(path: tuple[str, ...], text: str) -> object:
    """A variable's text as the data that the file would have."""
    kind = kind_of(path)
    if kind == "value" or (kind == "list" and text.startswith("[")) or (kind == "mapping" and text.startswith("{")):
        from meshlocal.wire.yaml_document import YamlError, parse_yaml

        try:
            return parse_yaml(text, "").data
        except YamlError as error:
            raise _ValueError(error.message) from None
    if kind == "list":
        return [item for item in re.split(r"[\s,]+", text) if item]
    if kind == "mapping":
        pairs: dict[str, object] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            key, separator, value = item.partition("=")
            if not separator or key in pairs:
                what = f"{key} twice" if separator else describe(item)
                raise _ValueError(f"expected key=value, separated by commas, or a mapping in braces; got {what}")
            pairs[key] = _read_text((*path, key), value)
        return pairs
    return text
