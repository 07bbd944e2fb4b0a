"""Plain tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, two spaces apart; `-` for what is None."""
    return "\n".join(Columns(header).lines(rows, header=True))


class Columns:
    """A table that is printed piece by piece: its columns get wider with what comes, and never narrower."""

    def __init__(self, header: Sequence[str]) -> None:
        self._header = list(header)
        self._widths = [len(name) for name in header]

    def lines(self, rows: Iterable[Sequence[object]], *, header: bool) -> list[str]:
        """Rows as lines, behind the header's if it is wanted."""
        cells = [[_cell(cell) for cell in row] for row in rows]
        for line in cells:
            self._widths = [max(width, len(cell)) for width, cell in zip(self._widths, line, strict=True)]
        shown = [self._header, *cells] if header else cells
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(line, self._widths, strict=True)).rstrip()
            for line in shown
        ]


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    return text if text.isprintable() else repr(text)[1:-1]
