"""What it costs to be seen: `python -m bench.observed`, which needs wrk, nginx and curl.

Proxies over the same upstream take turns. One is as it starts by default. The second has all that looks on: traces of
one request in a hundred to a collector, metrics of each instance, a scrape every five seconds, an open page and an open
tap. The third gives each request an id, which its instance has to read, and nothing else; the fourth records every one.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

from bench import http, report, tcp
from bench.load import find
from bench.machine import ROOT, describe
from bench.peers import Job, Peer, Running, start_meshlocal, started
from bench.rounds import Measured, Row, number, ratio, take_turns, values

OFF, ON, IDS, ALL = "off", "on", "ids", "every request traced"
TOLERATED = 0.95
"""Throughput with all of it on, at least, as a share of that without."""

SCRAPE = 5.0
"""Seconds between two scrapes."""

ROWS = {"tcp": tcp.ROWS, "http": http.ROWS}


class _Collector(BaseHTTPRequestHandler):
    """Takes what it is sent, and says nothing of it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Not a word."""


@contextmanager
def collector() -> Iterator[str]:
    """A collector's URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Collector) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def _looked_at(admin: int) -> Iterator[None]:
    """A page and a tap that are open, and a scraper."""
    base = f"http://127.0.0.1:{admin}"
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(SCRAPE):
            with suppress(OSError), urlopen(f"{base}/metrics") as answer:
                answer.read()

    with ExitStack() as stack:
        for path in ("/live/events?service=b", "/tap?service=b"):
            command = [find("curl") or "curl", "-sN", base + path]
            watcher = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            stack.callback(watcher.wait)
            stack.callback(watcher.kill)
        thread = threading.Thread(target=scrape, daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(over.set)
        yield


@contextmanager
def _start(folder: Path, job: Job, *, name: str, config: str, looked_at: bool) -> Iterator[Running]:
    with start_meshlocal(folder, job, name=name, checkout=ROOT, config=config) as running, ExitStack() as stack:
        if looked_at:
            stack.enter_context(_looked_at(running.admin))
        yield running


def sides(url: str) -> Sequence[Peer]:
    """All of them, given the collector's URL."""
    on = f"proxy: {{tracing: {{endpoint: '{url}', sample_percent: 1}}, metrics: {{instances: true}}}}\n"
    ids = "proxy: {http: {request_id: make}}\n"
    every = f"proxy: {{tracing: {{endpoint: '{url}', sample_percent: 100}}}}\n"
    return [
        Peer(name, lambda job: "", partial(_start, name=name, config=config, looked_at=looked_at))
        for name, config, looked_at in ((OFF, "", False), (ON, on, True), (IDS, ids, False), (ALL, every, False))
    ]


def measure(asked: argparse.Namespace) -> dict[str, Measured]:
    """Rounds by part, TCP and HTTP; each with all proxies started anew."""
    found: dict[str, Measured] = {}
    with collector() as url:
        for turn in range(asked.rounds):
            peers = list(sides(url))
            for name in ROWS:
                part: Any = tcp if name == "tcp" else http
                # What is traced is HTTP.
                chosen = peers[turn % 4 :] + peers[: turn % 4] if name == "http" else peers[:2]
                with ExitStack() as stack:
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-")))
                    job, _ = stack.enter_context(part.upstreams(folder / "up" if name == "http" else folder))
                    proxies = stack.enter_context(started(chosen, job, folder))
                    work = tcp.workloads(job, asked) if name == "tcp" else http.workloads(asked)
                    for workload, measured in take_turns(work, proxies, 1).items():
                        kept = found.setdefault(name, {}).setdefault(workload, {})
                        for side, metrics in measured.items():
                            kept.setdefault(side, []).extend(metrics)
    return found


def table(name: str, measured: Measured, rows: Sequence[Row]) -> str:
    """Medians, with the ratios to those of the proxy by default."""
    names = [OFF, ON, IDS, ALL] if name == "http" else [OFF, ON]
    lines = []
    for row in rows:
        cells = []
        for side in names:
            found = values(measured, row.workload, side, row.metric)
            if not found:
                break
            text = number(median(found) * row.scale)
            change = ratio(measured, row, side, OFF)
            cells.append(text if side == OFF or change is None else f"{text} ({change:.2f})")
        if len(cells) == len(names):
            lines.append([f"{row.title}, {row.unit} {'↑' if row.more else '↓'}", *cells])
    return report.table([name.upper(), *names], lines)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.observed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="rounds, each with all of them started anew")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="where the figures go")
    asked = parser.parse_args()
    asked.quick, asked.seconds, asked.connects, asked.rate_seconds, asked.storm_seconds = True, 2, 300, 1.0, 1.0
    return asked


def main() -> None:
    """Measure and print."""
    asked = options()
    machine = describe()
    report.heading("What it costs to be seen", machine)
    measured = measure(asked)
    for name, rows in ROWS.items():
        print(f"\n{table(name, measured[name], rows)}\n")
    verdicts = [
        report.verdict(f"{row.title}, on", change, TOLERATED, at_least=True)
        for name, rows in ROWS.items()
        for row in rows
        if row.more and (change := ratio(measured[name], row, ON, OFF)) is not None
    ]
    report.write("observed", machine, {"measured": measured, "verdicts": verdicts}, asked.output)


if __name__ == "__main__":
    main()
