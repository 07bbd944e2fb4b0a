"""What local-first gives, and what a failover costs.

First the same service on the caller's node and on another one behind a pretended network: through a proxy that takes
the near instance, one that knows of no nodes, and one that has far instances only. Then failover: connections come at a
fixed rate, the local instance is killed and comes back, and nobody should notice; beside HAProxy, nginx and Envoy.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

from bench import page, report
from bench.delay import delaying, verify
from bench.generator import Generator
from bench.latency import connects, exchanges
from bench.machine import describe, describe_line, raise_file_limit
from bench.peers import ENVOY, HAPROXY, MESHLOCAL, NGINX, OWN_NODE, Instance, Job, Peer, present, started
from bench.processes import free_port, instances_file, meshlocal, module, port_in, stop
from bench.rounds import OURS

ROUTES = {
    "near": "the caller's node first",
    "anywhere": "any node in turn",
    "far": "other nodes only",
}
FAR = 2
"""Far instances beside the near one."""

CONTESTANTS: dict[str, tuple[Peer, bool]] = {
    "HAProxy, backups, checks each second": (HAPROXY, True),
    "nginx, backups": (NGINX, False),
    "Envoy, priorities, outlier ejection": (ENVOY, False),
    "Envoy, priorities, checks each second": (ENVOY, True),
    OURS: (MESHLOCAL, False),
}
"""What fails over, and whether it checks its instances."""

STEP = 0.1
"""Seconds of one point of the failover's course."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.locality", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds of locality [10]")
    parser.add_argument("--exchanges", type=int, default=200, help="exchanges on one connection, a round and route")
    parser.add_argument("--connects", type=int, default=100, help="connections, likewise")
    parser.add_argument("--delay", type=float, default=0.25, help="one way to another node, in ms [0.25]")
    parser.add_argument("--failovers", type=int, default=5, help="rounds of failover [5]")
    parser.add_argument("--rate", type=int, default=400, help="connections a second in these [400]")
    parser.add_argument("--phase", type=float, default=2.0, help="seconds before, during and after each outage [2]")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    parser.add_argument("--document", action="store_true", help="put the figures into docs/performance.md")
    return parser.parse_args()


# Locality


@contextmanager
def _routes(one_way: float) -> Iterator[tuple[dict[str, int], float]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-")))
        _, (near,) = stack.enter_context(module("bench.echo", "127.0.0.1"))
        relays = [stack.enter_context(delaying(near, one_way)) for _ in range(FAR)]
        added = median(verify(("127.0.0.1", near), ("127.0.0.1", relay), one_way) for relay in relays)
        far = [Instance("127.0.0.1", relay, f"n{number + 2}") for number, relay in enumerate(relays)]
        file = folder / "instances.yaml"
        instances_file(file, {"all": [Instance("127.0.0.1", near), *far], "far": far})
        ports = {}
        for node, services in ((OWN_NODE, {"near": "all", "far": "far"}), (None, {"anywhere": "all"})):
            listen = [part for service in services.values() for part in ("--listen", f"tcp://127.0.0.1:0={service}")]
            # The proxy that knows no node warns of it, as it should; here that is the point.
            flags = ["--discovery", f"file:{file}", *listen, "--admin", "none", "--log-level", "error"]
            _, line = stack.enter_context(meshlocal("proxy", *flags, node=node))
            for route, service in services.items():
                ports[route] = port_in(line, rf"tcp://127\.0\.0\.1:(\d+)={service}\b")
        yield ports, added


def locality(asked: argparse.Namespace) -> dict[str, Any]:
    """Times of exchanges and of connections, by route."""
    rng = random.Random(3)
    times: dict[str, dict[str, list[float]]] = {
        kind: {route: [] for route in ROUTES} for kind in ("connect", "established")
    }
    with _routes(asked.delay / 1000) as (ports, added):
        for port in ports.values():
            connects(port, 20)
        for _ in range(asked.rounds):
            for route in rng.sample(sorted(ROUTES), len(ROUTES)):
                times["connect"][route] += connects(ports[route], asked.connects)
                # An established connection stays where it is: one to any node is near once in a while.
                for _ in range(1 + FAR):
                    times["established"][route] += exchanges(ports[route], asked.exchanges // (1 + FAR))
    figures: dict[str, Any] = {"far_one_way_asked": asked.delay / 1000, "far_round_trip_added": added}
    for kind, routes in times.items():
        figures[kind] = {route: {**report.percentiles(found), "mean": fmean(found)} for route, found in routes.items()}
    return figures


def locality_table(figures: dict[str, Any]) -> str:
    """For people."""
    parts = []
    titles = {"connect": "Connect, 64 bytes there and back, close", "established": "64 bytes there and back"}
    for kind, title in titles.items():
        rows = [
            [ROUTES[route], *(report.micro(row[key]) for key in ("mean", "p50", "p90", "p99"))]
            for route, row in figures[kind].items()
        ]
        parts.append(report.table([f"{title}, µs", "mean", "p50", "p90", "p99"], rows))
    asked, added = figures["far_one_way_asked"] * 2e3, figures["far_round_trip_added"] * 1e3
    parts.append(f"Other nodes are {asked:g} ms away and back; measured, a round trip takes {added:.2f} ms more.")
    return "\n\n".join(parts) + "\n"


# Failover


class _Local:
    """The local instance, which is killed and started again on its port."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._stack = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process, _ = self._stack.enter_context(module("bench.echo", f"127.0.0.1:{self.port}"))

    def kill(self) -> None:
        assert self._process is not None
        stop(self._process, signal.SIGKILL)
        self._stack.close()

    def steps(self, phase: float) -> Iterator[float]:
        """The course of an outage, for `Generator.run`."""
        yield phase
        self.kill()
        yield 2 * phase
        self.start()

    def close(self) -> None:
        self._stack.close()


def _fail_over(peer: Peer, checks: bool, asked: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-")))
        _, others = stack.enter_context(module("bench.echo", "127.0.0.2", "127.0.0.3"))
        local = _Local(free_port())
        stack.callback(local.close)
        local.start()
        far = [Instance(f"127.0.0.{number + 2}", port, f"n{number + 2}") for number, port in enumerate(others)]
        job = Job({"echo": [Instance("127.0.0.1", local.port), *far]}, checks=checks)
        (proxy,) = stack.enter_context(started([peer], job, folder))
        connects(proxy.ports["echo"], 100)
        load = Generator(("127.0.0.1", proxy.ports["echo"]), b"x" * 64, fresh=True)
        outcomes = load.run(asked.rate, 3 * asked.phase, local.steps(asked.phase))
    pairs = list(zip(outcomes.due, outcomes.latencies, strict=True))
    before = [latency for due, latency in pairs if due < asked.phase]
    after = [latency for due, latency in pairs if due >= asked.phase]
    course = [0.0] * round(3 * asked.phase / STEP)
    for due, latency in pairs:
        point = min(int(due / STEP), len(course) - 1)
        course[point] = max(course[point], latency)
    return {
        "requests": len(pairs) + outcomes.failed,
        "failed": outcomes.failed,
        "failures": outcomes.failures,
        "healthy_p50": report.percentile(before, 50),
        "healthy_worst": max(before),
        "outage_p50": report.percentile(
            [one for due, one in pairs if asked.phase <= due < 2 * asked.phase] or [0.0], 50
        ),
        "worst": max(after),
        "course": course,
    }


def failover(asked: argparse.Namespace) -> dict[str, Any]:
    """The rounds of each contestant."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    job = Job({})
    peers = {name: each for name, each in CONTESTANTS.items() if not each[0].missing(job)}
    present([HAPROXY, NGINX, ENVOY], job)
    for number in range(asked.failovers):
        print(f"failover {number + 1} of {asked.failovers} ...", flush=True)
        for name in random.Random(number).sample(list(peers), len(peers)):
            rounds.setdefault(name, []).append(_fail_over(*peers[name], asked))
    return {
        "rate": asked.rate,
        "phase": asked.phase,
        "rounds": {name: rounds[name] for name in CONTESTANTS if name in rounds},
    }


def failover_table(figures: dict[str, Any]) -> str:
    """For people."""
    rows = []
    for name, rounds in figures["rounds"].items():
        cells = [str(sum(each[key] for each in rounds)) for key in ("requests", "failed")]
        cells += [report.milli(median(each[key] for each in rounds)) for key in _TIMES]
        rows.append([name, *cells, report.milli(max(each["worst"] for each in rounds))])
    headers = [
        "Failover",
        "requests",
        "failed",
        "healthy p50",
        "p50 in the outage",
        "worst after",
        "worst of all rounds",
    ]
    text = report.table(headers, rows)
    phase = f"{figures['phase']:g}"
    count = max(map(len, figures["rounds"].values()))
    return (
        f"{text}\n\nTimes in ms, medians of {count} rounds; connect, 64 bytes there"
        f" and back, close, {figures['rate']} a second. The local instance is killed after {phase} s and comes back"
        f" {phase} s later. It is killed between two requests: one that is under way then is lost to any TCP proxy.\n"
    )


_TIMES = ("healthy_p50", "outage_p50", "worst")


def goals(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether failover is what it should be."""
    rounds = figures["rounds"][OURS]
    more = median(each["worst"] - each["healthy_p50"] for each in rounds) * 1e3
    return [
        report.verdict("failover: failed requests", sum(each["failed"] for each in rounds), 0),
        report.verdict("failover: the worst, beyond a healthy p50", more, 5, " ms"),
    ]


def main() -> None:
    asked = options()
    raise_file_limit()
    machine = describe()
    report.heading("Local first, and failover", machine)
    near = locality(asked)
    print(locality_table(near))
    over = failover(asked)
    print(f"\n{failover_table(over)}")
    judged = goals(over)
    report.write("locality", machine, {"locality": near, "failover": {**over, "goals": judged}}, asked.output)
    if asked.document:
        parts = [f"{describe_line(machine)}.\n", locality_table(near), failover_table(over), page.verdicts(judged)]
        page.write({"locality": "\n".join(parts)})


if __name__ == "__main__":
    main()
