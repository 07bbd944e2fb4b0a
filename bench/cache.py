"""A real cache side by side: Redis, asked by its own benchmark, directly and through each proxy in turn."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench import load
from bench.peers import PEERS, Instance, Job, Running, present, started
from bench.processes import free_port, listening
from bench.rounds import DIRECT, Measured, Row, Workload, take_turns

SERVICE = "cache"

CLIENTS = (1, 20, 100)
"""At once, each request on a connection of its own."""

ROWS = [
    Row("GET, 1 connection, p50", "cache-1", "p50", "µs", 1e6),
    Row("GET, 50 connections", "cache-50", "rate", "1000/s", 1e-3, more=True, closed=True),
    Row("GET, 50 connections, p99", "cache-50", "p99", "µs", 1e6),
    Row("GET, 50 connections, 16 at once on each", "cache-50-16", "rate", "1000/s", 1e-3, more=True, closed=True),
    Row("connect, GET, close, 1 client, p50", "cache-fresh-1", "p50", "µs", 1e6),
    *(
        Row(f"connect, GET, close, {count} clients at once", f"cache-fresh-{count}", "rate", "1000/s", 1e-3, more=True)
        for count in CLIENTS[1:]
    ),
    Row("CPU of a GET, 50 connections", "cache-50", "cpu_per_request", "µs", 1e6),
    *(
        Row(f"CPU of connect, GET, close, {count} at once", f"cache-fresh-{count}", "cpu_per_request", "µs", 1e6)
        for count in CLIENTS
    ),
]


@contextmanager
def upstreams(folder: Path) -> Iterator[tuple[Job, Running]]:
    """A Redis with one thread that keeps nothing on disk, as the instance of the proxies' node; another is away."""
    port = free_port()
    flags = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--tcp-backlog", "4096", "--dir", str(folder)]
    command = [load.find("redis-server") or "redis-server", *flags]
    with listening(command, folder / "redis", [port]) as process:
        load.redis_gets(port, 1, 1, command="set")
        services = {SERVICE: [Instance("127.0.0.1", port), Instance("127.0.0.2", free_port("127.0.0.2"), "n2")]}
        yield Job(services), Running(DIRECT, process.pid, {SERVICE: port})


def workloads(asked: argparse.Namespace) -> list[Workload]:
    """What is measured in rounds: some seconds each, where the machine is as fast as those of the tables."""
    share = 0.3 if asked.quick else 1.0
    kept = [("cache-1", 1, 12_000, 1), ("cache-50", 50, 60_000, 1), ("cache-50-16", 50, 800_000, 16)]
    found = [
        Workload(
            name, SERVICE, partial(load.redis_gets, connections=count, count=int(gets * share), pipelined=pipelined)
        )
        for name, count, gets, pipelined in kept
    ]
    for count in CLIENTS:
        gets = int((3_000 if count == 1 else 8_000) * share)
        run = partial(load.redis_gets, connections=count, count=gets, kept=False)
        found.append(Workload(f"cache-fresh-{count}", SERVICE, run))
    return found


def measure(asked: argparse.Namespace) -> Measured:
    """Everything about a cache; nothing if it is not installed."""
    if missing := load.missing("redis-server", "redis-benchmark"):
        print(f"without a cache: {', '.join(missing)}")
        return {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-")))
        job, direct = stack.enter_context(upstreams(folder))
        contestants = [direct, *stack.enter_context(started(present(PEERS, job), job, folder))]
        for each in contestants:
            load.redis_gets(each.ports[SERVICE], 1, 200)
        return take_turns(workloads(asked), contestants, asked.rounds)
