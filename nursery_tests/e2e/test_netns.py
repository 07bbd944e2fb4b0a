"""The main job on three nodes: network namespaces joined by a bridge, every part a process of its own.

n1, n2 and n3 each run an instance of `b`, the discovery server stands outside, and a proxy on n1 serves a client there.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

pytestmark = pytest.mark.netns

NODES = ("n1", "n2", "n3")
PORT, SECOND = 9000, 9001
LISTEN, ADMIN, DISCOVERY = 15001, 15000, 7070

QUICK = {
    "MESHLOCAL_PROXY__EJECTION__TIME": "0.5",
    "MESHLOCAL_PROXY__ATTEMPTS__CONNECT_TIMEOUT": "0.2",
    "MESHLOCAL_PROXY__DISCOVERY__KEEPALIVE_INTERVAL": "0.3",
    "MESHLOCAL_PROXY__DISCOVERY__KEEPALIVE_TIMEOUT": "0.3",
    "MESHLOCAL_PROXY__DISCOVERY__BACKOFF_INITIAL": "0.05",
    "MESHLOCAL_PROXY__DISCOVERY__BACKOFF_MAX": "0.2",
}


class Mesh:
    """Everything that a test starts."""

    def __init__(self, processes: Any, network: Any, load: Callable[..., Any], *, ipv6: bool = False) -> None:
        self.network, self.ipv6 = network, ipv6
        self.n1 = network["n1"]
        self.instances: dict[str, Any] = {}
        self._processes, self._load = processes, load
        self.proxy: Any = None
        self.discovery: Any = None

    def address(self, node: str) -> str:
        return str(self.network[node].address6 if self.ipv6 else self.network[node].address)

    def publish(self, *rows: tuple[str, int, str | None]) -> None:
        """Write the instances file: the node that an instance runs on, its port, and the node that its label says."""
        lines = [
            f"    - {{address: '{self.address(node)}', port: {port}"
            + (f", labels: {{node: {label}}}}}" if label is not None else "}")
            for node, port, label in rows
        ]
        self._processes.write("instances.yaml", "\n".join(["services:", "  b:", *lines, ""]))

    async def start_instance(self, node: str, port: int = PORT, name: str | None = None) -> None:
        name = name or node
        self.instances[name] = await self._processes.instance(
            name, self.address(node), port, prefix=self.network[node].prefix
        )

    async def start_discovery(self) -> None:
        self.discovery = await self._processes.meshlocal(
            "discovery",
            *("--bind", self._authority(self.address("outside"), DISCOVERY)),
            *("--source", "file:instances.yaml"),
            prefix=self.network["outside"].prefix,
        )
        await self.discovery.printed("ready: grpc://", "out")

    async def start_proxy(self, arguments: Sequence[str] = (), env: Mapping[str, str] | None = None) -> None:
        host = "::1" if self.ipv6 else "127.0.0.1"
        self.proxy = await self._processes.meshlocal(
            "proxy",
            *("--discovery", f"grpc://{self._authority(self.address('outside'), DISCOVERY)}"),
            *("--listen", f"tcp://{self._authority(host, LISTEN)}=b"),
            *arguments,
            env={**QUICK, **({"NODE_NAME": "n1"} if env is None else env)},
            prefix=self.n1.prefix,
        )
        await self.proxy.printed("meshlocal proxy ready", "out")

    async def start(self, *rows: tuple[str, int, str | None], **proxy: Any) -> None:
        """Start an instance for each row of the file, the discovery server and the proxy."""
        rows = rows or tuple((node, PORT, node) for node in NODES)
        self.publish(*rows)
        async with trio.open_nursery() as nursery:
            for node, port, _ in rows:
                nursery.start_soon(self.start_instance, node, port, node if port == PORT else f"{node}+")
            nursery.start_soon(self.start_discovery)
        await self.start_proxy(**proxy)

    def client(self, **how: Any) -> Any:
        """A load of new connections by a client on n1."""
        return self._load(self.n1, "::1" if self.ipv6 else "127.0.0.1", LISTEN, **how)

    @asynccontextmanager
    async def stopped(self, load: Any, name: str) -> Any:
        """An instance killed between two connections, and started again."""
        node, port = (name[:-1], SECOND) if name.endswith("+") else (name, PORT)
        async with load.between():
            await self.instances[name].killed()
        yield
        await self.start_instance(node, port, name)

    async def metrics(self) -> Any:
        return await self.n1.metrics(ADMIN)

    async def measured(self, holds: Callable[[Any], bool]) -> Any:
        return await self.n1.measured(ADMIN, holds)

    async def page(self) -> str:
        status, text = await self.n1.get(ADMIN, "/")
        assert status == 200
        return str(text)

    @staticmethod
    def _authority(host: str, port: int) -> str:
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@pytest.fixture
def mesh(processes: Any, network: Any, load: Callable[..., Any]) -> Mesh:
    return Mesh(processes, network, load)


@pytest.fixture(params=["ipv4", "ipv6"])
def mesh_of_either(request: pytest.FixtureRequest, processes: Any, network: Any, load: Callable[..., Any]) -> Mesh:
    return Mesh(processes, network, load, ipv6=request.param == "ipv6")


def evenly(served: Mapping[str, int], *names: str) -> bool:
    """Whether these, and they alone, served, none of them more than one connection ahead of another."""
    counts = [served[name] for name in names]
    return set(served) == set(names) and max(counts) - min(counts) <= 1


async def test_local_first_then_the_others_then_back(mesh_of_either: Mesh) -> None:
    """L3, A2, O2, R1, F1: on its node while it can be, evenly on the others while not, and back; nobody notices."""
    mesh = mesh_of_either
    await mesh.start()
    load = mesh.client()
    assert set(await load.next(40)) == {"n1"}
    async with mesh.stopped(load, "n1"):
        assert evenly(await load.next(60), "n2", "n3")
        await load.only("n2", "n3")
        metrics = await mesh.metrics()
        assert metrics("requests_total", reason="local_failed", tier="other", outcome="served") > 0
        assert metrics("attempts_total", tier="node", outcome="refused") > 0
    await load.only("n1")
    assert load.errors == []
    metrics = await mesh.metrics()
    # Nothing left the node for another reason, and nothing failed.
    assert metrics("requests_total", tier="other") == metrics("requests_total", outcome="served", tier="other")
    assert metrics("requests_total", tier="node", outcome="served") == metrics("requests_total", tier="node")


async def test_discovery_stops_and_nothing_changes(mesh: Mesh) -> None:
    """D1: what was known is gone on with, failover and return included, and its age is said; later all is current."""
    await mesh.start()
    load = mesh.client()
    await load.only("n1")
    await mesh.discovery.killed()
    await mesh.measured(lambda metrics: metrics("discovery_connected") == 0)
    assert set(await load.next(40)) == {"n1"}
    async with mesh.stopped(load, "n1"):
        assert evenly(await load.next(40), "n2", "n3")
    await load.only("n1")
    first = (await mesh.metrics())("snapshot_age_seconds")
    await mesh.measured(lambda metrics: metrics("snapshot_age_seconds") > first > 0)
    assert "connection refused" in (await mesh.page()).lower()
    # It comes back with another world: n1's instance is gone from it.
    mesh.publish(("n2", PORT, "n2"), ("n3", PORT, "n3"))
    await mesh.start_discovery()
    await load.only("n2", "n3")
    await mesh.measured(lambda metrics: metrics("discovery_connected") == 1 and metrics("snapshot_age_seconds") < 11)
    assert load.errors == []


async def test_frozen_discovery_is_noticed_and_forgiven(mesh: Mesh) -> None:
    """D1: a discovery server that is stopped without closing is found by keepalive, and watched again when it runs."""
    await mesh.start()
    load = mesh.client()
    await load.only("n1")
    mesh.discovery.signal(signal.SIGSTOP)
    frozen = trio.current_time()
    await mesh.measured(lambda metrics: metrics("discovery_connected") == 0)
    # A ping after 0.3 s of silence, 0.3 s for its answer; the rest is for a machine with other things to do.
    assert trio.current_time() - frozen < 5
    await mesh.proxy.printed("discovery is away")
    mesh.publish(("n2", PORT, "n2"))
    assert set(await load.next(40)) == {"n1"}
    mesh.discovery.signal(signal.SIGCONT)
    await load.only("n2")
    await mesh.measured(lambda metrics: metrics("discovery_connected") == 1)
    assert load.errors == []


async def test_an_instance_without_a_node_label_is_never_local(mesh: Mesh) -> None:
    """L2, L5: unknown equals nothing; that no instance is on the node is said in the log, a metric and on the page."""
    await mesh.start(("n1", PORT, None), ("n2", PORT, "n2"))
    load = mesh.client()
    assert evenly(await load.next(40), "n1", "n2")
    metrics = await mesh.measured(lambda metrics: metrics("requests_total", reason="no_local", tier="other") >= 40)
    assert metrics("requests_total", tier="node") == 0
    assert metrics("node_unmatched") == 1
    assert "no instance of any watched service is on it" in await mesh.page()
    await mesh.proxy.printed("no instance of any watched service is on this node")
    # Once it has its label, it is.
    mesh.publish(("n1", PORT, "n1"), ("n2", PORT, "n2"))
    await load.only("n1")
    assert (await mesh.metrics())("node_unmatched") == 0
    assert load.errors == []


async def test_a_proxy_without_a_node_serves_and_says_so(mesh: Mesh) -> None:
    """L1, L2, L5: with NODE_NAME unset or blank nothing is local, not even an instance whose own label is blank."""
    await mesh.start(("n1", PORT, "''"), ("n2", PORT, "n2"), ("n3", PORT, "n3"), env={"NODE_NAME": "  "})
    load = mesh.client()
    assert evenly(await load.next(60), *NODES)
    metrics = await mesh.measured(lambda metrics: metrics("requests_total", reason="node_unknown", tier="other") >= 60)
    assert metrics("node_unknown") == 1
    assert metrics("requests_total", tier="node") == 0
    await mesh.proxy.printed("ready: node=unknown", "out")
    await mesh.proxy.printed("the node is unknown")
    assert mesh.proxy.err.count("the node is unknown") == 1
    assert "NODE_NAME" in await mesh.page()
    assert load.errors == []


async def test_both_local_instances_are_tried_before_any_other_node(mesh: Mesh) -> None:
    """O1, O2, R1: n1's two instances share its load; with one dead the other has it all; then the other nodes."""
    # Without ejections, which put what fails behind all others (O5).
    env = {"NODE_NAME": "n1", "MESHLOCAL_PROXY__EJECTION__FAILURES": "null"}
    rows = ("n1", PORT, "n1"), ("n1", SECOND, "n1"), ("n2", PORT, "n2")
    await mesh.start(*rows, arguments=("--access-log",), env=env)
    load = mesh.client()
    assert evenly(await load.next(40), "n1", "n1+")
    async with mesh.stopped(load, "n1"):
        assert set(await load.next(40)) == {"n1+"}
        assert (await mesh.metrics())("requests_total", tier="other") == 0
        async with mesh.stopped(load, "n1+"):
            await load.only("n2")
            left = [each for each in access_log(mesh.proxy.err) if each["tier"] == "other"]
            assert {(each["node"], each["reason"], each["attempts"]) for each in left} == {("n2", "local_failed", 3)}
    await load.only("n1", "n1+")
    assert load.errors == []


async def test_a_node_that_is_cut_off_costs_a_timeout(mesh: Mesh) -> None:
    """A1, A2: packets that vanish end an attempt at its timeout, and the next instance serves the same connection."""
    await mesh.start()
    load = mesh.client(workers=8)
    async with mesh.stopped(load, "n1"):
        await load.only("n2", "n3")
        mesh.network.plug("n2", plugged=False)
        await load.only("n3")
        await mesh.measured(
            lambda metrics: (
                metrics("attempts_total", tier="other", outcome="timeout")
                + metrics("attempts_total", tier="other", outcome="unreachable")
            )
        )
        mesh.network.plug("n2", plugged=True)
        await load.only("n2", "n3")
    await load.only("n1")
    assert load.errors == []


async def test_nothing_answers_and_the_client_is_told(mesh: Mesh) -> None:
    """A6, O5: every instance was tried; the client's connection is reset, the metric says why, and the log says it."""
    await mesh.start(("n1", PORT, "n1"), ("n2", PORT, "n2"))
    await mesh.instances["n1"].killed()
    await mesh.instances["n2"].killed()
    # It may be reset before the client's connect has returned.
    with trio.fail_after(20), pytest.raises((trio.BrokenResourceError, ConnectionResetError)):
        async with await mesh.n1.connect("127.0.0.1", LISTEN) as stream:
            await stream.receive_some(1)
    metrics = await mesh.measured(lambda metrics: metrics("requests_total", outcome="failed") == 1)
    assert metrics("attempts_total", outcome="refused") == 2
    await mesh.proxy.printed("request failed: no instance connected")


def access_log(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [each for each in found if each["logger"] == "meshlocal.access"]
