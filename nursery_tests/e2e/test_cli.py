"""The command line as processes: answers, and one clear line with a status for whatever cannot be done."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio
import trustme

from nursery_tests.ports import free_port

INSTANCES = """\
zone: z1
cluster: c1
services:
  b:
    - {address: 127.0.0.1, port: 9001, port_name: grpc, labels: {node: n1}}
    - {address: 127.0.0.2, port: 9002, labels: {node: n2}}
    - {address: 127.0.0.3, port: 9003}
  empty: []
"""
UNUSED = ("--admin", "none")
TCP = ("--listen", "tcp://127.0.0.1:0=b")


class Done(NamedTuple):
    status: int
    out: str
    err: str


class Cli:
    """Runs `meshlocal` to its end, in a folder with an instances file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "instances.yaml").write_text(INSTANCES)

    async def __call__(self, *arguments: str, shell: str = "", **env: str) -> Done:
        command = [sys.executable, "-m", "meshlocal", *arguments]
        if shell:
            command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MESHLOCAL_") and k != "NODE_NAME"}
        with trio.fail_after(20):
            done = await trio.run_process(
                command,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                cwd=self.folder,
                env={**clean, **env},
            )
        assert "Traceback" not in done.stderr.decode()
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    async def failed(self, *arguments: str, **env: str) -> str:
        """What it says on stderr where the world is."""
        status, out, err = await self(*arguments, **env)
        assert (status, out) == (1, "")
        return err


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture
async def discovery(cli: Cli, processes: Any) -> str:
    """The URL of a discovery server over the instances file."""
    program = await processes.meshlocal("discovery", "--bind", "127.0.0.1:0", "--source", "file:instances.yaml")
    return str((await program.printed(r"^meshlocal discovery ready: (grpc://127\.0\.0\.1:\d+)$", "out"))[1])


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody else listens, who never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


async def test_get_and_explain_ask_a_server(cli: Cli, discovery: str) -> None:
    ask = partial(cli, MESHLOCAL_PROXY__DISCOVERY__URLS=discovery, NODE_NAME="n1")
    assert lines((await ask("get", "services")).out) == [["NAME", "INSTANCES"], ["b", "3"], ["empty", "0"]]
    view = json.loads((await ask("get", "instances", "b", "-o", "json")).out)
    assert view["service"] == "b"
    assert [each["node"] for each in view["instances"]] == ["n1", "n2", None]
    assert lines((await ask("get", "clusters")).out)[1:] == [["c1", "z1"]]
    assert [line[0] for line in lines((await ask("get", "instances")).out)] == ["SERVICE", "b", "b", "b"]
    nodes = json.loads((await ask("get", "nodes", "-o", "json")).out)
    assert [(node["name"], node["services"]) for node in nodes] == [
        ("n1", {"b": 1}),
        ("n2", {"b": 1}),
        (None, {"b": 1}),
    ]
    status, out, err = await ask("explain", "b")
    assert (status, err) == (0, "")
    steps = [line for line in lines(out) if line and line[0].isdecimal()]
    assert [step[3] for step in steps] == ["node", "other", "other"]


async def test_who_follows_discovery_and_where_callers_outnumber_instances(
    cli: Cli, discovery: str, processes: Any
) -> None:
    """Which proxies there are, whether one is behind, and which nodes are hot: by one question each."""
    assert lines((await cli("get", "proxies", "--discovery", discovery)).out) == [
        ["NAME", "NODE", "ADDRESS", "SOFTWARE", "BEHIND", "AGE", "SERVICES"]
    ]
    for node in ("n1", "n1", "n9"):
        listen = ("--listen", "tcp://127.0.0.1:0=b", "--listen", "tcp://127.0.0.1:0=empty")
        proxy = await processes.meshlocal("proxy", "--discovery", discovery, *listen, *UNUSED, env={"NODE_NAME": node})
        await proxy.printed("meshlocal proxy ready", "out")
    proxies = json.loads((await cli("get", "proxies", "-o", "json", "--discovery", discovery)).out)
    assert sorted(each["node"] for each in proxies) == ["n1", "n1", "n9"]
    for each in proxies:
        assert each["software"].startswith("meshlocal proxy ")
        assert (each["name"], each["behind"], sorted(each["services"])) == (socket.gethostname(), 0, ["b", "empty"])
    assert len({each["services"]["b"] for each in proxies}) == 1
    hot = (await cli("get", "hot-nodes", "--discovery", discovery)).out
    assert sorted(lines(hot)[1:]) == [
        ["b", "n1", "2", "1"],
        ["b", "n9", "1", "0"],
        ["empty", "n1", "2", "0"],
        [
            *("empty", "n9"),
            *("1", "0"),
        ],
    ]
    wide = (await cli("get", "proxies", "-o", "wide", "--discovery", discovery)).out
    assert f"b@{proxies[0]['services']['b'][:12]}, empty@" in wide
    refused = await cli.failed("get", "proxies", "--discovery", "file:instances.yaml")
    assert "nobody watches a file: ask a discovery server" in refused


async def test_get_follows_instances(cli: Cli, discovery: str, processes: Any) -> None:
    """What is there, and each change of it, until it is interrupted."""
    # What a shell runs in the background ignores Ctrl-C, and so would all that is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    watch = await processes.meshlocal("get", "instances", "b", "-w", "-o", "json", "--discovery", discovery)
    for port in (9001, 9002, 9003):
        await watch.printed(rf'{{"event": "added", "service": "b", "instance": .*"port": {port}', "out")
    processes.write("instances.yaml", INSTANCES.replace("9002", "9004").replace("node: n1", "node: n7"))
    await watch.printed(r'"changed", .*"port": 9001, .*"node": "n7"', "out")
    await watch.printed(r'"removed", .*"port": 9002', "out")
    await watch.printed(r'"added", .*"port": 9004', "out")
    watch.signal(signal.SIGINT)
    assert await watch.exited() == 130
    assert watch.err == ""


async def test_get_waits_for_a_service_that_nobody_knows(cli: Cli, processes: Any) -> None:
    watch = await processes.meshlocal("get", "instances", "late", "-w", "--discovery", "file:instances.yaml")
    await watch.printed("meshlocal: no registry knows a service 'late'; waiting for one")
    processes.write("instances.yaml", f"{INSTANCES}  late: [{{address: 127.0.0.1, port: 9009}}]\n")
    await watch.printed(r"added +127.0.0.1 +9009 ", "out")


async def test_get_ends_when_nobody_reads_what_it_follows(cli: Cli, processes: Any) -> None:
    """As `get -w | head` does. It ends with the next line that it cannot write."""
    async with trio.open_nursery() as nursery:
        done: list[Done] = []

        async def follow() -> None:
            file = "file:instances.yaml"
            done.append(await cli("get", "instances", "b", "-w", "--discovery", file, shell="| head -n 1"))

        nursery.start_soon(follow)
        with trio.fail_after(15):
            port = 9100
            while not done:
                port += 1
                processes.write("instances.yaml", INSTANCES.replace("9002", str(port)))
                # A file that changes all the time is not read: it is still being written.
                await trio.sleep(1)
    assert done[0].out.startswith("EVENT")
    assert done[0].err == ""


async def test_explain_asks_a_running_proxy(cli: Cli, processes: Any) -> None:
    proxy = await processes.meshlocal(
        "proxy", "--discovery", "file:instances.yaml", *TCP, "--admin", "127.0.0.1:0", env={"NODE_NAME": "n2"}
    )
    admin = (await proxy.printed(r"admin=http://(\S+)", "out"))[1]
    status, out, err = await cli("explain", "b", "--proxy", admin)
    assert (status, err) == (0, "")
    assert "service b, seen from node n2" in out
    assert (await cli("explain", "b", "--proxy", f"http://{admin}/"))[:2] == (0, out)
    assert (await cli.failed("explain", "zz", "--proxy", admin)).startswith(f"meshlocal: {admin}: no listener names")


async def test_tap_shows_requests_as_they_end(cli: Cli, processes: Any, here: Any) -> None:
    """R1: for people and as JSON; a reader that leaves ends it without a word, and so does the proxy."""
    far = await processes.instance("n2", "127.0.0.1", 0)
    port = int((await far.printed(r"listening (\d+)", "out"))[1])
    dead = free_port()
    instances = f"""\
services:
  b:
    - {{address: 127.0.0.1, port: {dead}, labels: {{node: n1}}}}
    - {{address: 127.0.0.1, port: {port}, labels: {{node: n2}}}}
"""
    processes.write("instances.yaml", instances)
    proxy = await processes.meshlocal(
        *("proxy", "--discovery", "file:instances.yaml", *TCP, "--admin", "127.0.0.1:0", "--node-name", "n1")
    )
    ready = await proxy.printed(r"tcp://127.0.0.1:(\d+)=b admin=http://(\S+)", "out")
    tap = await processes.meshlocal("tap", "b", "--left", "--proxy", ready[2])
    machine = await processes.meshlocal("tap", "b", "--failed", "-o", "json", "--proxy", f"http://{ready[2]}")
    none = await cli.failed("tap", "c", "--proxy", ready[2])
    assert none == f"meshlocal: {ready[2]}: no such service: 'c'\n"
    with trio.fail_after(20):
        while not (tap.out and machine.out):
            # Until both have begun to follow.
            assert await here.ask("127.0.0.1", int(ready[1])) == "n2"
    line = tap.out.splitlines()[0]
    shown = rf"tcp  served  \S+  127.0.0.1:{port} \(n2, other\)  local_failed  after 127.0.0.1:{dead} \(node\) refused"
    assert re.search(shown, line) or "local_ejected" in line
    row = json.loads(machine.out.splitlines()[0])
    assert (row["service"], row["tier"], row["failed"][0]["error"]) == ("b", "other", "refused")
    proxy.signal(signal.SIGTERM)
    assert await proxy.exited() == 0
    assert (await tap.exited(), tap.err) == (0, "")
    assert (await machine.exited(), machine.err) == (0, "")


async def test_a_registry_that_does_not_know_the_service_is_told_by_a_status(cli: Cli, processes: Any) -> None:
    """With --proxy as with --discovery."""
    listen = ("--listen", "tcp://127.0.0.1:0=zz")
    env = {"NODE_NAME": "n1"}
    source = ("--discovery", "file:instances.yaml")
    proxy = await processes.meshlocal("proxy", *source, *listen, "--admin", "127.0.0.1:0", env=env)
    admin = (await proxy.printed(r"admin=http://(\S+)", "out"))[1]
    status, out, err = await cli("explain", "zz", "--proxy", admin)
    assert (status, err) == (1, "")
    assert "no registry knows this service" in out


async def test_what_is_given_and_does_nothing_is_said_at_the_start(cli: Cli, processes: Any, tmp_path: Path) -> None:
    """A misspelt service, and a variable with one underscore."""
    config = tmp_path / "proxy.yaml"
    config.write_text(
        "proxy: {listen: ['tcp://127.0.0.1:0=b'], services: {bb: {}}, admin: null,"
        f" discovery: {{urls: ['file:{tmp_path}/instances.yaml'], cache_file: /nowhere/snapshots}}}}"
    )
    env = {"MESHLOCAL_PROXY_ACCESS_LOG": "true", "NODE_NAME": "n1"}
    proxy = await processes.meshlocal("proxy", "--config", str(config), env=env)
    await proxy.printed("meshlocal proxy ready", "out")
    told = "environment variable MESHLOCAL_PROXY_ACCESS_LOG is no key of the configuration"
    await proxy.printed(f'"environment variable has no use","problem":"{told}')
    await proxy.printed("proxy.services.bb is not used: no listener and no route names it; did you mean 'b'")
    await proxy.printed("proxy.discovery.cache_file is not used: an instances file needs none")


async def test_a_cache_file_that_cannot_be_written_is_said_at_the_start(cli: Cli, processes: Any) -> None:
    """It costs the cache, and no traffic (P1)."""
    env = {"MESHLOCAL_PROXY__DISCOVERY__CACHE_FILE": "/nowhere/snapshots", "NODE_NAME": "n1"}
    source = ("--discovery", "grpc://127.0.0.1:1")
    proxy = await processes.meshlocal("proxy", *source, *TCP, "--admin", "127.0.0.1:0", env=env)
    await proxy.printed("cache file cannot be written")
    await proxy.printed("meshlocal proxy ready", "out")


async def test_a_port_in_use_is_said(cli: Cli, taken: int) -> None:
    line = f"cannot listen on 127.0.0.1:{taken}: Address already in use\n"
    listen = ("--listen", f"tcp://127.0.0.1:{taken}=b")
    source = ("--discovery", "file:instances.yaml")
    assert await cli.failed("proxy", *source, *TCP, *listen, *UNUSED) == f"meshlocal: proxy.listen[1]: {line}"
    assert (
        await cli.failed("proxy", *source, *TCP, "--admin", f"127.0.0.1:{taken}") == f"meshlocal: proxy.admin: {line}"
    )
    file = ("--source", "file:instances.yaml")
    told = await cli.failed("discovery", "--bind", f"127.0.0.1:{taken}", *file)
    assert told == f"meshlocal: discovery.bind[0]: {line}"
    foreign = await cli.failed("discovery", "--bind", "192.0.2.1:7070", "--source", "file:instances.yaml")
    assert foreign == "meshlocal: discovery.bind[0]: cannot listen on 192.0.2.1:7070: Cannot assign requested address\n"


BAD_INSTANCES = """\
services:
  b:
    - {address: '', port: 9000}
    - {address: 10.0.0.1, port: 0}
    - {address: 10.0.0.1, port: 70000}
    - {address: b.example, port: 9000}
"""
BAD_LINES = (
    "bad.yaml:3: services.b[0].address: is empty",
    "bad.yaml:4: services.b[1].port: 0 is not within 1 to 65535",
    "bad.yaml:5: services.b[2].port: 70000 is not within 1 to 65535",
    "bad.yaml:6: services.b[3].address: ",
)


async def test_a_malformed_instances_file_says_each_line_and_key(cli: Cli, processes: Any) -> None:
    (cli.folder / "bad.yaml").write_text(BAD_INSTANCES)
    # The server starts all the same, says it, answers that it has nothing, and serves once the file is mended.
    server = await processes.meshlocal("discovery", "--bind", "127.0.0.1:0", "--source", "file:bad.yaml")
    for start in BAD_LINES:
        await server.printed(start.replace("[", r"\[").replace("]", r"\]"))
    url = (await server.printed(r"(grpc://\S+) \(not in sync yet: file:bad.yaml\)", "out"))[1]
    assert "not in sync yet with file:bad.yaml" in await cli.failed("get", "services", "--discovery", url)
    processes.write("bad.yaml", INSTANCES)
    await server.printed("source in sync")
    assert lines((await cli("get", "services", "--discovery", url)).out)[1:] == [["b", "3"], ["empty", "0"]]
    # Broken again, it changes nothing.
    processes.write("bad.yaml", BAD_INSTANCES)
    await server.printed("what it said before")
    assert lines((await cli("get", "services", "--discovery", url)).out)[1:] == [["b", "3"], ["empty", "0"]]


async def test_an_unknown_service_is_said(cli: Cli, discovery: str, processes: Any, here: Any) -> None:
    err = await cli.failed("get", "instances", "zz", "--discovery", discovery)
    assert err == f"meshlocal: {discovery}: no registry knows a service 'zz'\n"
    # A proxy whose listener names it starts, says it, and resets its clients' connections (A6).
    proxy = await processes.meshlocal("proxy", "--discovery", discovery, "--listen", "tcp://127.0.0.1:0=zz", *UNUSED)
    port = int((await proxy.printed(r"tcp://127.0.0.1:(\d+)=zz", "out"))[1])
    await proxy.printed("no registry knows the service")
    # The reset can come so soon that the client's connect finds it.
    with trio.fail_after(20), pytest.raises((trio.BrokenResourceError, ConnectionResetError)):
        async with await here.connect("127.0.0.1", port) as stream:
            await stream.receive_some(1)
    await proxy.printed('"outcome":"no_instance"')


async def test_discovery_that_comes_late_is_served_from(cli: Cli, processes: Any, here: Any) -> None:
    """A7, D1: a proxy starts without its discovery, holds a request for it, and serves it once it comes."""
    port = free_port()
    instance = await processes.instance("n1", "127.0.0.1", 0)
    at = int((await instance.printed(r"listening (\d+)", "out"))[1])
    (cli.folder / "instances.yaml").write_text(f"services: {{b: [{{address: 127.0.0.1, port: {at}}}]}}")
    proxy = await processes.meshlocal(
        *("proxy", "--discovery", f"grpc://127.0.0.1:{port}", *TCP, "--admin", "127.0.0.1:0"),
        env={
            "MESHLOCAL_PROXY__ATTEMPTS__FIRST_SNAPSHOT_WAIT": "0.3",
            "MESHLOCAL_PROXY__SERVICES__B__ATTEMPTS__DEADLINE": "20",
            "MESHLOCAL_PROXY__DISCOVERY__BACKOFF_MAX": "0.3",
        },
    )
    ready = await proxy.printed(
        r"tcp://127.0.0.1:(\d+)=b admin=http://127.0.0.1:(\d+) \(nothing heard yet of: b\)", "out"
    )
    assert proxy.err.count("discovery is away") == 1
    assert "connection refused" in proxy.err
    assert (await here.get(int(ready[2]), "/readyz"))[0] == 200
    with pytest.raises((OSError, trio.BrokenResourceError)):
        await here.ask("127.0.0.1", int(ready[1]))
    await processes.meshlocal("discovery", "--bind", f"127.0.0.1:{port}", "--source", "file:instances.yaml")
    await proxy.printed("discovery is watched")
    assert await here.ask("127.0.0.1", int(ready[1])) == "n1"


async def test_discovery_that_cannot_be_reached_is_said(cli: Cli) -> None:
    refusing = f"grpc://127.0.0.1:{free_port()}"
    line = f"meshlocal: cannot reach discovery {refusing}: connection refused\n"
    assert await cli.failed("explain", "b", "--discovery", refusing) == line
    err = await cli.failed("get", "services", "--discovery", refusing, "--discovery", "grpc://nowhere.invalid:1")
    assert err.splitlines()[0] == line.strip()
    assert err.splitlines()[1].startswith("meshlocal: cannot reach discovery grpc://nowhere.invalid:1: ")


async def said_all(stream: trio.SocketStream) -> None:
    """End what this side says, and hear the other out.

    A socket that is closed with something unread resets its connection, which can overtake what was sent.
    """
    with suppress(trio.BrokenResourceError):
        await stream.send_eof()
        async for _ in stream:
            pass
    await stream.aclose()


async def test_a_server_that_is_no_discovery_is_said(cli: Cli, nursery: trio.Nursery) -> None:
    async def http(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/html\r\n\r\n<p>\nno\n</p>")
        await said_all(stream)

    async def mute(stream: trio.SocketStream) -> None:
        await said_all(stream)

    async def resetting(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.aclose()

    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    async def tls(stream: trio.SocketStream) -> None:
        secured = trio.SSLStream(stream, context, server_side=True)
        with pytest.raises(trio.BrokenResourceError):
            await secured.do_handshake()
        await said_all(stream)

    async def serve(handler: Any) -> int:
        listeners = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
        return int(listeners[0].socket.getsockname()[1])

    nothing = "closed by the peer, which said nothing in HTTP/2"
    known = ((http, "does not speak HTTP/2"), (mute, nothing), (tls, nothing), (resetting, "reset by peer"))
    for handler, why in known:
        port = await serve(handler)
        err = await cli.failed("get", "services", "--discovery", f"grpc://127.0.0.1:{port}")
        assert err.startswith(f"meshlocal: cannot reach discovery grpc://127.0.0.1:{port}: ")
        assert why in err
        assert len(err.splitlines()) == 1
    port = await serve(http)
    err = await cli.failed("explain", "b", "--proxy", f"127.0.0.1:{port}")
    assert err == f"meshlocal: 127.0.0.1:{port} does not answer as a proxy's admin address does\n"
    port = await serve(mute)
    err = await cli.failed("explain", "b", "--proxy", f"127.0.0.1:{port}")
    assert err.startswith(f"meshlocal: cannot ask the proxy at 127.0.0.1:{port}: ")


@pytest.mark.parametrize("shell", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"])
async def test_output_that_goes_nowhere(cli: Cli, shell: str) -> None:
    """Nobody reads, or the disk is full: no traceback, and the status tells failures from what merely was not read."""
    status, _, err = await cli("get", "services", "--discovery", "file:instances.yaml", shell=shell)
    full = shell == ">/dev/full"
    assert status == full
    assert err == ("meshlocal: cannot write the output: no space left on device\n" if full else "")


@pytest.mark.parametrize("shell", ["<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
async def test_a_proxy_serves_without_anybody_listening_to_it(cli: Cli, processes: Any, here: Any, shell: str) -> None:
    port = free_port()
    command = [sys.executable, "-m", "meshlocal", "proxy", "--discovery", "file:missing.yaml", *TCP]
    proxy = await processes.start(["sh", "-c", f'exec "$@" {shell}', "sh", *command, "--admin", f"127.0.0.1:{port}"])
    with trio.fail_after(20):
        status = None
        while status is None:
            try:
                status, _ = await here.get(port, "/livez")
            except OSError:
                await trio.sleep(0.05)
    assert status == 200
    proxy.process.terminate()
    assert await proxy.exited() == 0


async def test_a_reader_that_has_left_costs_no_traceback(cli: Cli) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "meshlocal", "get", "services", "--discovery", "file:instances.yaml"]
        with trio.fail_after(20):
            done = await trio.run_process(command, stdout=writer, capture_stderr=True, check=False, cwd=cli.folder)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


async def test_the_ready_line_names_every_address(cli: Cli, processes: Any) -> None:
    proxy = await processes.meshlocal(
        *("proxy", "--discovery", "file:instances.yaml", *TCP, "--listen", "tcp://[::1]:0=empty"),
        *("--listen", "tcp://localhost:0=b", "--admin", "127.0.0.1:0"),
        env={"NODE_NAME": "n1"},
    )
    ready = await proxy.printed(
        r"^meshlocal proxy ready: node=n1 tcp://127\.0\.0\.1:[1-9]\d*=b tcp://\[::1\]:[1-9]\d*=empty"
        r" tcp://127\.0\.0\.1:([1-9]\d*)=b tcp://\[::1\]:\1=b admin=http://127\.0\.0\.1:[1-9]\d*\n$",
        "out",
    )
    assert proxy.out == ready[0], "and nothing else"
    discovery = await processes.meshlocal(
        *("discovery", "--source", "file:instances.yaml", "--bind", "127.0.0.1:0", "--bind", "[::1]:0"),
        *("--admin", "127.0.0.1:0"),
    )
    ready = await discovery.printed(
        r"^meshlocal discovery ready: grpc://127\.0\.0\.1:[1-9]\d* grpc://\[::1\]:[1-9]\d*"
        r" admin=http://127\.0\.0\.1:[1-9]\d*\n$",
        "out",
    )
    assert discovery.out == ready[0], "and nothing else"


async def test_the_demo_shows_what_it_should(cli: Cli) -> None:
    status, out, err = await cli("demo", "--seconds", "0.3")
    assert (status, err) == (0, "")
    assert out.count("failed 0") == 3
