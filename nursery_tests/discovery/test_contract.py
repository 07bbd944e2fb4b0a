"""What every registry owes the hub, whatever it is: the same tests for all of them (D3, D8)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
import trustme

from meshlocal.discovery.dns import resolving
from meshlocal.discovery.dns import source as dns_source
from meshlocal.discovery.dns.source import DnsSource
from meshlocal.discovery.etcd import source as etcd_source
from meshlocal.discovery.etcd.source import EtcdSource
from meshlocal.discovery.file_source import FileSource
from meshlocal.discovery.hub import Hub
from meshlocal.discovery.kubernetes.api import Api
from meshlocal.discovery.kubernetes.kubeconfig import Access, Content
from meshlocal.discovery.kubernetes.listwatch import Limits
from meshlocal.discovery.kubernetes.source import KubernetesSource
from meshlocal.discovery.server_source import ServerSource
from meshlocal.discovery.service import DiscoveryService
from meshlocal.discovery.source import Publisher, Source
from meshlocal.net.grpc.server import GrpcServer
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.policy import model
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.policy.dns_options import DnsOptions
from meshlocal.policy.etcd_options import EtcdOptions
from meshlocal.policy.kubernetes_options import KubernetesOptions
from meshlocal.policy.lineage import Lineage
from meshlocal.policy.meshlocal_options import MeshlocalOptions
from meshlocal.policy.model import Caller, ServiceKey, make_instance
from nursery_tests.discovery.dns.server import Server as DnsServer
from nursery_tests.discovery.kubernetes import apiserver
from nursery_tests.interop.etcd import Etcd, installed
from nursery_tests.ports import free_port

LIMIT = 30.0

Services = Mapping[str, list[int]]
"""By name, the last number of each instance's address."""


class Registry:
    """One registry of a kind.

    Attributes:
        several: whether it can hold other services than b.
    """

    several = True

    def name(self, service: str) -> str:
        """What a service is called that it holds by this name."""
        return service

    def source(self) -> Source:
        """A source that reads it."""
        raise NotImplementedError

    async def hold(self, services: Services) -> None:
        """Hold this, and nothing else; whether it can be reached or not."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Be away."""
        raise NotImplementedError

    async def start(self) -> None:
        """Be back, with what is held now."""
        raise NotImplementedError


class FileRegistry(Registry):
    """Away: its file is malformed, as one that is half written."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "instances.yaml"
        self._text = ""
        self._is_up = False

    def source(self) -> Source:
        return FileSource(self._path)

    def _write(self, text: str) -> None:
        draft = self._path.with_suffix(".new")
        draft.write_text(text)
        os.replace(draft, self._path)

    async def hold(self, services: Services) -> None:
        lines = ["services:"] if services else ["services: {}"]
        for service, numbers in services.items():
            lines.append(f"  {service}: [{', '.join(f'{{address: 10.0.0.{last}, port: 9000}}' for last in numbers)}]")
        self._text = "\n".join(lines) + "\n"
        if self._is_up:
            self._write(self._text)

    async def stop(self) -> None:
        self._is_up = False
        self._write(self._text.rstrip("\n]}") + "[")

    async def start(self) -> None:
        self._is_up = True
        self._write(self._text)


class EtcdRegistry(Registry):
    """Away: killed. What it is to hold meanwhile is written to it at a port that nobody else knows."""

    def __init__(self, etcd: Etcd) -> None:
        self._etcd = etcd
        self._services: Services = {}

    def source(self) -> Source:
        options = EtcdOptions.parse(f"//127.0.0.1:{self._etcd.port}/mesh")
        return EtcdSource(options, Random(0), {})

    async def hold(self, services: Services) -> None:
        if self._etcd.process is not None:
            await self._change(services)
            return
        known, self._etcd.port = self._etcd.port, free_port()
        self._etcd.start()
        await self._change(services)
        self._etcd.kill()
        self._etcd.port = known

    async def _change(self, services: Services) -> None:
        old = {(service, last) for service, numbers in self._services.items() for last in numbers}
        new = {(service, last) for service, numbers in services.items() for last in numbers}
        for service, last in sorted(new - old):
            await self._etcd.put(f"mesh/{service}/{last}", address=f"10.0.0.{last}")
        for service, last in sorted(old - new):
            await self._etcd.ctl("del", f"mesh/{service}/{last}")
        self._services = services

    async def stop(self) -> None:
        self._etcd.kill()

    async def start(self) -> None:
        self._etcd.start()
        await self._etcd.ctl("get", "mesh")


class DnsRegistry(Registry):
    """Away: it says nothing."""

    several = False

    def __init__(self, server: DnsServer) -> None:
        self._server = server
        server.silent = True

    def source(self) -> Source:
        text = f"b.example?service=b&port=9000&server=127.0.0.1:{self._server.port}"
        return DnsSource(DnsOptions.parse(text), Random(0), {})

    async def hold(self, services: Services) -> None:
        texts = [f"10.0.0.{last}" for last in services.get("b", [])]
        self._server.records = {("b.example", "A"): (0, texts)} if texts else {}

    async def stop(self) -> None:
        self._server.silent = True

    async def start(self) -> None:
        self._server.silent = False


class KubernetesRegistry(Registry):
    """Away: its connections break, and no others are taken."""

    def __init__(self, server: Any, authority: trustme.CA) -> None:
        self._server = server
        self._authority = authority
        self._services: Services = {}
        server.refuse = True

    def name(self, service: str) -> str:
        return f"{service}.shop"

    def source(self) -> Source:
        def find() -> Access:
            certificates = Content(self._authority.cert_pem.bytes())
            return Access(
                origin="test",
                scheme="https",
                host="127.0.0.1",
                port=self._server.port,
                token=Content(b"t"),
                authority=certificates,
            )

        limits = Limits(backoff_initial=0.01, backoff_max=0.05, steady=0.02)
        api = Api(find, lambda: datetime.now(UTC))
        return KubernetesSource(api, KubernetesOptions.parse(""), Random(0), limits=limits)

    async def hold(self, services: Services) -> None:
        for service in self._services.keys() | services.keys():
            if self._services.get(service) == services.get(service):
                continue
            endpoints = [{"addresses": [f"10.0.0.{last}"]} for last in services.get(service, [])]
            meta = {"name": service, "namespace": "shop", "labels": {"kubernetes.io/service-name": service}}
            ports = [{"name": "", "port": 9000, "protocol": "TCP"}]
            item = {"metadata": meta, "addressType": "IPv4", "endpoints": endpoints, "ports": ports}
            change = "DELETED" if service not in services else "MODIFIED" if service in self._services else "ADDED"
            self._server.put(apiserver.SLICES, change, item)
        self._services = services

    async def stop(self) -> None:
        self._server.refuse = True
        await self._server.cut()

    async def start(self) -> None:
        self._server.refuse = False


class _Held:
    """The source of the server that is followed."""

    name = "held"

    def __init__(self, services: Services) -> None:
        self._services = services
        self.publisher: Publisher | None = None

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        self.publisher = publisher
        self.hold(self._services)
        task_status.started()
        await trio.sleep_forever()

    def hold(self, services: Services) -> None:
        assert self.publisher is not None
        for gone in self._services.keys() - services.keys():
            self.publisher.update(ServiceKey(gone), None)
        for service, numbers in services.items():
            instances = model.index(make_instance(f"10.0.0.{last}", 9000) for last in numbers)
            self.publisher.update(ServiceKey(service), instances)
        self._services = services


class ServerRegistry(Registry):
    """Away: the server has ended. Each time it is another one."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._port = free_port()
        self._services: Services = {}
        self._scope: trio.CancelScope | None = None
        self._held = _Held({})
        self._ended = trio.Event()

    def source(self) -> Source:
        config = DiscoveryClientConfig(backoff_initial=0.01, backoff_max=0.05)
        options = MeshlocalOptions.parse(f"grpc://127.0.0.1:{self._port}")
        return ServerSource(options, {}, Lineage("below"), config=config, caller=Caller(), rng=Random(0))

    async def hold(self, services: Services) -> None:
        self._services = services
        if self._scope is not None:
            self._held.hold(services)

    async def stop(self) -> None:
        if self._scope is not None:
            self._scope.cancel()
            await self._ended.wait()
            self._scope = None

    async def start(self) -> None:
        await self._nursery.start(self._serve)

    async def _serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        self._ended = trio.Event()
        try:
            with trio.CancelScope() as self._scope:
                self._held = _Held(self._services)
                hub = Hub([self._held], Random(0))
                service = DiscoveryService(hub, 0.1, lineage=Lineage(f"above {free_port()}"))
                sockets = open_tcp_listeners("127.0.0.1", self._port)
                async with trio.open_nursery() as nursery:
                    await nursery.start(hub.run)
                    await hub.wait_in_sync()
                    await nursery.start(partial(GrpcServer(service.handlers()).serve, sockets))
                    task_status.started()
        finally:
            self._ended.set()


@pytest.fixture(params=["file", "etcd", "dns", "kubernetes", "meshlocal"])
async def registry(
    request: pytest.FixtureRequest, nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Registry]:
    """A registry that is away, and holds nothing."""
    monkeypatch.setattr(etcd_source, "BACKOFF_MAX", 0.5)
    for name, value in (("SHORTEST", 0.05), ("BACKOFF_INITIAL", 0.05), ("BACKOFF_MAX", 0.1)):
        monkeypatch.setattr(dns_source, name, value)
    monkeypatch.setattr(resolving, "LIFETIME", 0.4)
    if request.param == "file":
        yield FileRegistry(tmp_path)
    elif request.param == "etcd":
        etcd = Etcd(*installed(request.getfixturevalue("program"), "debian"), tmp_path)
        yield EtcdRegistry(etcd)
        etcd.kill()
    elif request.param == "dns":
        server = DnsServer()
        await nursery.start(server.serve)
        yield DnsRegistry(server)
    elif request.param == "kubernetes":
        authority = trustme.CA()
        async with apiserver.serving(authority) as api:
            yield KubernetesRegistry(api, authority)
    else:
        yield ServerRegistry(nursery)


class Followed:
    """A hub that follows one registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.hub = Hub([registry.source()], Random(0))

    @property
    def problem(self) -> str | None:
        return self.hub.sources[0].problem

    def knows(self) -> dict[str, list[int]]:
        return {
            each.service: sorted(int(instance.key.address.rpartition(".")[2]) for instance in each.instances.values())
            for each in self.hub.snapshots()
            if each.instances
        }

    def expects(self, services: Services) -> dict[str, list[int]]:
        return {self._registry.name(service): sorted(numbers) for service, numbers in services.items()}

    async def until(self, holds: Callable[[], object]) -> None:
        with trio.move_on_after(LIMIT):
            while not holds():  # noqa: ASYNC110 - what is looked at has no event to wait for
                await trio.sleep(0.005)
        assert holds(), (self.knows(), self.problem)

    async def until_it_knows(self, services: Services) -> None:
        await self.until(lambda: self.knows() == self.expects(services))


@asynccontextmanager
async def following(registry: Registry) -> AsyncIterator[Followed]:
    followed = Followed(registry)
    async with trio.open_nursery() as nursery:
        await nursery.start(followed.hub.run)
        yield followed
        nursery.cancel_scope.cancel()


def only(registry: Registry, services: Services) -> Services:
    """As much of it as the registry can hold."""
    return services if registry.several else {name: each for name, each in services.items() if name == "b"}


async def test_nothing_is_known_before_the_registry_has_said_it(registry: Registry) -> None:
    """One that is away from the beginning is no registry that is empty; it is named (D3)."""
    await registry.hold(held := only(registry, {"b": [1, 2], "c": [3]}))
    await registry.stop()
    async with following(registry) as followed:
        await followed.until(lambda: followed.problem is not None)
        assert not followed.hub.in_sync
        assert followed.hub.snapshot(ServiceKey(registry.name("b"))) is None
        await registry.start()
        await followed.until(lambda: followed.hub.in_sync)
        assert followed.knows() == followed.expects(held)
        await followed.until(lambda: followed.problem is None)


async def test_an_outage_is_no_empty_service(registry: Registry) -> None:
    """What was known stays meanwhile. What changed meanwhile is known afterwards, and what is gone is gone."""
    await registry.start()
    await registry.hold(held := only(registry, {"b": [1, 2], "c": [3]}))
    async with following(registry) as followed:
        await followed.until_it_knows(held)
        await registry.stop()
        await followed.until(lambda: followed.problem is not None)
        await registry.hold(later := only(registry, {"b": [2, 4], "d": [5]}))
        await trio.sleep(0.1)
        assert followed.knows() == followed.expects(held)
        await registry.start()
        await followed.until_it_knows(later)
        await followed.until(lambda: followed.problem is None)


async def test_a_change_is_a_change_of_that_service_alone(registry: Registry) -> None:
    """Of the others, the snapshot is the same, and nobody who watches them is told anything."""
    await registry.start()
    await registry.hold(only(registry, {"b": [1], "c": [3], "d": [4]}))
    async with following(registry) as followed:
        await followed.until_it_knows(only(registry, {"b": [1], "c": [3], "d": [4]}))
        before = {each.service: each for each in followed.hub.snapshots()}
        changes = followed.hub.changes
        await registry.hold(later := only(registry, {"b": [1, 2], "c": [3], "d": [4]}))
        await followed.until_it_knows(later)
        after = {each.service: each for each in followed.hub.snapshots()}
        assert [name for name in after if after[name] is not before[name]] == [registry.name("b")]
        assert followed.hub.changes == changes + 1


async def test_whatever_happens_in_between_the_end_is_exact(registry: Registry) -> None:
    """Changes and outages, one after the other."""
    rng = Random(5)
    await registry.start()
    await registry.hold({"b": [1]})
    async with following(registry) as followed:
        await followed.until_it_knows({"b": [1]})
        services: Services = {}
        for _ in range(5):
            services = {
                name: sorted(rng.sample(range(1, 9), rng.randint(1, 4))) for name in "bcd" if rng.random() < 0.7
            }
            services = dict(only(registry, {"b": [9], **services}))
            is_away = rng.random() < 0.4
            if is_away:
                await registry.stop()
            await registry.hold(services)
            if is_away:
                await registry.start()
        await followed.until_it_knows(services)
        await followed.until(lambda: followed.problem is None)


async def test_a_source_that_is_cancelled_ends(registry: Registry) -> None:
    """Whether the registry is there or not, and at whatever await."""
    await registry.start()
    await registry.hold({"b": [1]})
    for number in range(10):
        if number == 5:
            await registry.stop()
        with trio.fail_after(LIMIT):
            with trio.move_on_after(number * 0.01):
                await Hub([registry.source()], Random(0)).run()
