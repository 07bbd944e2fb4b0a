"""The package in docs/examples: built, installed and run as its users would; and ones that fail, beside others (P1)."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from nursery_tests.e2e.running import LIMIT, Processes

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "http-registry"

BAD = """\
import trio
from meshlocal.policy.sources import SourceKind

class Bad:
    def __init__(self, how): self.name = f"bad:{how}"
    async def run(self, publisher, *, task_status):
        how = self.name[4:]
        if how == "hangs": await trio.sleep_forever()
        if how == "returns": return
        if how == "nonsense": publisher.replace("nonsense")
        raise RuntimeError("a fault of its own")

def open_sources(options, context):
    yield Bad(options)

KIND = SourceKind("bad:HOW", lambda text: text, "bad_registry:open_sources")
"""
POINTS = "[meshlocal.sources]\nbad = bad_registry:KIND\n"


@pytest.fixture
def processes(nursery: trio.Nursery, tmp_path: Path) -> Processes:
    return Processes(nursery, tmp_path)


@asynccontextmanager
async def registry(nursery: trio.Nursery, services: dict[str, object]) -> AsyncIterator[str]:
    """Says what `services` holds as it is asked; its URL."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(65536)
            body = json.dumps({"services": services}).encode()
            head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            await stream.send_all(head.encode() + body)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    await nursery.start(trio.serve_listeners, serve, listeners)
    yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/services"


async def installed(folder: Path) -> Path:
    """The example, built and installed beside what is there already."""
    target = folder / "site"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--target", str(target), str(EXAMPLE)]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return target


@pytest.mark.timeout(100)
async def test_the_example(processes: Processes, nursery: trio.Nursery, tmp_path: Path) -> None:
    site = await installed(tmp_path)
    services: dict[str, object] = {"b": [{"address": "10.0.0.1", "port": 9000, "labels": {"node": "n1"}}]}
    env = {"PYTHONPATH": str(site)}
    async with registry(nursery, services) as url:
        source = f"http-registry:{url}"
        server = await processes.meshlocal(
            "discovery", "--bind", "127.0.0.1:0", "--source", source, "--zone", "z1", env=env
        )
        grpc = (await server.printed(r"(grpc://\S+)", "out"))[1]
        watch = await processes.meshlocal("get", "instances", "b", "-w", "-o", "json", "--discovery", grpc)
        await watch.printed(r"10\.0\.0\.1", "out", limit=LIMIT)
        services["b"] = [{"address": "10.0.0.2", "port": 9000}]
        await watch.printed(r"10\.0\.0\.2", "out")
        services["b"] = [{"address": "no address", "port": 9000}]
        await server.printed(r"registry cannot be followed|no address|10\.0\.0\.2|source", limit=LIMIT)
        assert server.process.returncode is None
    wrong = await processes.meshlocal("discovery", "--source", "http-registry:x", env=env)
    assert await wrong.exited() == 2
    assert "expected http-registry:http://HOST/PATH, got 'x'" in wrong.err


@pytest.mark.parametrize("how", ["raises", "returns", "nonsense", "hangs"])
async def test_one_that_fails_is_named_and_harms_nobody(processes: Processes, tmp_path: Path, how: str) -> None:
    """The services of other sources are served meanwhile."""
    site = tmp_path / "site"
    (site / "bad_registry-1.dist-info").mkdir(parents=True)
    (site / "bad_registry-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: bad-registry\nVersion: 1\n"
    )
    (site / "bad_registry-1.dist-info" / "entry_points.txt").write_text(POINTS)
    (site / "bad_registry.py").write_text(BAD)
    processes.write("instances.yaml", "services: {b: [{address: 10.0.0.1, port: 1}]}\n")
    server = await processes.meshlocal(
        *("discovery", "--bind", "127.0.0.1:0", "--admin", "127.0.0.1:0"),
        *("--source", f"bad:{how}", "--source", "file:instances.yaml"),
        env={"PYTHONPATH": str(site)},
    )
    grpc = (await server.printed(r"(grpc://\S+)", "out"))[1]
    found = await processes.meshlocal("get", "instances", "b", "--discovery", grpc)
    assert await found.exited() == 0
    assert "10.0.0.1" in found.out
    if how != "hangs":
        await server.printed(rf'"source failed","source":"bad:{how}"')
