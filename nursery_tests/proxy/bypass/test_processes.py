"""A proxy, its instances and their clients, as processes within a cgroup (B1, B2, A2, H1)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from nursery_tests.e2e.running import Place, Processes, Program
from nursery_tests.ports import free_port
from nursery_tests.proxy.bypass.parts import Connects, connecting

LIMIT = 20.0
ANSWERS = Path(__file__).with_name("answers.py")


class World:
    """A proxy on n1 with a listener for b, whose instances stand in a file."""

    def __init__(self, processes: Processes, cgroup: Path) -> None:
        self.processes = processes
        self.cgroup = cgroup
        self.port, self.admin = free_port(), free_port()
        self.ports = [free_port() for _ in range(3)]
        self.running: dict[str, Program] = {}
        self.proxy: Program
        self.prefix: Sequence[str] = ()
        """What programs are started with, such as `ip netns exec`."""

    def write(self, *names: str, far: tuple[str, int] | None = None) -> None:
        """The registry has these instances, `i0` to `i2`, all on n1; and one on n2."""
        lines = [
            f"    - {{address: 127.0.0.1, port: {self.ports[int(name[1])]}, labels: {{node: n1}}}}" for name in names
        ]
        if far is not None:
            lines.append(f"    - {{address: {far[0]}, port: {far[1]}, labels: {{node: n2}}}}")
        body = "\n".join(["services:", "  b:", *lines]) if lines else "services: {b: []}"
        self.processes.write("instances.yaml", f"{body}\n")

    async def instance(self, name: str) -> Program:
        started = self.running[name] = await self.processes.instance(name, "127.0.0.1", self.ports[int(name[1])])
        return started

    async def answering(self, name: str) -> None:
        """Start an instance that takes no part in anything but short connections, and is quick at that."""
        command = [sys.executable, "-SE", str(ANSWERS), name, str(self.ports[int(name[1])])]
        started = self.running[name] = await self.processes.start([*self.prefix, *command])
        await started.printed("listening", "out")

    async def start(self, **env: str) -> None:
        listen = ("--listen", f"tcp://127.0.0.1:{self.port}=b", "--admin", f"127.0.0.1:{self.admin}")
        environment = {"NODE_NAME": "n1", "MESHLOCAL_PROXY__BYPASS__CGROUP": str(self.cgroup), **env}
        self.proxy = await self.processes.meshlocal(
            "proxy",
            "--discovery",
            "file:instances.yaml",
            *listen,
            "--log-format",
            "text",
            env=environment,
            prefix=self.prefix,
        )
        await self.proxy.printed("meshlocal proxy ready", "out")

    async def bypassed(self, active: bool = True) -> None:
        """Wait until connects pass the proxy by, or do not."""
        await Place().measured(self.admin, lambda found: found("bypass_active") == float(active))

    async def listed(self) -> list[str]:
        """The instances that connects go to."""
        _, told = await Place().get(self.admin, "/explain?service=b")
        [listener] = json.loads(told)["bypass"]["listeners"]
        found: list[str] = listener["instances"]
        return found


@pytest.fixture
async def world(nursery: trio.Nursery, tmp_path: Path, cgroup: Path) -> Any:
    return World(Processes(nursery, tmp_path), cgroup)


@pytest.fixture
def clients(world: World) -> Iterator[Any]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(connecting(world.cgroup, ("127.0.0.1", world.port)))


@pytest.fixture
def namespace(root: None, program: Callable[[str], str]) -> Iterator[list[str]]:
    """What starts a program in a network namespace of its own, with a loopback interface."""
    ip, name = program("ip"), f"meshlocal-bypass-{os.getpid()}"
    subprocess.run([ip, "netns", "add", name], check=True)
    try:
        subprocess.run([ip, "-n", name, "link", "set", "lo", "up"], check=True)
        # Not by `ip netns exec`, which mounts another /sys, without cgroups.
        yield [program("nsenter"), f"--net=/run/netns/{name}"]
    finally:
        subprocess.run([ip, "netns", "del", name], check=True)


async def test_two_proxies_with_the_same_listener(
    world: World, clients: Any, nursery: trio.Nursery, tmp_path: Path, namespace: list[str]
) -> None:
    """B1: each has a network namespace of its own, where 127.0.0.1 is another; the clients of both share a cgroup."""
    (tmp_path / "other").mkdir()
    other = World(Processes(nursery, tmp_path / "other"), world.cgroup)
    other.port, other.admin, other.ports, other.prefix = world.port, world.admin, world.ports, namespace
    await world.answering("i0")
    await other.answering("i1")
    # Both know both; each reaches its own.
    for each in (world, other):
        each.write("i0", "i1")
        await each.start()
    await world.bypassed()
    await other.proxy.printed("listener is bypassed")
    here = clients()
    with connecting(world.cgroup, ("127.0.0.1", world.port), namespace) as there:
        assert await order(here, "connect 50") == {"i0": 50}
        assert await order(there, "connect 50") == {"i1": 50}
        # One that ends takes nothing of the other's with it.
        other.proxy.signal(signal.SIGTERM)
        assert await other.proxy.exited() == 0
        assert await order(here, "connect 50") == {"i0": 50}
        assert await order(there, "connect 5") == {"ConnectionRefusedError": 5}
    metrics = await Place().metrics(world.admin)
    assert metrics("bypassed_connects_total") == 100
    nursery.cancel_scope.cancel()


async def test_a_second_proxy_with_the_same_listener_is_refused(
    world: World, clients: Any, nursery: trio.Nursery
) -> None:
    """In the same namespace the address is taken, and the first one's bypass goes on."""
    await world.instance("i0")
    world.write("i0")
    await world.start()
    await world.bypassed()
    client = clients()
    second = await world.processes.meshlocal(
        "proxy",
        *("--discovery", "file:instances.yaml", "--listen", f"tcp://127.0.0.1:{world.port}=b", "--admin", "none"),
        env={"NODE_NAME": "n1", "MESHLOCAL_PROXY__BYPASS__CGROUP": str(world.cgroup)},
    )
    assert await second.exited() == 1
    assert "Address already in use" in second.err
    assert await order(client, "connect 20") == {"i0": 20}
    nursery.cancel_scope.cancel()


async def order(client: Connects, text: str) -> dict[str, int]:
    return await trio.to_thread.run_sync(client.order, text)


async def test_connects_go_round_and_are_counted(world: World, clients: Any, nursery: trio.Nursery) -> None:
    """B2, in metrics and in what `explain` says; the proxy sees none of them."""
    for name in ("i0", "i1"):
        await world.instance(name)
    world.write("i0", "i1")
    await world.start()
    await world.bypassed()
    client = clients()
    assert await order(client, "connect 1000") == {"i0": 500, "i1": 500}
    metrics = await Place().metrics(world.admin)
    for port in world.ports[:2]:
        labels = {"service": "b", "tier": "node", "via": "bypass", "instance": f"127.0.0.1:{port}"}
        assert metrics("bypassed_connects_total", **labels) == 500
    assert metrics("bypass_missed_total") == 0
    assert metrics("requests_total") == 0
    _, told = await Place().get(world.admin, "/explain?service=b")
    assert '"why_not":null' in told
    explained = await world.processes.meshlocal("explain", "b", "--proxy", f"127.0.0.1:{world.admin}")
    await explained.exited()
    assert f"bypassed: connects to 127.0.0.1:{world.port} go to 127.0.0.1:" in explained.out
    nursery.cancel_scope.cancel()


CONNECTS = 100_000


async def test_kills_under_load_fail_only_what_was_there(world: World, clients: Any, nursery: trio.Nursery) -> None:
    """Of 100,000 connects, those end with an instance that were established or queued when it was killed; no other."""
    for name in ("i0", "i1"):
        await world.answering(name)
    world.write("i0", "i1")
    await world.start()
    await world.bypassed()
    client = clients()
    await order(client, "start 4")
    kills = 0
    while sum((await order(client, "count")).values()) < CONNECTS:
        name = f"i{kills % 2}"
        await trio.sleep(1)
        await world.running[name].killed()
        kills += 1
        await trio.sleep(0.1)
        await world.answering(name)
    counts = await order(client, "stop")
    served = counts.pop("i0") + counts.pop("i1")
    # Each of four clients had one connection at the moment of a kill.
    assert sum(counts.values()) <= 4 * kills, (counts, kills)
    assert served + sum(counts.values()) >= CONNECTS
    metrics = await Place().metrics(world.admin)
    assert metrics("bypassed_connects_total") >= served
    assert metrics("requests_total") == 0, "the proxy saw one"
    nursery.cancel_scope.cancel()


async def test_flapping_costs_only_what_was_there(world: World, clients: Any, nursery: trio.Nursery) -> None:
    await world.instance("i1")
    world.write("i0", "i1")
    await world.start()
    await world.bypassed()
    client = clients()
    await order(client, "start 4")
    flaps = 10
    for _ in range(flaps):
        flapping = await world.instance("i0")
        await trio.sleep(0.05)
        await flapping.killed()
        await trio.sleep(0.05)
    counts = await order(client, "stop")
    served = counts.pop("i0", 0) + counts.pop("i1")
    assert sum(counts.values()) <= 4 * flaps, counts
    assert served > 20
    nursery.cancel_scope.cancel()


async def test_the_registry_and_failover_rule_as_ever(world: World, clients: Any, nursery: trio.Nursery) -> None:
    """Not ready, gone, none left: connects reach the proxy, which goes to the other node; back: back."""
    for name in ("i0", "i1", "i2"):
        await world.instance(name)
    far = ("127.0.0.1", world.ports[2])
    world.write("i0", "i1", far=far)
    await world.start()
    await world.bypassed()
    client = clients()
    assert await order(client, "connect 20") == {"i0": 10, "i1": 10}
    world.write("i1", far=far)
    await Place().measured(world.admin, lambda found: found("instances", service="b", tier="node") == 1)
    assert await order(client, "connect 20") == {"i1": 20}
    world.write(far=far)
    await world.bypassed(active=False)
    assert await order(client, "connect 20") == {"i2": 20}
    world.write("i0", far=far)
    await world.bypassed()
    assert await order(client, "connect 20") == {"i0": 20}
    # Killed, and still in the registry: the program finds nobody listening, and the proxy the next instance.
    await world.running["i0"].killed()
    assert await order(client, "connect 20") == {"i2": 20}
    metrics = await Place().metrics(world.admin)
    assert metrics("bypass_missed_total") > 0
    await world.instance("i0")
    with trio.fail_after(LIMIT):
        while (await order(client, "connect 5")).keys() != {"i0"}:  # noqa: ASYNC110 - a trial comes with time
            await trio.sleep(0.1)
    await world.bypassed()
    nursery.cancel_scope.cancel()


async def test_a_full_accept_queue_is_gone_past(world: World, clients: Any, nursery: trio.Nursery) -> None:
    """A2: one that accepts nothing is left out once its queue is full; the other has all, and no connect waits."""
    await world.instance("i1")
    world.write("i0", "i1")
    with ExitStack() as stack:
        stuck = stack.enter_context(socket.create_server(("127.0.0.1", world.ports[0]), backlog=4))
        await world.start()
        await world.bypassed()
        fill = [
            stack.enter_context(socket.create_connection(("127.0.0.1", world.ports[0]), timeout=LIMIT))
            for _ in range(5)
        ]
        client = clients()
        stuck_at = f"127.0.0.1:{world.ports[0]}"
        with trio.fail_after(LIMIT):
            while stuck_at in await world.listed():  # noqa: ASYNC110 - the proxy looks once a second
                await trio.sleep(0.05)
        assert await order(client, "connect 20") == {"i1": 20}
        # Once it accepts again, it has its turns.
        for _ in fill:
            stuck.accept()[0].close()
        stuck.close()
        await world.instance("i0")
        with trio.fail_after(LIMIT):
            while (await order(client, "connect 4")).keys() != {"i0", "i1"}:  # noqa: ASYNC110 - the proxy looks
                await trio.sleep(0.05)
    nursery.cancel_scope.cancel()


async def test_the_program_goes_with_its_proxy(world: World, clients: Any, nursery: trio.Nursery) -> None:
    """B1: killed, it leaves nothing behind: connects to its listener are refused; another proxy begins anew."""
    await world.instance("i0")
    world.write("i0")
    await world.start()
    await world.bypassed()
    client = clients()
    assert await order(client, "connect 10") == {"i0": 10}
    await world.proxy.killed()
    assert await order(client, "connect 10") == {"ConnectionRefusedError": 10}
    await world.start()
    await world.bypassed()
    assert await order(client, "connect 10") == {"i0": 10}
    world.proxy.signal(signal.SIGTERM)
    assert await world.proxy.exited() == 0
    nursery.cancel_scope.cancel()


async def test_a_cgroup_that_is_none(world: World, nursery: trio.Nursery) -> None:
    """The proxy serves without, and says why: in its log, and where it explains."""
    await world.instance("i0")
    world.write("i0")
    await world.start(MESHLOCAL_PROXY__BYPASS__CGROUP="/nowhere")
    await world.proxy.printed("no bypass; the proxy serves without .*No such file or directory")
    assert await Place().ask("127.0.0.1", world.port) == "i0"
    _, told = await Place().get(world.admin, "/explain?service=b")
    assert "No such file or directory" in told
    nursery.cancel_scope.cancel()


async def test_pinned_it_outlives_its_proxy(
    world: World, clients: Any, bpffs: Path, nursery: trio.Nursery, tmp_path: Path
) -> None:
    """Killed under load, no connect fails while an instance lives; the next proxy takes over, and counts on."""
    for name in ("i0", "i1"):
        await world.instance(name)
    world.write("i0", "i1")
    pin = {"MESHLOCAL_PROXY__BYPASS__PIN": str(bpffs / "meshlocal")}
    await world.start(**pin)
    await world.bypassed()
    client = clients()
    await order(client, "start 4")
    await trio.sleep(0.3)
    await world.proxy.killed()
    await trio.sleep(0.5)
    counts = await order(client, "stop")
    assert counts.keys() == {"i0", "i1"}
    status = await world.processes.meshlocal("bypass", "status", "--pin", str(bpffs / "meshlocal"))
    assert await status.exited() == 0
    assert f"127.0.0.1:{world.port}" in status.out
    await order(client, "start 4")
    await world.start(**pin)
    await world.bypassed()
    more = await order(client, "stop")
    assert more.keys() == {"i0", "i1"}
    metrics = await Place().metrics(world.admin)
    assert metrics("bypassed_connects_total") == sum(counts.values()) + sum(more.values())
    world.write("i1")
    await Place().measured(world.admin, lambda found: found("instances", service="b", tier="node") == 1)
    assert await order(client, "connect 10") == {"i1": 10}
    world.proxy.signal(signal.SIGTERM)
    await world.proxy.exited()
    assert await order(client, "connect 10") == {"i1": 10}
    detach = await world.processes.meshlocal("bypass", "detach", "--pin", str(bpffs / "meshlocal"))
    assert await detach.exited() == 0
    assert await order(client, "connect 3") == {"ConnectionRefusedError": 3}
    again = await world.processes.meshlocal("bypass", "detach", "--pin", str(bpffs / "meshlocal"))
    assert await again.exited() == 1
    assert "no bypass is detached from" in again.err
    nursery.cancel_scope.cancel()
