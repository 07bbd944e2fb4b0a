"""Many services: a proxy that follows 1,000 of them, with 100,000 instances, and is sent all of it anew under load.

The discovery server is the benchmark's own, over states that it makes at its start. It is killed, and another begins at
its port that knows other instances of every service: so the proxy is told all of it, and has to change each of its
pickers, while 1,000 exchanges a second go on at one listener.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import trio

from bench import report
from bench.machine import cpu_seconds, describe, memory_kb, raise_file_limit
from bench.peers import OWN_NODE
from bench.processes import free_port, meshlocal, module, port_in, ready_line, running
from bench.rounds import Metrics, fixed_rate
from meshlocal.discovery.hub import Hub
from meshlocal.discovery.service import DiscoveryService
from meshlocal.discovery.source import Instances, Publisher
from meshlocal.net.grpc.server import GrpcServer
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.policy.model import ServiceKey, index, make_instance

RATE = 1000
NODES = 500
GOAL = 0.005
POLL = 0.05
LIMIT = 120.0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.services", description=__doc__)
    parser.add_argument("--services", type=int, default=1000)
    parser.add_argument("--instances", type=int, default=100, help="of each service [100]")
    parser.add_argument("--seconds", type=float, default=20.0, help="of load, quiet and through the resync [20]")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    parser.add_argument("--serve", type=int, nargs=3, metavar=("PORT", "ECHO", "STATE"), help=argparse.SUPPRESS)
    return parser.parse_args()


class _Source:
    """A `Source` that says one thing."""

    name = "bench"

    def __init__(self, services: dict[ServiceKey, Instances]) -> None:
        self._services = services

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        publisher.replace(self._services)
        task_status.started()
        await trio.sleep_forever()


def _services(echo: int, services: int, count: int, state: int) -> dict[ServiceKey, Instances]:
    """Each has one instance on the proxy's node; the others have other addresses in each state."""
    found: dict[ServiceKey, Instances] = {}
    for number in range(services):
        others = (
            make_instance(f"10.{state}.{number >> 8}.{number & 255}", 9000 + each, "", {"node": f"n{each % NODES + 2}"})
            for each in range(1, count)
        )
        found[ServiceKey(f"s{number}")] = index([make_instance("127.0.0.1", echo, "", {"node": OWN_NODE}), *others])
    return found


async def serve(asked: argparse.Namespace) -> None:
    """Serve one state at a port."""
    port, echo, state = asked.serve
    hub = Hub([_Source(_services(echo, asked.services, asked.instances, state))], random.Random(1))
    service = DiscoveryService(hub, 5.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(hub.run)
        await hub.wait_in_sync()
        await nursery.start(GrpcServer(service.handlers()).serve, open_tcp_listeners("127.0.0.1", port))
        print(port, flush=True)


def _server(asked: argparse.Namespace, port: int, echo: int, state: int) -> list[str]:
    flags = ["--services", str(asked.services), "--instances", str(asked.instances)]
    return [sys.executable, "-m", "bench.services", "--serve", str(port), str(echo), str(state), *flags]


class Proxied:
    """The proxy, and what it knows.

    Attributes:
        pid: its process.
        port: of the listener that the load goes to.
        admin: of its pages.
        memory: bytes resident, with nothing known yet.
    """

    def __init__(self, pid: int, port: int, admin: int, memory: int) -> None:
        self.pid = pid
        self.port = port
        self.admin = admin
        self.memory = memory

    def state(self, number: int) -> int:
        """Which state it has of a service; 0: none."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/explain?service=s{number}") as answer:
                plan = json.load(answer)["plan"]
        except OSError:
            return 0
        return max((int(step["instance"].split(".")[1]) for step in plan if step["node"] != OWN_NODE), default=0)

    def wait(self, state: int, services: int) -> None:
        """Wait until it has a state of the first service and of the last."""
        until = time.monotonic() + LIMIT
        while {self.state(0), self.state(services - 1)} != {state}:
            if time.monotonic() > until:
                raise TimeoutError(f"state {state} did not come")
            time.sleep(POLL)


@contextmanager
def proxied(asked: argparse.Namespace, folder: Path, discovery: int) -> Iterator[Proxied]:
    config = folder / "proxy.yaml"
    listen = [f"tcp://127.0.0.1:0=s{number}" for number in range(asked.services)]
    config.write_text(json.dumps({"proxy": {"listen": listen, "attempts": {"first_snapshot_wait": 0.1}}}))
    flags = ["--config", str(config), "--discovery", f"grpc://127.0.0.1:{discovery}", "--admin", "127.0.0.1:0"]
    with meshlocal("proxy", *flags, node=OWN_NODE) as (process, line):
        port, admin = port_in(line, r"tcp://127\.0\.0\.1:(\d+)=s0\b"), port_in(line, r"admin=http://127\.0\.0\.1:(\d+)")
        yield Proxied(process.pid, port, admin, memory_kb(process.pid) * 1024)


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    raise_file_limit()
    discovery = free_port()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-")))
        _, (echo,) = stack.enter_context(module("bench.echo", "127.0.0.1"))
        proxy = stack.enter_context(proxied(asked, folder, discovery))
        with running(_server(asked, discovery, echo, 1)) as first:
            ready_line(first)
            began = time.monotonic()
            proxy.wait(1, asked.services)
            synced = time.monotonic() - began
            known = memory_kb(proxy.pid) * 1024
            quiet = fixed_rate(proxy.port, b"x" * 64, RATE, asked.seconds)
        # The port is free once the first is gone.
        second = stack.enter_context(running(_server(asked, discovery, echo, 2)))
        load: list[Metrics] = []
        loading = threading.Thread(
            target=lambda: load.append(fixed_rate(proxy.port, b"x" * 64, RATE, asked.seconds)), daemon=True
        )
        loading.start()
        ready_line(second)
        spent, began = cpu_seconds(proxy.pid), time.monotonic()
        proxy.wait(2, asked.services)
        taken, spent = time.monotonic() - began, cpu_seconds(proxy.pid) - spent
        loading.join()
        after = memory_kb(proxy.pid) * 1024
    total = asked.services * asked.instances
    return {
        "services": asked.services,
        "instances": total,
        "first": synced,
        "resync": taken,
        "resync_cpu": spent,
        "memory_empty": proxy.memory,
        "memory": known,
        "memory_after": after,
        "each": (known - proxy.memory) / total,
        "quiet": quiet,
        "meanwhile": load[0],
        "p99_more": load[0]["p99"] - quiet["p99"],
    }


def main() -> None:
    asked = options()
    if asked.serve is not None:
        trio.run(serve, asked)
        sys.exit()
    machine = describe()
    report.heading("Many services", machine)
    figures = measure(asked)
    rows = [
        ["memory with nothing known", f"{figures['memory_empty'] / 1e6:.1f} MB"],
        ["memory with all known", f"{figures['memory'] / 1e6:.1f} MB"],
        ["the same, for each instance", f"{figures['each']:.0f} bytes"],
        ["memory after all changed", f"{figures['memory_after'] / 1e6:.1f} MB"],
        ["first sync, after the server is ready", f"{figures['first']:.1f} s"],
        ["full resync, after another server is ready", f"{figures['resync']:.1f} s"],
        ["CPU of the proxy meanwhile, with the load", f"{figures['resync_cpu']:.1f} s"],
    ]
    title = f"{figures['services']:,} services, {figures['instances']:,} instances"
    print(report.table([title, ""], rows), end="\n\n")
    columns = ("p50", "p90", "p99", "p99.9", "max")
    times = [
        [name, *(report.milli(figures[key][column]) for column in columns)]
        for key, name in (("quiet", "nothing changes"), ("meanwhile", "a full resync"))
    ]
    print(report.table(["64 bytes at 1,000 a second, ms", *columns], times), end="\n\n")
    what = f"p99 while {figures['instances']:,} instances are told anew, beyond p99 without"
    figures["goals"] = [report.verdict(what, figures["p99_more"] * 1e3, GOAL * 1e3, " ms")]
    report.write("services", machine, figures, asked.output)


if __name__ == "__main__":
    main()
