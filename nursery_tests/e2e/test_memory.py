"""What an idle sidecar costs: resident memory, and the modules that it must not load."""

from __future__ import annotations

import compileall
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

import meshlocal
from bench.idle import wakes

LIMIT = 40 * 1024
"""Kilobytes resident, the goal of an idle proxy with one service."""

SCRAPED = 512
"""Kilobytes more, once Prometheus has looked at it: its library alone takes 2.8 MB."""

LOOKED_AT = 512
"""Kilobytes more than that, once a person has looked at its page."""

INSTANCES = """\
services:
  b:
    - {address: 127.0.0.1, port: 9001, labels: {node: n1}}
    - {address: 127.0.0.2, port: 9002, labels: {node: n2}}
    - {address: 127.0.0.3, port: 9003, labels: {node: n3}}
"""
LISTEN = ("--listen", "tcp://127.0.0.1:0=b", "--admin", "127.0.0.1:0")

HEAVY = {
    "asyncio": "the proxy runs on trio",
    "anyio._backends._asyncio": "the proxy runs on trio",
    "difflib": "nothing is misspelt",
    "concurrent.futures": "nothing here runs in a pool",
    "email": "comes with http.client and http.server",
    "grpc": "gRPC runs over ngh2",
    "h2": "gRPC runs over ngh2",
    "html.entities": "escaping needs five of them",
    "http.client": "nothing here asks over HTTP",
    "http.server": "comes with prometheus_client",
    "httpx": "only the library's transport needs it",
    "kr8s": "only the Kubernetes source needs it",
    "meshlocal.app.demo": "another command",
    "meshlocal.app.discovery": "another command",
    "meshlocal.app.html": "nobody looks at a page",
    "meshlocal.app.query": "another command",
    "meshlocal.library": "for applications",
    "meshlocal.proxy.http": "no http listener is configured",
    "prometheus_client": "loaded once metrics are asked for",
    "pydoc": "comes with unittest",
    "unittest": "comes with tests",
    "urllib.request": "nothing here asks over HTTP",
    "yaml": "no YAML file is read",
}
OVER_GRPC = {
    "meshlocal.discovery.hub": "a discovery server is in another process",
}
FROM_A_FILE = {
    "google.protobuf": "no gRPC is spoken",
    "ngh2": "no gRPC is spoken",
}


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """As installed: without the memory that compiling leaves behind."""
    (folder,) = meshlocal.__path__
    compileall.compile_dir(folder, quiet=2)


async def start(processes: Any, source: str, *options: str) -> tuple[Any, int]:
    """A proxy that reads instances from a server or a file, and the port of its admin pages."""
    processes.write("instances.yaml", INSTANCES)
    url = "file:instances.yaml"
    if source == "grpc":
        server = await processes.meshlocal("discovery", "--bind", "127.0.0.1:0", "--source", url)
        url = (await server.printed(r"ready: (\S+)", "out"))[1]
    command = [sys.executable, *options, "-m", "meshlocal", "proxy", "--discovery", url, *LISTEN]
    proxy = await processes.start(command, {"NODE_NAME": "n1"})
    admin = (await proxy.printed(r"ready: .*admin=http://127.0.0.1:(\d+)", "out"))[1]
    return proxy, int(admin)


def resident(process: trio.Process) -> int:
    """Kilobytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("source", ["grpc", "file"])
async def test_an_idle_proxy_stays_small(processes: Any, here: Any, source: str) -> None:
    proxy, admin = await start(processes, source)
    await here.get(admin, "/readyz")
    assert resident(proxy.process) <= LIMIT
    if source == "grpc":
        # Also once Prometheus has looked at it.
        for path in ("/services", "/metrics", "/metrics"):
            assert (await here.get(admin, path))[0] == 200
        assert resident(proxy.process) <= LIMIT + SCRAPED
        # And a little more once people have: only they need what makes the page.
        for path in ("/", "/live?service=b", "/live?service=b"):
            assert (await here.get(admin, path))[0] == 200
        assert resident(proxy.process) <= LIMIT + SCRAPED + LOOKED_AT


def is_loaded(name: str, loaded: set[str]) -> bool:
    """A package is not always named where a module of it was asked for."""
    return any(each == name or each.startswith(f"{name}.") for each in loaded)


@pytest.mark.parametrize(("source", "more"), [("grpc", OVER_GRPC), ("file", FROM_A_FILE)])
async def test_an_idle_proxy_loads_nothing_heavy(processes: Any, here: Any, source: str, more: dict[str, str]) -> None:
    proxy, admin = await start(processes, source, "-X", "importtime")
    await here.get(admin, "/readyz")
    loaded = set(re.findall(r"^import time: .* \| +(\S+)$", proxy.err, re.MULTILINE))
    assert {"trio", "meshlocal.app.proxy"} <= loaded
    heavy = HEAVY | more
    if source == "file":
        del heavy["yaml"]
    assert {name: why for name, why in heavy.items() if is_loaded(name, loaded)} == {}
    # What is told of as heavy is named as Python names it: metrics do load their library.
    await here.get(admin, "/metrics")
    await proxy.printed(r"\| +prometheus_client\.metrics\n")


@pytest.mark.parametrize("source", ["grpc", "file"])
async def test_an_idle_proxy_sleeps(processes: Any, here: Any, source: str) -> None:
    """P3: it wakes no more than twice a second, with a file too."""
    proxy, admin = await start(processes, source)
    await here.get(admin, "/readyz")
    await trio.sleep(1)
    before = wakes(proxy.process.pid)
    await trio.sleep(6)
    assert wakes(proxy.process.pid) - before <= 12
