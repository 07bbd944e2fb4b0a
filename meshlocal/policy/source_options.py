"""What stands behind the `?` of a source URL: `name=value` pairs, percent-encoded, joined by `&`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote_plus, unquote_plus

from meshlocal.policy.problems import quote, unknown_key

_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


class SourceOptionsError(ValueError):
    """Options that cannot be used. The text says which and why."""


def read_options(text: str, known: Sequence[str], repeated: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The pairs in their order.

    Args:
        text: what follows the `?`.
        known: names that there are.
        repeated: those of them that may stand more than once.

    Raises:
        SourceOptionsError: it is written otherwise, names an unknown option, or one twice.
    """
    found: list[tuple[str, str]] = []
    names: set[str] = set()
    for pair in text.split("&"):
        name, separator, raw = pair.partition("=")
        if not separator:
            raise SourceOptionsError(f"expected OPTION=VALUE, got {quote(pair)}")
        if name not in known:
            raise SourceOptionsError(f"{quote(name)}: {unknown_key(name, known)}")
        value = _decode(name, raw)
        if name in names and name not in repeated:
            raise SourceOptionsError(f"{name} stands twice")
        names.add(name)
        found.append((name, value))
    return found


def yes_or_no(found: dict[str, str], name: str, *, default: bool = False) -> bool:
    """Take an option that is `yes` or `no` out of those that were read.

    Raises:
        SourceOptionsError: it is neither.
    """
    value = found.pop(name, "yes" if default else "no")
    if value not in ("yes", "no"):
        raise SourceOptionsError(f"{name}: expected yes or no, got {quote(value)}")
    return value == "yes"


def write_options(pairs: Iterable[tuple[str, str]]) -> str:
    """The same as text, with the `?`; empty if there are none."""
    written = "&".join(f"{name}={quote_plus(value, safe='/')}" for name, value in pairs)
    return f"?{written}" if written else ""


def _decode(name: str, raw: str) -> str:
    """A percent-encoded value. A plus is a space, so that a selector's plus is written %2B."""
    try:
        value = unquote_plus(raw, errors="strict")
    except UnicodeDecodeError:
        value = ""
    if not value.strip() or _BAD_ESCAPE.search(raw) or not value.isprintable():
        raise SourceOptionsError(f"{name}: {quote(raw)} is no percent-encoded text")
    return value
