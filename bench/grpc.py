"""gRPC calls side by side: direct, HAProxy, nginx, Envoy and meshlocal in turn, over the same nghttpd, one worker each.

A call is what gRPC makes of a unary one: HEADERS, a message, half-close; HEADERS, a message, trailers. nghttpd answers
whatever it is sent with a file, and a trailer. Calls that are streamed to are `bench.streamer`'s.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench import load, streamer
from bench.generator import idle
from bench.machine import memory_kb
from bench.peers import PEERS, Instance, Job, Running, max_connections, present, started
from bench.processes import free_port, listening, module
from bench.rounds import DIRECT, Measured, Metrics, Row, Workload, of_load, take_turns

SHAPES = ((1, 1), (1, 32), (32, 8))
"""Connections, and calls at once on each."""

RATES = (1000, 2000)
"""Calls a second, on one connection."""

SMALL, LARGE = 59, 65531
"""Bytes of a message, which its prefix makes 64 and 64 KiB."""

HELLO = bytes.fromhex("505249202a20485454502f322e300d0a0d0a534d0d0a0d0a" + "000000040000000000")
"""The preface, and empty SETTINGS (RFC 9113, 3.4)."""

ROWS = [
    Row("gRPC, 1 connection, 1 call at once, p50", "grpc-1-1", "p50", "µs", 1e6),
    Row("gRPC, 1 connection, 1 call at once, p99", "grpc-1-1", "p99", "µs", 1e6),
    Row("gRPC, 1 connection, 32 at once", "grpc-1-32", "rate", "1000/s", 1e-3, more=True, closed=True),
    Row("gRPC, 32 connections, 8 at once", "grpc-32-8", "rate", "1000/s", 1e-3, more=True, closed=True),
    Row("gRPC, 32 connections, 8 at once, p99", "grpc-32-8", "p99", "ms", 1e3),
    Row("gRPC, messages of 64 KiB, 1 connection, 8 at once", "grpc-large", "rate", "1000/s", 1e-3, more=True),
    *(
        Row(f"gRPC, {rate:,} calls a second, {metric}", f"grpc-rate-{rate}", metric, "µs", 1e6)
        for rate in RATES
        for metric in ("p50", "p99")
    ),
    Row(
        "gRPC, messages to 1 client, 8 calls at once", "grpc-stream", "messages", "1000/s", 1e-3, more=True, closed=True
    ),
    Row("CPU of a call, 1 connection, 32 at once", "grpc-1-32", "cpu_per_request", "µs", 1e6),
    Row("CPU of a call, 32 connections, 8 at once", "grpc-32-8", "cpu_per_request", "µs", 1e6),
    Row("memory, idle", "grpc-memory", "idle", "MB", 1e-6),
    Row("memory per idle connection", "grpc-memory", "each", "KB", 1e-3),
]


def needs() -> list[str]:
    """What is not installed, without which nothing of this can be measured."""
    return load.missing("nghttpd", "h2load")


@contextmanager
def upstreams(folder: Path) -> Iterator[tuple[Job, Running]]:
    """An nghttpd, as one instance on the proxies' node and one on another."""
    near, other = free_port(), free_port("127.0.0.2")
    files = folder / "files"
    files.mkdir(parents=True)
    for name, size in (("small", SMALL), ("large", LARGE)):
        message = b"\0" + size.to_bytes(4, "big") + b"x" * size
        (files / name).write_bytes(message)
    command = [load.find("nghttpd") or "nghttpd", "--no-tls", "-d", str(files), "--trailer=grpc-status: 0"]
    with (
        listening([*command, "--address=127.0.0.1", str(near)], folder / "log", [near]) as process,
        listening([*command, "--address=127.0.0.2", str(other)], folder / "other.log", []),
        module("bench.streamer") as (_, (streams,)),
    ):
        services = {
            "b": [Instance("127.0.0.1", near), Instance("127.0.0.2", other, "n2")],
            "s": [Instance("127.0.0.1", streams)],
        }
        yield Job(services, http=True, http2=True), Running(DIRECT, process.pid, {"b": near, "s": streams})


def calls(
    port: int,
    folder: Path,
    connections: int,
    at_once: int,
    seconds: int,
    *,
    message: str = "small",
    rate: int | None = None,
) -> Metrics:
    """Unary calls, so many at once on each connection; with `rate`, so many a second."""
    body = folder / "up" / "files" / message
    return of_load(load.h2load_calls(port, connections, at_once, seconds, body, path=f"/{message}", rate=rate))


def streamed(port: int, folder: Path, seconds: int) -> Metrics:
    """Calls that are answered with many messages each."""
    found = calls(port, folder, 1, 8, seconds)
    return {**found, "messages": found["rate"] * streamer.MESSAGES}


def workloads(asked: argparse.Namespace, folder: Path) -> list[Workload]:
    """What is measured in rounds."""
    found = [
        Workload(
            f"grpc-{connections}-{at_once}",
            "b",
            partial(calls, folder=folder, connections=connections, at_once=at_once, seconds=asked.seconds),
        )
        for connections, at_once in SHAPES
    ]
    large = partial(calls, folder=folder, connections=1, at_once=8, seconds=asked.seconds, message="large")
    found.append(Workload("grpc-large", "b", large))
    for rate in RATES:
        run = partial(calls, folder=folder, connections=1, at_once=32, seconds=round(asked.rate_seconds), rate=rate)
        found.append(Workload(f"grpc-rate-{rate}", "b", run))
    return [*found, Workload("grpc-stream", "s", partial(streamed, folder=folder, seconds=asked.seconds))]


def memory(contestant: Running, count: int) -> Metrics:
    """A proxy's memory before it served anything, and what `count` idle connections add."""
    before = memory_kb(contestant.pid)
    with idle(("127.0.0.1", contestant.ports["b"]), count, HELLO):
        held = memory_kb(contestant.pid)
    return {"idle": before * 1024, "each": (held - before) * 1024 / count, "connections": count}


def measure(asked: argparse.Namespace) -> Measured:
    """Everything about gRPC; nothing if its upstream or load is missing."""
    if missing := needs():
        print(f"without gRPC: {', '.join(missing)}")
        return {}
    with tempfile.TemporaryDirectory(prefix="meshlocal-bench-") as name:
        folder = Path(name)
        with upstreams(folder / "up") as found:
            job, direct = found
            with started(present(PEERS, job), job, folder) as proxies:
                count = min(asked.idle, max_connections() - 100)
                memories: Any = {each.name: [memory(each, count)] for each in proxies}
                measured = take_turns(workloads(asked, folder), [direct, *proxies], asked.rounds)
    return {**measured, "grpc-memory": {DIRECT: [], **memories}}
