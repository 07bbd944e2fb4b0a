"""The dashboard of deploy/monitoring: each of its queries gives series of what real processes said."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from meshlocal.net.wall_clock import wall_clock
from nursery_tests.e2e.running import LIMIT, Place, Processes
from nursery_tests.ports import free_port

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "monitoring" / "dashboard.json"

CONFIG = """\
proxy:
  node_name: n1
  listen: ["http://127.0.0.1:0", "tcp://127.0.0.1:0=tcp"]
  admin: 127.0.0.1:0
  discovery: {{urls: ["grpc://127.0.0.1:{port}"]}}
  services:
    full: {{limits: {{requests: 1}}}}
  ejection: {{failures: 1}}
"""

SCRAPES = 6
STEP = 60
"""Seconds between two scrapes, as far as Prometheus is told."""


def queries() -> Iterator[tuple[str, str]]:
    """Each panel's title, and each of its queries."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m").replace("$service", ".*")


def test_the_dashboard_is_one() -> None:
    """Each panel has a place of its own, a data source, and says what it is for."""
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


class Recording:
    """What processes said at `/metrics`, each minute, as OpenMetrics."""

    def __init__(self, start: int) -> None:
        self._start = start
        self._families: dict[str, tuple[str, list[str]]] = {}

    def add(self, instance: str, number: int, text: str) -> None:
        at = self._start + number * STEP
        for family in text_string_to_metric_families(text):
            _, lines = self._families.setdefault(family.name, (family.type, []))
            for sample in family.samples:
                labels = ",".join(
                    f"{name}={json.dumps(value)}" for name, value in {**sample.labels, "instance": instance}.items()
                )
                lines.append(f"{sample.name}{{{labels}}} {sample.value} {at}")

    def __str__(self) -> str:
        lines = []
        for name, (kind, samples) in self._families.items():
            lines += [f"# TYPE {name} {kind}", *samples]
        return "\n".join([*lines, "# EOF", ""])


async def http(port: int, host: str) -> int:
    """One request; its status."""
    with trio.fail_after(LIMIT):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(f"GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
            answer = b"".join([bytes(part) async for part in stream])
            return int(answer.split()[1])


async def together(ask: Callable[[], Awaitable[int]], count: int) -> list[int]:
    """What comes of so many calls at once."""
    found: list[int] = []

    async def call() -> None:
        found.append(await ask())

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(call)
    return found


async def instance(nursery: trio.Nursery) -> int:
    """One that says 200, a moment later."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            if await stream.receive_some(65536):
                await trio.sleep(0.1)
                await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    await nursery.start(trio.serve_listeners, serve, listeners)
    port: int = listeners[0].socket.getsockname()[1]
    return port


async def record(processes: Processes, here: Place, nursery: trio.Nursery, recording: Recording) -> list[str]:
    """What a discovery server and a proxy said while traffic flowed, left its node and failed; their last pages."""
    far = await instance(nursery)
    near = await processes.instance("near", "127.0.0.1", 0)
    port = int((await near.printed(r"listening (\d+)", "out"))[1])
    processes.write(
        "instances.yaml",
        "services:\n"
        f"  tcp: [{{address: 127.0.0.1, port: {port}, labels: {{node: n1}}}},"
        f" {{address: 127.0.0.1, port: {far}, labels: {{node: n2}}}}]\n"
        f"  far: [{{address: 127.0.0.1, port: {far}, labels: {{node: n2}}}}]\n"
        f"  near: [{{address: 127.0.0.1, port: {far}, labels: {{node: n1}}}}]\n"
        f"  full: [{{address: 127.0.0.1, port: {far}, labels: {{node: n1}}}}]\n"
        "  empty: []\n",
    )
    server = await processes.meshlocal(
        "discovery", "--bind", "127.0.0.1:0", "--source", "file:instances.yaml", "--admin", "127.0.0.1:0"
    )
    found = await server.printed(r"grpc://127\.0\.0\.1:(\d+) .*admin=http://127\.0\.0\.1:(\d+)", "out")
    processes.write("proxy.yaml", CONFIG.format(port=found[1]))
    proxy = await processes.meshlocal("proxy", "--config", "proxy.yaml")
    ready = await proxy.printed(
        r"http://127\.0\.0\.1:(\d+) tcp://127\.0\.0\.1:(\d+)=tcp admin=http://127\.0\.0\.1:(\d+)", "out"
    )
    listener, tcp = int(ready[1]), int(ready[2])
    pages = {"discovery": int(found[2]), "proxy": int(ready[3])}
    for number in range(SCRAPES):
        for host, status in (("near", 200), ("far", 200), ("empty", 503)):
            assert await http(listener, host) == status
        # Two at once, of which the limit lets one through.
        both = await together(partial(http, listener, "full"), 2)
        assert sorted(both) == [200, 503]
        if number == 1:
            # What went to it goes to the other node from now on.
            await near.killed()
        if number > 0:
            for _ in range(3):
                async with await trio.open_tcp_stream("127.0.0.1", tcp) as stream:
                    await stream.send_all(b"hello\n")
                    await stream.receive_some(100)
        for name, admin in pages.items():
            status, text = await here.get(admin, "/metrics")
            assert status == 200
            recording.add(name, number, text)
    return [(await here.get(admin, "/metrics"))[1] for admin in pages.values()]


async def ask(port: int, query: str, at: float) -> list[Any]:
    """The series that a query gives."""
    with trio.fail_after(LIMIT):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            target = "/api/v1/query?" + urlencode({"query": query, "time": at})
            await stream.send_all(f"GET {target} HTTP/1.0\r\nhost: localhost\r\n\r\n".encode())
            answer = b"".join([bytes(part) async for part in stream])
    found = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert found["status"] == "success", (query, found)
    result: list[Any] = found["data"]["result"]
    return result


async def run(folder: Path, *command: str, said: str = "") -> str:
    """A program that is to end well; what it said."""
    done = await trio.run_process(
        command, stdin=said.encode(), cwd=folder, capture_stdout=True, capture_stderr=True, check=False
    )
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, text
    return text


async def until_ready(port: int) -> None:
    """Wait until Prometheus answers queries."""
    with trio.fail_after(LIMIT):
        while True:
            try:
                await ask(port, "vector(1)", wall_clock())
            except (OSError, json.JSONDecodeError, AssertionError):
                await trio.sleep(0.1)
            else:
                return


@pytest.mark.timeout(120)
async def test_every_query_gives_series(
    processes: Processes, here: Place, nursery: trio.Nursery, program: Callable[[str], str], tmp_path: Path
) -> None:
    promtool, prometheus = program("promtool"), program("prometheus")
    # Prometheus takes no samples of the future, and these are recorded in moments.
    start = int(wall_clock()) - SCRAPES * STEP
    recording = Recording(start)
    pages = await record(processes, here, nursery, recording)
    for page in pages:
        linted = await run(tmp_path, promtool, "check", "metrics", said=page)
        assert linted == ""
    (tmp_path / "recorded").write_text(str(recording))
    (tmp_path / "prometheus.yml").write_text("scrape_configs: []\n")
    command = [promtool, "tsdb", "create-blocks-from", "openmetrics", "recorded", "data"]
    await run(tmp_path, *command)
    port = free_port()
    flags = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}"]
    await processes.start([prometheus, *flags])
    await until_ready(port)
    at = start + (SCRAPES - 1) * STEP
    empty = [(title, query) for title, query in queries() if not await ask(port, query, at)]
    assert empty == []
    # What they say is so: a quarter of HTTP requests stayed, and the near instance is out.
    shares = {each["metric"]["service"]: float(each["value"][1]) for each in await ask(port, _of("Local share"), at)}
    assert (shares["near"], shares["far"], shares["empty"]) == (1, 0, 0)
    reasons = {
        (each["metric"]["service"], each["metric"]["reason"]) for each in await ask(port, _of("Why requests left"), at)
    }
    assert ("far", "no_local") in reasons
    (success,) = await ask(port, _of("Success rate"), at)
    assert 0 < float(success["value"][1]) < 1
    (stale,) = await ask(port, _of("Stale sidecars"), at)
    assert float(stale["value"][1]) == 0


def _of(title: str) -> str:
    return next(query for panel, query in queries() if panel == title)
