"""Contestants taking turns: workloads, interleaved rounds, and the table that comes of them.

What is kept of a workload is, for each contestant, a list of rounds, each a mapping of metrics to numbers. Everything
that is printed, drawn or judged is made from that, so a run's JSON file can be rendered again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from bench import report
from bench.generator import Generator, Outcomes
from bench.load import Load
from bench.machine import cpu_seconds
from bench.peers import Running

DIRECT = "direct"
REFERENCE = "Envoy"
OURS = "meshlocal"
SATURATED = 0.85
"""The share of a core that a proxy must have used to have been what limited a closed-loop workload."""

Metrics = dict[str, float]
Measured = dict[str, dict[str, list[Metrics]]]
"""Rounds by workload and contestant."""


class Workload(NamedTuple):
    """Something to measure.

    Attributes:
        name: its key in results.
        service: whose port it goes to.
        run: puts the load on a port.
    """

    name: str
    service: str
    run: Callable[[int], Metrics]


class Row(NamedTuple):
    """A line of a table.

    Attributes:
        unit: what `scale` turns the metric into.
        more: more is better.
        closed: it is a closed-loop workload, of which the proxy should be the limit.
    """

    title: str
    workload: str
    metric: str
    unit: str
    scale: float
    more: bool = False
    closed: bool = False


def of_load(load: Load) -> Metrics:
    """The metrics of closed-loop load."""
    return {key: float(value) for key, value in load._asdict().items()}


def of_outcomes(outcomes: Outcomes) -> Metrics:
    """The metrics of load at a fixed rate."""
    late = report.percentile(outcomes.late, 99) if outcomes.late else 0.0
    found = outcomes.percentiles() if outcomes.latencies else {}
    return {**found, "requests": len(outcomes.latencies), "errors": outcomes.failed, "late_p99": late}


def fixed_rate(
    port: int, payload: bytes, rate: int, seconds: float, *, http: bool = False, together: int = 1
) -> Metrics:
    """Load at a fixed rate over 32 connections; `together`: see `Generator`."""
    from bench.generator import http_answer

    generator = Generator(("127.0.0.1", port), payload, answer=http_answer if http else None, together=together)
    return of_outcomes(generator.run(rate, seconds))


def take_turns(workloads: Sequence[Workload], contestants: Sequence[Running], rounds: int) -> Measured:
    """Measure every workload of every contestant, once a round, in another order each round."""
    rng = random.Random(7)
    measured: Measured = {workload.name: {each.name: [] for each in contestants} for workload in workloads}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} ...", flush=True)
        for workload in workloads:
            for each in rng.sample(list(contestants), len(contestants)):
                measured[workload.name][each.name].append(_once(workload, each))
    return measured


def _once(workload: Workload, contestant: Running) -> Metrics:
    before, start = cpu_seconds(contestant.pid), time.perf_counter()
    metrics = workload.run(contestant.ports[workload.service])
    spent, taken = cpu_seconds(contestant.pid) - before, time.perf_counter() - start
    metrics["cores"] = spent / taken
    if metrics.get("requests"):
        metrics["cpu_per_request"] = spent / metrics["requests"]
    return metrics


def values(measured: Measured, workload: str, contestant: str, metric: str) -> list[float]:
    """A metric of each round; empty if it was not measured."""
    rounds = measured.get(workload, {}).get(contestant, [])
    return [each[metric] for each in rounds if metric in each]


def ratio(measured: Measured, row: Row, contestant: str, base: str) -> float | None:
    """The median of a contestant's ratios to another one; None where one of them was not measured."""
    own = values(measured, row.workload, contestant, row.metric)
    other = values(measured, row.workload, base, row.metric)
    if not own or len(own) != len(other) or not all(other):
        return None
    return report.median_ratio(own, other)


def contestants_of(measured: Measured) -> list[str]:
    """Who took part, in the tables' order."""
    names: dict[str, None] = {}
    for each in measured.values():
        names.update(dict.fromkeys(each))
    return list(names)


def compare(title: str, measured: Measured, rows: Sequence[Row]) -> str:
    """A table of medians, with the ratios to Envoy's where it took part."""
    names = contestants_of(measured)
    lines = []
    limited = False
    for row in rows:
        cells = []
        for name in names:
            found = values(measured, row.workload, name, row.metric)
            if not found:
                cells.append("–")
                continue
            text = number(median(found) * row.scale)
            relative = ratio(measured, row, name, REFERENCE)
            if relative is not None and name not in (REFERENCE, DIRECT):
                text += f" ({relative:.2f})"
            if row.closed and name != DIRECT and median(values(measured, row.workload, name, "cores")) < SATURATED:
                text += " *"
                limited = True
            cells.append(text)
        if any(cell != "–" for cell in cells):
            lines.append([f"{row.title}, {row.unit} {'↑' if row.more else '↓'}", *cells])
    if not lines:
        return ""
    notes = "↓ less is better, ↑ more is better. Medians of the rounds"
    notes += (
        f"; in brackets the ratio to {REFERENCE}'s, as the median of the rounds' ratios." if REFERENCE in names else "."
    )
    if limited:
        notes += (
            f" \\* The proxy used less than {SATURATED:.0%} of a core: the machine, which runs load and upstream"
            " too, was the limit."
        )
    return report.table([title, *names], lines) + "\n\n" + notes + "\n"


def number(value: float) -> str:
    """Three digits or so."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def errors(measured: Mapping[str, Mapping[str, Sequence[Metrics]]]) -> list[str]:
    """A line for each workload and contestant of which requests failed."""
    return [
        f"{name}, {workload}: {failed:.0f} requests failed"
        for workload, contestants in measured.items()
        for name, rounds in contestants.items()
        if (failed := sum(each.get("errors", 0) for each in rounds))
    ]
