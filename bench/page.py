"""The page of the documentation that shows runs: each writes its own sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench import report
from bench.machine import ROOT

PAGE = ROOT / "docs" / "performance.md"


def write(sections: Mapping[str, str]) -> None:
    """Replace these sections.

    Raises:
        SystemExit: the page has no place for one of them.
    """
    page = PAGE.read_text()
    for name, text in sections.items():
        page = insert(page, name, text)
    PAGE.write_text(page)
    print(f"wrote {PAGE}")


def insert(page: str, name: str, text: str) -> str:
    """The page with another text in a section's place."""
    begin, end = f"<!-- {name}: written by a benchmark -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{PAGE} has no place for {name}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def verdicts(goals: Sequence[Mapping[str, Any]]) -> str:
    """A table of goals, and whether they hold."""
    judged = [
        [
            each["goal"],
            f"{each['value']:.3g}{each['unit']}",
            f"{'≥' if each['at_least'] else '≤'} {each['limit']:g}{each['unit']}",
            "holds" if each["holds"] else "**missed**",
        ]
        for each in goals
    ]
    return report.table(["Goal", "measured", "goal", ""], judged) + "\n"
