"""Two versions of meshlocal side by side: what a change costs, or gives. `python -m bench.versions --before CHECKOUT`.

Both run at once, over the same upstreams, and take turns at each workload, so that what the machine does to one it does
to the other. Each round starts both anew: where a process lies in memory makes up to a tenth of its speed. What counts
is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench import http, report, tcp
from bench.latency import connects
from bench.machine import ROOT
from bench.peers import Peer, of_checkout, started
from bench.rounds import Measured, Row, ratio, take_turns, values

BEFORE, NOW = "before", "now"
TOLERATED = 1.05
"""How much worse a row may be."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.versions", description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="a checkout to compare this one with")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, each with both started anew")
    parser.add_argument("--only", choices=["tcp", "http"], action="append")
    asked = parser.parse_args()
    asked.quick, asked.seconds, asked.connects, asked.rate_seconds, asked.storm_seconds = True, 1, 300, 1.0, 1.0
    return asked


def measure(asked: argparse.Namespace) -> dict[str, Measured]:
    """Rounds by part, TCP and HTTP."""
    found: dict[str, Measured] = {}
    for number in range(asked.rounds):
        peers = [of_checkout(BEFORE, asked.before.resolve()), of_checkout(NOW, ROOT)]
        if number % 2:
            peers.reverse()
        for name in asked.only or ["tcp", "http"]:
            for workload, sides in _round(name, peers, asked).items():
                kept = found.setdefault(name, {}).setdefault(workload, {})
                for side, measured in sides.items():
                    kept.setdefault(side, []).extend(measured)
    return found


def _round(name: str, peers: Sequence[Peer], asked: argparse.Namespace) -> Measured:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-")))
        part = tcp if name == "tcp" else http
        job, _ = stack.enter_context(part.upstreams(folder / "up" if name == "http" else folder))
        proxies = stack.enter_context(started(peers, job, folder))
        if name == "tcp":
            for each in proxies:
                connects(each.ports["echo"], 50)
        work = tcp.workloads(job, asked) if name == "tcp" else http.workloads(asked)
        return take_turns(work, proxies, 1)


def table(measured: Measured, rows: list[Row]) -> tuple[str, list[str]]:
    """The rows that were measured, and the names of those that are worse than is tolerated."""
    lines, worse = [], []
    for row in rows:
        change = ratio(measured, row, NOW, BEFORE)
        if change is None:
            continue
        cells = [
            f"{sorted(found)[len(found) // 2] * row.scale:,.2f}"
            for found in (values(measured, row.workload, side, row.metric) for side in (BEFORE, NOW))
        ]
        lines.append([f"{row.title}, {row.unit} {'↑' if row.more else '↓'}", *cells, f"{change:.3f}"])
        if (1 / change if row.more else change) > TOLERATED:
            worse.append(row.title)
    return report.table(["median of the rounds", BEFORE, NOW, "ratio"], lines), worse


def main() -> None:
    """Measure and print."""
    asked = options()
    for name, measured in measure(asked).items():
        text, worse = table(measured, tcp.ROWS if name == "tcp" else http.ROWS)
        print(f"\n{name}\n\n{text}\n")
        print(f"more than {TOLERATED - 1:.0%} worse: {', '.join(worse) or 'none'}")


if __name__ == "__main__":
    main()
