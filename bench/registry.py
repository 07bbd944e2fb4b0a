"""A registry at one discovery server: the first sync, then a steady storm of changes, and what both cost.

What holds the endpoints is the registry's own part (`Registry`): an API server of the benchmark's own
(`bench.kubernetes`), or a real etcd (`bench.etcd`). One endpoint is replaced at each change, by one of a new address on
another node: from the address a watcher knows which change it sees. One client, the one that a proxy runs, watches a
few of the services and notes how late each of their changes is.
"""

from __future__ import annotations

import random
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import trio

from bench import report
from bench.machine import cpu_seconds, memory_kb
from bench.processes import free_port, running
from meshlocal.client.watch import DiscoveryWatch
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.model import ServiceChange, ServiceKey, ServiceSnapshot

NODES = 500
TICK = 0.005
"""Seconds between two sweeps of the sender: what is due by then goes out in one piece."""
WATCHED = 20
"""One service in so many is watched, whatever their number."""
LIMIT = 60.0
SYNC_GOAL = 2.0
LATE_GOAL = 0.1


def address(number: int) -> str:
    """The address of the endpoint that came with this change."""
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def number_of(address: str) -> int:
    """The change that an endpoint of this address came with."""
    _, high, middle, low = map(int, address.split("."))
    return high << 16 | middle << 8 | low


class Registry(Protocol):
    """What holds the endpoints.

    Attributes:
        services: what discovery calls its services.
        endpoints: of each of them.
    """

    services: Sequence[ServiceKey]
    endpoints: int

    async def serve(self, nursery: trio.Nursery, folder: Path) -> str:
        """Begin; what it is asked is not answered yet. Returns the source's URL."""
        ...

    def open(self) -> None:
        """Answer."""
        ...

    async def synced(self) -> dict[str, Any]:
        """Wait until it is followed; figures of its own."""
        ...

    async def send_changes(self, rate: int, seconds: float) -> dict[int, float]:
        """Replace endpoints, of each service in turn, at a rate; when each was due, by its number."""
        ...

    def numbers(self, position: int) -> Sequence[int]:
        """The changes that a service's endpoints came with."""
        ...


class _Sink:
    """A `SnapshotSink` that notes when each endpoint was first seen, by the number in its address."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}
        self.services: set[ServiceKey] = set()
        self.news = trio.Event()

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        return iter(())

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        now = trio.current_time()
        self.services.add(snapshot.service)
        for key in snapshot.instances:
            self.seen.setdefault(number_of(key.address), now)
        self.news.set()
        self.news = trio.Event()


def _metrics(admin: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{admin}/metrics", timeout=LIMIT) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (each.rpartition(" ") for each in lines if each[:1] != "#")}


async def _until(admin: int, metric: str, value: float) -> dict[str, float]:
    """Ask for the metrics until one of them has a value; of those with labels, the first of its name."""
    with trio.fail_after(LIMIT):
        while True:
            try:
                found = await trio.to_thread.run_sync(_metrics, admin)
            except OSError:
                found = {}
            if any(name.split("{")[0] == metric and number >= value for name, number in found.items()):
                return found
            await trio.sleep(0.05)


def _events(metrics: dict[str, float]) -> float:
    return sum(value for name, value in metrics.items() if name.startswith("meshlocal_source_events_total"))


class Measurement:
    """One registry, one discovery server.

    Args:
        registry: of one size.
        rate: changes a second.
        seconds: of changes.
    """

    def __init__(self, registry: Registry, rate: int, seconds: float) -> None:
        self._registry = registry
        self._rate = rate
        self._seconds = seconds
        self._sink = _Sink()
        self._watched = registry.services[::WATCHED]

    async def run(self, folder: Path) -> dict[str, Any]:
        """Everything, in order."""
        async with trio.open_nursery() as nursery:
            source = await self._registry.serve(nursery, folder)
            # Ports that are known beforehand: the line that names them waits for the sources, which wait for `open`.
            grpc, admin = free_port(), free_port()
            flags = ["--bind", f"127.0.0.1:{grpc}", "--admin", f"127.0.0.1:{admin}"]
            flags += ["--source", source, "--log-level", "error"]
            watch = DiscoveryWatch(
                [DiscoveryUrl.parse(f"grpc://127.0.0.1:{grpc}")], list(self._watched), self._sink, random.Random(1)
            )
            with running([sys.executable, "-m", "meshlocal", "discovery", *flags]) as server:
                # The watch ends before the server, which would wait for it.
                async with trio.open_nursery() as watching:
                    await _until(admin, "meshlocal_watchers", 0)
                    watching.start_soon(watch.run)
                    await _until(admin, "meshlocal_watchers", 1)
                    figures = await self._sync(server)
                    figures |= await self._changes(server, admin)
                    watching.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
        return figures

    async def _sync(self, server: subprocess.Popen[bytes]) -> dict[str, Any]:
        """From the registry's first answer to the watcher's having every service that it watches."""
        cpu, memory, start = cpu_seconds(server.pid), memory_kb(server.pid), trio.current_time()
        self._registry.open()
        with trio.fail_after(LIMIT):
            while len(self._sink.services) < len(self._watched):
                await self._sink.news.wait()
        figures = {
            "services": len(self._registry.services),
            "endpoints": len(self._registry.services) * self._registry.endpoints,
            "sync_seconds": trio.current_time() - start,
            "sync_cpu": cpu_seconds(server.pid) - cpu,
            "memory_before_kb": memory,
        }
        with trio.fail_after(LIMIT):
            figures |= await self._registry.synced()
        return figures | {"memory_kb": memory_kb(server.pid)}

    async def _changes(self, server: subprocess.Popen[bytes], admin: int) -> dict[str, Any]:
        before = await trio.to_thread.run_sync(_metrics, admin)
        cpu, start = cpu_seconds(server.pid), trio.current_time()
        due = await self._registry.send_changes(self._rate, self._seconds)
        sent = trio.current_time() - start
        after = await _until(admin, "meshlocal_source_events_total", _events(before) + len(due))
        spent = cpu_seconds(server.pid) - cpu
        watched = self._watched_numbers(due)
        with trio.fail_after(LIMIT):
            while not watched <= self._sink.seen.keys():
                await self._sink.news.wait()
        late = [self._sink.seen[number] - due[number] for number in watched]
        return {
            "changes": len(due),
            "changes_seconds": sent,
            "published": after["meshlocal_changes_total"] - before["meshlocal_changes_total"],
            "cpu_share": spent / sent,
            "cpu_per_change": spent / len(due),
            "late": {**report.percentiles(late), "last": max(late)},
            "memory_after_kb": memory_kb(server.pid),
        }

    def _watched_numbers(self, due: dict[int, float]) -> set[int]:
        """The changes that the watcher is to see: of its services, and not undone by a later one."""
        held: set[int] = set()
        for position in range(0, len(self._registry.services), WATCHED):
            held.update(self._registry.numbers(position))
        return held & due.keys()


def sync_rows(measured: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of a table of first syncs."""
    return [
        ["time until a watcher has its services, ms", *(report.milli(each["sync_seconds"]) for each in measured)],
        ["CPU, ms", *(report.milli(each["sync_cpu"]) for each in measured)],
        ["memory before, MB", *(f"{each['memory_before_kb'] / 1024:.1f}" for each in measured)],
        ["memory after, MB", *(f"{each['memory_kb'] / 1024:.1f}" for each in measured)],
    ]


def change_rows(measured: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of a table of changes."""
    late = [
        [f"a watcher has it after, {column}, ms", *(report.milli(each["late"][column]) for each in measured)]
        for column in ("p50", "p99", "last")
    ]
    return [
        ["CPU of a change, µs", *(report.micro(each["cpu_per_change"]) for each in measured)],
        ["share of a core", *(f"{each['cpu_share']:.1%}" for each in measured)],
        *late,
        ["memory after, MB", *(f"{each['memory_after_kb'] / 1024:.1f}" for each in measured)],
    ]
