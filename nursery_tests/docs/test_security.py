"""docs/security.md: each promise names a test, and that is there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "security.md"


def promises() -> dict[str, list[tuple[str, str]]]:
    """The tests of each promise, as file and name."""
    section = PAGE.read_text().partition("## Promises")[2].partition("\n## ")[0]
    found: dict[str, list[tuple[str, str]]] = {}
    for line in section.splitlines():
        if line.startswith("| ") and "`" in line:
            promise, named = line.strip("| ").rsplit(" | ", 1)
            tests: list[tuple[str, str]] = []
            for text in re.findall(r"`([^`]*)`", named):
                file, _, name = text.partition("::")
                tests.append((file or tests[-1][0], name))
            found[promise] = tests
    return found


def test_every_promise_has_a_test_that_is_there() -> None:
    found = promises()
    assert len(found) > 20
    for promise, tests in found.items():
        assert tests, promise
        for file, name in tests:
            text = (TESTS / file).read_text()
            assert re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), f"{promise}: {file}::{name}"
