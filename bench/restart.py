"""A discovery server is killed under thousands of watchers, and comes back, with something new or without: how the
watchers' return spreads over time, when the last of them is in sync, and what it costs the server.

Every watcher is the client that a proxy runs, as in `bench.watchers`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import trio

from bench import report
from bench.machine import cpu_seconds, describe, memory_kb, raise_file_limit
from bench.processes import START_LIMIT, StartError, free_port, meshlocal, ready_line, running
from bench.watchers import Holder, write_instances
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.policy.model import ServiceSnapshot

GOAL = 5.0
"""Seconds from a server's return, or of a backoff's end, within which all watchers are back."""

SAMPLE = 0.1
"""Seconds between looks at the server's CPU time and memory."""

LOOK = 0.02
"""Seconds between looks at who is connected again."""

SYNC_LIMIT = 120.0


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.restart", description=__doc__)
    parser.add_argument("--watchers", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2, help="processes that hold them [2]")
    parser.add_argument("--instances", type=int, default=100, help="instances of the service [100]")
    parser.add_argument("--down", type=float, default=5.0, help="seconds for which there is no server [5]")
    parser.add_argument("--unchanged", action="store_true", help="it comes back with what it had: versions are resumed")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    # One of the processes that hold watchers:
    parser.add_argument("--hold", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    return parser.parse_args()


class Observer(Holder):
    """Says on a line of its own, too, when a watcher was told that the service has no instances: its state was lost."""

    def arrived(self, number: int, snapshot: ServiceSnapshot, *, first: bool) -> None:
        """A watcher has applied a snapshot."""
        if not snapshot.instances:
            print(json.dumps("lost"), flush=True)
        super().arrived(number, snapshot, first=first)


class Returns(Observer):
    """Says on a line when each watcher was connected again, once all are: those that resume are told nothing new."""

    def __init__(self, url: str, count: int) -> None:
        super().__init__(url, count)
        self._lost_before: dict[int, int] = {}

    async def run(self) -> None:
        """Watch until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(super().run)
            nursery.start_soon(self._look)

    def arrived(self, number: int, snapshot: ServiceSnapshot, *, first: bool) -> None:
        """A watcher has applied a snapshot."""
        if first:
            self._lost_before[number] = self.watches[number].status.reconnects
        super().arrived(number, snapshot, first=first)

    async def _look(self) -> None:
        back: dict[int, int] = {}
        while len(back) < self._count:
            await trio.sleep(LOOK)
            now = time.time_ns()
            for number, before in self._lost_before.items():
                status = self.watches[number].status
                # By its count: an outage may be shorter than the time between two looks.
                if status.connected and status.reconnects > before:
                    back.setdefault(number, now)
        print(json.dumps(list(back.values())), flush=True)


class Sampler(threading.Thread):
    """Looks at a process again and again: the highest share of a core in half a second, and the most memory."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._done = threading.Event()
        self.cpu_peak = 0.0
        self.memory_peak_kb = 0

    def run(self) -> None:
        """Look until told to stop."""
        seen: list[tuple[float, float]] = []
        while not self._done.wait(SAMPLE):
            now, cpu = time.monotonic(), cpu_seconds(self._pid)
            seen = [*(each for each in seen if now - each[0] <= 1.0), (now, cpu)]
            if now - seen[0][0] >= 0.5:
                self.cpu_peak = max(self.cpu_peak, (cpu - seen[0][1]) / (now - seen[0][0]))
            self.memory_peak_kb = max(self.memory_peak_kb, memory_kb(self._pid))

    def stop(self) -> None:
        """End it."""
        self._done.set()
        self.join()


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-"))) / "instances.yaml"
        write_instances(file, asked.instances, 0)
        port = free_port()
        flags = ["--bind", f"127.0.0.1:{port}", "--source", f"file:{file}"]
        server, _ = stack.enter_context(meshlocal("discovery", *flags))
        holders = []
        for number in range(asked.processes):
            share = asked.watchers // asked.processes + (number < asked.watchers % asked.processes)
            command = [sys.executable, "-m", "bench.restart", "--hold", str(share), "--url", f"grpc://127.0.0.1:{port}"]
            command += ["--unchanged"] if asked.unchanged else []
            # What they log of the outage, each by itself, is of no interest here.
            holders.append(stack.enter_context(running(command, log=stack.enter_context(open("/dev/null")).fileno())))
        for holder in holders:
            ready_line(holder, START_LIMIT + asked.watchers / 50)

        server.kill()
        server.wait()
        if not asked.unchanged:
            write_instances(file, asked.instances, 1)
        time.sleep(asked.down)
        again, _ = stack.enter_context(meshlocal("discovery", *flags))
        ready = time.time_ns()
        sampler = Sampler(again.pid)
        sampler.start()
        lost, arrived = 0, []
        for holder in holders:
            while (said := json.loads(ready_line(holder, SYNC_LIMIT))) == "lost":
                lost += 1
            arrived += said
        cpu = cpu_seconds(again.pid)
        sampler.stop()
        if len(arrived) != asked.watchers:
            raise StartError(f"{len(arrived)} watchers of {asked.watchers} are in sync again")
        times = sorted((one - ready) / 1e9 for one in arrived)
        seconds = [sum(second <= each < second + 1 for each in times) for second in range(int(max(times[-1], 0)) + 1)]
        seconds[0] += sum(each < 0 for each in times)
        return {
            "watchers": asked.watchers,
            "processes": asked.processes,
            "instances": asked.instances,
            "down_seconds": asked.down,
            "unchanged": asked.unchanged,
            "in_sync_after": {"first": times[0], **report.percentiles(times), "last": times[-1]},
            "in_sync_each_second": seconds,
            "lost_their_state": lost,
            "server_cpu_seconds": cpu,
            "server_cpu_peak_share": sampler.cpu_peak,
            "server_memory_peak_kb": sampler.memory_peak_kb,
        }


def main() -> None:
    asked = options()
    raise_file_limit()
    if asked.hold:
        trio.run((Returns if asked.unchanged else Observer)(asked.url, asked.hold).run)
        return
    machine = describe()
    report.heading("A discovery server restarts under its watchers", machine)
    figures = measure(asked)
    after = figures["in_sync_after"]
    title = f"{asked.watchers} watchers are in sync again after, s"
    columns = ("first", "p50", "p99", "last")
    print(report.table([title, *columns], [["the new server is ready", *(f"{after[one]:.2f}" for one in columns)]]))
    print()
    rows = [
        ["watchers in each second", ", ".join(map(str, figures["in_sync_each_second"]))],
        ["watchers that lost their last state", str(figures["lost_their_state"])],
        ["CPU in all", f"{figures['server_cpu_seconds']:.1f} s"],
        ["CPU, most in half a second", f"{figures['server_cpu_peak_share']:.0%} of a core"],
        ["memory, most", f"{figures['server_memory_peak_kb'] / 1024:.0f} MB"],
    ]
    print(report.table(["The restart", ""], rows))
    print()
    # After a longer outage, a watcher may have begun to wait as long as the backoff lets it when the server came back.
    cap = 0.0 if asked.down <= 1 else DiscoveryClientConfig().backoff_max
    what = "resume" if asked.unchanged else "have what is new"
    goal = f"all watchers {what}, after an outage of {asked.down:g} s"
    figures["verdicts"] = [report.verdict(goal, after["last"], GOAL + cap, " s")]
    report.write("restart-unchanged" if asked.unchanged else "restart", machine, figures, asked.output)


if __name__ == "__main__":
    main()
