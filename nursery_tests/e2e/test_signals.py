"""Stopping and reloading, as an operator or a service manager does it: S1 and S2 with real processes."""

from __future__ import annotations

from signal import SIGHUP, SIGINT, SIGTERM
from typing import Any

import pytest
import trio

from nursery_tests.ports import free_port

LIMIT = 20


class Running:
    """A proxy with an instance behind it, configured by a file."""

    def __init__(self, processes: Any, here: Any) -> None:
        self.processes, self.here = processes, here
        self.proxy: Any = None
        self.admin = 0
        self.ports: dict[str, int] = {}

    async def start(self, config: str) -> None:
        instance = await self.processes.instance("n1", "127.0.0.1", 0, 0)
        first, second = (await instance.printed(r"listening (\d+) (\d+)", "out")).groups()
        row = "{{address: 127.0.0.1, port: {}}}"
        self.processes.write(
            "instances.yaml", f"services: {{b: [{row.format(first)}], c: [{row.format(second)}], d: [{row.format(1)}]}}"
        )
        self.processes.write("proxy.yaml", config)
        self.proxy = await self.processes.meshlocal(
            "proxy", "--config", "proxy.yaml", "--discovery", "file:instances.yaml", "--admin", "127.0.0.1:0"
        )
        ready = (await self.proxy.printed(r"meshlocal proxy ready: .*admin=http://127.0.0.1:(\d+)\n", "out"))[0]
        for part in ready.split():
            if part.startswith("tcp://"):
                address, _, service = part.partition("=")
                self.ports[service] = int(address.rpartition(":")[2])
        self.admin = int(ready.rstrip().rpartition(":")[2])

    async def open(self, service: str = "b") -> Talk:
        talk = Talk(await self.here.connect("127.0.0.1", self.ports[service]))
        assert await talk.ask() == "n1"
        return talk

    async def readiness(self) -> tuple[int, str]:
        found: tuple[int, str] = await self.here.get(self.admin, "/readyz")
        return found


class Talk:
    """A connection that stays open."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def ask(self) -> str:
        with trio.fail_after(LIMIT):
            await self.stream.send_all(b"who?\n")
            return (await self.stream.receive_some(64)).decode().strip()

    async def end(self) -> None:
        """End in good order, and see the other side do so too."""
        with trio.fail_after(LIMIT):
            await self.stream.send_eof()
            assert await self.stream.receive_some(64) == b""
        await self.stream.aclose()

    async def reset(self) -> None:
        """Be reset."""
        with trio.fail_after(LIMIT), pytest.raises(trio.BrokenResourceError):
            await self.stream.receive_some(64)
        await self.stream.aclose()


@pytest.fixture
def running(processes: Any, here: Any) -> Running:
    return Running(processes, here)


def config(*listen: str, **drain: float) -> str:
    drained = ", ".join(f"{key}: {value}" for key, value in drain.items())
    return f"proxy:\n  listen: [{', '.join(listen)}]\n  drain: {{{drained}}}\n"


B, C = "'tcp://127.0.0.1:0=b'", "'tcp://127.0.0.1:0=c'"


async def test_a_drain_lets_what_is_under_way_finish(running: Running) -> None:
    """S1: not ready at once, taken for `drain.delay` still, refused after it; status 0 once the last has ended."""
    await running.start(config(B, delay=3, timeout=60))
    early = await running.open()
    running.proxy.signal(SIGTERM)
    await running.proxy.printed('"event":"draining"')
    assert await running.readiness() == (503, "not ready: draining\n")
    late = await running.open()
    # The listener goes once the delay is over.
    await refuses(running.ports["b"])
    # What is under way goes on, and the admin pages with it.
    assert (await early.ask(), await late.ask()) == ("n1", "n1")
    assert await running.readiness() == (503, "not ready: draining\n")
    assert (await running.here.get(running.admin, "/livez"))[0] == 200
    await early.end()
    await late.end()
    assert await running.proxy.exited() == 0


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
async def test_an_idle_proxy_stops_at_once(running: Running, number: Any) -> None:
    await running.start(config(B, timeout=60))
    running.proxy.signal(number)
    assert await running.proxy.exited() == 0


async def test_what_does_not_end_in_time_is_cut(running: Running) -> None:
    """S1: at the end of `drain.timeout` what is left is reset, never ended as if it were whole; status 1."""
    await running.start(config(B, timeout=0.3))
    talk = await running.open()
    running.proxy.signal(SIGTERM)
    await talk.reset()
    assert await running.proxy.exited() == 1
    await running.proxy.printed('connections cut at the end of the drain.*count":1')


async def test_a_second_signal_ends_it_now(running: Running) -> None:
    """S1: whatever the delay and the timeout are."""
    await running.start(config(B, delay=100, timeout=100))
    talk = await running.open()
    running.proxy.signal(SIGTERM)
    await running.proxy.printed('"event":"draining"')
    running.proxy.signal(SIGINT)
    await talk.reset()
    assert await running.proxy.exited() == 1
    await running.proxy.printed('"event":"stopping now"')


async def test_a_second_signal_after_the_delay_ends_it_now(running: Running) -> None:
    await running.start(config(B, delay=0, timeout=100))
    talk = await running.open()
    running.proxy.signal(SIGTERM)
    await refuses(running.ports["b"])
    assert await talk.ask() == "n1"
    running.proxy.signal(SIGTERM)
    await talk.reset()
    assert await running.proxy.exited() == 1


async def test_sighup_adds_and_removes_listeners_without_dropping_a_connection(running: Running) -> None:
    """S2: connections of a listener that went, and of one that stayed, go on."""
    ports = [free_port() for _ in range(3)]
    b, c, other = (f"'tcp://127.0.0.1:{port}={service}'" for port, service in zip(ports, "bcb", strict=True))
    await running.start(config(b, c, timeout=60))
    on_b, on_c = await running.open("b"), await running.open("c")
    running.processes.write("proxy.yaml", config(b, other, timeout=60))
    running.proxy.signal(SIGHUP)
    await running.proxy.printed("config applied")
    assert (await on_b.ask(), await on_c.ask()) == ("n1", "n1")
    await refuses(ports[1])
    assert await running.here.ask("127.0.0.1", ports[0]) == "n1"
    assert await running.here.ask("127.0.0.1", ports[2]) == "n1"
    # And what went comes back; a listener may change its service, too.
    running.processes.write("proxy.yaml", config(f"'tcp://127.0.0.1:{ports[0]}=c'", c, timeout=60))
    running.proxy.signal(SIGHUP)
    await running.proxy.printed("config applied(?s:.*)config applied")
    running.ports = {"c": ports[0]}
    replaced = await running.open("c")
    assert await running.here.ask("127.0.0.1", ports[1]) == "n1"
    for talk in (on_b, on_c, replaced):
        await talk.end()
    running.proxy.signal(SIGTERM)
    assert await running.proxy.exited() == 0


async def test_a_reload_does_not_disturb_a_drain(running: Running) -> None:
    """S1, S2: what is under way still finishes, and nothing new is listened on."""
    await running.start(config(B, timeout=60))
    talk = await running.open()
    running.proxy.signal(SIGTERM)
    await refuses(running.ports["b"])
    port = free_port()
    running.processes.write("proxy.yaml", config(B, f"'tcp://127.0.0.1:{port}=c'", timeout=60))
    running.proxy.signal(SIGHUP)
    await running.proxy.printed("config not applied.*draining")
    await refuses(port)
    assert await talk.ask() == "n1"
    await talk.end()
    assert await running.proxy.exited() == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("proxy: {listen: [], drian: {}}", "proxy.yaml:1: proxy.drian: unknown key; did you mean 'drain'?"),
        ("proxy: {listen: [tcp://127.0.0.1:0=b], drain: {delay: x}}", "proxy.yaml:1: proxy.drain.delay: "),
        ("proxy: [", "proxy.yaml:2:1: "),
        ("proxy: {listen: []}", "proxy.listen: no listener is given"),
        ("proxy: {listen: [tcp://192.0.2.1:1=b]}", "proxy.listen[0]: cannot listen on 192.0.2.1:1: "),
        (
            "proxy: {listen: [tcp://127.0.0.1:0=b], discovery: {backoff_max: 9}}",
            "proxy.discovery: takes a restart to change",
        ),
        (None, "proxy.yaml: cannot be read: No such file or directory"),
    ],
)
async def test_a_bad_config_changes_nothing(running: Running, change: str | None, said: str) -> None:
    """S2: it is reported with the path of the key at fault."""
    await running.start(config(B))
    talk = await running.open()
    if change is None:
        (running.processes.folder / "proxy.yaml").unlink()
    else:
        running.processes.write("proxy.yaml", change)
    running.proxy.signal(SIGHUP)
    line = (await running.proxy.printed(".*config not applied.*"))[0]
    assert said in line
    assert await talk.ask() == "n1"
    assert await running.here.ask("127.0.0.1", running.ports["b"]) == "n1"
    # Mended, it is applied.
    running.processes.write("proxy.yaml", config(f"'tcp://127.0.0.1:{free_port()}=c'"))
    running.proxy.signal(SIGHUP)
    await running.proxy.printed("config applied")
    assert await talk.ask() == "n1"
    await talk.end()


async def test_a_discovery_server_drains(processes: Any, here: Any) -> None:
    """S1: it is not ready at once, ends its watches so that proxies turn elsewhere, and ends with status 0."""
    processes.write("instances.yaml", "services: {b: []}")
    server = await processes.meshlocal(
        *("discovery", "--bind", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--source", "file:instances.yaml"),
        env={"MESHLOCAL_DISCOVERY__DRAIN__DELAY": "2"},
    )
    url, admin = (await server.printed(r"ready: (\S+) admin=http://127.0.0.1:(\d+)", "out")).groups()
    assert await here.get(int(admin), "/readyz") == (200, "ready\n")
    proxy = await processes.meshlocal("proxy", "--discovery", url, "--listen", "tcp://127.0.0.1:0=b", "--admin", "none")
    await proxy.printed("discovery is watched")
    server.signal(SIGTERM)
    await server.printed('"event":"draining"')
    assert await here.get(int(admin), "/readyz") == (503, "not ready: draining\n")
    await proxy.printed("discovery is away.*this server is going away")
    assert await server.exited() == 0


async def test_a_second_signal_ends_discovery_now(processes: Any) -> None:
    processes.write("instances.yaml", "services: {b: []}")
    server = await processes.meshlocal(
        "discovery",
        *("--bind", "127.0.0.1:0", "--source", "file:instances.yaml"),
        env={"MESHLOCAL_DISCOVERY__DRAIN__DELAY": "100"},
    )
    await server.printed("ready: ", "out")
    server.signal(SIGTERM)
    await server.printed('"event":"draining"')
    server.signal(SIGTERM)
    assert await server.exited() == 0


async def test_discovery_reloads_its_logging_and_refuses_the_rest(processes: Any) -> None:
    """S2."""
    processes.write("instances.yaml", "services: {b: []}")
    text = "discovery: {{bind: ['127.0.0.1:0'], sources: ['file:instances.yaml'], zone: {}}}\nlog: {{level: {}}}\n"
    processes.write("discovery.yaml", text.format("z1", "info"))
    server = await processes.meshlocal("discovery", "--config", "discovery.yaml")
    await server.printed("ready: ", "out")
    processes.write("discovery.yaml", text.format("z2", "info"))
    server.signal(SIGHUP)
    await server.printed("config not applied.*discovery: takes a restart to change")
    processes.write("discovery.yaml", text.format("z1", "loud"))
    server.signal(SIGHUP)
    await server.printed("config not applied.*discovery.yaml:2: log.level: ")
    processes.write("discovery.yaml", text.format("z1", "debug"))
    server.signal(SIGHUP)
    await server.printed("config applied")
    server.signal(SIGTERM)
    assert await server.exited() == 0


async def refuses(port: int) -> None:
    """Wait until new connections are refused."""
    with trio.fail_after(LIMIT):
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
            except OSError:
                return
            await stream.aclose()
            await trio.sleep(0.02)


async def test_whether_it_waits_awake_can_be_changed(running: Running) -> None:
    """S2: `busy_poll` is applied to what is under way, and what it costs is counted."""

    async def spent() -> float:
        return float((await running.here.metrics(running.admin))("busy_poll_seconds_total"))

    await running.start(config(B))
    talk = await running.open()
    for _ in range(20):
        assert await talk.ask() == "n1"
    assert await spent() > 0
    running.processes.write("proxy.yaml", config(B) + "  busy_poll: 0\n")
    running.proxy.signal(SIGHUP)
    await running.proxy.printed("config applied")
    before = await spent()
    for _ in range(20):
        assert await talk.ask() == "n1"
    assert await spent() == before
    await talk.end()
