"""What the proxy adds to a TCP exchange: direct, through the proxy on the same node, and to another node.

One caller, one exchange at a time, 64 bytes there and back, in interleaved rounds. Nodes are loopback addresses; the
far ones stand behind a relay that pretends a network (`bench.delay`).
"""

from __future__ import annotations

import argparse
import random
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench import report
from bench.delay import delaying, verify
from bench.machine import describe
from bench.processes import free_port, instances_file, meshlocal, module, port_in

PAYLOAD = b"x" * 64
LIMIT = 10.0

ROUTES = {
    "direct": "direct",
    "same": "proxy, same node",
    "other": "proxy, other node",
    "failover": "proxy, other node after the local one refused",
    "far-direct": "direct, far node",
    "far": "proxy, far node",
}
"""What is measured, and what it is called."""

TITLES = {"connect": "Connect, 64 bytes there and back, close", "established": "64 bytes there and back"}

_BASE = {"far": "far-direct"}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds [15]")
    parser.add_argument("--exchanges", type=int, default=500, help="exchanges on one connection, a round and route")
    parser.add_argument("--connects", type=int, default=150, help="connections opened, used once and closed, likewise")
    parser.add_argument("--delay", type=float, default=0.25, help="one way to the far node, in ms [0.25]")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    return parser.parse_args()


@contextmanager
def routes(one_way: float) -> Iterator[tuple[dict[str, int], float]]:
    """Everything up: the port of each route, and what the far node's relay adds to a round trip."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-")))
        _, (near, other) = stack.enter_context(module("bench.echo", "127.0.0.1", "127.0.0.2"))
        relay = stack.enter_context(delaying(near, one_way, "127.0.0.1"))
        added = verify(("127.0.0.1", near), ("127.0.0.1", relay), one_way)
        file = folder / "instances.yaml"
        services = {
            "same": [("127.0.0.1", near, "n1"), ("127.0.0.2", other, "n2")],
            "other": [("127.0.0.2", other, "n2")],
            "failover": [("127.0.0.1", free_port(), "n1"), ("127.0.0.2", other, "n2")],
            "far": [("127.0.0.1", relay, "n3")],
        }
        instances_file(file, services)
        listen = [part for name in services for part in ("--listen", f"tcp://127.0.0.1:0={name}")]
        proxy = meshlocal("proxy", "--discovery", f"file:{file}", *listen, "--admin", "none", node="n1")
        _, line = stack.enter_context(proxy)
        ports = {name: port_in(line, rf"tcp://127\.0\.0\.1:(\d+)={name}\b") for name in services}
        yield {"direct": near, "far-direct": relay, **ports}, added


Place = int | str
"""A port of 127.0.0.1, or the path of a Unix socket."""


def exchanges(place: Place, count: int) -> list[float]:
    """Seconds of each exchange on one connection."""
    times = []
    with _connected(place) as sock:
        if isinstance(place, int):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _exchange(sock)
        for _ in range(count):
            start = time.perf_counter()
            _exchange(sock)
            times.append(time.perf_counter() - start)
    return times


def connects(place: Place, count: int) -> list[float]:
    """Seconds of each connect, exchange and close."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        with _connected(place) as sock:
            _exchange(sock)
        times.append(time.perf_counter() - start)
    return times


def sizes(parser: argparse.ArgumentParser) -> None:
    """The options that `in_turns` goes by."""
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds [21]")
    parser.add_argument("--exchanges", type=int, default=500, help="exchanges on one connection, a round and route")
    parser.add_argument("--connects", type=int, default=150, help="connections opened, used once and closed, likewise")


def in_turns(places: Mapping[str, Place], asked: argparse.Namespace) -> dict[str, Any]:
    """Both kinds, of every place once a round, each round in another order; prints a table of each.

    Args:
        places: by what they are called; one is `direct`.
        asked: `rounds`, `connects` and `exchanges`.

    Returns:
        Figures by kind and place, beside what was asked for.
    """
    rng = random.Random(1)
    times: dict[str, dict[str, list[list[float]]]] = {
        kind: {route: [] for route in places} for kind in ("connect", "established")
    }
    for place in places.values():  # the first connections of a process pay for its imports and caches
        connects(place, 20)
    for _ in range(asked.rounds):
        for route in rng.sample(sorted(places), len(places)):
            times["connect"][route].append(connects(places[route], asked.connects))
            times["established"][route].append(exchanges(places[route], asked.exchanges))
    figures: dict[str, Any] = {name: getattr(asked, name) for name in ("rounds", "exchanges", "connects")}
    for kind, title in TITLES.items():
        figures[kind] = summarise(times[kind])
        rows = [
            [route, *(report.micro(row[key]) for key in ("p50", "p90", "p99")), f"{row['ratio_to_direct']:.2f}"]
            for route, row in figures[kind].items()
        ]
        print(report.table([f"{title}, µs", "p50", "p90", "p99", "× direct"], rows), end="\n\n")
    return figures


def _connected(place: Place) -> socket.socket:
    # Not create_connection: its look-up of the name would count.
    sock = socket.socket(socket.AF_INET if isinstance(place, int) else socket.AF_UNIX)
    try:
        sock.settimeout(LIMIT)
        sock.connect(("127.0.0.1", place) if isinstance(place, int) else place)
    except BaseException:
        sock.close()
        raise
    return sock


def _exchange(sock: socket.socket) -> None:
    sock.sendall(PAYLOAD)
    left = len(PAYLOAD)
    while left:
        received = sock.recv(left)
        if not received:
            raise ConnectionError("the connection ended in the middle of an exchange")
        left -= len(received)


def measure(ports: dict[str, int], asked: argparse.Namespace) -> dict[str, dict[str, list[list[float]]]]:
    """Times by kind, route and round. Each round takes the routes in another order."""
    rng = random.Random(1)
    times: dict[str, dict[str, list[list[float]]]] = {
        kind: {route: [] for route in ROUTES} for kind in ("established", "connect")
    }
    for _ in range(asked.rounds):
        for route in rng.sample(sorted(ROUTES), len(ROUTES)):
            times["established"][route].append(exchanges(ports[route], asked.exchanges))
            times["connect"][route].append(connects(ports[route], asked.connects))
    return times


def summarise(times: dict[str, list[list[float]]]) -> dict[str, dict[str, float]]:
    """Percentiles over all rounds, and the ratio of medians to the direct route's."""
    rows = {}
    medians = {route: [report.percentile(each, 50) for each in rounds] for route, rounds in times.items()}
    for route, rounds in times.items():
        base = _BASE.get(route, "direct")
        figures = report.percentiles([one for each in rounds for one in each])
        rows[route] = {**figures, "ratio_to_direct": report.median_ratio(medians[route], medians[base])}
    return rows


def main() -> None:
    asked = options()
    machine = describe()
    report.heading("Latency of the proxy", machine)
    one_way = asked.delay / 1000
    with routes(one_way) as (ports, added):
        for port in ports.values():  # the first connections of a process pay for its imports and caches
            connects(port, 20)
        times = measure(ports, asked)
    print(f"The far node is {asked.delay:g} ms away; measured, a round trip to it takes {added * 1000:.2f} ms more.\n")
    titles = {"established": "64 bytes there and back", "connect": "Connect, 64 bytes there and back, close"}
    figures: dict[str, Any] = {
        "rounds": asked.rounds,
        "exchanges": asked.exchanges,
        "connects": asked.connects,
        "far_one_way_asked": one_way,
        "far_round_trip_added": added,
    }
    for kind, title in titles.items():
        figures[kind] = summarise(times[kind])
        rows = [
            [ROUTES[route], *(report.micro(row[key]) for key in ("p50", "p90", "p99")), f"{row['ratio_to_direct']:.2f}"]
            for route, row in figures[kind].items()
        ]
        print(report.table([f"{title}, µs", "p50", "p90", "p99", "× direct"], rows), end="\n\n")
    print("× direct: median over the rounds; the far node's is to the far node without a proxy.")
    report.write("latency", machine, figures, asked.output)


if __name__ == "__main__":
    main()
