"""Several workers, as an operator sees them: one proxy, whose listeners, metrics and signals are one (S1, S2)."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from nursery_tests.e2e.running import LIMIT, Place, Processes, Program

WORKERS = 2
CONFIG = """
proxy:
  workers: {workers}
  listen: [{listen}]
  node_name: n1
  drain: {{delay: 0, timeout: {timeout}}}
"""
B = "'tcp://127.0.0.1:0=b'"


class Running:
    """A proxy of two workers with an instance behind it."""

    def __init__(self, processes: Processes, here: Place) -> None:
        self.processes, self.here = processes, here
        self.proxy: Program
        self.admin = 0
        self.ports: list[int] = []
        self.instance = 0
        self.streams: list[trio.SocketStream] = []

    def configure(self, *listen: str, drain: float = 60, workers: int = WORKERS) -> None:
        text = CONFIG.format(workers=workers, listen=", ".join(listen), timeout=drain)
        self.processes.write("proxy.yaml", text)

    async def start(self, *listen: str, drain: float = 60) -> None:
        instance = await self.processes.instance("n1", "127.0.0.1", 0)
        self.instance = int((await instance.printed(r"listening (\d+)", "out"))[1])
        rows = f"[{{address: 127.0.0.1, port: {self.instance}, labels: {{node: n1}}}}]"
        self.processes.write("instances.yaml", f"services: {{b: {rows}, c: {rows}}}")
        self.configure(*listen, drain=drain)
        self.proxy = await self.processes.meshlocal(
            "proxy", "--config", "proxy.yaml", "--discovery", "file:instances.yaml", "--admin", "127.0.0.1:0"
        )
        line = (await self.proxy.printed(r"meshlocal proxy ready: .*admin=http://127.0.0.1:(\d+)\n", "out"))[0]
        assert f" workers={WORKERS} " in line
        self.admin = int(line.rstrip().rpartition(":")[2])
        self.ports = [int(port) for port in re.findall(r"(?:tcp|http)://127\.0\.0\.1:(\d+)(?==| workers)", line)]

    async def ask(self, port: int = 0) -> str:
        """The answer of a connection of its own."""
        return await self.here.ask("127.0.0.1", port or self.ports[0])

    async def page(self, path: str) -> Any:
        status, text = await self.here.get(self.admin, path)
        assert status == 200, text
        return json.loads(text)

    async def pids(self) -> list[int]:
        found = await self.page("/workers")
        return [worker["pid"] for worker in found["workers"]]

    async def open(self, worker: int) -> int:
        """Connections open now, with one worker alone."""
        _, text = await self.here.get(self.admin, f"/live?worker={worker}")
        services: list[dict[str, int]] = json.loads(text.splitlines()[1])["services"]
        return sum(service["open"] for service in services)

    async def until(self, path: str, holds: Callable[[tuple[int, str]], bool]) -> None:
        with trio.fail_after(LIMIT):
            while not holds(await self.here.get(self.admin, path)):  # noqa: ASYNC110 - another process's state
                await trio.sleep(0.02)

    async def open_on_each(self) -> dict[int, trio.SocketStream]:
        """A connection that each worker serves, which answers."""
        found: dict[int, trio.SocketStream] = {}
        numbers = range(1, WORKERS + 1)
        with trio.fail_after(LIMIT):
            while len(found) < WORKERS:
                before = [await self.open(number) for number in numbers]
                stream = await self.here.connect("127.0.0.1", self.ports[0])
                self.streams.append(stream)
                assert await talk(stream) == "n1"
                now = [await self.open(number) for number in numbers]
                [by] = [number for number in numbers if now[number - 1] > before[number - 1]]
                found.setdefault(by, stream)
        return found


async def talk(stream: trio.SocketStream) -> str:
    with trio.fail_after(LIMIT):
        await stream.send_all(b"who?\n")
        return (await stream.receive_some(64)).decode().strip()


async def end(stream: trio.SocketStream) -> None:
    with trio.fail_after(LIMIT):
        await stream.send_eof()
        assert await stream.receive_some(64) == b""
    await stream.aclose()


@pytest.fixture
async def running(processes: Processes, here: Place) -> AsyncIterator[Running]:
    made = Running(processes, here)
    yield made
    for stream in made.streams:
        await trio.aclose_forcefully(stream)


async def test_a_tap_follows_all_workers(running: Running) -> None:
    """R1: whichever worker serves a request, it is told, and once."""
    await running.start(B)
    tap = await running.processes.meshlocal("tap", "b", "-o", "json", "--proxy", f"127.0.0.1:{running.admin}")
    with trio.fail_after(LIMIT):
        while not tap.out:  # until it follows
            await running.ask()
            await trio.sleep(0.05)
    streams = await running.open_on_each()
    peers = {"{}:{}".format(*stream.socket.getsockname()) for stream in running.streams}
    for stream in running.streams:
        await end(stream)
    assert len(streams) == WORKERS
    with trio.fail_after(LIMIT):
        while True:
            told = [json.loads(line)["client"] for line in tap.out.splitlines() if line.endswith("}")]
            if peers <= set(told):
                break
            await trio.sleep(0.02)
    assert len(told) == len(set(told))


async def test_the_log_level_is_changed_in_all_processes(running: Running) -> None:
    """At debug, each worker says what became of each request; and from then on no more."""
    await running.start(B)
    for level, told in (("debug", True), ("info", False)):
        status, _ = await running.here.get(running.admin, f"/log?level={level}", method="PUT")
        assert status == 200
        assert await running.page("/log") == {"level": level, "levels": {}}
        start = len(running.proxy.err)
        streams = await running.open_on_each()
        for stream in running.streams:
            await end(stream)
        running.streams.clear()
        if told:
            for number in streams:
                await running.proxy.printed(rf'"event":"request ended","service":"b",.*"worker":{number}', start=start)
        else:
            assert "request ended" not in running.proxy.err[start:]
    status, text = await running.here.get(running.admin, "/log?level=loud", method="PUT")
    assert (status, text.startswith("log level 'loud' is none of debug, info, warning, error")) == (400, True)


async def test_traffic_reaches_every_worker_and_is_counted_once(running: Running) -> None:
    """Two listeners on any port, one of them both families': each worker serves them, and `/metrics` adds up."""
    await running.start(B, "'http://127.0.0.1:0'")
    streams = await running.open_on_each()
    opened = len(running.streams)
    for _ in range(20):
        assert await running.ask() == "n1"
    found = await running.here.measured(
        running.admin, lambda metrics: metrics("requests_total", service="b", outcome="served") == 20
    )
    assert found("connections_open", service="b") == opened
    assert found("picks_total", service="b", tier="node") == 20 + opened
    assert (found("workers"), found("workers_ready"), found("worker_restarts_total")) == (WORKERS, WORKERS, 0)
    # What all of them see is not counted twice.
    assert (found("instances", service="b", tier="node"), found("ready")) == (1, 1)
    assert (await running.page("/explain?service=b&worker=2"))["service"] == "b"
    assert [each["service"] for each in await running.page("/services")] == ["b"]
    assert (await running.page("/config"))["proxy"]["workers"] == WORKERS
    assert (await running.here.get(running.admin, "/services?worker=9"))[0] == 503
    for stream in streams.values():
        await end(stream)


async def test_sigterm_drains_all_workers(running: Running) -> None:
    """S1: not ready at once, refused after it, and status 0 once the last connection has ended."""
    await running.start(B)
    streams = await running.open_on_each()
    for stream in running.streams:
        if stream not in streams.values():
            await end(stream)
    running.proxy.signal(signal.SIGTERM)
    await running.until("/readyz", lambda found: found == (503, "not ready: draining\n"))
    with trio.fail_after(LIMIT):
        while True:
            try:
                stream = await running.here.connect("127.0.0.1", running.ports[0])
            except OSError:
                break
            await stream.aclose()
            await trio.sleep(0.02)
    for stream in streams.values():
        assert await talk(stream) == "n1"
        await end(stream)
    assert await running.proxy.exited() == 0


async def test_a_group_wide_sigterm_is_one_order(running: Running) -> None:
    """S1: a service manager signals every process; what is under way still finishes."""
    await running.start(B)
    await running.open_on_each()
    for pid in await running.pids():
        os.kill(pid, signal.SIGTERM)
    running.proxy.signal(signal.SIGTERM)
    await running.until("/readyz", lambda found: found[0] == 503)
    for stream in running.streams:
        assert await talk(stream) == "n1"
        await end(stream)
    assert await running.proxy.exited() == 0


async def test_what_does_not_end_in_time_is_cut_in_every_worker(running: Running) -> None:
    """S1: status 1 then."""
    await running.start(B, drain=0.2)
    streams = await running.open_on_each()
    running.proxy.signal(signal.SIGTERM)
    for stream in streams.values():
        with trio.fail_after(LIMIT), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(64)
    assert await running.proxy.exited() == 1


async def test_a_second_signal_ends_all_workers_now(running: Running) -> None:
    """S1."""
    await running.start(B)
    streams = await running.open_on_each()
    running.proxy.signal(signal.SIGTERM)
    await running.until("/readyz", lambda found: found[0] == 503)
    running.proxy.signal(signal.SIGTERM)
    for stream in streams.values():
        with trio.fail_after(LIMIT), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(64)
    assert await running.proxy.exited() == 1


async def test_a_killed_worker_is_replaced_and_the_others_go_on(running: Running) -> None:
    """Only its own connections are lost; counts never fall, and the port stays."""
    await running.start(B)
    streams = await running.open_on_each()
    for _ in range(10):
        await running.ask()
    before = await running.here.measured(
        running.admin, lambda metrics: metrics("requests_total", service="b", outcome="served") == 10
    )
    pids = await running.pids()
    os.kill(pids[0], signal.SIGKILL)
    with trio.fail_after(LIMIT):
        # The kernel closes what a killed process had open.
        assert await streams[1].receive_some(1) == b""
    assert await talk(streams[2]) == "n1"
    await running.proxy.printed('worker ended: starting another.*"worker":1,"status":-9')
    await running.until("/workers", lambda found: json.loads(found[1])["restarts"] == 1)
    await running.until("/readyz", lambda found: found == (200, "ready\n"))
    after = await running.pids()
    assert after[0] != pids[0]
    assert after[1] == pids[1]
    _, text = await running.here.get(running.admin, "/metrics")
    told = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(told) == len(set(told)), "each name stands once"
    found = await running.here.metrics(running.admin)
    assert found("requests_total", service="b", outcome="served") >= 10
    assert found("picks_total", service="b") >= before("picks_total", service="b")
    assert found("worker_restarts_total") == 1
    # The new one serves, too.
    again = await running.open_on_each()
    assert set(again) == {1, 2}
    assert await talk(streams[2]) == "n1"


async def test_workers_end_when_the_supervisor_is_killed(running: Running) -> None:
    """Nobody would stop them, or start them again."""
    await running.start(B)
    pids = await running.pids()
    assert [alive(pid) for pid in pids] == [True] * WORKERS
    await running.proxy.killed()
    with trio.move_on_after(LIMIT):
        while any(alive(pid) for pid in pids):  # noqa: ASYNC110 - no children of this process
            await trio.sleep(0.02)
    assert [alive(pid) for pid in pids] == [False] * WORKERS


async def test_sighup_is_applied_by_all_workers_or_by_none(running: Running) -> None:
    """S2: a mistake, a port that is taken, and what takes a restart change nothing in any worker."""
    await running.start(B)
    streams = await running.open_on_each()
    bad = [
        ("proxy: {listen: []}", "proxy.listen: no listener is given"),
        (f"proxy: {{workers: 2, node_name: n1, listen: ['tcp://127.0.0.1:{running.instance}=b']}}", "already in use"),
        (CONFIG.format(workers=3, listen=B, timeout=60), "proxy.workers: takes a restart to change"),
    ]
    for text, said in bad:
        running.processes.write("proxy.yaml", text)
        running.proxy.signal(signal.SIGHUP)
        await running.proxy.printed(f"config not applied.*{said}")
        for stream in streams.values():
            assert await talk(stream) == "n1"
        assert await running.ask() == "n1"
    assert "config applied" not in running.proxy.err
    # Mended, and with one more listener, it is applied by each; the port that the system chose stays.
    running.configure(B, "'tcp://127.0.0.1:0=c'")
    running.proxy.signal(signal.SIGHUP)
    await running.proxy.printed('config applied to all workers.*"workers":2')
    _, text = await running.here.get(running.admin, "/")
    port = int(re.findall(r"tcp://127\.0\.0\.1:(\d+)</code></td><td>c", text)[0])
    for number in (1, 2):
        _, text = await running.here.get(running.admin, f"/?worker={number}")
        assert f"tcp://127.0.0.1:{port}</code></td><td>c" in text
        assert f"tcp://127.0.0.1:{running.ports[0]}</code></td><td>b" in text
    assert await running.ask(port) == "n1"
    for stream in streams.values():
        assert await talk(stream) == "n1"


async def test_a_port_in_use_is_named_and_no_worker_starts(processes: Processes) -> None:
    instance = await processes.instance("n1", "127.0.0.1", 0)
    port = (await instance.printed(r"listening (\d+)", "out"))[1]
    processes.write("instances.yaml", "services: {b: []}")
    proxy = await processes.meshlocal(
        *("proxy", "--discovery", "file:instances.yaml", "--listen", f"tcp://127.0.0.1:{port}=b"),
        *("--admin", "none", "--workers", "2"),
    )
    assert await proxy.exited() == 1
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in proxy.err


async def test_a_worker_that_ends_before_the_proxy_was_ready_ends_it(processes: Processes, here: Place) -> None:
    """With status 1, instead of starting it again and again: what does not start is for whoever started it to see."""
    processes.write("proxy.yaml", "proxy: {workers: 2, attempts: {first_snapshot_wait: 600}}")
    proxy = await processes.meshlocal(
        *("proxy", "--config", "proxy.yaml", "--listen", "tcp://127.0.0.1:0=b", "--admin", "none"),
        *("--discovery", "grpc://127.0.0.1:1"),
    )
    # Nobody is there: both say so, and wait.
    await proxy.printed('"worker":1')
    await proxy.printed('"worker":2')
    first, _ = children(proxy.process.pid)
    os.kill(first, signal.SIGKILL)
    await proxy.printed("worker ended before the proxy was ready: stopping")
    assert await proxy.exited() == 1


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    # A thread of Trio's starts them.
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process that is no child of this one runs."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
