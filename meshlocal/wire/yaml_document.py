"""YAML text → plain data, and the line on which each value stands.

What is read is the part of YAML that JSON has too: mappings with text as keys, lists, text, numbers, true, false and
null. Plain scalars resolve as the YAML 1.2 core schema has it (section 10.3.2), not as YAML 1.1: `no`, `on`, `12:30`
and `2024-01-01` are text, `0x1F` is 31, `1.20` is the number 1.2 and `010` is ten.

The parser's events are put together here, without recursion, so that neither deep nesting nor aliases that multiply
("billion laughs") get anywhere: aliases and tags are refused, and so is every key that a mapping has twice.

JSON is YAML too, but for keys of more than 1024 characters and for characters written as two escaped surrogates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from meshlocal.policy.problems import KeyPath, quote

MAX_TEXT = 16 * 1024 * 1024
"""Characters of a document."""
MAX_DEPTH = 64
"""Mappings and lists within one another."""
MAX_NUMBER = 400
"""Characters of a number: Python turns no longer ones into integers in reasonable time, or at all."""

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's parser where PyYAML was built with it: ten times as fast."""

_INTEGER = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_WORDS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_STANDARD = "tag:yaml.org,2002:"


class YamlError(ValueError):
    """A text that is not the YAML described above.

    Attributes:
        name: the document's.
        line: from 1.
        column: from 1.
        message: what is wrong.
    """

    def __init__(self, name: str, line: int, column: int, message: str) -> None:
        super().__init__(f"{name}:{line}:{column}: {message}")
        self.name = name
        self.line = line
        self.column = column
        self.message = message


class YamlDocument:
    """A parsed document.

    Attributes:
        name: as it was given.
        data: dicts, lists, str, int, float, bool and None. It must not be changed: `line_of` goes by it.
    """

    def __init__(self, name: str, data: object, line: int, lines: dict[int, dict[Any, int]]) -> None:
        self.name = name
        self.data = data
        self._line = line
        self._lines = lines

    def line_of(self, path: KeyPath) -> int:
        """The line, from 1, of the value at the path (of its key, in a mapping); of the nearest one around it if there
        is no such value.
        """
        line = self._line
        value: Any = self.data
        for step in path:
            known = self._lines.get(id(value))
            if known is None or step not in known:
                break
            line = known[step]
            value = value[step]
        return line


def parse_yaml(text: str, name: str) -> YamlDocument:
    """Read one document. An empty one is null.

    Args:
        text: the document, at most `MAX_TEXT` characters.
        name: what errors call it, such as the file's path.

    Raises:
        YamlError: it is no YAML, has several documents, a key twice, a key that is not text, an alias, a tag (other
            than `!!str`), too deep a nesting, or is too long.
    """
    if len(text) > MAX_TEXT:
        raise YamlError(name, 1, 1, f"longer than {MAX_TEXT} characters")
    builder = _Builder(name)
    try:
        # libyaml is handed UTF-8.
        text.encode()
        for event in _events(text.removeprefix("\ufeff")):
            builder.add(event)
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        column = error.start - text.rfind("\n", 0, error.start)
        raise YamlError(name, line, column, "a lone surrogate is no character") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = ", ".join(part for part in (error.context, error.problem) if part) or "is no YAML"
        raise YamlError(name, mark.line + 1 if mark else 1, mark.column + 1 if mark else 1, message) from None
    except yaml.reader.ReaderError as error:
        raise YamlError(name, *_position(text, error), "a character that YAML does not allow") from None
    except yaml.YAMLError as error:
        raise YamlError(name, 1, 1, str(error)) from None
    return builder.document()


def _events(text: str) -> Iterator[Any]:
    loader = LOADER(text)
    try:
        while loader.check_event():
            yield loader.get_event()
    finally:
        loader.dispose()


def _position(text: str, error: yaml.reader.ReaderError) -> tuple[int, int]:
    """Line and column. The parsers count differently, so that the character itself is looked for."""
    character = error.character if isinstance(error.character, str) else chr(error.character)
    found = max(text.find(character), 0)
    return text.count("\n", 0, found) + 1, found - text.rfind("\n", 0, found)


class _Builder:
    """Puts parser events together. `_stack` holds the containers that are open, each with its lines and pending key."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lines: dict[int, dict[Any, int]] = {}
        self._root: Any = None
        self._root_line = 1
        self._documents = 0
        self._container: Any = None
        self._container_lines: dict[Any, int] = {}
        self._key: str | None = None
        self._stack: list[tuple[Any, dict[Any, int], str | None]] = []

    def document(self) -> YamlDocument:
        return YamlDocument(self._name, self._root, self._root_line, self._lines)

    def _error(self, event: Any, message: str) -> YamlError:
        return YamlError(self._name, event.start_mark.line + 1, event.start_mark.column + 1, message)

    def add(self, event: Any) -> None:
        kind = type(event)
        if kind is yaml.ScalarEvent:
            self._add_scalar(event)
        elif kind is yaml.MappingStartEvent:
            self._open(event, {})
        elif kind is yaml.SequenceStartEvent:
            self._open(event, [])
        elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
            self._container, self._container_lines, self._key = self._stack.pop()
        elif kind is yaml.AliasEvent:
            raise self._error(event, f"aliases (*{event.anchor}) are not supported; write the value out")
        elif kind is yaml.DocumentStartEvent:
            self._documents += 1
            if self._documents > 1:
                raise self._error(event, "a second document; one is expected")

    def _add_scalar(self, event: Any) -> None:
        value: Any = event.value
        tag = event.tag
        if tag is None or tag == "!":
            if event.implicit[0] and tag is None:
                value = self._resolve(event, value)
        elif tag != _STANDARD + "str":
            raise self._refused_tag(event)
        container = self._container
        if type(container) is dict and self._key is None:
            if type(value) is not str:
                raise self._error(event, f"the key {event.value or 'null'} is not text; put it between quotes")
            if value in container:
                first = self._container_lines[value]
                raise self._error(event, f"the key {quote(value)} is already on line {first}")
            self._key = value
            self._container_lines[value] = event.start_mark.line + 1
        else:
            self._put(event, value)

    def _open(self, event: Any, value: Any) -> None:
        tag = event.tag
        if tag is not None and tag not in ("!", _STANDARD + ("map" if type(value) is dict else "seq")):
            raise self._refused_tag(event)
        if type(self._container) is dict and self._key is None:
            raise self._error(event, f"a key is text, not a {'mapping' if type(value) is dict else 'list'}")
        if len(self._stack) >= MAX_DEPTH:
            raise self._error(event, f"nested more than {MAX_DEPTH} deep")
        self._put(event, value)
        self._stack.append((self._container, self._container_lines, self._key))
        self._container = value
        self._container_lines = self._lines[id(value)] = {}
        self._key = None

    def _put(self, event: Any, value: Any) -> None:
        container = self._container
        if container is None:
            self._root = value
            self._root_line = event.start_mark.line + 1
        elif type(container) is dict:
            container[self._key] = value
            self._key = None
        else:
            self._container_lines[len(container)] = event.start_mark.line + 1
            container.append(value)

    def _refused_tag(self, event: Any) -> YamlError:
        tag = str(event.tag)
        shown = "!!" + tag.removeprefix(_STANDARD) if tag.startswith(_STANDARD) else tag
        return self._error(event, f"the tag {quote(shown)} is not supported")

    def _resolve(self, event: Any, text: str) -> object:
        """A plain scalar's value in the YAML 1.2 core schema."""
        if text in _WORDS:
            return _WORDS[text]
        if text[0] not in "+-.0123456789":
            return text
        if _INTEGER.fullmatch(text):
            convert: Any = int
        elif _FLOAT.fullmatch(text):
            convert = float
        elif _OCTAL.fullmatch(text) or _HEXADECIMAL.fullmatch(text):
            convert = _prefixed
        else:
            return text
        if len(text) > MAX_NUMBER:
            raise self._error(event, f"a number of more than {MAX_NUMBER} characters")
        return convert(text)


def _prefixed(text: str) -> int:
    return int(text, 0)
