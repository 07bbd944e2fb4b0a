"""The lists in the kernel are as the pickers have them, whatever changes (B1, B2, P1, S2)."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshlocal.client.services import ServiceTable
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.policy import model
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.bypass import NoBypass
from meshlocal.policy.config import ProxyConfig, ServiceConfig
from meshlocal.policy.config_health import EjectionConfig, LimitsConfig
from meshlocal.policy.locality import Locality
from meshlocal.policy.model import Conditions, Instance, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.proxy.bypass.bypass import Bypass
from meshlocal.proxy.bypass.kernel import Counts
from meshlocal.proxy.listeners import Listener

B, C = ServiceKey("b"), ServiceKey("c")
ONE, TWO = (make_instance("127.0.0.1", port, labels={"node": "n1"}) for port in (9001, 9002))
FAR = make_instance("10.9.9.9", 9000, labels={"node": "n2"})


class FakeKernel:
    """Notes what it is told."""

    def __init__(self, cgroup: int = 0) -> None:
        self.cgroup = cgroup
        self.lists: dict[tuple[str, int], tuple[tuple[str, int], ...]] = {}
        self.told: list[tuple[str, tuple[str, int]]] = []
        self.closed = False
        self.full = False

    def set(self, listener: tuple[str, int], instances: tuple[tuple[str, int], ...]) -> None:
        if self.full:
            raise OSError("no room")
        self.told.append(("set", listener))
        self.lists[listener] = instances

    def remove(self, listener: tuple[str, int]) -> None:
        self.told.append(("remove", listener))
        self.lists.pop(listener, None)

    def forget(self, listener: tuple[str, int]) -> None:
        self.told.append(("forget", listener))
        self.lists.pop(listener, None)

    def counts(self, listener: tuple[str, int]) -> Counts:
        return Counts(dict.fromkeys(self.lists.get(listener, ()), 3), 2)

    def adopted(self) -> dict[tuple[str, int], tuple[tuple[str, int], ...]]:
        return dict(self.lists)

    def close(self) -> None:
        self.closed = True


class World:
    """A table of services, listeners, and a bypass over them."""

    def __init__(self, stack: ExitStack, *listen: str, **config: Any) -> None:
        self._stack = stack
        self._versions = itertools.count()
        self.kernel = FakeKernel()
        self.config = self._configured(listen, config)
        self.table = ServiceTable(self.config, Locality({"node": "n1"}), random.Random(0))
        self.listeners: list[Listener] = []
        self._listen()
        self.bypass = Bypass("cgroup", self.table, lambda: self.listeners, load=self._load)
        self.problem: Exception | None = None

    def _load(self, cgroup: str, pin: str | None) -> FakeKernel:
        if self.problem is not None:
            raise self.problem
        return self.kernel

    @staticmethod
    def _configured(listen: tuple[str, ...], config: dict[str, Any]) -> ProxyConfig:
        return ProxyConfig(listen=tuple(map(ListenAddress.parse, listen)), **config)

    def _listen(self) -> None:
        for configured in self.config.listen:
            sockets = open_tcp_listeners(configured.host, configured.port)
            for sock in sockets:
                self._stack.callback(sock.close)
            service = ServiceKey(configured.service) if configured.service is not None else None
            self.listeners.append(Listener(configured, service, sockets))

    async def begin(self, nursery: trio.Nursery) -> None:
        """Run the bypass, which loads its program in a thread."""
        nursery.start_soon(self.bypass.run)
        with trio.fail_after(1000):
            while not list(self.bypass.listed()) and self.bypass.problem is None:  # noqa: ASYNC110 - a thread does it
                await trio.sleep(0.001)
        await wait_all_tasks_blocked()

    def place(self, position: int = 0) -> tuple[str, int]:
        found: tuple[str, int] = self.listeners[position].sockets[0].getsockname()[:2]
        return found

    def publish(self, *instances: Instance, service: ServiceKey = B) -> None:
        by_key = model.index(instances)
        self.table.publish(ServiceSnapshot(service, str(next(self._versions)), by_key))

    @property
    def listed(self) -> list[int]:
        """The ports in the first listener's list."""
        return [port for _, port in self.kernel.lists.get(self.place(), ())]

    @property
    def why_not(self) -> NoBypass | None:
        [found] = [each for each in self.bypass.listed() if each.listener == self.place()]
        return found.why_not


Make = Callable[..., World]


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:
        yield lambda *listen, **config: World(stack, *(listen or ("tcp://127.0.0.1:0=b",)), **config)


async def test_lists_follow_snapshots_within_a_turn(make: Make, nursery: trio.Nursery) -> None:
    world = make()
    await world.begin(nursery)
    assert (world.listed, world.why_not) == ([], NoBypass.NO_SNAPSHOT)
    world.publish(ONE, TWO, FAR)
    await wait_all_tasks_blocked()
    assert (world.listed, world.why_not) == ([9001, 9002], None)
    world.publish(ONE, make_instance("127.0.0.1", 9002, labels={"node": "n1"}, conditions=Conditions(ready=False)))
    await wait_all_tasks_blocked()
    assert world.listed == [9001]
    world.publish(FAR)
    await wait_all_tasks_blocked()
    assert (world.listed, world.why_not) == ([], NoBypass.NO_LOCAL)
    # What stays as it is is not written again.
    told = len(world.kernel.told)
    world.publish(FAR, make_instance("10.9.9.8", 9000))
    await wait_all_tasks_blocked()
    assert len(world.kernel.told) == told
    nursery.cancel_scope.cancel()


async def test_what_is_ejected_leaves_at_once_and_comes_back_by_a_trial(
    make: Make, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """H1: when it is due, connects reach the proxy; whoever is admitted then is in the list again."""
    world = make(ejection=EjectionConfig(failures=1, time=5.0))
    world.publish(ONE, TWO)
    await world.begin(nursery)
    fitness = world.table[B].fitness
    fitness.failed(ONE, "refused")
    await wait_all_tasks_blocked()
    assert world.listed == [9002]
    await trio.sleep(6)
    assert (world.listed, world.why_not) == ([], NoBypass.TRIAL)
    plan = world.table[B].plan()
    assert plan is not None
    plan.next()
    plan.next()
    await wait_all_tasks_blocked()
    fitness.worked(ONE)
    await wait_all_tasks_blocked()
    assert world.listed == [9001, 9002]
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("listen", "config", "why_not"),
    [
        ("tcp://127.0.0.1:0=b", {"services": {B: ServiceConfig(spill=4)}}, NoBypass.SPILL),
        ("tcp://127.0.0.1:0=b", {"services": {B: ServiceConfig(limits=LimitsConfig(requests=4))}}, NoBypass.LIMITS),
        ("tcp://127.0.0.1:0=b", {"limits": LimitsConfig(connections=4)}, NoBypass.LIMITS),
        ("tcp://0.0.0.0:0=b", {}, NoBypass.ADDRESS),
        ("http://127.0.0.1:0=b", {}, NoBypass.KIND),
        ("tls://127.0.0.1:0=b", {}, NoBypass.KIND),
    ],
)
async def test_what_the_proxy_must_see_is_not_bypassed(
    make: Make, nursery: trio.Nursery, listen: str, config: dict[str, Any], why_not: NoBypass
) -> None:
    world = make(listen, **config)
    world.publish(ONE)
    await world.begin(nursery)
    assert (world.listed, world.why_not) == ([], why_not)
    nursery.cancel_scope.cancel()


async def test_tls_to_the_instances_is_not_bypassed(make: Make, nursery: trio.Nursery) -> None:
    world = make()
    world.publish(ONE)
    await world.begin(nursery)
    assert world.listed == [9001]
    world.table[B].security = object()  # type: ignore[assignment]  # whatever it is
    world.table[B].refit()
    await wait_all_tasks_blocked()
    assert (world.listed, world.why_not) == ([], NoBypass.TLS)
    nursery.cancel_scope.cancel()


async def test_a_reload_is_followed(make: Make, nursery: trio.Nursery) -> None:
    """S2: another service at a listener, another policy, a listener less."""
    world = make("tcp://127.0.0.1:0=b", "tcp://127.0.0.1:0=c")
    world.publish(ONE)
    world.publish(TWO, service=C)
    await world.begin(nursery)
    first, second = world.place(0), world.place(1)
    assert world.kernel.lists == {first: (("127.0.0.1", 9001),), second: (("127.0.0.1", 9002),)}
    world.listeners[0].service = C
    world.bypass.wake()
    await wait_all_tasks_blocked()
    assert world.kernel.lists[first] == (("127.0.0.1", 9002),)
    del world.listeners[1]
    config = ProxyConfig(listen=world.config.listen, services={C: ServiceConfig(spill=1)})
    world.table.reconfigure(config, world.table.locality)
    await wait_all_tasks_blocked()
    assert world.kernel.lists == {}
    assert ("forget", second) in world.kernel.told
    nursery.cancel_scope.cancel()


async def test_what_was_there_before_goes_on_until_there_is_a_word(make: Make, nursery: trio.Nursery) -> None:
    """The stated exception of B1: of a pinned program. What is nobody's any more is forgotten."""
    world = make()
    stranger = ("127.0.0.9", 1)
    world.kernel.lists = {world.place(): (("127.0.0.1", 9007),), stranger: (("127.0.0.1", 9008),)}
    await world.begin(nursery)
    assert world.kernel.lists == {world.place(): (("127.0.0.1", 9007),)}
    assert world.kernel.told == [("forget", stranger)]
    [found] = world.bypass.listed(B)
    assert (found.instances, found.why_not) == ((("127.0.0.1", 9007),), None)
    world.publish(ONE)
    await wait_all_tasks_blocked()
    assert world.listed == [9001]
    nursery.cancel_scope.cancel()


async def test_both_addresses_of_localhost(make: Make, nursery: trio.Nursery) -> None:
    """Each has the instances of its family, or none."""
    world = make("tcp://localhost:0=b")
    world.publish(ONE)
    await world.begin(nursery)
    assert {each.listener[0]: each.why_not for each in world.bypass.listed(B)} == {
        "127.0.0.1": None,
        **({"::1": NoBypass.FAMILY} if len(world.listeners[0].sockets) == 2 else {}),
    }
    assert list(world.bypass.listed(C)) == []
    nursery.cancel_scope.cancel()


async def test_without_the_kernels_consent_the_proxy_serves_without(
    make: Make, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    """P1: it is said, and nothing else happens."""
    world = make()
    world.problem = OSError(1, "cannot make a map: Operation not permitted")
    await world.begin(nursery)
    assert "Operation not permitted" in (world.bypass.problem or "")
    assert "no bypass; the proxy serves without" in caplog.text
    world.publish(ONE)
    await wait_all_tasks_blocked()
    assert (list(world.bypass.listed()), list(world.bypass.counts())) == ([], [])
    nursery.cancel_scope.cancel()


async def test_a_full_table_costs_one_listener_its_bypass(
    make: Make, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    world = make()
    world.publish(ONE)
    world.kernel.full = True
    await world.begin(nursery)
    assert (world.listed, world.why_not) == ([], NoBypass.KERNEL)
    for _ in range(5):
        world.bypass.wake()
        await wait_all_tasks_blocked()
    assert caplog.text.count("bypass of a listener failed") == 1
    world.kernel.full = False
    world.bypass.wake()
    await wait_all_tasks_blocked()
    assert world.listed == [9001]
    nursery.cancel_scope.cancel()


async def test_it_ends_with_its_task(make: Make) -> None:
    world = make()
    world.publish(ONE)
    async with trio.open_nursery() as nursery:
        await world.begin(nursery)
        assert [(service, counts.missed) for service, counts in world.bypass.counts()] == [(B, 2)]
        nursery.cancel_scope.cancel()
    assert world.kernel.closed
    assert (list(world.bypass.listed()), list(world.bypass.counts())) == ([], [])
    # Whatever changes from now on is nothing to it.
    world.publish(TWO)


async def test_a_drain_takes_the_lists_away(make: Make, nursery: trio.Nursery) -> None:
    """S1: no new connections, by whatever way; what was counted stays to be told. Pinned, they go on."""
    world = make()
    world.publish(ONE)
    await world.begin(nursery)
    world.bypass.drain()
    await wait_all_tasks_blocked()
    assert (world.kernel.lists, world.why_not) == ({}, NoBypass.DRAINING)
    world.publish(ONE, TWO)
    for listener in world.listeners:
        listener.close()
    await wait_all_tasks_blocked()
    assert (world.kernel.lists, ("forget", world.kernel.told[0][1]) in world.kernel.told) == ({}, False)
    pinned = make()
    pinned.bypass._pin = "/pin"
    pinned.publish(ONE)
    await pinned.begin(nursery)
    pinned.bypass.drain()
    pinned.publish(TWO)
    await wait_all_tasks_blocked()
    assert pinned.listed == [9001]
    nursery.cancel_scope.cancel()


async def test_what_was_counted_stays_with_its_service(make: Make, nursery: trio.Nursery) -> None:
    """B2: a listener that a reload gives to another service begins to count anew."""
    world = make("tcp://127.0.0.1:0=b", "tcp://127.0.0.1:0=c")
    for service in (B, C):
        world.publish(ONE, service=service)
    await world.begin(nursery)
    world.listeners[0].service = C
    world.bypass.wake()
    await wait_all_tasks_blocked()
    assert world.kernel.told[-2:] == [("forget", world.place()), ("set", world.place())]
    nursery.cancel_scope.cancel()


async def test_a_cgroup_that_comes_later_and_one_that_is_another(
    make: Make, nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Service managers make cgroups when they start the first unit in one, and remove those that are empty."""
    world = make()
    world.publish(ONE)
    world.bypass._cgroup = str(tmp_path / "cgroup")
    world.problem = OSError(2, "No such file or directory")
    await world.begin(nursery)
    assert world.bypass.problem is not None
    (tmp_path / "cgroup").mkdir()
    world.problem = None
    world.kernel.cgroup = (tmp_path / "cgroup").stat().st_ino
    await trio.sleep(11)
    while not world.listed:  # noqa: ASYNC110 - a thread does it
        await trio.sleep(0.01)
    assert world.bypass.problem is None
    (tmp_path / "other").mkdir()
    (tmp_path / "cgroup").rmdir()
    (tmp_path / "other").rename(tmp_path / "cgroup")
    first, world.kernel = world.kernel, FakeKernel((tmp_path / "cgroup").stat().st_ino)
    await trio.sleep(11)
    while not world.listed:  # noqa: ASYNC110 - a thread does it
        await trio.sleep(0.01)
    assert first.closed
    nursery.cancel_scope.cancel()


async def test_a_program_that_comes_when_nobody_waits_is_let_go(make: Make) -> None:
    """P1: the proxy was told to stop while its thread was in the kernel."""
    world = make()
    began, go_on = threading.Event(), threading.Event()

    def slow(cgroup: str, pin: str | None) -> FakeKernel:
        began.set()
        go_on.wait(20)
        return world.kernel

    world.bypass._load = slow
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.bypass.run)
        while not began.is_set():  # noqa: ASYNC110 - a thread does it
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    go_on.set()
    with trio.fail_after(20):
        while not world.kernel.closed:  # noqa: ASYNC110 - a thread does it
            await trio.sleep(0.001)


async def test_a_program_that_is_loaded_but_never_arrives_is_let_go(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1: the proxy was told to stop after the kernel had it, and before the proxy had."""
    world = make()
    loaded = trio.Event()

    async def cut_off(load: Callable[[], object]) -> object:
        load()
        loaded.set()
        await trio.sleep_forever()

    monkeypatch.setattr(world.bypass._files, "run", cut_off)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.bypass.run)
        await loaded.wait()
        assert not world.kernel.closed
        nursery.cancel_scope.cancel()
    assert world.kernel.closed
