"""A discovery server sends everything to everybody: thousands of readers get a large service whole, when they come and
after a restart with something new. Readers do nothing else than read: what is measured is the server.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import trio

from bench import report
from bench.machine import cpu_seconds, describe, memory_kb, raise_file_limit
from bench.processes import StartError, free_port, meshlocal, ready_line, running
from bench.restart import Sampler
from bench.watchers import B, write_instances
from meshlocal.client.links import open_link
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.backoff import Backoff
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.wire.discovery_methods import WATCH_INSTANCES
from meshlocal.wire.grpc.status import GrpcError
from meshlocal.wire.pb import discovery_pb2 as pb

LIMIT = 300.0
MEMORY_GOAL_MB = 100
SPREAD = 2.0
"""Seconds over which readers come at first."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.resend", description=__doc__)
    parser.add_argument("--watchers", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2, help="processes that hold them [2]")
    parser.add_argument("--instances", type=int, default=2000, help="instances of the service [2000]")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    # One of the processes that hold readers:
    parser.add_argument("--hold", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    return parser.parse_args()


class Readers:
    """The readers of one process. Prints one line once all have the service whole, and again after each reconnect.

    Args:
        url: the discovery server.
        count: how many.
    """

    def __init__(self, url: str, count: int) -> None:
        self._url = DiscoveryUrl.parse(url)
        self._count = count
        self._rng = random.Random(count)
        self._arrived: list[int] = []

    async def run(self) -> None:
        """Read until cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(self._count):
                nursery.start_soon(self._read_again)

    async def _read_again(self) -> None:
        backoff = Backoff(0.2, 5.0, self._rng, least=0.0)
        await trio.sleep(self._rng.uniform(0, SPREAD))
        while True:
            try:
                async with open_link(self._url, DiscoveryClientConfig()) as link:
                    request = pb.WatchInstancesRequest(subscriptions=[pb.Subscription(service=B)])
                    async with link.watch(WATCH_INSTANCES, request) as events:
                        while (event := await events.receive()) is not None:
                            if event.HasField("snapshot"):
                                backoff.reset()
                                self._have()
            except (GrpcError, OSError):
                pass
            await trio.sleep(backoff.next())

    def _have(self) -> None:
        self._arrived.append(time.time_ns())
        if len(self._arrived) == self._count:
            print(json.dumps(self._arrived), flush=True)
            self._arrived = []


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-"))) / "instances.yaml"
        write_instances(file, asked.instances, 0)
        port = free_port()
        flags = ["--bind", f"127.0.0.1:{port}", "--source", f"file:{file}"]
        server, _ = stack.enter_context(meshlocal("discovery", *flags))
        idle = memory_kb(server.pid)
        sampler = Sampler(server.pid)
        sampler.start()
        began = time.time_ns()
        holders = []
        for number in range(asked.processes):
            share = asked.watchers // asked.processes + (number < asked.watchers % asked.processes)
            command = [sys.executable, "-m", "bench.resend", "--hold", str(share), "--url", f"grpc://127.0.0.1:{port}"]
            holders.append(stack.enter_context(running(command, log=stack.enter_context(open("/dev/null")).fileno())))
        first = _all_have(holders, asked.watchers, began)
        first |= _taken(sampler, server.pid, idle)
        server.kill()
        server.wait()
        write_instances(file, asked.instances, 1)
        server, _ = stack.enter_context(meshlocal("discovery", *flags))
        began = time.time_ns()
        sampler = Sampler(server.pid)
        sampler.start()
        again = _all_have(holders, asked.watchers, began)
        again |= _taken(sampler, server.pid, idle)
        return {
            "watchers": asked.watchers,
            "processes": asked.processes,
            "instances": asked.instances,
            "memory_idle_kb": idle,
            "first": first,
            "again": again,
        }


def _all_have(holders: list[Any], count: int, began: int) -> dict[str, Any]:
    arrived = [one for holder in holders for one in json.loads(ready_line(holder, LIMIT))]
    if len(arrived) != count:
        raise StartError(f"{len(arrived)} readers of {count} have the service")
    times = sorted((one - began) / 1e9 for one in arrived)
    return {**report.percentiles(times), "last": times[-1]}


def _taken(sampler: Sampler, pid: int, idle: int) -> dict[str, Any]:
    cpu = cpu_seconds(pid)
    sampler.stop()
    return {"cpu_seconds": cpu, "memory_peak_over_idle_kb": sampler.memory_peak_kb - idle}


def main() -> None:
    asked = options()
    raise_file_limit()
    if asked.hold:
        trio.run(Readers(asked.url, asked.hold).run)
        return
    machine = describe()
    report.heading("A discovery server sends everything to everybody", machine)
    figures = measure(asked)
    rows = [
        [
            name,
            *(f"{figures[key][one]:.2f}" for one in ("p50", "p99", "last")),
            f"{figures[key]['cpu_seconds']:.1f}",
            f"{figures[key]['memory_peak_over_idle_kb'] / 1024:.0f}",
        ]
        for name, key in (("when they come", "first"), ("after a restart", "again"))
    ]
    title = f"{asked.watchers} readers have {asked.instances} instances after, s"
    print(report.table([title, "p50", "p99", "last", "CPU, s", "MB over idle, most"], rows))
    print()
    most = max(figures[key]["memory_peak_over_idle_kb"] for key in ("first", "again")) / 1024
    figures["verdicts"] = [report.verdict("memory over idle", most, MEMORY_GOAL_MB, " MB")]
    report.write("resend", machine, figures, asked.output)


if __name__ == "__main__":
    main()
