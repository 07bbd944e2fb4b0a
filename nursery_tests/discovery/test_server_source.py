"""Instances from another discovery server, over real loopback sockets, by gRPC and by WebSocket (D1, D3, D8)."""

from __future__ import annotations

import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from meshlocal.client import watch as watching
from meshlocal.client.link import Link
from meshlocal.client.watch import DiscoveryWatch
from meshlocal.discovery import server_source
from meshlocal.discovery.hub import Hub
from meshlocal.discovery.server_source import ServerSource, open_server_source
from meshlocal.discovery.service import DiscoveryService
from meshlocal.discovery.source import Instances, Publisher, Source, SourceContext, SourceError
from meshlocal.discovery.websocket import WebSocketServer
from meshlocal.net.grpc.server import GrpcServer, Routes
from meshlocal.net.grpc.servercall import ServerCall
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.policy import model
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.policy.lineage import Lineage
from meshlocal.policy.meshlocal_options import MeshlocalOptions
from meshlocal.policy.model import Instance, ServiceKey, make_instance
from meshlocal.wire.discovery_codec import change_event, heartbeat_event, lineage_event, services_events, snapshot_event
from meshlocal.wire.discovery_methods import WATCH_INSTANCES, WATCH_SERVICES
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import discovery_pb2 as pb
from nursery_tests.e2e.running import Processes
from nursery_tests.ports import free_port

B, C, D = ServiceKey("b"), ServiceKey("c"), ServiceKey("d")
LIMIT = 20


def at(last: int, **labels: str) -> Instance:
    return make_instance(f"10.0.0.{last}", 9000, labels=labels)


class Registry:
    """A source that its test publishes through."""

    name = "registry"

    def __init__(self, services: Mapping[ServiceKey, Instances] | None) -> None:
        self._services = services or {}
        self.sync = trio.Event()
        if services is not None:
            self.sync.set()
        self.publisher: Publisher | None = None

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        self.publisher = publisher
        publisher.replace(self._services)
        await self.sync.wait()
        task_status.started()
        await trio.sleep_forever()

    def update(self, service: ServiceKey, *instances: Instance) -> None:
        assert self.publisher is not None
        self.publisher.update(service, model.index(instances) if instances else None)


class Server:
    """A discovery server with a registry of its own, and others that it follows."""

    def __init__(
        self, name: str, services: Mapping[ServiceKey, Instances] | None, *urls: str, defaults: str = ""
    ) -> None:
        self.lineage = Lineage(name)
        self.registry = Registry(services)
        self.sources = [follow(f"{url}{defaults}", self.lineage) for url in urls]
        sources: list[Source] = [self.registry, *self.sources]
        self.hub = Hub(sources, random.Random(0))
        self.service = DiscoveryService(self.hub, 0.05, lineage=self.lineage)
        self.url = ""

    def knows(self) -> dict[str, list[str]]:
        return {
            each.service: sorted(instance.key.address for instance in each.instances.values())
            for each in self.hub.snapshots()
        }

    def problem(self, source: int = 0) -> str | None:
        return self.hub.sources[source + 1].problem


def follow(text: str, lineage: Lineage) -> ServerSource:
    context = SourceContext(random.Random(0), {}, "", "", lineage)
    (source,) = open_server_source(MeshlocalOptions.parse(text), context)
    assert isinstance(source, ServerSource)
    return source


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a reconnect."""
    config = partial(
        DiscoveryClientConfig, connect_timeout=1, keepalive_interval=0.05, keepalive_timeout=1, backoff_initial=0.01
    )
    monkeypatch.setattr(server_source, "DiscoveryClientConfig", config)
    monkeypatch.setattr(server_source, "BACKOFF_MAX", 0.02)


@pytest.fixture
def processes(nursery: trio.Nursery, tmp_path: Path) -> Processes:
    return Processes(nursery, tmp_path)


@pytest.fixture
def unused_port() -> int:
    return free_port()


@pytest.fixture(params=["grpc", "ws"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def serving(routes: Routes, port: int = 0, scheme: str = "grpc") -> AsyncIterator[str]:
    sockets = open_tcp_listeners("127.0.0.1", port)
    server = GrpcServer(routes) if scheme == "grpc" else WebSocketServer(routes)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(server.serve, sockets))
        yield f"{scheme}://127.0.0.1:{sockets[0].getsockname()[1]}"
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def running(server: Server, port: int = 0, scheme: str = "grpc") -> AsyncIterator[Server]:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.hub.run)
        async with serving(server.service.handlers(), port, scheme) as server.url:
            yield server
        nursery.cancel_scope.cancel()


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT):
        while not holds():  # noqa: ASYNC110 - what is looked at has no event to wait for
            await trio.sleep(0.005)


def one(*instances: Instance) -> Instances:
    return model.index(instances)


def port_of(server: Server) -> int:
    return int(server.url.rpartition(":")[2])


async def test_its_services_are_there_and_come_and_go(scheme: str) -> None:
    """Beside those of the server's own registries, with which they merge."""
    async with (
        running(Server("above", {B: one(at(1))}), scheme=scheme) as above,
        running(Server("below", {D: one(at(9)), B: one(at(2))}, above.url)) as below,
    ):
        await until(lambda: below.hub.in_sync)
        assert below.knows() == {"b": ["10.0.0.1", "10.0.0.2"], "d": ["10.0.0.9"]}
        above.registry.update(C, at(3), at(4))
        await until(lambda: below.knows().get("c") == ["10.0.0.3", "10.0.0.4"])
        above.registry.update(C, at(4))
        await until(lambda: below.knows().get("c") == ["10.0.0.4"])
        above.registry.update(C)
        above.registry.update(B)
        await until(lambda: below.knows() == {"b": ["10.0.0.2"], "d": ["10.0.0.9"]})
        above.registry.update(C, at(5))
        await until(lambda: below.knows().get("c") == ["10.0.0.5"])
        (followed,) = below.sources[0].details().resources
        assert (followed.name, followed.in_sync) == ("services", True)
        assert followed.silence is not None
        assert below.problem() is None


async def test_labels_are_added_to_those_that_come_without() -> None:
    """`zone` and `cluster`, by changes and by snapshots; what an instance says itself counts."""

    def labels(server: Server) -> dict[str, dict[str, str]]:
        snapshot = server.hub.snapshot(B)
        assert snapshot is not None
        return {each.key.address[-1]: dict(each.labels) for each in snapshot.instances.values()}

    async with (
        running(Server("above", {B: one(at(1, node="n1"), at(2, zone="z1"), at(7))})) as above,
        running(Server("below", {}, above.url, defaults="?zone=z2&cluster=c2")) as below,
    ):
        await until(lambda: below.hub.in_sync)
        assert labels(below)["1"] == {"node": "n1", "zone": "z2", "cluster": "c2"}
        assert labels(below)["2"] == {"zone": "z1", "cluster": "c2"}
        above.registry.update(B, at(1, node="n1"), at(2, zone=" "), at(3))
        await until(lambda: "3" in labels(below))
        assert labels(below) == {
            "1": {"node": "n1", "zone": "z2", "cluster": "c2"},
            "2": {"zone": "z2", "cluster": "c2"},
            "3": {"zone": "z2", "cluster": "c2"},
        }


async def test_of_many_services_all_come() -> None:
    """More than one event names, and more than one stream follows; and instances that are labelled in steps."""
    crowd = {ServiceKey(f"s{number}"): one(at(1)) for number in range(2500)}
    many = [make_instance(f"10.1.{number >> 8}.{number & 255}", 9000) for number in range(700)]
    async with (
        running(Server("above", {**crowd, B: one(*many)})) as above,
        running(Server("below", {}, above.url, defaults="?zone=z2")) as below,
    ):
        await until(lambda: below.hub.in_sync)
        assert below.knows() == above.knows()
        snapshot = below.hub.snapshot(B)
        assert snapshot is not None
        assert {each.labels["zone"] for each in snapshot.instances.values()} == {"z2"}


async def test_until_it_has_said_all_it_is_not_in_sync() -> None:
    """D3: a server whose registries are not in sync has not said which services there are."""
    async with (
        running(Server("above", None)) as above,
        running(Server("below", {}, above.url)) as below,
    ):
        waits = "the server has not said yet which services there are"
        await until(lambda: below.problem() == waits)
        assert not below.hub.in_sync
        above.registry.update(B, at(1))
        above.registry.sync.set()
        await until(lambda: below.hub.in_sync)
        assert below.knows() == {"b": ["10.0.0.1"]}
        assert below.problem() is None


async def test_with_another_server_one_that_does_not_know_all_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """D6: whose registries are not in sync, though some are; nobody waits for it for ever."""
    monkeypatch.setattr(watching, "PENDING_LIMIT", 0.1)
    async with (
        running(Server("unknowing", None)) as unknowing,
        running(Server("knowing", {B: one(at(1))})) as knowing,
        running(Server("below", {}, f"{unknowing.url},{knowing.url}")) as below,
    ):
        await until(lambda: below.hub.in_sync)
        assert below.knows() == {"b": ["10.0.0.1"]}


async def test_with_another_server_one_that_is_refused_is_left(unused_port: int) -> None:
    """So that all replicas may have the same URLs, their own among them."""
    async with running(Server("other", {B: one(at(1))})) as other:
        own = Server("own", {}, f"grpc://127.0.0.1:{unused_port},{other.url}")
        async with running(own, unused_port):
            await until(lambda: own.hub.in_sync)
            assert own.knows() == {"b": ["10.0.0.1"]}
            assert own.problem() is None


async def test_a_service_that_goes_while_it_is_read_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a large one takes turns, in which the list may say that it is gone."""
    crowd = [make_instance(f"10.1.{number >> 8}.{number & 255}", 9000) for number in range(5000)]
    async with running(Server("above", {C: one(at(1))})) as above:
        below = Server("below", {}, above.url, defaults="?zone=z2")
        source = below.sources[0]
        prepare, seen = source.prepare, []

        def prepare_and_drop(snapshot: model.ServiceSnapshot) -> Iterator[None]:
            for step, _ in enumerate(prepare(snapshot)):
                if step == 1:
                    seen.append(snapshot.service)
                    del source._named[snapshot.service]
                    source._take_names()
                yield

        async with running(below):
            await until(lambda: below.hub.in_sync)
            monkeypatch.setattr(source, "prepare", prepare_and_drop)
            above.registry.update(B, *crowd)
            await until(lambda: bool(seen))
            await trio.sleep(0.5)
            assert seen == [B]
            assert below.knows() == {"c": ["10.0.0.1"]}


async def test_an_event_of_a_service_that_went_and_came_back_costs_nothing_else() -> None:
    """The stream that is about to end may still tell of it what it told before."""
    changes = model.ServiceChange(B, "v1", "v2", (at(2),), ())
    told = trio.Event()
    requests: list[list[str]] = []

    async def instances(call: ServerCall[Any, Any]) -> None:
        request = await call.receive()
        assert request is not None
        requests.append([each.version for each in request.subscriptions])
        await call.send(snapshot_event(model.ServiceSnapshot(B, "v1", one(at(1)))))
        await call.send(heartbeat_event(1000.0, []))
        if len(requests) == 1:
            await told.wait()
            await call.send(change_event(changes))
        await trio.sleep_forever()

    async def services(call: ServerCall[Any, Any]) -> None:
        await call.receive()
        await call.send(LINEAGE)
        for event in services_events([B], [], complete=True):
            await call.send(event)
        await until(lambda: bool(requests) and below.hub.in_sync)
        for gone, come in (([B], []), ([], [B])):
            for event in services_events(come, gone, complete=True):
                await call.send(event)
        told.set()
        await trio.sleep_forever()

    async with serving({WATCH_SERVICES: services, WATCH_INSTANCES: instances}) as url, trio.open_nursery() as nursery:
        below = Server("below", {}, url)
        await nursery.start(below.hub.run)
        await until(lambda: len(requests) == 2)
        await until(lambda: below.knows() == {"b": ["10.0.0.1"]})
        assert below.problem() is None
        assert below.sources[0].details().resources[0].failures == 0
        nursery.cancel_scope.cancel()


async def test_an_outage_changes_nothing_and_what_follows_is_exact(scheme: str) -> None:
    """What was known stays while the server is away, and while another one in its place does not know all yet."""
    async with trio.open_nursery() as nursery:
        first = Server("first", {B: one(at(1)), C: one(at(2))})
        async with running(first, scheme=scheme):
            below = Server("below", {}, first.url)
            await nursery.start(below.hub.run)
            await until(lambda: below.hub.in_sync)
        await until(lambda: below.problem() is not None)
        assert below.knows() == {"b": ["10.0.0.1"], "c": ["10.0.0.2"]}
        assert first.url in str(below.problem())
        second = Server("second", None)
        async with running(second, port_of(first), scheme):
            await until(lambda: below.problem() == "the server has not said yet which services there are")
            assert below.knows() == {"b": ["10.0.0.1"], "c": ["10.0.0.2"]}
            second.registry.update(C, at(3))
            second.registry.update(D, at(4))
            second.registry.sync.set()
            await until(lambda: below.knows() == {"c": ["10.0.0.3"], "d": ["10.0.0.4"]})
        nursery.cancel_scope.cancel()


async def test_another_server_takes_over() -> None:
    """Several that know the same: the next is followed when one ends."""
    services = {B: one(at(1))}
    async with running(Server("second", services)) as second, trio.open_nursery() as nursery:
        async with running(Server("first", services)) as first:
            below = Server("below", {}, f"{first.url},{second.url}")
            await nursery.start(below.hub.run)
            await until(lambda: below.hub.in_sync)
            assert below.lineage.servers() == ("below", "first")
        second.registry.update(B, at(2))
        await until(lambda: below.knows() == {"b": ["10.0.0.2"]})
        assert below.lineage.servers() == ("below", "second")
        nursery.cancel_scope.cancel()


async def test_a_server_that_follows_itself_is_refused(unused_port: int) -> None:
    own = Server("own", {B: one(at(1))}, f"grpc://127.0.0.1:{unused_port}")
    async with running(own, unused_port):
        await until(lambda: own.problem() is not None and "itself" in str(own.problem()))
        assert own.problem() == f"{own.url} is not followed: it is this server itself"
        assert own.knows() == {"b": ["10.0.0.1"]}
        assert not own.hub.in_sync


async def test_a_loop_is_refused_by_all_who_are_in_it_and_costs_nothing_that_was_known(unused_port: int) -> None:
    """Two follow each other: what one forgets must not come back to it. Who follows one of them goes on."""
    one_of_two = Server("one", {B: one(at(1))}, f"grpc://127.0.0.1:{unused_port}")
    async with running(one_of_two), trio.open_nursery() as nursery:
        async with running(Server("old", {C: one(at(2))}), unused_port):
            await until(lambda: one_of_two.knows() == {"b": ["10.0.0.1"], "c": ["10.0.0.2"]})
            beyond = Server("beyond", {}, one_of_two.url)
            await nursery.start(beyond.hub.run)
            await until(lambda: beyond.hub.in_sync)
        other = Server("other", {C: one(at(3))}, one_of_two.url)
        async with running(other, unused_port):
            loop = "is not followed: it learns from this server: each would hear what it said itself"
            await until(lambda: loop in str(one_of_two.problem()) and loop in str(other.problem()))
            assert one_of_two.knows() == {"b": ["10.0.0.1"], "c": ["10.0.0.2"]}
            # It may have learnt from the one before that one turned to it: then there was no loop yet.
            assert other.knows() in ({"c": ["10.0.0.3"]}, {"b": ["10.0.0.1"], "c": ["10.0.0.2", "10.0.0.3"]})
            learnt = other.knows()
            one_of_two.registry.update(B, at(4))
            await until(lambda: beyond.knows()["b"] == ["10.0.0.4"])
            assert other.knows() == learnt
        async with running(Server("mended", {C: one(at(5))}), unused_port):
            await until(lambda: one_of_two.knows() == {"b": ["10.0.0.4"], "c": ["10.0.0.5"]})
            await until(lambda: one_of_two.problem() is None)
            await until(lambda: beyond.knows() == one_of_two.knows())
        nursery.cancel_scope.cancel()


async def test_a_loop_that_ends_while_the_connection_goes_on() -> None:
    """Its server says another lineage: it is followed from then on."""
    lineage = Lineage("above")
    above = Server("above", {B: one(at(1))})
    above.service = DiscoveryService(above.hub, 0.05, lineage=lineage)
    lineage.note("source", ["below"])
    async with running(above), running(Server("below", {}, above.url)) as below:
        await until(lambda: "learns from this server" in str(below.problem()))
        assert not below.hub.in_sync
        lineage.note("source", ["somebody else"])
        await until(lambda: below.hub.in_sync)
        assert below.knows() == {"b": ["10.0.0.1"]}
        assert below.problem() is None


async def test_the_same_server_by_two_names_is_refused() -> None:
    async with running(Server("above", {B: one(at(1))})) as above:
        by_name = above.url.replace("127.0.0.1", "localhost")
        async with running(Server("below", {}, above.url, by_name)) as below:
            await until(lambda: "same server" in f"{below.problem(0)} {below.problem(1)}")
            await until(lambda: below.hub.in_sync)
            assert below.knows() == {"b": ["10.0.0.1"]}
            assert [below.problem(0), below.problem(1)].count(None) == 1


class NoSink:
    def prepare(self, snapshot: model.ServiceSnapshot) -> Iterator[None]:
        return iter(())

    def publish(self, snapshot: model.ServiceSnapshot, change: model.ServiceChange | None = None) -> None:
        raise AssertionError("nothing is followed")


async def test_the_same_server_in_two_urls_is_refused() -> None:
    async with (
        running(Server("above", {B: one(at(1))})) as above,
        running(Server("below", {}, above.url, f"{above.url}?zone=z2")) as below,
    ):
        await until(lambda: "same server" in f"{below.problem(0)} {below.problem(1)}")
        assert [below.problem(0), below.problem(1)].count(None) == 1


async def test_a_server_that_names_its_services_and_refuses_to_tell_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its list alone does not make it work: the problem stays, and the pauses between tries grow."""

    async def refuse(call: ServerCall[Any, Any]) -> None:
        await call.receive()
        raise GrpcError(StatusCode.PERMISSION_DENIED, "not you")

    list_ = telling(LINEAGE, *services_events([B], [], complete=True))
    async with serving({WATCH_SERVICES: list_, WATCH_INSTANCES: refuse}) as url, trio.open_nursery() as nursery:
        below = Server("below", {}, url)
        told: list[str | None] = []
        monkeypatch.setattr(below.sources[0], "_note_problem", told.append)
        await nursery.start(below.hub.run)
        await until(lambda: len([each for each in told if each]) > 3)
        # Before the first list, nothing was followed yet: so far it worked.
        assert told[0] is None
        assert set(told[1:]) == {"PERMISSION_DENIED: not you"}
        nursery.cancel_scope.cancel()


async def silent(call: ServerCall[Any, Any]) -> None:
    await call.receive()
    await trio.sleep_forever()


def telling(*events: pb.WatchServicesResponse) -> Callable[[ServerCall[Any, Any]], Awaitable[None]]:
    async def tell(call: ServerCall[Any, Any]) -> None:
        await call.receive()
        for event in events:
            await call.send(event)
        await trio.sleep_forever()

    return tell


async def of_b(call: ServerCall[Any, Any]) -> None:
    request = await call.receive()
    assert request is not None
    assert [each.service for each in request.subscriptions] == ["b"]
    await call.send(snapshot_event(model.ServiceSnapshot(B, "v1", one(at(1)))))
    await call.send(heartbeat_event(1000.0, []))
    await trio.sleep_forever()


LINEAGE = lineage_event(["above"])


@pytest.mark.parametrize(
    ("routes", "problem"),
    [
        ({WATCH_INSTANCES: of_b}, "it cannot say which services it has: it is of an earlier version"),
        ({WATCH_SERVICES: telling(*services_events([B], [], complete=True))}, "it has not said whom it learns from"),
        ({WATCH_SERVICES: telling(LINEAGE, *services_events([B, C], [], complete=True))}, "more than 1 services"),
        ({WATCH_SERVICES: telling(lineage_event([]))}, "is not followed: its lineage makes no sense"),
        ({WATCH_SERVICES: silent}, "no answer in time"),
    ],
    ids=["older", "no lineage", "too many", "bad lineage", "silent"],
)
async def test_a_server_that_cannot_be_followed_is_named(
    routes: Routes, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_source, "MOST_SERVICES", 1)
    monkeypatch.setattr(server_source, "FIRST_EVENT_LIMIT", 0.05)
    async with serving(routes) as url, trio.open_nursery() as nursery:
        below = Server("below", {D: one(at(9))}, url)
        await nursery.start(below.hub.run)
        await until(lambda: problem in str(below.problem()))
        assert url in str(below.problem())
        assert below.knows() == {"d": ["10.0.0.9"]}
        nursery.cancel_scope.cancel()


async def test_a_name_that_cannot_be_one_costs_nobody_else_anything() -> None:
    change = pb.WatchServicesResponse(change=pb.ServicesChange(added=["", "b", "no\nname"], complete=True))
    routes: Routes = {WATCH_SERVICES: telling(LINEAGE, pb.WatchServicesResponse(), change), WATCH_INSTANCES: of_b}
    async with serving(routes) as url, trio.open_nursery() as nursery:
        below = Server("below", {}, url)
        await nursery.start(below.hub.run)
        await until(lambda: below.hub.in_sync)
        assert below.knows() == {"b": ["10.0.0.1"]}
        await until(lambda: below.problem() is not None)
        assert str(below.problem()).startswith("a service is left out: ")
        assert str(below.problem()).endswith("; and 1 more")
        nursery.cancel_scope.cancel()


def test_a_token_would_not_be_shown() -> None:
    context = SourceContext(random.Random(0), {}, "", "")
    options = MeshlocalOptions.parse("grpc://10.0.0.1:7070?token_file=/token")
    with pytest.raises(SourceError, match=r"^token_file: without allow_plaintext_tokens, .* grpc://10.0.0.1:7070 is"):
        list(open_server_source(options, context))
    allowed = MeshlocalOptions.parse("grpc://10.0.0.1:7070?token_file=/token&allow_plaintext_tokens=yes")
    (source,) = open_server_source(allowed, context)
    assert source.name == "meshlocal:grpc://10.0.0.1:7070"


async def test_a_connection_that_breaks_as_it_is_cancelled_is_no_failure() -> None:
    """The cancellation goes on, and what broke in the same moment goes nowhere."""
    done = []

    async def break_off(link: Link, reached: Callable[[], None]) -> None:
        reached()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            raise GrpcError(StatusCode.UNAVAILABLE, "closed by the peer") from None

    async with serving({WATCH_SERVICES: silent}) as url:
        problems: list[str | None] = []
        watch = DiscoveryWatch(
            [DiscoveryUrl.parse(url)],
            (),
            NoSink(),
            random.Random(0),
            beside=break_off,
            on_problem=problems.append,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            await until(lambda: bool(problems))
            nursery.cancel_scope.cancel()
        done.append(problems)
    assert done == [[None]]


async def test_it_can_be_cancelled_at_any_time() -> None:
    """Wherever it is then; and it tells nobody any more whom it learnt from."""
    async with running(Server("above", {B: one(at(1))})) as above:
        for number in range(40):
            lineage = Lineage("below")
            hub = Hub([follow(above.url, lineage)], random.Random(0))
            with trio.move_on_after(number / 2000):
                await hub.run()
            assert lineage.servers() == ("below",)
        await until(lambda: not list(above.service.watches.callers()))


async def test_as_a_process(processes: Processes) -> None:
    """What the documents promise, by the command line alone."""
    processes.write("instances.yaml", "services: {b: [{address: 10.0.0.1, port: 1, labels: {node: n1}}]}\n")
    bound = ("--bind", "127.0.0.1:0")
    above = await processes.meshlocal("discovery", *bound, "--source", "file:instances.yaml")
    url = (await above.printed(r"ready: (\S+)", "out"))[1]
    below = await processes.meshlocal("discovery", *bound, "--source", f"meshlocal:{url}?zone=z2")
    near = (await below.printed(r"ready: (\S+)", "out"))[1]
    found = await processes.meshlocal("get", "instances", "b", "--discovery", near)
    assert await found.exited() == 0
    assert re.search(r"10\.0\.0\.1 +1 .* n1 +ready +zone=z2\n", found.out)
    watchers = await processes.meshlocal("get", "proxies", "--discovery", url)
    assert await watchers.exited() == 0
    assert "meshlocal discovery" in watchers.out
    wrong = await processes.meshlocal("discovery", *bound, "--source", "meshlocal:other:7070")
    assert await wrong.exited() == 2
    assert "expected meshlocal:grpc://HOST:PORT (or grpcs, ws, wss)" in wrong.err
