"""What a large snapshot does to traffic: 10,000 instances change, once a second, while 1,000 exchanges a second go on.

A discovery server of the benchmark's own publishes states that it made beforehand, so that it takes no CPU from the
proxy beyond sending them. Each is so different from the one before that the proxy is sent all of it.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import trio

from bench import report
from bench.machine import describe
from bench.peers import OWN_NODE
from bench.processes import StartError, meshlocal, module, port_in, ready_line
from bench.rounds import Metrics, fixed_rate
from meshlocal.discovery.hub import Hub
from meshlocal.discovery.service import DiscoveryService
from meshlocal.discovery.source import Instances, Publisher
from meshlocal.net.grpc.server import GrpcServer
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.policy.model import ServiceKey, index, make_instance

B = ServiceKey("b")
GOAL = 0.005
RATE = 1000
NODES = 500


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.update", description=__doc__)
    parser.add_argument("--instances", type=int, default=10000)
    parser.add_argument("--rounds", type=int, default=5, help="each once with updates and once without [5]")
    parser.add_argument("--seconds", type=float, default=4.0, help="of load, likewise [4]")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    return parser.parse_args()


# The server: publishes one state, and after each SIGUSR1 a new one every second until the next.


class _Source:
    """A `Source` of two states in turn."""

    name = "bench"

    def __init__(self, states: list[Instances]) -> None:
        self._states = states
        self.publishing = trio.Event()

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        number = 0
        publisher.update(B, self._states[0])
        task_status.started()
        while True:
            await self.publishing.wait()
            await trio.sleep(1)
            if not self.publishing.is_set():
                continue
            number += 1
            publisher.update(B, self._states[number % len(self._states)])


def _state(port: int, count: int, block: int) -> Instances:
    others = (
        make_instance(f"10.{block}.{number >> 8}.{number & 255}", 9000, "", {"node": f"n{number % NODES + 2}"})
        for number in range(1, count)
    )
    return index([make_instance("127.0.0.1", port, "", {"node": OWN_NODE}), *others])


async def serve(port: int, count: int) -> None:
    """Publish `count` instances, the one on the proxy's node at `port`."""
    source = _Source([_state(port, count, block) for block in (1, 2)])
    hub = Hub([source], random.Random(1))
    service = DiscoveryService(hub, 5.0)
    listeners = open_tcp_listeners("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(hub.run)
        await nursery.start(GrpcServer(service.handlers()).serve, listeners)
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            print(listeners[0].getsockname()[1], flush=True)
            async for _ in signals:
                if source.publishing.is_set():
                    source.publishing = trio.Event()
                else:
                    source.publishing.set()
                print(hub.changes, hub.watcher_count, flush=True)


# The measurement


@contextmanager
def _proxied(count: int) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    with ExitStack() as stack:
        _, (echo,) = stack.enter_context(module("bench.echo", "127.0.0.1"))
        flags = ["--serve", str(echo), "--instances", str(count)]
        server, (port,) = stack.enter_context(module("bench.update", *flags))
        listen = ["--listen", "tcp://127.0.0.1:0=b", "--discovery", f"grpc://127.0.0.1:{port}", "--admin", "none"]
        _, line = stack.enter_context(meshlocal("proxy", *listen, node=OWN_NODE))
        yield port_in(line, r"tcp://127\.0\.0\.1:(\d+)=b"), server


def _toggle(server: subprocess.Popen[bytes]) -> int:
    """Start or stop the updates; returns how many states were published so far."""
    server.send_signal(signal.SIGUSR1)
    changes, watchers = map(int, ready_line(server).split())
    if watchers != 1:
        raise StartError(f"{watchers} proxies watch")
    return changes


def measure(instances: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Latencies with and without updates."""
    quiet: list[Metrics] = []
    updated: list[Metrics] = []
    with _proxied(instances) as (port, server):
        # Each state once: the server encodes what it sends, and keeps it.
        before = _toggle(server)
        fixed_rate(port, b"x" * 64, RATE, 3.5)
        changes = _toggle(server) - before
        for _ in range(rounds):
            quiet.append(fixed_rate(port, b"x" * 64, RATE, seconds))
            before = _toggle(server)
            updated.append(fixed_rate(port, b"x" * 64, RATE, seconds))
            changes += _toggle(server) - before
    more = median(after["p99"] - before["p99"] for before, after in zip(quiet, updated, strict=True))
    return {"instances": instances, "updates": changes, "quiet": quiet, "updated": updated, "p99_more": more}


def table(figures: dict[str, Any]) -> str:
    """For people."""
    columns = ("p50", "p90", "p99", "p99.9", "max")
    rows = [
        [title, *(report.milli(median(each[column] for each in figures[key])) for column in columns)]
        for key, title in (("quiet", "nothing changes"), ("updated", "a new snapshot each second"))
    ]
    title = f"A service of {figures['instances']:,} instances, ms"
    return report.table([title, *columns], rows) + "\n"


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether updates stay off the data path."""
    what = f"p99 with snapshots of {figures['instances']:,} instances, beyond p99 without"
    return [report.verdict(what, figures["p99_more"] * 1e3, GOAL * 1e3, " ms")]


def main() -> None:
    asked = options()
    if asked.serve is not None:
        trio.run(serve, asked.serve, asked.instances)
        sys.exit()
    machine = describe()
    report.heading("Traffic while snapshots arrive", machine)
    figures = measure(asked.instances, asked.rounds, asked.seconds)
    print(table(figures))
    report.write("update", machine, {**figures, "goals": goals(figures)}, asked.output)


if __name__ == "__main__":
    main()
