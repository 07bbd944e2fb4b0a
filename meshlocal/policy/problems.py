"""What is wrong with a document that a person wrote, said so that they can put it right.

A problem names the place (`services.b[1].port`), what was expected there and what came instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]
"""Where a value stands in nested data: keys of mappings and indexes of lists, from the outside in."""

MAX_SHOWN = 60
"""Characters of a bad value that a message repeats."""


class Problem(NamedTuple):
    """One thing that is wrong.

    Attributes:
        path: the key at fault, such as `proxy.listen[0]`; empty for the document as a whole.
        message: what was expected and what came.
        origin: where it was read: `flag`, `environment MESHLOCAL_LOG__LEVEL`, `config.yaml:7`; empty if nowhere.
    """

    path: str
    message: str
    origin: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.origin, self.path, self.message) if part)


def format_path(path: Iterable[str | int]) -> str:
    """A path as people write it: `services.b[1].port`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{shorten(step)}" if text else shorten(step)
    return text


def shorten(text: str) -> str:
    """The text on one printable line, cut where it is long."""
    shown = text if text.isprintable() else repr(text)[1:-1]
    return shown if len(shown) <= MAX_SHOWN else shown[: MAX_SHOWN - 1] + "…"


def quote(text: str) -> str:
    """The text between quotes, on one line, cut where it is long."""
    return f"'{shorten(text)}'"


def describe(value: object) -> str:
    """A value of plain data (as YAML and JSON have it), with its kind: `the text 'x'`, `the number 3`, `a list`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        # Python refuses to print integers of thousands of digits.
        return f"the number {value}" if value.bit_length() <= 128 else "a huge number"
    if isinstance(value, float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {quote(value)}" if value else "empty text"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return f"a {type(value).__name__}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of the known words; empty if none is near."""
    import difflib  # here: it is large, and configurations are seldom wrong

    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {quote(near[0])}?" if near else ""


def unknown_key(word: str, known: Iterable[str]) -> str:
    """The message for a key that is none of the known ones."""
    known = list(known)
    if hint := did_you_mean(word, known):
        return f"unknown key{hint}"
    return f"unknown key; known here: {', '.join(known)}"
