"""TCP side by side: direct, HAProxy, nginx, Envoy and meshlocal in turn, over the same upstream, one worker each."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench import load, report
from bench.generator import Generator, idle
from bench.latency import connects
from bench.machine import memory_kb
from bench.peers import PEERS, Instance, Job, Running, max_connections, present, started
from bench.processes import free_port, listening, module
from bench.rounds import DIRECT, Measured, Metrics, Row, Workload, fixed_rate, of_load, of_outcomes, take_turns

CONNECTIONS = (32, 256)
SIZES = (64, 65536)
LARGEST = 65507
"""Bytes of sockperf's largest message, which stands for 64 KiB."""

RATES = (1000, 5000)
STORM = 5000
IDLE = 2.0
CHECKS = 2
"""Rounds of the comparison of load and upstreams with others, at most."""

ROWS = [
    Row("64 B echo, 1 connection, p50", "echo-64-1", "p50", "µs", 1e6),
    Row("64 B echo, 1 connection, p99", "echo-64-1", "p99", "µs", 1e6),
    Row("64 B echo, 32 connections", "echo-64-32", "rate", "1000/s", 1e-3, more=True, closed=True),
    Row("64 B echo, 256 connections", "echo-64-256", "rate", "1000/s", 1e-3, more=True, closed=True),
    Row("64 KiB echo, 1 connection, p50", "echo-65536-1", "p50", "µs", 1e6),
    Row("64 KiB echo, 32 connections, p50", "echo-65536-32", "p50", "µs", 1e6),
    Row("64 KiB echo, 32 connections", "echo-65536-32", "rate", "1000/s", 1e-3, more=True, closed=True),
    Row("64 KiB echo, 256 connections", "echo-65536-256", "rate", "1000/s", 1e-3, more=True, closed=True),
    Row("bulk, to the upstream", "bulk", "rate", "GB/s", 1e-9, more=True, closed=True),
    Row("bulk, to the client", "bulk-reverse", "rate", "GB/s", 1e-9, more=True, closed=True),
    Row("connect, exchange, close, p50", "connect", "p50", "µs", 1e6),
    Row("connect, exchange, close, p99", "connect", "p99", "µs", 1e6),
    *(
        Row(f"64 B at {rate:,} a second, {share}", f"rate-{rate}", share, "µs", 1e6)
        for rate in RATES
        for share in ("p50", "p90", "p99", "p99.9")
    ),
    Row("CPU of a 64 B exchange", "echo-64-32", "cpu_per_request", "µs", 1e6),
    Row("CPU of a 64 KiB exchange", "echo-65536-32", "cpu_per_request", "µs", 1e6),
    Row("CPU of connect, exchange, close", "connect", "cpu_per_request", "µs", 1e6),
    Row("memory, idle", "memory", "idle", "MB", 1e-6),
    Row("memory per idle connection", "memory", "each", "KB", 1e-3),
    Row(f"{STORM:,} connections a second: lost", "storm", "errors", "", 1),
    Row(f"{STORM:,} connections a second, p50", "storm", "p50", "ms", 1e3),
]


@contextmanager
def upstreams(folder: Path) -> Iterator[tuple[Job, Running]]:
    """What all proxies forward to, each service with one instance on their node and one on another."""
    with ExitStack() as stack:
        process, (near, other) = stack.enter_context(module("bench.echo", "127.0.0.1", "127.0.0.2"))
        services = {"echo": [Instance("127.0.0.1", near), Instance("127.0.0.2", other, "n2")]}
        ports = {"echo": near}
        if (sockperf := load.find("sockperf")) is not None:
            port = ports["sockperf"] = free_port()
            flags = ["server", "--tcp", "-i", "127.0.0.1", "-p", str(port)]
            stack.enter_context(listening([sockperf, *flags], folder / "sockperf", [port]))
            services["sockperf"] = [Instance("127.0.0.1", port)]
        if (iperf3 := load.find("iperf3")) is not None:
            port = ports["bulk"] = free_port()
            flags = ["--server", "--bind", "127.0.0.1", "--port", str(port)]
            # Not waited for by a connection: it takes each for a test, and complains.
            stack.enter_context(listening([iperf3, *flags], folder / "iperf3", []))
            services["bulk"] = [Instance("127.0.0.1", port)]
        yield Job(services), Running(DIRECT, process.pid, ports)


def workloads(job: Job, asked: argparse.Namespace) -> list[Workload]:
    """What is measured in rounds."""
    found = []
    for size in SIZES:
        if "sockperf" in job.services:
            run: Callable[[int], Metrics] = partial(pings, size=min(size, LARGEST), seconds=asked.seconds)
            found.append(Workload(f"echo-{size}-1", "sockperf", run))
        if load.find("wrk") is not None:
            for count in CONNECTIONS[: 1 if asked.quick else None]:
                run = partial(echoes, size=size, connections=count, seconds=asked.seconds)
                found.append(Workload(f"echo-{size}-{count}", "echo", run))
    if "bulk" in job.services:
        for name, reverse in (("bulk", False), ("bulk-reverse", True))[: 1 if asked.quick else None]:
            found.append(Workload(name, "bulk", partial(bulk, seconds=asked.seconds, reverse=reverse)))
    found.append(Workload("connect", "echo", partial(short, count=asked.connects)))
    for rate in RATES:
        run = partial(fixed_rate, payload=b"x" * 64, rate=rate, seconds=asked.rate_seconds)
        found.append(Workload(f"rate-{rate}", "echo", run))
    return found


def pings(port: int, size: int, seconds: int) -> Metrics:
    return of_load(load.sockperf_ping(port, size, seconds))


def echoes(port: int, size: int, connections: int, seconds: int) -> Metrics:
    return of_load(load.wrk_echo(port, size, connections, seconds))


def bulk(port: int, seconds: int, *, reverse: bool) -> Metrics:
    return {"rate": load.iperf3(port, seconds, reverse=reverse)}


def short(port: int, count: int) -> Metrics:
    """Connect, exchange, close: one after another."""
    return {**report.percentiles(times := connects(port, count)), "requests": len(times)}


def memory(contestant: Running, count: int) -> Metrics:
    """A proxy's memory before it served anything, and what `count` idle connections add."""
    before = memory_kb(contestant.pid)
    with idle(("127.0.0.1", contestant.ports["echo"]), count):
        time.sleep(1)
        held = memory_kb(contestant.pid)
    return {"idle": before * 1024, "each": (held - before) * 1024 / count, "connections": count}


def storm(contestant: Running, seconds: float) -> Metrics:
    """Connections opened, used once and closed, 5,000 a second whether they are served or not."""
    generator = Generator(("127.0.0.1", contestant.ports["echo"]), b"x" * 64, fresh=True)
    return of_outcomes(generator.run(STORM, seconds))


def checks(asked: argparse.Namespace) -> list[str]:
    """How load and upstream of the benchmark's own compare with programs in C on both sides, with no proxy between."""
    if missing := load.missing("sockperf", "wrk"):
        return [f"not checked against sockperf: {', '.join(missing)}"]
    lines = []
    with tempfile.TemporaryDirectory(prefix="meshlocal-bench-") as folder, upstreams(Path(folder)) as (_, direct):
        theirs, own = direct.ports["sockperf"], direct.ports["echo"]
        for size in (64, LARGEST):
            pairs = [
                (load.sockperf_ping(theirs, size, asked.seconds).p50, load.wrk_echo(own, size, 1, asked.seconds).p50)
                for _ in range(min(asked.rounds, CHECKS))
            ]
            lines.append(_check(f"{size} B echo, 1 connection, p50", "sockperf", "wrk with bench.echo", pairs))
        pairs = [
            (load.sockperf_rate(theirs, 64, 2, 1000).p50, fixed_rate(own, b"x" * 64, 1000, 2)["p50"])
            for _ in range(min(asked.rounds, CHECKS))
        ]
        what = "64 B at 1,000 a second, p50"
        lines.append(_check(what, "sockperf (which spins between exchanges)", "bench.generator (which sleeps)", pairs))
    return lines


def _check(what: str, theirs: str, ours: str, pairs: list[tuple[float, float]]) -> str:
    their, own = (median(column) * 1e6 for column in zip(*pairs, strict=True))
    return f"{what}: {theirs} {their:.1f} µs, {ours} {own:.1f} µs"


def measure(asked: argparse.Namespace) -> Measured:
    """Everything about TCP."""
    for line in load.missing("sockperf", "wrk", "iperf3"):
        print(f"without {line}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-")))
        job, direct = stack.enter_context(upstreams(folder))
        proxies = stack.enter_context(started(present(PEERS, job), job, folder))
        time.sleep(IDLE)
        count = min(asked.idle, max_connections() - 100)
        # First of all: what was allocated under load and is kept would hide what a connection takes.
        memories: Any = {each.name: [memory(each, count)] for each in proxies}
        contestants = [direct, *proxies]
        for each in contestants:
            connects(each.ports["echo"], 50)
        measured = take_turns(workloads(job, asked), contestants, asked.rounds)
        storms: Any = {each.name: [storm(each, asked.storm_seconds)] for each in contestants}
    return {**measured, "memory": {DIRECT: [], **memories}, "storm": storms}
