"""P1: once a process runs, no file system call and no import is made in its event loop."""

from __future__ import annotations

import sys
from pathlib import Path
from signal import SIGHUP, SIGTERM
from typing import Any

import pytest
import trio

from nursery_tests.e2e.running import LIMIT, Program
from nursery_tests.ports import free_port

AUDITED = str(Path(__file__).with_name("audited.py"))
INSTANCES = """\
services:
  b:
    - {{address: 127.0.0.1, port: {port}, labels: {{node: n1}}}}
"""
PAGES = ("/", "/services", "/metrics", "/config", "/readyz", "/livez", "/explain?service=b", "/nothing")


async def start(processes: Any, *arguments: str) -> Program:
    command = [sys.executable, AUDITED, *arguments]
    program: Program = await processes.start(command, {"NODE_NAME": "n1", "PYTHONPATH": str(Path.cwd())})
    return program


def audited(program: Program) -> list[str]:
    return [line for line in program.err.splitlines() if line.startswith("AUDIT")]


async def exchange(port: int, *said: bytes) -> bytes:
    """Say something, end the stream, and read all there is."""
    answer = b""
    with trio.fail_after(LIMIT):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            for each in said:
                await stream.send_all(each)
            await stream.send_eof()
            try:
                async for part in stream:
                    answer += part
            except trio.BrokenResourceError:
                pass
    return answer


async def look_at_pages(here: Any, admin: int, pages: tuple[str, ...]) -> None:
    for page in pages:
        status, _ = await here.get(admin, page)
        assert status in (200, 404), page


async def test_the_hook_sees_what_it_should(processes: Any) -> None:
    script = (
        f"import runpy, sys; watch = runpy.run_path({AUDITED!r})['Watch'](); sys.addaudithook(watch.audit);"
        " open('/dev/null'); watch.on = True; open('/dev/zero'); open('/proc/stat'); import colorsys"
    )
    program = await processes.start([sys.executable, "-c", script])
    assert await program.exited() == 0
    told = [line.split(" from ")[0] for line in audited(program)]
    assert "AUDIT open '/dev/zero'" in told
    assert "AUDIT import 'colorsys'" in told
    assert not any("/dev/null" in line or "/proc" in line for line in told)


@pytest.mark.parametrize("source", ["file", "grpc"])
async def test_a_proxys_event_loop_opens_and_imports_nothing(processes: Any, here: Any, source: str) -> None:
    instance, tcp, http = (free_port() for _ in range(3))
    await processes.instance("n1", "127.0.0.1", instance)
    processes.write("instances.yaml", INSTANCES.format(port=instance))
    url = f"file:{processes.folder}/instances.yaml"
    server = None
    if source == "grpc":
        server = await start(
            processes, *("discovery", "--bind", "127.0.0.1:0", "--source", url), "--admin", "127.0.0.1:0"
        )
        url = (await server.printed(r"grpc://127\.0\.0\.1:\d+", "out"))[0]
    config = (
        f"proxy: {{listen: ['tcp://127.0.0.1:{tcp}=b', 'http://127.0.0.1:{http}'], admin: '127.0.0.1:0',"
        f" access_log: true, discovery: {{urls: ['{url}']}}}}"
    )
    processes.write("proxy.yaml", config)
    proxy = await start(processes, "proxy", "--config", "proxy.yaml")
    line = (await proxy.printed(r"admin=http://127\.0\.0\.1:(\d+)", "out"))[1]
    admin = int(line)
    for _ in range(2):
        assert await here.ask("127.0.0.1", tcp) == "n1"
        for request in (
            b"GET / HTTP/1.1\r\nHost: b\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: unknown\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: b\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
            b"CONNECT b:80 HTTP/1.1\r\nHost: b:80\r\n\r\nx",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"nonsense\r\n\r\n",
        ):
            await exchange(http, request)
        await look_at_pages(here, admin, PAGES)
        for text in (config, "proxy: {listen: [", config.replace("access_log: true", "access_log: false")):
            said = len(proxy.err)
            processes.write("proxy.yaml", text)
            proxy.signal(SIGHUP)
            await proxy.printed("config (not )?applied", start=said)
        if server is not None:
            server.signal(SIGHUP)
        processes.write("instances.yaml", INSTANCES.format(port=instance).replace("n1", "n2"))
        await here.measured(admin, lambda metrics: metrics("instances", service="b", tier="other") == 1)
        processes.write("instances.yaml", INSTANCES.format(port=instance))
        await here.measured(admin, lambda metrics: metrics("instances", service="b", tier="node") == 1)
    if server is not None:
        pages = int((await server.printed(r"admin=http://127\.0\.0\.1:(\d+)", "out"))[1])
        await look_at_pages(here, pages, ("/", "/metrics", "/services", "/readyz", "/livez", "/nothing"))
    for program in (proxy, server):
        if program is not None:
            program.signal(SIGTERM)
            assert await program.exited() == 0
            assert audited(program) == []
