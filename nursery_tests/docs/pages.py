"""The documentation's code blocks, and how what is shown is compared with what is said.

A block is run or checked by its language. One that is not has a comment right before it that says why:

    <!-- not run: needs a program that draws -->

Or the page says so once, for all of its blocks in some languages:

    <!-- sh, console not run: needs a cluster -->
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in sorted([ROOT / "README.md", ROOT / "bench" / "README.md", *(ROOT / "docs").glob("*.md")])
}

_PAGE_MARK = re.compile(r"^<!-- (?P<languages>[a-z, ]+) not run: (?P<why>[^\n]+) -->$", re.MULTILINE)
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>not run: [^\n]+) -->\n+)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        line: where it begins, from 1.
        exempt: why it is not run; empty if it is.
    """

    page: str
    line: int
    language: str
    text: str
    exempt: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    text = PAGES[page].read_text()
    exempt = {each: mark["why"] for mark in _PAGE_MARK.finditer(text) for each in mark["languages"].split(", ")}
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        body = match["text"].replace("\n" + match["indent"], "\n").removeprefix(match["indent"])
        mark = (match["mark"] or "").removeprefix("not run: ") or exempt.get(match["language"], "")
        found.append(Block(page, line, match["language"], body, mark))
    return found


class Step(NamedTuple):
    """A command of a block, and what it is shown to print; None if nothing is shown."""

    where: str
    command: str
    shown: str | None


def steps(block: Block) -> list[Step]:
    """The commands of an `sh` block, all as one; of a `console` block, each after its `$`."""
    if block.language != "console":
        return [Step(str(block), block.text, None)]
    found = []
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        lines = part.split("\n")
        count = 1
        while lines[count - 1].endswith("\\"):
            count += 1
        found.append(Step(str(block), "\n".join(lines[:count]), "\n".join(lines[count:])))
    return found


def alike(shown: str, said: str) -> bool:
    """Whether a program said what a page shows: `…` stands for anything, spaces at line ends for nothing."""
    pattern = ".*".join(re.escape(part) for part in _trimmed(shown).split("…"))
    return re.fullmatch(pattern, _trimmed(said), re.DOTALL) is not None


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
