"""What one user of a proxy makes its neighbours pay: small exchanges beside bulk, a proxy at rest, large requests in
memory, and pages that are made while others want to be served. Each has a goal.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bench import report
from bench.machine import cpu_seconds, describe, family, memory_kb, raise_file_limit
from bench.processes import instances_file, meshlocal, module, port_in, ready_line, running

SIZE = 64
CHUNK = 262_144
ADMIN = r"admin=http://127\.0\.0\.1:(\d+)"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.neighbours", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement [8]")
    parser.add_argument("--rounds", type=int, default=3, help="of those of latency [3]")
    parser.add_argument("--streams", type=int, default=40, help="bulk streams [40]")
    parser.add_argument("--services", type=int, default=250, help="services of a scrape [250]")
    parser.add_argument("--instances", type=int, default=10_000, help="instances of a page [10000]")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    parser.add_argument("--role", choices=["source", "sink", "web", "fetch"], help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


# Processes that take part.


def source() -> None:
    """Send without an end to whoever connects."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(listener.getsockname()[1], flush=True)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    chunk = b"x" * CHUNK
    while True:
        for number, _ in poll.poll():
            if number == listener.fileno():
                sock, _ = listener.accept()
                sock.setblocking(False)
                connections[sock.fileno()] = sock
                poll.register(sock, select.EPOLLOUT)
                continue
            try:
                connections[number].send(chunk)
            except BlockingIOError:
                continue
            except OSError:
                connections.pop(number).close()


def sink(port: int, count: int, seconds: float) -> None:
    """Read from so many connections; print the bytes that came in the time."""
    poll = select.epoll()
    connections = {}
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setblocking(False)
        connections[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
    print("reading", flush=True)
    buffer = bytearray(CHUNK)
    total, end = 0, time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        for number, _ in poll.poll(left):
            with contextlib.suppress(BlockingIOError):
                total += connections[number].recv_into(buffer)
    print(total, flush=True)


def web(delay: float) -> None:
    """An HTTP instance that takes its time for a POST."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(delay)
            self._answer()

        def _answer(self) -> None:
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n".encode()
            self.wfile.write(head + b"x" * SIZE)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


def fetch(port: int, path: str, times: int) -> None:
    """Get a page again and again; print the seconds that each took, and the size of the last."""
    took, size = [], 0
    for _ in range(times):
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", path)
        size = len(connection.getresponse().read())
        connection.close()
        took.append(time.monotonic() - began)
        time.sleep(0.05)
    print(json.dumps({"seconds": took, "bytes": size}), flush=True)


def _role(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "bench.neighbours", "--role", name, *map(str, arguments)]


@contextmanager
def taking_part(name: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """One of the processes above."""
    with running(_role(name, *arguments)) as process:
        yield process


# What is measured.


class Exchanges(threading.Thread):
    """One connection that exchanges a few bytes again and again, each a millisecond after the last.

    Attributes:
        took: seconds of each.
    """

    def __init__(self, port: int, said: bytes) -> None:
        super().__init__(daemon=True)
        self._sock = socket.create_connection(("127.0.0.1", port))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._said = said
        self._over = threading.Event()
        self.took: list[float] = []

    def run(self) -> None:
        """Exchange until told to stop."""
        while not self._over.wait(0.001):
            began = time.perf_counter()
            self._sock.sendall(self._said)
            if not self._sock.recv(65536):
                raise ConnectionError("the proxy ended the connection")
            self.took.append(time.perf_counter() - began)

    def stop(self) -> list[float]:
        """End it; returns what was measured."""
        self._over.set()
        self.join()
        self._sock.close()
        return self.took


def exchanges(port: int, said: bytes, seconds: float) -> list[float]:
    """What each exchange takes while nothing else is asked for."""
    one = Exchanges(port, said)
    one.start()
    time.sleep(seconds)
    return one.stop()


def beside_bulk(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """A small exchange beside bulk streams, and what the streams carry with and without it."""
    with ExitStack() as stack:
        _, (echo,) = stack.enter_context(module("bench.echo", "127.0.0.1"))
        bulk = int(ready_line(stack.enter_context(taking_part("source"))))
        file = folder / "bulk.yaml"
        instances_file(file, {"ping": [("127.0.0.1", echo, "n1")], "bulk": [("127.0.0.1", bulk, "n1")]})
        listen = ["--listen", "tcp://127.0.0.1:0=ping", "--listen", "tcp://127.0.0.1:0=bulk", "--admin", "none"]
        _, line = stack.enter_context(meshlocal("proxy", *listen, "--discovery", f"file:{file}", node="n1"))
        ping, through = (port_in(line, rf"tcp://127\.0\.0\.1:(\d+)={name}") for name in ("ping", "bulk"))
        rounds = []
        for _ in range(asked.rounds):
            alone = exchanges(ping, b"x" * SIZE, asked.seconds / 4)
            bulk_alone, _ = _carry(through, ping, asked, beside=False)
            bulk_beside, beside = _carry(through, ping, asked, beside=True)
            carried = {"bulk_alone": bulk_alone, "bulk_beside": bulk_beside}
            rounds.append({"alone": report.percentiles(alone), "beside": report.percentiles(beside), **carried})
        return {"rounds": rounds}


def _carry(through: int, ping: int, asked: argparse.Namespace, *, beside: bool) -> tuple[float, list[float]]:
    """Bytes a second of the bulk streams, and what each small exchange takes beside them."""
    with ExitStack() as stack:
        process = stack.enter_context(taking_part("sink", through, asked.streams, asked.seconds / 2))
        ready_line(process)
        one = Exchanges(ping, b"x" * SIZE)
        if beside:
            one.start()
        carried = int(ready_line(process)) / (asked.seconds / 2)
        return carried, one.stop() if beside else []


def at_rest(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """One request a second: CPU and wakes."""
    with ExitStack() as stack:
        instance = int(ready_line(stack.enter_context(taking_part("web", 0))))
        file = folder / "rest.yaml"
        instances_file(file, {"b": [("127.0.0.1", instance, "n1")]})
        flags = ["--listen", "http://127.0.0.1:0=b", "--admin", "none", "--discovery", f"file:{file}"]
        proxy, line = stack.enter_context(meshlocal("proxy", *flags, node="n1"))
        connection = http.client.HTTPConnection("127.0.0.1", port_in(line, r"http://127\.0\.0\.1:(\d+)"))
        _get(connection)
        time.sleep(2)
        cpu, wakes, began = cpu_seconds(proxy.pid), _wakes(proxy.pid), time.monotonic()
        for _ in range(max(3, round(asked.seconds * 2))):
            _get(connection)
            time.sleep(1)
        took = time.monotonic() - began
        return {
            "cpu_share": (cpu_seconds(proxy.pid) - cpu) / took,
            "wakes_per_second": (_wakes(proxy.pid) - wakes) / took,
        }


def _get(connection: http.client.HTTPConnection) -> None:
    connection.request("GET", "/")
    connection.getresponse().read()


def _wakes(pid: int) -> int:
    """How often the process's threads slept so far: each is woken once for it."""
    total = 0
    for each in family(pid):
        for task in Path(f"/proc/{each}/task").iterdir():
            for line in (task / "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    total += int(line.split()[1])
    return total


def large_requests(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Memory after clients posted large bodies to an instance that takes 20 ms for each."""
    with ExitStack() as stack:
        instance = int(ready_line(stack.enter_context(taking_part("web", 0.02))))
        file = folder / "large.yaml"
        instances_file(file, {"b": [("127.0.0.1", instance, "n1")]})
        flags = ["--listen", "http://127.0.0.1:0=b", "--admin", "none", "--discovery", f"file:{file}"]
        proxy, line = stack.enter_context(meshlocal("proxy", *flags, node="n1"))
        port = port_in(line, r"http://127\.0\.0\.1:(\d+)")
        idle = memory_kb(proxy.pid)
        over = threading.Event()
        sent = []

        def post() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            count = 0
            while not over.is_set():
                connection.request("POST", "/", body=b"x" * 60_000)
                connection.getresponse().read()
                count += 1
            sent.append(count)

        clients = [threading.Thread(target=post, daemon=True) for _ in range(12)]
        for client in clients:
            client.start()
        time.sleep(asked.seconds)
        under_load = memory_kb(proxy.pid)
        over.set()
        for client in clients:
            client.join()
        return {"requests": sum(sent), "idle_kb": idle, "over_idle_kb": under_load - idle}


def pages(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """The longest exchanges while a scrape and a page are made."""
    found: dict[str, Any] = {}
    for name, path, services, instances in (
        ("scrape", "/metrics", asked.services, 1),
        ("page", "/services", 1, asked.instances),
    ):
        with ExitStack() as stack:
            web_port = int(ready_line(stack.enter_context(taking_part("web", 0))))
            file = folder / f"{name}.yaml"
            far = [
                (f"127.{each >> 16}.{each >> 8 & 255}.{each & 255}", web_port, "n2") for each in range(2, instances + 1)
            ]
            listed = {f"s{number}": [*far, ("127.0.0.1", web_port, "n1")] for number in range(services)}
            instances_file(file, listed)
            listen = ["--listen", "http://127.0.0.1:0", "--admin", "127.0.0.1:0", "--discovery", f"file:{file}"]
            _, line = stack.enter_context(meshlocal("proxy", *listen, node="n1"))
            port, admin = port_in(line, r" http://127\.0\.0\.1:(\d+)"), port_in(line, ADMIN)
            for service in listed:
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("GET", "/", headers={"Host": service})
                assert connection.getresponse().status == 200
                connection.close()
            said = b"GET / HTTP/1.1\r\nHost: s0\r\n\r\n"
            rounds = []
            for _ in range(asked.rounds):
                alone = exchanges(port, said, asked.seconds / 2)
                with taking_part("fetch", admin, path, 8) as process:
                    one = Exchanges(port, said)
                    one.start()
                    fetched = json.loads(ready_line(process, 120))
                    beside = one.stop()
                rounds.append({"alone": _longest(alone), "beside": _longest(beside), **fetched})
            found[name] = {"services": services, "instances": instances, "rounds": rounds}
    return found


def _longest(took: list[float]) -> dict[str, float]:
    return {**report.percentiles(took), "p99.9": report.percentile(took, 99.9), "most": max(took)}


# What comes of it.


def main() -> None:
    asked = options()
    raise_file_limit()
    if asked.role == "source":
        source()
    elif asked.role == "sink":
        sink(int(asked.arguments[0]), int(asked.arguments[1]), float(asked.arguments[2]))
    elif asked.role == "web":
        web(float(asked.arguments[0]))
    elif asked.role == "fetch":
        fetch(int(asked.arguments[0]), asked.arguments[1], int(asked.arguments[2]))
    else:
        with tempfile.TemporaryDirectory(prefix="meshlocal-bench-") as folder:
            measure(asked, Path(folder))


def measure(asked: argparse.Namespace, folder: Path) -> None:
    machine = describe()
    report.heading("What neighbours pay", machine)
    bulk, rest = beside_bulk(folder, asked), at_rest(folder, asked)
    large, made = large_requests(folder, asked), pages(folder, asked)
    figures: dict[str, Any] = {"bulk": bulk, "rest": rest, "large": large, **made}
    rows = []
    for number, each in enumerate(bulk["rounds"], start=1):
        alone, beside = each["alone"], each["beside"]
        rows.append(
            [
                f"round {number}",
                report.milli(alone["p99"]),
                report.milli(beside["p50"]),
                report.milli(beside["p99"]),
                f"{each['bulk_alone'] / 1e9:.2f}",
                f"{each['bulk_beside'] / 1e9:.2f}",
            ]
        )
    title = f"{SIZE} B beside {asked.streams} bulk streams"
    columns = ["p99 alone, ms", "p50, ms", "p99, ms", "bulk alone, GB/s", "bulk, GB/s"]
    print(report.table([title, *columns], rows), end="\n\n")
    rows = [
        [
            f"{name}, round {number}",
            report.milli(each["alone"]["most"]),
            report.milli(each["beside"]["p99"]),
            report.milli(each["beside"]["most"]),
            report.milli(max(each["seconds"])),
            f"{each['bytes'] / 1e6:.1f}",
        ]
        for name in ("scrape", "page")
        for number, each in enumerate(figures[name]["rounds"], start=1)
    ]
    columns = ["longest alone, ms", "p99, ms", "longest, ms", "page, ms", "MB"]
    print(report.table(["GET while a page is made", *columns], rows), end="\n\n")
    best = report.percentile([each["beside"]["p99"] for each in bulk["rounds"]], 50)
    figures["verdicts"] = [
        report.verdict(f"{SIZE} B beside {asked.streams} bulk streams, p99", best * 1e3, 10, " ms"),
        report.verdict("one request a second, CPU", rest["cpu_share"] * 100, 0.3, " % of a core"),
        report.verdict("one request a second, wakes", rest["wakes_per_second"], 10, " a second"),
        report.verdict("memory after POSTs of 60 KB, over idle", large["over_idle_kb"] / 1024, 10, " MB"),
        *(
            report.verdict(
                f"a {name} holds a GET by",
                (
                    report.percentile([each["beside"]["most"] for each in figures[name]["rounds"]], 50)
                    - report.percentile([each["alone"]["p50"] for each in figures[name]["rounds"]], 50)
                )
                * 1e3,
                5,
                " ms",
            )
            for name in ("scrape", "page")
        ),
    ]
    report.write("neighbours", machine, figures, asked.output)


if __name__ == "__main__":
    main()
