"""A cluster's slices at one discovery server: the first sync, then a steady storm of changes, and what both cost.

The API server is the benchmark's own: it lists in pages and watches as the real one does, but its slices are made up,
and it speaks plain HTTP, so that no TLS of its own takes CPU from what is measured. One endpoint is replaced at each
change, by one of a new address on another node: from the address a watcher knows which change it sees. One client, the
one that a proxy runs, watches a few of the services and notes how late each of their changes is.

The same rate of changes is sent to clusters of different size: a change that cost work for more than its own service
would cost more in a larger one.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trio

from bench import report
from bench.machine import cpu_seconds, describe, memory_kb
from bench.processes import StartError, free_port, running
from meshlocal.client.watch import DiscoveryWatch
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.model import ServiceChange, ServiceKey, ServiceSnapshot

NAMESPACE = "bench"
NODES = 500
TICK = 0.005
"""Seconds between two sweeps of the sender: what is due by then goes out in one piece."""
WATCHED = 20
"""One service in so many is watched, whatever the cluster's size."""
LIMIT = 60.0
SYNC_GOAL = 2.0
LATE_GOAL = 0.1
GROWTH_GOAL = 1.25
"""How much more CPU a change may take in a cluster of five times the size."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kubernetes", description=__doc__)
    parser.add_argument("--services", type=int, default=200, help="services of the cluster [200]")
    parser.add_argument("--endpoints", type=int, default=50, help="endpoints of each service, in one slice [50]")
    parser.add_argument("--scales", default="0.1,1,5", help="clusters of this many times the size [0.1,1,5]")
    parser.add_argument("--rate", type=int, default=1000, help="changes a second [1000]")
    parser.add_argument("--seconds", type=float, default=10.0, help="of changes, for each cluster [10]")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    return parser.parse_args()


# The API server


def _address(number: int) -> str:
    """The address of the endpoint that came with this change."""
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def number_of(address: str) -> int:
    """The change that an endpoint of this address came with."""
    _, high, middle, low = map(int, address.split("."))
    return high << 16 | middle << 8 | low


class Cluster:
    """Services of one slice each, with as many endpoints each; the objects as a real API server writes them.

    Attributes:
        version: the resource version.
        events: the lines of a watch since its start.
    """

    def __init__(self, services: int, endpoints: int) -> None:
        self.names = [f"svc-{number:05}" for number in range(services)]
        self.version = services * endpoints
        self._slices = [
            [self._endpoint(name, service * endpoints + number) for number in range(endpoints)]
            for service, name in enumerate(self.names)
        ]
        self._numbers = [[service * endpoints + number for number in range(endpoints)] for service in range(services)]
        self._turn = 0

    def numbers(self, position: int) -> list[int]:
        """The changes that a slice's endpoints came with."""
        return self._numbers[position]

    def _endpoint(self, service: str, number: int) -> bytes:
        # Nothing that meshlocal reads and nothing that it skips is left out.
        endpoint = {
            "addresses": [_address(number)],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "targetRef": {
                "kind": "Pod",
                "namespace": NAMESPACE,
                "name": f"{service}-{number:08x}",
                "uid": f"{number:08x}-0000-4000-8000-000000000000",
            },
            "nodeName": f"node-{number % NODES:03}",
            "zone": f"zone-{number % 3}",
        }
        return json.dumps(endpoint, separators=(",", ":")).encode()

    def slice(self, position: int) -> bytes:
        """A slice's JSON now."""
        name = self.names[position]
        meta = {
            "name": f"{name}-x7k2p",
            "generateName": f"{name}-",
            "namespace": NAMESPACE,
            "uid": f"{position:08x}-0000-4000-8000-111111111111",
            "resourceVersion": str(self.version),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {
                "kubernetes.io/service-name": name,
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
        }
        return b'{"metadata":%s,"addressType":"IPv4","endpoints":[%s],"ports":[%s]}' % (
            json.dumps(meta, separators=(",", ":")).encode(),
            b",".join(self._slices[position]),
            b'{"name":"grpc","protocol":"TCP","port":9000}',
        )

    def change(self) -> tuple[int, bytes]:
        """Replace an endpoint, of each service in turn; the change's number, and the line that tells it."""
        round_, position = divmod(self._turn, len(self.names))
        self._turn += 1
        self.version += 1
        endpoints = self._slices[position]
        place = round_ % len(endpoints)
        endpoints[place] = self._endpoint(self.names[position], self.version)
        self._numbers[position][place] = self.version
        return self.version, b'{"type":"MODIFIED","object":%s}\n' % self.slice(position)


class ApiServer:
    """Lists and watches of one cluster. Lists wait until `opened` is set.

    Attributes:
        pages: pages of lists so far.
        watches: streams that changes go to.
        watched: set with the first of them.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.opened = trio.Event()
        self.watched = trio.Event()
        self.pages = 0
        self.watches: list[trio.SocketStream] = []

    async def handle(self, stream: trio.SocketStream) -> None:
        """One request."""
        async with stream:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                if not (data := await stream.receive_some(65536)):
                    return
                head += data
            url = urlsplit(head.split(b" ", 2)[1].decode())
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            if not url.path.endswith("/endpointslices"):
                raise StartError(f"asked for {url.path}")
            if query.get("watch") == "true":
                if query["resourceVersion"] != str(self.cluster.version):
                    raise StartError(f"a watch from {query['resourceVersion']}")
                await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                self.watches.append(stream)
                self.watched.set()
                await stream.receive_some(1)
                return
            await self.opened.wait()
            await self._list(stream, int(query["limit"]), int(query.get("continue", "0")))

    async def _list(self, stream: trio.SocketStream, limit: int, start: int) -> None:
        end = min(start + limit, len(self.cluster.names))
        meta = {"resourceVersion": str(self.cluster.version)}
        if end < len(self.cluster.names):
            meta["continue"] = str(end)
        items = b",".join(self.cluster.slice(position) for position in range(start, end))
        body = b'{"kind":"EndpointSliceList","metadata":%s,"items":[%s]}' % (json.dumps(meta).encode(), items)
        self.pages += 1
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    async def send_changes(self, rate: int, seconds: float) -> dict[int, float]:
        """Send changes at a rate; when each was due, by its number."""
        (watch,) = self.watches
        due: dict[int, float] = {}
        start = trio.current_time()
        while len(due) < rate * seconds:
            await trio.sleep_until(start + (len(due) + 1) / rate)
            chunks = []
            while (at := start + len(due) / rate) <= trio.current_time() and len(due) < rate * seconds:
                number, line = self.cluster.change()
                due[number] = at
                chunks.append(b"%x\r\n%s\r\n" % (len(line), line))
            await watch.send_all(b"".join(chunks))
            await trio.sleep(TICK)
        return due


# The measurement


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
    """One cluster, one discovery server.

    Args:
        services: of the cluster.
        asked: the rest.
    """

    def __init__(self, services: int, asked: argparse.Namespace) -> None:
        self._asked = asked
        self._cluster = Cluster(services, asked.endpoints)
        self._api = ApiServer(self._cluster)
        self._sink = _Sink()
        self._watched = [ServiceKey(f"{name}.{NAMESPACE}") for name in self._cluster.names[::WATCHED]]

    async def run(self, folder: Path) -> dict[str, Any]:
        """Everything, in order."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        config = folder / "kubeconfig"
        config.write_text(
            "{current-context: x, contexts: [{name: x, context: {cluster: c}}], clusters: [{name: c, cluster:"
            f" {{server: 'http://127.0.0.1:{listeners[0].socket.getsockname()[1]}'}}}}]}}"
        )
        # Ports that are known beforehand: the line that names them waits for the sources, which wait for `opened`.
        grpc, admin = free_port(), free_port()
        flags = ["--bind", f"127.0.0.1:{grpc}", "--admin", f"127.0.0.1:{admin}"]
        flags += ["--source", f"kubernetes:?kubeconfig={config}&nodes=no", "--log-level", "error"]
        watch = DiscoveryWatch(
            [DiscoveryUrl.parse(f"grpc://127.0.0.1:{grpc}")], self._watched, self._sink, random.Random(1)
        )
        with running([sys.executable, "-m", "meshlocal", "discovery", *flags]) as server:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, self._api.handle, listeners)
                await _until(admin, "meshlocal_watchers", 0)
                nursery.start_soon(watch.run)
                await _until(admin, "meshlocal_watchers", 1)
                figures = await self._sync(server)
                figures |= await self._changes(server, admin)
                nursery.cancel_scope.cancel()
        return figures

    async def _sync(self, server: subprocess.Popen[bytes]) -> dict[str, Any]:
        """From the first list's answer to the watcher's having every service that it watches."""
        cpu, memory, start = cpu_seconds(server.pid), memory_kb(server.pid), trio.current_time()
        self._api.opened.set()
        with trio.fail_after(LIMIT):
            while len(self._sink.services) < len(self._watched):
                await self._sink.news.wait()
        figures = {
            "services": len(self._cluster.names),
            "endpoints": len(self._cluster.names) * self._asked.endpoints,
            "sync_seconds": trio.current_time() - start,
            "sync_cpu": cpu_seconds(server.pid) - cpu,
            "pages": self._api.pages,
            "memory_before_kb": memory,
        }
        with trio.fail_after(LIMIT):
            await self._api.watched.wait()
        return figures | {"memory_kb": memory_kb(server.pid)}

    async def _changes(self, server: subprocess.Popen[bytes], admin: int) -> dict[str, Any]:
        before = await trio.to_thread.run_sync(_metrics, admin)
        cpu, start = cpu_seconds(server.pid), trio.current_time()
        due = await self._api.send_changes(self._asked.rate, self._asked.seconds)
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
        """The changes that the watcher is to see: of its services, and not undone by a later one of the same slice."""
        held: set[int] = set()
        for position, name in enumerate(self._cluster.names):
            if f"{name}.{NAMESPACE}" in self._watched:
                held.update(self._cluster.numbers(position))
        return held & due.keys()


def _scales(text: str) -> Iterator[float]:
    for each in text.split(","):
        yield float(each)


def main() -> None:
    asked = options()
    machine = describe()
    report.heading("A cluster's endpoints", machine)
    clusters = []
    for scale in _scales(asked.scales):
        with tempfile.TemporaryDirectory(prefix="meshlocal-bench-") as folder:
            clusters.append(trio.run(Measurement(max(1, round(asked.services * scale)), asked).run, Path(folder)))
    print(report.table(["First sync", *(f"{each['endpoints']} endpoints" for each in clusters)], _sync_rows(clusters)))
    print()
    title = f"{asked.rate} changes a second"
    print(report.table([title, *(f"{each['services']} services" for each in clusters)], _change_rows(clusters)))
    print()
    figures = {"rate": asked.rate, "endpoints_per_service": asked.endpoints, "clusters": clusters}
    report.write("kubernetes", machine, {**figures, "goals": _goals(asked, clusters)}, asked.output)


def _sync_rows(clusters: list[dict[str, Any]]) -> list[list[str]]:
    return [
        ["time until a watcher has its services, ms", *(report.milli(each["sync_seconds"]) for each in clusters)],
        ["CPU, ms", *(report.milli(each["sync_cpu"]) for each in clusters)],
        ["memory before, MB", *(f"{each['memory_before_kb'] / 1024:.1f}" for each in clusters)],
        ["memory after, MB", *(f"{each['memory_kb'] / 1024:.1f}" for each in clusters)],
    ]


def _change_rows(clusters: list[dict[str, Any]]) -> list[list[str]]:
    late = [
        [f"a watcher has it after, {column}, ms", *(report.milli(each["late"][column]) for each in clusters)]
        for column in ("p50", "p99", "last")
    ]
    return [
        ["CPU of a change, µs", *(report.micro(each["cpu_per_change"]) for each in clusters)],
        ["share of a core", *(f"{each['cpu_share']:.1%}" for each in clusters)],
        *late,
        ["memory after, MB", *(f"{each['memory_after_kb'] / 1024:.1f}" for each in clusters)],
    ]


def _goals(asked: argparse.Namespace, clusters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    main_ = min(clusters, key=lambda each: abs(each["services"] - asked.services))
    largest = max(clusters, key=lambda each: int(each["services"]))
    count = f"{main_['endpoints']} endpoints"
    growth = largest["cpu_per_change"] / main_["cpu_per_change"]
    what = f"CPU of a change at {largest['services']} services, over that at {main_['services']}"
    return [
        report.verdict(f"first sync of {count}", main_["sync_seconds"], SYNC_GOAL, " s"),
        report.verdict(f"p99 of a change's way to a watcher, {count}", main_["late"]["p99"], LATE_GOAL, " s"),
        report.verdict(what, growth, GROWTH_GOAL),
    ]


if __name__ == "__main__":
    main()
