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
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trio

from bench import report
from bench.machine import describe
from bench.processes import StartError
from bench.registry import LATE_GOAL, NODES, SYNC_GOAL, TICK, Measurement, address, change_rows, sync_rows
from meshlocal.policy.model import ServiceKey

NAMESPACE = "bench"
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
            "addresses": [address(number)],
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
        self.services: Sequence[ServiceKey] = [ServiceKey(f"{name}.{NAMESPACE}") for name in cluster.names]
        self.endpoints = len(cluster.numbers(0))
        self.opened = trio.Event()
        self.watched = trio.Event()
        self.pages = 0
        self.watches: list[trio.SocketStream] = []

    async def serve(self, nursery: trio.Nursery, folder: Path) -> str:
        """See `bench.registry.Registry`."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, self.handle, listeners)
        config = folder / "kubeconfig"
        config.write_text(
            "{current-context: x, contexts: [{name: x, context: {cluster: c}}], clusters: [{name: c, cluster:"
            f" {{server: 'http://127.0.0.1:{listeners[0].socket.getsockname()[1]}'}}}}]}}"
        )
        return f"kubernetes:?kubeconfig={config}&nodes=no"

    def open(self) -> None:
        """See `bench.registry.Registry`."""
        self.opened.set()

    async def synced(self) -> dict[str, Any]:
        """See `bench.registry.Registry`."""
        await self.watched.wait()
        return {"pages": self.pages}

    def numbers(self, position: int) -> Sequence[int]:
        """See `bench.registry.Registry`."""
        return self.cluster.numbers(position)

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


def _scales(text: str) -> Iterator[float]:
    for each in text.split(","):
        yield float(each)


def main() -> None:
    asked = options()
    machine = describe()
    report.heading("A cluster's endpoints", machine)
    clusters = []
    for scale in _scales(asked.scales):
        cluster = Cluster(max(1, round(asked.services * scale)), asked.endpoints)
        with tempfile.TemporaryDirectory(prefix="meshlocal-bench-") as folder:
            clusters.append(trio.run(Measurement(ApiServer(cluster), asked.rate, asked.seconds).run, Path(folder)))
    print(report.table(["First sync", *(f"{each['endpoints']} endpoints" for each in clusters)], sync_rows(clusters)))
    print()
    title = f"{asked.rate} changes a second"
    print(report.table([title, *(f"{each['services']} services" for each in clusters)], change_rows(clusters)))
    print()
    figures = {"rate": asked.rate, "endpoints_per_service": asked.endpoints, "clusters": clusters}
    report.write("kubernetes", machine, {**figures, "goals": _goals(asked, clusters)}, asked.output)


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
