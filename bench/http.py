"""HTTP/1.1 side by side: direct, HAProxy, nginx, Envoy and meshlocal in turn, over the same nginx, one worker each."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from bench import load
from bench.peers import PEERS, Instance, Job, Running, nginx_base, present, started
from bench.processes import free_port, listening
from bench.rounds import DIRECT, Measured, Metrics, Row, Workload, fixed_rate, of_load, take_turns

CONNECTIONS = (1, 32, 256)
RATES = (1000, 2000)
GET = b"GET / HTTP/1.1\r\nHost: b\r\n\r\n"

ROWS = [
    Row("GET, 1 connection, p50", "http-1", "p50", "µs", 1e6),
    Row("GET, 1 connection, p99", "http-1", "p99", "µs", 1e6),
    Row("GET, 32 connections", "http-32", "rate", "1000/s", 1e-3, more=True, closed=True),
    Row("GET, 32 connections, p50", "http-32", "p50", "µs", 1e6),
    Row("GET, 32 connections, p99", "http-32", "p99", "µs", 1e6),
    Row("GET, 32 connections, no two heads alike", "http-heads", "rate", "1000/s", 1e-3, more=True, closed=True),
    Row("GET, 256 connections", "http-256", "rate", "1000/s", 1e-3, more=True, closed=True),
    Row("GET, 256 connections, p99", "http-256", "p99", "ms", 1e3),
    *(
        Row(f"GET at {rate:,} a second, {share}", f"http-rate-{rate}", share, "µs", 1e6)
        for rate in RATES
        for share in ("p50", "p90", "p99", "p99.9")
    ),
    Row("CPU of a GET", "http-32", "cpu_per_request", "µs", 1e6),
    Row("CPU of a GET, no two heads alike", "http-heads", "cpu_per_request", "µs", 1e6),
]


def needs() -> list[str]:
    """What is not installed, without which nothing of this can be measured."""
    return load.missing("nginx", "wrk")


@contextmanager
def upstreams(folder: Path) -> Iterator[tuple[Job, Running]]:
    """An nginx that answers with 64 bytes, as one instance on the proxies' node and one on another."""
    near, other = free_port(), free_port("127.0.0.2")
    servers = "".join(
        f'server {{ listen {address}:{port} backlog=4096; location / {{ return 200 "{"x" * 64}"; }} }}\n'
        for address, port in (("127.0.0.1", near), ("127.0.0.2", other))
    )
    folder.mkdir()
    config = folder / "nginx.conf"
    config.write_text(nginx_base(folder) % "" + servers + "}\n")
    command = [load.find("nginx") or "nginx", "-c", str(config)]
    with listening(command, folder / "log", [near]) as process:
        services = {"b": [Instance("127.0.0.1", near), Instance("127.0.0.2", other, "n2")]}
        yield Job(services, http=True), Running(DIRECT, process.pid, {"b": near})


def gets(port: int, connections: int, seconds: int, *, alike: bool = True) -> Metrics:
    return of_load(load.wrk_http(port, connections, seconds, alike=alike))


def workloads(asked: argparse.Namespace) -> list[Workload]:
    """What is measured in rounds."""
    found = [
        Workload(f"http-{count}", "b", partial(gets, connections=count, seconds=asked.seconds))
        for count in CONNECTIONS[: 2 if asked.quick else None]
    ]
    found.append(Workload("http-heads", "b", partial(gets, connections=32, seconds=asked.seconds, alike=False)))
    for rate in RATES:
        run = partial(fixed_rate, payload=GET, rate=rate, seconds=asked.rate_seconds, http=True)
        found.append(Workload(f"http-rate-{rate}", "b", run))
    return found


def checks(asked: argparse.Namespace) -> list[str]:
    """How the generator of the benchmark's own compares with h2load, with no proxy between.

    h2load's clients begin together and keep the same time, so that all of them send at once, and each then waits for
    the others; for this comparison the generator does the same, and then spreads them as it does for the tables.
    """
    if missing := [*needs(), *load.missing("h2load")]:
        return [f"not checked against h2load: {', '.join(missing)}"]
    with tempfile.TemporaryDirectory(prefix="meshlocal-bench-") as folder, upstreams(Path(folder) / "up") as found:
        port = found[1].ports["b"]
        figures = [
            (
                load.h2load_rate(port, 32, 1000, 2),
                fixed_rate(port, GET, 1000, 2, http=True, together=32)["mean"],
                fixed_rate(port, GET, 1000, 2, http=True)["mean"],
            )
            for _ in range(min(asked.rounds, 2))
        ]
    theirs, ours, spread = (median(column) * 1e6 for column in zip(*figures, strict=True))
    at_once = f"h2load {theirs:.1f} µs, bench.generator {ours:.1f} µs"
    return [f"GET at 1,000 a second, mean, 32 at once: {at_once}; spread evenly: bench.generator {spread:.1f} µs"]


def measure(asked: argparse.Namespace) -> Measured:
    """Everything about HTTP; nothing if its upstream or load is missing."""
    if missing := needs():
        print(f"without HTTP: {', '.join(missing)}")
        return {}
    with tempfile.TemporaryDirectory(prefix="meshlocal-bench-") as folder, upstreams(Path(folder) / "up") as found:
        job, direct = found
        with started(present(PEERS, job), job, Path(folder)) as proxies:
            return take_turns(workloads(asked), [direct, *proxies], asked.rounds)
