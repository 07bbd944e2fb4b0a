"""One discovery server and hundreds of xDS clients: how soon a change reaches the last of them, and what that costs.

Every client has a TCP connection of its own, and subscribes to every service as a gRPC client does that has a channel
to each: to its listener, route, cluster and endpoints. A few processes hold them; they answer each response
and read nothing of it but whether the change is in it. Clients and server share this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import trio

from bench import report
from bench.machine import cpu_seconds, describe, memory_kb, raise_file_limit
from bench.processes import START_LIMIT, StartError, free_port, meshlocal, ready_line, running
from bench.watchers import CHANGE_LIMIT, over_changes, published
from meshlocal.net.grpc.client import open_channel
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.wire.grpc.status import GrpcError
from meshlocal.wire.pb import envoy_core_pb2 as core_pb
from meshlocal.wire.pb import envoy_discovery_pb2 as pb
from meshlocal.wire.xds import STREAM, ResourceType

CONNECTING = 25
"""Clients of one process that connect at the same time."""

RETRY = 1.0
"""Seconds from one attempt of a client to connect again to the next; gRPC's first backoff."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.xds", description=__doc__)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--services", type=int, default=200)
    parser.add_argument("--instances", type=int, default=50, help="instances of each service [50]")
    parser.add_argument("--nodes", type=int, default=100, help="nodes that clients and instances are on [100]")
    parser.add_argument("--processes", type=int, default=2, help="processes that hold the clients [2]")
    parser.add_argument("--changes", type=int, default=10, help="changes of one instance, one after another [10]")
    parser.add_argument("--idle", type=float, default=15.0, help="seconds in which nothing changes [15]")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    # One of the processes that hold clients: which ones.
    parser.add_argument("--hold", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _name(service: int) -> str:
    return f"service-{service}"


def changed_address(change: int) -> str:
    """The address that an instance has since a change."""
    return f"10.200.{change >> 8}.{change & 255}"


def write_instances(path: Path, asked: argparse.Namespace, change: int) -> None:
    """All services; the first one's first instance has another address after each change."""
    services = {}
    for service in range(asked.services):
        services[_name(service)] = [
            {
                "address": f"10.{service}.{number >> 8}.{number & 255}",
                "port": 9000,
                "labels": {"node": f"n{(service + number) % asked.nodes}", "zone": f"z{number % 3}"},
            }
            for number in range(asked.instances)
        ]
    services[_name(0)][0]["address"] = changed_address(change)
    draft = path.with_suffix(".new")
    # JSON is YAML too, of one line.
    draft.write_text(json.dumps({"services": services}))
    os.replace(draft, path)


class Holder:
    """The clients of one process. It prints a line once each has all endpoints, and one for each change once all have
    it, whether it came by itself or with everything else, to clients that were connected again.
    """

    def __init__(self, asked: argparse.Namespace) -> None:
        self._asked = asked
        self._first, self._count = asked.hold
        self._connecting = trio.CapacityLimiter(CONNECTING)
        self._names = [_name(service) for service in range(asked.services)]
        self._arrived: dict[int, list[int]] = defaultdict(list)
        self._changes: dict[int, int] = defaultdict(int)
        """By client, the change that it waits for."""
        self._wanted: dict[int, bytes] = {}

    async def run(self) -> None:
        """Follow until cancelled."""
        async with trio.open_nursery() as nursery:
            for number in range(self._first, self._first + self._count):
                nursery.start_soon(self._client, number)

    async def _client(self, number: int) -> None:
        while True:
            try:
                async with self._connecting:
                    opened = open_channel("127.0.0.1", self._asked.port, options=GrpcOptions(max_message_size=1 << 26))
                    channel = await opened.__aenter__()
                try:
                    async with channel.call(STREAM) as call:
                        await self._follow(number, call)
                finally:
                    await opened.__aexit__(None, None, None)
            except GrpcError:
                await trio.sleep(RETRY)

    async def _follow(self, number: int, call: Any) -> None:
        node = core_pb.Node(id=f"client-{number}")
        node.locality.sub_zone, node.locality.zone = f"n{number % self._asked.nodes}", "z0"
        for kind in (ResourceType.LISTENER, ResourceType.ROUTE, ResourceType.CLUSTER, ResourceType.ENDPOINTS):
            await call.send(pb.DiscoveryRequest(node=node, type_url=kind.url, resource_names=self._names))
        left = len(self._names)
        while True:
            response = await call.receive()
            if response is None:
                return
            answer = pb.DiscoveryRequest(
                type_url=response.type_url,
                resource_names=self._names,
                version_info=response.version_info,
                response_nonce=response.nonce,
            )
            await call.send(answer)
            if response.type_url != ResourceType.ENDPOINTS.url:
                continue
            if left > 0:
                left -= len(response.resources)
                if left <= 0:
                    self._note(number)
            elif any(self._wanted[number] in each.value for each in response.resources):
                self._note(number)

    def _note(self, number: int) -> None:
        """A client has the change that it waited for."""
        change = self._changes[number]
        self._changes[number] += 1
        self._wanted[number] = changed_address(change + 1).encode()
        times = self._arrived[change]
        times.append(time.time_ns())
        if len(times) == self._count:
            print(json.dumps(times), flush=True)


def _arrived(holders: list[subprocess.Popen[bytes]], asked: argparse.Namespace, limit: float) -> list[int]:
    arrived = [one for holder in holders for one in json.loads(ready_line(holder, limit))]
    if len(arrived) != asked.clients:
        raise StartError(f"{len(arrived)} clients of {asked.clients} have it")
    return arrived


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    names = ("clients", "services", "instances", "nodes", "changes", "processes")
    figures: dict[str, Any] = {name: getattr(asked, name) for name in names}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-")))
        file, log, port = folder / "instances.yaml", folder / "log", free_port()
        write_instances(file, asked, -1 & 255)
        sink = stack.enter_context(log.open("wb"))
        flags = ["--bind", "127.0.0.1:0", "--xds", f"127.0.0.1:{port}", "--source", f"file:{file}"]
        flags += ["--log-level", "info", "--log-format", "json"]
        server, _ = stack.enter_context(meshlocal("discovery", *flags, log=sink.fileno()))
        # What a change costs without clients: the file is read whole.
        cpu, read = cpu_seconds(server.pid), len(published(log))
        write_instances(file, asked, 0)
        end = time.monotonic() + CHANGE_LIMIT
        while len(published(log)) == read and time.monotonic() < end:
            time.sleep(0.05)
        reading = cpu_seconds(server.pid) - cpu
        memory, cpu = memory_kb(server.pid), cpu_seconds(server.pid)
        figures |= {"server_memory_idle_kb": memory, "reading_cpu": reading}

        start = time.monotonic()
        holders = []
        for number in range(asked.processes):
            first, after = (asked.clients * each // asked.processes for each in (number, number + 1))
            command = [sys.executable, "-m", "bench.xds", "--hold", str(first), str(after - first), "--port", str(port)]
            command += ["--services", str(asked.services), "--nodes", str(asked.nodes)]
            holders.append(stack.enter_context(running(command)))
        _arrived(holders, asked, START_LIMIT + asked.clients)
        figures["connect_seconds"] = time.monotonic() - start
        figures["connect_cpu_per_client"] = (cpu_seconds(server.pid) - cpu) / asked.clients
        time.sleep(1)
        figures["memory_per_client_kb"] = (memory_kb(server.pid) - memory) / asked.clients

        cpu = cpu_seconds(server.pid)
        time.sleep(asked.idle)
        figures["idle_cpu_share"] = (cpu_seconds(server.pid) - cpu) / asked.idle

        figures["each_change"] = []
        for change in range(1, asked.changes + 1):
            cpu, told = cpu_seconds(server.pid), len(published(log))
            write_instances(file, asked, change)
            arrived = _arrived(holders, asked, CHANGE_LIMIT)
            at = published(log)[told]
            times = [(one - at) / 1e9 for one in arrived]
            spent = cpu_seconds(server.pid) - cpu
            figures["each_change"].append(
                {"first": min(times), **report.percentiles(times), "last": max(times), "server_cpu": spent}
            )
        figures["server_memory_after_kb"] = memory_kb(server.pid)

        server.send_signal(signal.SIGKILL)
        server.wait()
        write_instances(file, asked, asked.changes + 1)
        began = time.time_ns()
        again, _ = stack.enter_context(meshlocal("discovery", *flags, log=sink.fileno()))
        ready = time.time_ns()
        arrived = _arrived(holders, asked, START_LIMIT + asked.clients)
        figures["restart"] = {
            "ready_after": (ready - began) / 1e9,
            "last_after_ready": (max(arrived) - ready) / 1e9,
            "server_cpu": cpu_seconds(again.pid),
            "server_memory_kb": memory_kb(again.pid),
        }
    return figures


def main() -> None:
    asked = options()
    raise_file_limit()
    if asked.hold:
        trio.run(Holder(asked).run)
        return
    machine = describe()
    report.heading("xDS clients of one discovery server", machine)
    figures = measure(asked)
    rounds = figures["each_change"]
    figures |= over_changes(rounds, f"{asked.clients} clients of {asked.services} services have a change after, ms")
    spent = median(each["server_cpu"] for each in rounds) - figures["reading_cpu"]
    figures["server_cpu_per_change"] = spent
    restart = figures["restart"]
    rows = [
        ["CPU of one change, beside the reading of the file", f"{spent * 1e3:.0f} ms"],
        ["CPU of one change, per client", f"{spent / asked.clients * 1e6:.0f} µs"],
        ["CPU of a client's arrival", f"{figures['connect_cpu_per_client'] * 1e3:.1f} ms"],
        ["CPU while nothing changes", f"{figures['idle_cpu_share']:.1%} of a core"],
        ["memory before the first client", f"{figures['server_memory_idle_kb'] / 1024:.1f} MB"],
        ["memory per client", f"{figures['memory_per_client_kb']:.0f} KB"],
        ["restarted: the last client has all, after it is ready", f"{restart['last_after_ready']:.1f} s"],
        ["restarted: CPU until then", f"{restart['server_cpu']:.1f} s"],
    ]
    print(report.table(["The server", ""], rows))
    report.write("xds", machine, figures, asked.output)


if __name__ == "__main__":
    main()
