"""What the library costs: streams of a mesh beside trio's own, and GETs through its transport beside httpx alone.

One caller, one exchange at a time, in interleaved rounds, on Trio, over an echo server and an nginx on this machine.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import trio

import meshlocal
from bench import report
from bench.http import upstreams
from bench.latency import PAYLOAD, summarise
from bench.load import missing
from bench.machine import describe
from bench.processes import instances_file, module
from meshlocal.httpx import MeshTransport

SERVICE = "b"
GOAL = 30e-6
"""Seconds that a GET may take longer through the transport."""

TITLES = {
    "stream": "Connect, 64 bytes there and back, close: trio's stream, and a mesh's",
    "get": "GET: httpx, and through MeshTransport",
}

Once = Callable[[], Awaitable[object]]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.library", description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds [21]")
    parser.add_argument("--count", type=int, default=150, help="exchanges, a round and way [150]")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    return parser.parse_args()


async def exchange(stream: trio.SocketStream) -> None:
    async with stream:
        await stream.send_all(PAYLOAD)
        left = len(PAYLOAD)
        while left:
            left -= len(await stream.receive_some(left))


@asynccontextmanager
async def ways(folder: Path, echo: int, http: int | None) -> AsyncIterator[dict[str, dict[str, Once]]]:
    """What is measured, by kind and way."""
    file = folder / "instances.yaml"
    services = {SERVICE: [("127.0.0.1", echo, "n1")]}
    if http is not None:
        services["http"] = [("127.0.0.1", http, "n1")]
    instances_file(file, services)
    async with AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(meshlocal.open_mesh(f"file:{file}", node_name="n1"))

        async def direct() -> None:
            await exchange(await trio.open_tcp_stream("127.0.0.1", echo))

        async def meshed() -> None:
            await exchange(await mesh.open_tcp_stream(SERVICE))

        found: dict[str, dict[str, Once]] = {"stream": {"direct": direct, "meshlocal": meshed}}
        if http is not None:
            alone = await stack.enter_async_context(httpx.AsyncClient())
            through = await stack.enter_async_context(httpx.AsyncClient(transport=MeshTransport(mesh)))
            urls = {"direct": (alone, f"http://127.0.0.1:{http}/"), "meshlocal": (through, "http://http/")}
            found["get"] = {way: _getting(client, url) for way, (client, url) in urls.items()}
        yield found


def _getting(client: httpx.AsyncClient, url: str) -> Once:
    async def get() -> None:
        response = await client.get(url)
        response.raise_for_status()

    return get


async def measure(asked: argparse.Namespace, folder: Path, echo: int, http: int | None) -> dict[str, Any]:
    rng = random.Random(1)
    async with ways(folder, echo, http) as kinds:
        times: dict[str, dict[str, list[list[float]]]] = {
            kind: {way: [] for way in found} for kind, found in kinds.items()
        }
        for found in kinds.values():
            for once in found.values():
                for _ in range(20):
                    await once()
        for _ in range(asked.rounds):
            for kind, found in kinds.items():
                for way in rng.sample(sorted(found), len(found)):
                    times[kind][way].append(await _timed(found[way], asked.count))
    return {kind: summarise(found) for kind, found in times.items()}


async def _timed(once: Once, count: int) -> list[float]:
    found = []
    for _ in range(count):
        start = time.perf_counter()
        await once()
        found.append(time.perf_counter() - start)
    return found


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Figures by kind and way; those of GETs only where there is an nginx."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshlocal-bench-")))
        _, (echo,) = stack.enter_context(module("bench.echo", "127.0.0.1"))
        http: int | None = None
        if lacking := missing("nginx"):
            print(f"without GETs: {', '.join(lacking)}")
        else:
            _, direct = stack.enter_context(upstreams(folder / "up"))
            http = direct.ports[SERVICE]
        figures: dict[str, Any] = trio.run(measure, asked, folder, echo, http)
        return figures


def tables(figures: Mapping[str, Any]) -> str:
    """For people."""
    parts = []
    for kind, title in TITLES.items():
        if kind in figures:
            table = [
                [way, *(report.micro(row[key]) for key in ("p50", "p90", "p99")), f"{row['ratio_to_direct']:.2f}"]
                for way, row in figures[kind].items()
            ]
            parts.append(report.table([f"{title}, µs", "p50", "p90", "p99", "× direct"], table) + "\n")
    return "\n".join(parts)


def goals(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Whether a GET takes as little more as it may."""
    if "get" not in figures:
        return []
    more = (figures["get"]["meshlocal"]["p50"] - figures["get"]["direct"]["p50"]) * 1e6
    return [report.verdict("a GET through the library, p50, beyond httpx alone", more, GOAL * 1e6, " µs")]


def main() -> None:
    asked = options()
    machine = describe()
    report.heading("The library", machine)
    figures = run(asked)
    print(tables(figures))
    report.write("library", machine, {**figures, "goals": goals(figures)}, asked.output)


if __name__ == "__main__":
    main()
