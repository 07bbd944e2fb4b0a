"""A world for each test: its registry, its processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
import trustme

from nursery_tests.discovery.kubernetes import apiserver
from nursery_tests.e2e.running import Processes
from nursery_tests.interop.etcd import Etcd, installed
from nursery_tests.interop.xds.parts import ROOT, EtcdRegistry, FileRegistry, KubernetesRegistry, World
from nursery_tests.ports import free_port


@pytest.fixture
def processes(nursery: trio.Nursery, tmp_path: Path) -> Processes:
    return Processes(nursery, tmp_path)


@pytest.fixture
def world(processes: Processes) -> World:
    """Instances stand in a file."""
    return World(processes, FileRegistry(free_port(), processes))


@pytest.fixture(params=["file", "etcd", "kubernetes"])
async def world_of_each(
    request: pytest.FixtureRequest, processes: Processes, program: Callable[[str], str], tmp_path: Path
) -> AsyncIterator[World]:
    """Instances stand in each registry in turn."""
    port = free_port()
    if request.param == "file":
        yield World(processes, FileRegistry(port, processes))
    elif request.param == "etcd":
        etcd = Etcd(*installed(program, "debian"), tmp_path)
        etcd.start()
        yield World(processes, EtcdRegistry(port, etcd))
        etcd.kill()
    else:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
        async with apiserver.serving(authority) as api:
            yield World(processes, KubernetesRegistry(port, api, processes))


@pytest.fixture(params=["threads", "asyncio", "grpc-js", "envoy"])
def kind(request: pytest.FixtureRequest, program: Callable[[str], str]) -> str:
    """Each client that is tested; skips where it is not installed."""
    if request.param == "grpc-js":
        program("node")
        if not (ROOT / ".venv" / "node" / "node_modules" / "@grpc" / "grpc-js-xds").is_dir():
            pytest.skip("needs @grpc/grpc-js-xds, which make installs where there is npm")
    elif request.param == "envoy":
        needs_envoy()
    return str(request.param)


def needs_envoy() -> None:
    if not (ROOT / ".venv" / "bin" / "envoy").exists():
        pytest.skip("needs Envoy, which make installs")


@pytest.fixture
def envoy_installed() -> None:
    needs_envoy()
