"""One discovery server and thousands of watchers: how soon a change reaches the last of them, and what that costs.

Every watcher is the client that a proxy runs (`meshlocal.client.watch`), over a TCP connection of its own; a few
processes hold them. Watchers and server share this machine, so most of the time that a change takes here is the
watchers' own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import trio

from bench import report
from bench.machine import cpu_seconds, describe, memory_kb, raise_file_limit
from bench.processes import START_LIMIT, StartError, meshlocal, port_in, ready_line, running
from meshlocal.client.watch import DiscoveryWatch
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.model import ServiceChange, ServiceKey, ServiceSnapshot

B = ServiceKey("b")
CONNECTING = 50
"""Watchers of one process that connect at the same time."""

CHANGE_LIMIT = 60.0
PORT = r"grpc://127\.0\.0\.1:(\d+)"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.watchers", description=__doc__)
    parser.add_argument("--watchers", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2, help="processes that hold them [2]")
    parser.add_argument("--below", type=int, default=0, help="servers that follow the one, and serve the watchers [0]")
    parser.add_argument("--instances", type=int, default=100, help="instances of the service [100]")
    parser.add_argument("--changes", type=int, default=10, help="changes of one instance, one after another [10]")
    parser.add_argument("--idle", type=float, default=15.0, help="seconds in which nothing changes [15]")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    # One of the processes that hold watchers:
    parser.add_argument("--hold", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    return parser.parse_args()


class Holder:
    """The watchers of one process. Prints one line once all hold a snapshot, and one for each change once all have it.

    Args:
        url: the discovery server.
        count: how many.
    """

    def __init__(self, url: str, count: int) -> None:
        self._url = DiscoveryUrl.parse(url)
        self._count = count
        self._arrived: dict[str, list[int]] = defaultdict(list)
        self._connecting = trio.CapacityLimiter(CONNECTING)
        self.watches: list[DiscoveryWatch] = []

    async def run(self) -> None:
        """Watch until cancelled."""
        async with trio.open_nursery() as nursery:
            for number in range(self._count):
                await self._connecting.acquire_on_behalf_of(number)
                watch = DiscoveryWatch([self._url], [B], _Sink(self, number), random.Random(number))
                self.watches.append(watch)
                nursery.start_soon(watch.run)

    def arrived(self, number: int, snapshot: ServiceSnapshot, *, first: bool) -> None:
        """A watcher has applied a snapshot."""
        now = time.time_ns()
        if first:
            self._connecting.release_on_behalf_of(number)
        times = self._arrived[snapshot.version]
        times.append(now)
        if len(times) == self._count:
            print(json.dumps(times), flush=True)


class _Sink:
    """A `SnapshotSink`."""

    __slots__ = ("_first", "_holder", "_number")

    def __init__(self, holder: Holder, number: int) -> None:
        self._holder = holder
        self._number = number
        self._first = True

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        return iter(())

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        self._holder.arrived(self._number, snapshot, first=self._first)
        self._first = False


def published(log: Path) -> list[int]:
    """When the server published each change so far, in ns since the epoch, rounded down to a millisecond.

    Its log says so in the same step, before any watcher is sent anything.
    """
    times = []
    for line in log.read_text().splitlines():
        record = json.loads(line)
        if record["event"] == "instances file read again":
            times.append(round(datetime.fromisoformat(record["ts"]).timestamp() * 1000) * 1_000_000)
        elif record["level"] != "info":
            print(line, file=sys.stderr)
    return times


def write_instances(path: Path, count: int, change: int) -> None:
    """The service, with one label of one instance different after each change."""
    lines = ["services:", "  b:"]
    for number in range(count):
        labels = f"node: n{number}, build: '{change if not number else 0}'"
        lines.append(f"    - {{address: 10.0.{number >> 8}.{number & 255}, port: 9000, labels: {{{labels}}}}}")
    draft = path.with_suffix(".new")
    draft.write_text("\n".join(lines) + "\n")
    os.replace(draft, path)


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "watchers": asked.watchers,
        "instances": asked.instances,
        "changes": asked.changes,
        "processes": asked.processes,
        "below": asked.below,
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-")))
        file = folder / "instances.yaml"
        write_instances(file, asked.instances, 0)
        log = folder / "log"
        sink = stack.enter_context(log.open("wb"))
        flags = ["--bind", "127.0.0.1:0", "--source", f"file:{file}", "--log-level", "info", "--log-format", "json"]
        server, line = stack.enter_context(meshlocal("discovery", *flags, log=sink.fileno()))
        urls = [f"grpc://127.0.0.1:{port_in(line, PORT)}"]
        servers = [server]
        if asked.below:
            flags = ["--bind", "127.0.0.1:0", "--source", f"meshlocal:{urls[0]}"]
            made = [stack.enter_context(meshlocal("discovery", *flags)) for _ in range(asked.below)]
            servers = [process for process, _ in made]
            urls = [f"grpc://127.0.0.1:{port_in(line, PORT)}" for _, line in made]
        memory, cpu = _memory(servers), _cpu(servers)
        figures["server_memory_idle_kb"] = memory / len(servers)

        start = time.monotonic()
        holders = []
        for number in range(asked.processes):
            share = asked.watchers // asked.processes + (number < asked.watchers % asked.processes)
            command = [sys.executable, "-m", "bench.watchers", "--hold", str(share), "--url", urls[number % len(urls)]]
            holders.append(stack.enter_context(running(command)))
        for holder in holders:
            ready_line(holder, START_LIMIT + asked.watchers / 50)
        figures["connect_seconds"] = time.monotonic() - start
        figures["connect_cpu_per_watcher"] = (_cpu(servers) - cpu) / asked.watchers
        time.sleep(1)
        figures["memory_per_watcher_kb"] = (_memory(servers) - memory) / asked.watchers

        cpu = _cpu(servers)
        time.sleep(asked.idle)
        figures["idle_cpu_share"] = (_cpu(servers) - cpu) / asked.idle

        followed = cpu_seconds(server.pid)
        figures["each_change"] = [
            one_change(servers, holders, log, file, asked, number) for number in range(asked.changes)
        ]
        if asked.below:
            figures["followed_cpu_per_change"] = (cpu_seconds(server.pid) - followed) / asked.changes
        figures["server_memory_after_kb"] = _memory(servers) / len(servers)
    return figures


def _cpu(servers: list[subprocess.Popen[bytes]]) -> float:
    return sum(cpu_seconds(each.pid) for each in servers)


def _memory(servers: list[subprocess.Popen[bytes]]) -> int:
    return sum(memory_kb(each.pid) for each in servers)


def one_change(
    servers: list[subprocess.Popen[bytes]],
    holders: list[subprocess.Popen[bytes]],
    log: Path,
    file: Path,
    asked: argparse.Namespace,
    number: int,
) -> dict[str, float]:
    """Change one instance, and see when each watcher has it, in seconds from when the server published it."""
    cpu = _cpu(servers)
    write_instances(file, asked.instances, number + 1)
    arrived = [one for holder in holders for one in json.loads(ready_line(holder, CHANGE_LIMIT))]
    if len(arrived) != asked.watchers:
        raise StartError(f"{len(arrived)} watchers of {asked.watchers} have the change")
    at = published(log)[number]
    times = [(one - at) / 1e9 for one in arrived]
    spent = _cpu(servers) - cpu
    return {"first": min(times), **report.percentiles(times), "last": max(times), "server_cpu": spent}


def over_changes(rounds: list[dict[str, float]], title: str) -> dict[str, dict[str, float]]:
    """The median and the worst of several changes, which are printed as well."""
    columns = ("first", "p50", "p99", "last")
    overall = {column: median(each[column] for each in rounds) for column in columns}
    worst = {column: max(each[column] for each in rounds) for column in columns}
    rows = [
        [f"median of {len(rounds)} changes", *(report.milli(overall[column]) for column in columns)],
        ["worst change", *(report.milli(worst[column]) for column in columns)],
    ]
    print(report.table([title, *columns], rows), end="\n\n")
    return {"median": overall, "worst": worst}


def main() -> None:
    asked = options()
    raise_file_limit()
    if asked.hold:
        trio.run(Holder(asked.url, asked.hold).run)
        return
    machine = describe()
    report.heading("Watchers of one discovery server", machine)
    figures = measure(asked)
    rounds = figures["each_change"]
    figures |= over_changes(rounds, f"{asked.watchers} watchers have a change after, ms")
    spent = median(each["server_cpu"] for each in rounds)
    per_watcher = spent / asked.watchers
    figures["server_cpu_per_change"] = spent
    rows = [
        ["CPU of one change, in all", f"{spent * 1e3:.0f} ms"],
        ["CPU of one change, per watcher", f"{per_watcher * 1e6:.0f} µs"],
        ["CPU of a watcher's arrival", f"{figures['connect_cpu_per_watcher'] * 1e6:.0f} µs"],
        ["CPU while nothing changes", f"{figures['idle_cpu_share']:.1%} of a core"],
        [
            "memory before the first watcher, each" if asked.below else "memory before the first watcher",
            f"{figures['server_memory_idle_kb'] / 1024:.1f} MB",
        ],
        ["memory per watcher", f"{figures['memory_per_watcher_kb']:.1f} KB"],
    ]
    if asked.below:
        followed = figures["followed_cpu_per_change"]
        rows.append(["CPU of one change, of the server that is followed", f"{followed * 1e3:.0f} ms"])
    print(report.table([f"The {asked.below} servers below, together" if asked.below else "The server", ""], rows))
    report.write("watchers-below" if asked.below else "watchers", machine, figures, asked.output)


if __name__ == "__main__":
    main()
