"""The table of what came of each fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from nursery_tests.campaign.campaign import Row

GROUPS = {
    "tcp": ("tcp", "held"),
    "tcp, replay": ("replay",),
    "HTTP/1.1": ("get", "post"),
    "gRPC": ("call",),
    "gRPC streams": ("stream",),
}
"""Columns, and the kinds of requests that each sums up."""

BEGIN = "<!-- campaign: begin; `make soak-document` writes it again -->"
END = "<!-- campaign: end -->"


def table(rows: Iterable[Row]) -> str:
    """Markdown."""
    titles = ["fault", "what must hold", *GROUPS, "tasks", "descriptors", "memory"]
    lines = [_line(titles), _line(["---"] * len(titles))]
    for row in rows:
        cells = [_group(row, kinds) for kinds in GROUPS.values()]
        memory = f"{row.memory / 2**20:+.1f} MB"
        lines.append(_line([row.fault.name, row.fault.holds, *cells, str(row.tasks), str(row.descriptors), memory]))
    return "\n".join(lines) + "\n"


def _group(row: Row, kinds: Sequence[str]) -> str:
    kinds = [kind for kind in kinds if kind in row.sent]
    if not kinds:
        return ""
    sent = sum(row.sent[kind] for kind in kinds)
    failed: Counter[str] = sum((row.failed[kind] for kind in kinds), Counter())
    worst = max(row.worst[kind] for kind in kinds)
    how = f" ({', '.join(f'{count} {name}' for name, count in failed.most_common())})" if failed else ""
    return f"{sent:,} sent, {failed.total():,} failed{how}; {worst * 1000:,.0f} ms"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def put(document: str, text: str) -> str:
    """A document with the text between its marks."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"
