"""Figures: percentiles, tables, verdicts, and the JSON files that keep them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine import Machine, describe_line

RESULTS = Path(__file__).resolve().parent / "results"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` percent of all are no larger than."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99."""
    return {f"p{share}": percentile(values, share) for share in (50, 90, 99)}


def median_ratio(values: Sequence[float], bases: Sequence[float]) -> float:
    """The median of the rounds' ratios: what the machine did to one round it did to both sides of its ratio."""
    return median(value / base for value, base in zip(values, bases, strict=True))


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns in Markdown; the first is text, the others are figures."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    dashes = ["-" * width if not column else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    texts = []
    for line in [lines[0], dashes, *lines[1:]]:
        cells = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        texts.append(f"| {' | '.join(cells)} |")
    return "\n".join(texts)


def micro(seconds: float) -> str:
    """Seconds as microseconds."""
    return f"{seconds * 1e6:.0f}" if seconds >= 1e-5 else f"{seconds * 1e6:.2f}"


def milli(seconds: float) -> str:
    """Seconds as milliseconds."""
    return f"{seconds * 1e3:.1f}" if seconds >= 0.01 else f"{seconds * 1e3:.2f}"


def verdict(goal: str, value: float, limit: float, unit: str = "", *, at_least: bool = False) -> dict[str, Any]:
    """Whether a goal holds; prints it."""
    holds = value >= limit if at_least else value <= limit
    sign = "≥" if at_least else "≤"
    print(f"{'holds' if holds else 'MISSED':7} {goal}: {value:.3g}{unit} (goal {sign} {limit:g}{unit})")
    return {"goal": goal, "value": value, "limit": limit, "unit": unit, "at_least": at_least, "holds": holds}


def heading(name: str, machine: Machine) -> None:
    """What begins every benchmark's output."""
    print(f"# {name}\n\n{describe_line(machine)}\n", flush=True)


def write(name: str, machine: Machine, figures: dict[str, Any], folder: Path | None) -> None:
    """Keep a run's figures as JSON, unless `folder` is None."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    figures |= {"benchmark": name, "at": at, "machine": machine}
    path.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\nwrote {path}")
