"""The aggregated stream over a hub: what clients are told, of what, and when (D1, D3, D4, S2)."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
import trio
import trio.lowlevel
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from meshlocal.discovery.hub import Hub
from meshlocal.discovery.limits import ServerLimits
from meshlocal.discovery.watches import Watches
from meshlocal.discovery.xds import service as service_module
from meshlocal.discovery.xds.service import XdsService
from meshlocal.net.grpc.client import Channel, channel_over
from meshlocal.net.grpc.server import GrpcServer, Handler, Routes, ServerCall
from meshlocal.net.slices import in_slices
from meshlocal.policy.config_discovery import ServerLimitsConfig
from meshlocal.policy.model import ServiceKey, make_instance
from meshlocal.policy.steps import finish
from meshlocal.policy.visibility import View
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import envoy_cluster_pb2 as cluster_pb
from meshlocal.wire.pb import envoy_core_pb2 as core_pb
from meshlocal.wire.pb import envoy_discovery_pb2 as pb
from meshlocal.wire.pb import envoy_endpoint_pb2 as endpoint_pb
from meshlocal.wire.pb import envoy_listener_pb2 as listener_pb
from meshlocal.wire.pb import envoy_route_pb2 as route_pb
from meshlocal.wire.xds import STREAM, ResourceType
from nursery_tests.discovery.held import HeldSource

CLUSTER, ENDPOINTS, LISTENER, ROUTE = ResourceType
_MESSAGES: dict[str, Any] = {
    CLUSTER.url: cluster_pb.Cluster,
    ENDPOINTS.url: endpoint_pb.ClusterLoadAssignment,
    LISTENER.url: listener_pb.Listener,
    ROUTE.url: route_pb.RouteConfiguration,
}
ONE, TWO, FAR = (make_instance(f"10.0.0.{n}", 80, labels={"node": f"n{n}"}) for n in (1, 2, 3))


class Client:
    """One stream, from the client's side."""

    def __init__(self, call: Any, node: core_pb.Node) -> None:
        self._call = call
        self._node: core_pb.Node | None = node
        self.nonces: dict[str, str] = {}

    async def ask(
        self, kind: ResourceType | str, *names: str, nonce: str = "", problem: str | None = None, version: str = ""
    ) -> None:
        url = kind if not isinstance(kind, ResourceType) else kind.url
        request = pb.DiscoveryRequest(type_url=url, resource_names=names, response_nonce=nonce, version_info=version)
        if self._node is not None:
            request.node.CopyFrom(self._node)
            self._node = None
        if problem is not None:
            request.error_detail.message = problem
        await self._call.send(request)

    async def next(self) -> pb.DiscoveryResponse:
        response: pb.DiscoveryResponse = await self._call.receive()
        self.nonces[response.type_url] = response.nonce
        return response

    async def ack(self, kind: ResourceType, *names: str, problem: str | None = None) -> None:
        await self.ask(kind, *names, nonce=self.nonces[kind.url], problem=problem)

    async def silence(self) -> None:
        """Nothing comes."""
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def read() -> None:
                    response = await self.next()
                    raise AssertionError(f"there came {response}")

                nursery.start_soon(read)
                await wait_all_tasks_blocked()
                scope.cancel()

    async def end(self) -> None:
        await self._call.end()


def names(response: pb.DiscoveryResponse) -> list[str]:
    """Of the resources."""
    messages = [_MESSAGES[each.type_url].FromString(each.value) for each in response.resources]
    return [each.cluster_name if response.type_url == ENDPOINTS.url else each.name for each in messages]


def nodes(response: pb.DiscoveryResponse) -> dict[str, list[tuple[int, str]]]:
    """Of endpoints: by cluster, the priorities and what node is in them."""
    found = {}
    for each in response.resources:
        message = endpoint_pb.ClusterLoadAssignment.FromString(each.value)
        found[message.cluster_name] = [(group.priority, group.locality.sub_zone) for group in message.endpoints]
    return found


class Served:
    def __init__(self, sources: Sequence[HeldSource], hub: Hub, service: XdsService, watches: Watches) -> None:
        self.source = sources[0]
        self.sources = sources
        self.hub = hub
        self.service = service
        self.watches = watches
        self.hidden: list[ServiceKey] = []
        self.channel: Channel
        self.limits: ServerLimits

    @asynccontextmanager
    async def client(self, node: str = "n1", **metadata: str) -> AsyncIterator[Client]:
        asks = core_pb.Node(id="test", locality=core_pb.Locality(sub_zone=node))
        for key, value in metadata.items():
            asks.metadata.fields[key].string_value = value
        async with self.channel.call(STREAM) as call:
            yield Client(call, asks)


Serving = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serving() -> Serving:
    @asynccontextmanager
    async def serving(
        *services: str,
        sync: bool = True,
        sources: Sequence[HeldSource] = (),
        view: View | None = None,
        limits: ServerLimitsConfig | None = None,
    ) -> AsyncIterator[Served]:
        sources = sources or [HeldSource()]
        hub = Hub(sources, random.Random(0))
        watches = Watches()
        hidden: list[ServiceKey] = []
        taken = ServerLimits(limits)
        service = XdsService(hub, taken, watches, lambda call, services: hidden.extend(services), ("node",))
        async with trio.open_nursery() as nursery:
            await nursery.start(hub.run)
            near, far = memory_stream_pair()
            handlers = _seeing(service.handlers(), view) if view is not None else service.handlers()
            nursery.start_soon(GrpcServer(handlers).serve_stream, far)
            async with channel_over(near) as channel:
                await wait_all_tasks_blocked()
                served = Served(sources, hub, service, watches)
                served.channel, served.hidden, served.limits = channel, hidden, taken
                for name in services:
                    served.source.update(name, ONE, TWO)
                if sync:
                    for source in sources:
                        source.sync.set()
                    await hub.wait_in_sync()
                yield served
            nursery.cancel_scope.cancel()

    return serving


def _seeing(routes: Routes, view: View) -> Routes:
    def wrapped(handler: Handler) -> Handler:
        async def see(call: ServerCall[Any, Any]) -> None:
            call.caller = view
            await handler(call)

        return see

    return {method: wrapped(handler) for method, handler in routes.items()}


async def test_a_channel_finds_its_endpoints_step_by_step(serving: Serving) -> None:
    async with serving("b") as served, served.client("n2") as client:
        for kind in (LISTENER, ROUTE, CLUSTER):
            await client.ask(kind, "b")
            response = await client.next()
            assert (response.type_url, names(response)) == (kind.url, ["b"])
            await client.ack(kind, "b")
        await client.ask(ENDPOINTS, "b")
        assert nodes(await client.next()) == {"b": [(0, "n2"), (1, "n1")]}
        await client.ack(ENDPOINTS, "b")
        await client.silence()
        assert dict(served.service.responses) == dict.fromkeys(ResourceType, 1)


async def test_each_client_has_its_own_node_first(serving: Serving) -> None:
    async with serving("b") as served:
        seen = []
        for node in ("n1", "n2", "n9"):
            async with served.client(node) as client:
                await client.ask(ENDPOINTS, "b")
                seen.append(nodes(await client.next())["b"])
    assert seen == [[(0, "n1"), (1, "n2")], [(0, "n2"), (1, "n1")], [(0, "n1"), (0, "n2")]]


async def test_a_clients_own_prefer_wins(serving: Serving) -> None:
    async with serving("b") as served, served.client("n1", prefer="rack") as client:
        await client.ask(ENDPOINTS, "b")
        assert nodes(await client.next())["b"] == [(0, "n1"), (0, "n2")]


async def test_only_what_changed_is_pushed(serving: Serving) -> None:
    async with serving("a", "b", "c") as served, served.client() as client:
        await client.ask(CLUSTER, "a", "b")
        await client.next()
        await client.ack(CLUSTER, "a", "b")
        await client.ask(ENDPOINTS, "a", "b")
        assert set(nodes(await client.next())) == {"a", "b"}
        await client.ack(ENDPOINTS, "a", "b")
        served.source.update("c", ONE)
        # What changes nothing of what a client sees is nothing to it.
        served.source.update("a", ONE, make_instance("10.0.0.2", 80, labels={"node": "n2", "version": "2"}))
        await client.silence()
        served.source.update("b", ONE, FAR)
        assert nodes(await client.next()) == {"b": [(0, "n1"), (1, "n3")]}


async def test_a_service_that_is_gone_takes_its_cluster_with_it_and_comes_back(serving: Serving) -> None:
    async with serving("a", "b") as served, served.client() as client:
        for kind in (CLUSTER, ENDPOINTS):
            await client.ask(kind, "a", "b")
            await client.next()
            await client.ack(kind, "a", "b")
        served.source.remove("b")
        response = await client.next()
        assert (response.type_url, names(response)) == (CLUSTER.url, ["a"])
        assert nodes(await client.next()) == {"b": []}
        for kind in (CLUSTER, ENDPOINTS):
            await client.ack(kind, "a", "b")
        served.source.update("b", ONE)
        response = await client.next()
        assert (response.type_url, names(response)) == (CLUSTER.url, ["a", "b"])
        assert nodes(await client.next()) == {"b": [(0, "n1")]}


async def test_a_service_without_instances_is_known(serving: Serving) -> None:
    async with serving() as served, served.client() as client:
        served.source.update("b")
        await client.ask(CLUSTER, "b")
        assert names(await client.next()) == ["b"]
        await client.ask(ENDPOINTS, "b")
        assert nodes(await client.next()) == {"b": []}


async def test_what_nobody_knows_does_not_exist(serving: Serving) -> None:
    async with serving("b") as served, served.client() as client:
        await client.ask(LISTENER, "nobody")
        assert names(await client.next()) == []
        await client.ack(LISTENER, "nobody")
        served.source.update("nobody", ONE)
        assert names(await client.next()) == ["nobody"]


async def test_names_that_can_be_none_are_counted_and_harm_no_others(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving("b") as served, served.client() as client:
        await client.ask(LISTENER, "xdstp://elsewhere/b", "b")
        assert names(await client.next()) == ["b"]
        await client.ack(LISTENER, "xdstp://elsewhere/b", "b")
        await client.silence()
        assert served.service.refused == 1
    assert "xds resource name refused" in caplog.text
    assert "xdstp://elsewhere/b" in caplog.text


async def test_ports_are_chosen_by_name(serving: Serving) -> None:
    async with serving() as served, served.client() as client:
        grpc, metrics = (make_instance("10.0.0.1", port, name) for port, name in ((80, "grpc"), (90, "metrics")))
        served.source.update("b", grpc, metrics)
        await client.ask(ENDPOINTS, "b:grpc", "b:none")
        response = await client.next()
        found = [endpoint_pb.ClusterLoadAssignment.FromString(each.value) for each in response.resources]
        assert [
            [end.endpoint.address.socket_address.port_value for group in each.endpoints for end in group.lb_endpoints]
            for each in found
        ] == [[80], []]


async def test_a_rejected_response_is_counted_logged_and_not_sent_again(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving("b") as served, served.client() as client:
        await client.ask(ENDPOINTS, "b")
        await client.next()
        await client.ack(ENDPOINTS, "b", problem="no such field")
        await client.silence()
        assert served.service.rejected[ENDPOINTS] == 1
        assert served.service.responses[ENDPOINTS] == 1
        served.source.update("b", TWO)
        assert nodes(await client.next()) == {"b": [(0, "n2")]}
    assert "xds response rejected" in caplog.text
    assert "no such field" in caplog.text


async def test_a_wildcard_follows_which_services_there_are(serving: Serving) -> None:
    async with serving("a", "b") as served, served.client() as client:
        await client.ask(CLUSTER)
        assert sorted(names(await client.next())) == ["a", "b"]
        await client.ack(CLUSTER)
        served.source.update("c", ONE)
        assert sorted(names(await client.next())) == ["a", "b", "c"]
        await client.ack(CLUSTER)
        served.source.remove("a")
        assert sorted(names(await client.next())) == ["b", "c"]
        await client.ack(CLUSTER)
        served.source.update("b", TWO)
        await client.silence()


async def test_a_wildcard_that_is_given_up_is_watched_no_more(serving: Serving) -> None:
    async with serving("a", "b") as served, served.client() as client:
        await client.ask(CLUSTER)
        await client.next()
        await client.ack(CLUSTER, "a")
        # What is named anew is answered, though the wildcard had brought it.
        assert names(await client.next()) == ["a"]
        await client.ack(CLUSTER, "a")
        await wait_all_tasks_blocked()
        [watching] = served.watches._told_of()
        assert set(watching.watcher.services) == {"a"}
        served.source.update("c", ONE)
        await client.silence()


async def test_what_is_given_up_is_watched_no_more(serving: Serving) -> None:
    async with serving("a", "b") as served, served.client() as client:
        await client.ask(ENDPOINTS, "a", "b", "b:grpc")
        await client.next()
        await client.ack(ENDPOINTS, "b:grpc")
        await wait_all_tasks_blocked()
        [watching] = served.watches._told_of()
        assert set(watching.watcher.services) == {"b"}
        served.source.update("a", TWO)
        await client.silence()
        await client.ask(ENDPOINTS, "a", "b:grpc", nonce=client.nonces[ENDPOINTS.url])
        assert nodes(await client.next()) == {"a": [(0, "n2")]}


async def test_nothing_is_said_before_the_sources_are_in_sync(serving: Serving) -> None:
    """D3: an answer without a service would take away what a client has from before."""
    async with serving("b", sync=False) as served, served.client() as client:
        await client.ask(LISTENER, "b")
        await client.ask(CLUSTER)
        await client.ask(ENDPOINTS, "b")
        await client.silence()
        served.source.sync.set()
        found = {}
        for _ in range(3):
            response = await client.next()
            found[response.type_url] = names(response)
        assert found == {LISTENER.url: ["b"], CLUSTER.url: ["b"], ENDPOINTS.url: ["b"]}


async def test_a_source_that_is_out_holds_up_what_it_may_know_alone(serving: Serving) -> None:
    """D3, D8: of endpoints, what can be said is said."""
    sources = [HeldSource("one", "a"), HeldSource("two", "b")]
    async with serving(sources=sources, sync=False) as served, served.client() as client:
        sources[0].update("a", ONE)
        sources[0].sync.set()
        await client.ask(ENDPOINTS, "a", "b")
        assert nodes(await client.next()) == {"a": [(0, "n1")]}
        await client.ack(ENDPOINTS, "a", "b")
        await client.silence()
        sources[1].update("b", TWO)
        sources[1].sync.set()
        assert nodes(await client.next()) == {"b": [(0, "n2")]}


async def test_endpoints_are_split_into_responses_that_clients_take(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_RESPONSE", 10)
    async with serving("a", "b", "c") as served, served.client() as client:
        await client.ask(ENDPOINTS, "a", "b", "c")
        seen: list[str] = []
        for _ in range(3):
            seen += nodes(await client.next())
            await client.ack(ENDPOINTS, "a", "b", "c")
        assert seen == ["a", "b", "c"]
        await client.silence()


async def test_a_caller_sees_what_it_may_and_is_told_of_nothing_else(serving: Serving) -> None:
    async with serving("a", "b", view=View("web", ["a"])) as served, served.client() as client:
        await client.ask(LISTENER, "a", "b")
        assert names(await client.next()) == ["a"]
        await client.ask(CLUSTER)
        assert names(await client.next()) == ["a"]
        await client.ack(CLUSTER)
        served.source.update("c", ONE)
        await client.silence()
        assert served.hidden == ["b"]


async def test_streams_are_listed_among_the_watches(serving: Serving) -> None:
    async with serving("b") as served, served.client("n1") as client:
        await client.ask(ENDPOINTS, "b")
        await client.next()
        await wait_all_tasks_blocked()
        [watcher], _ = finish(served.watches.listed(10))
        assert (watcher.caller.name, watcher.caller.node, watcher.services[0].service) == ("test", "n1", "b")
        assert watcher.behind_ms >= 0
        assert served.watches._told_of()[0].behind_since is not None
        await client.ack(ENDPOINTS, "b")
        await wait_all_tasks_blocked()
        assert served.watches._told_of()[0].behind_since is None
        assert served.service.streams == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.DiscoveryRequest(type_url=LISTENER.url), "node: the stream's first request has none"),
        (
            pb.DiscoveryRequest(type_url=LISTENER.url, node=core_pb.Node(id="x"), resource_names=["b", "x" * 513]),
            r"resource_names\[1\]: is longer than 512 characters",
        ),
    ],
)
async def test_streams_that_are_refused(serving: Serving, request_: pb.DiscoveryRequest, message: str) -> None:
    async with serving("b") as served, served.channel.call(STREAM) as call:
        await call.send(request_)
        with pytest.raises(GrpcError, match=message) as caught:
            await call.receive()
        assert caught.value.code is StatusCode.INVALID_ARGUMENT
        assert not len(served.watches)


async def test_a_node_that_cannot_be_read_is_told_so(serving: Serving) -> None:
    node = core_pb.Node()
    node.metadata.fields["prefer"].number_value = 7
    async with serving("b") as served, served.channel.call(STREAM) as call:
        await call.send(pb.DiscoveryRequest(type_url=LISTENER.url, node=node))
        with pytest.raises(GrpcError, match=r"node\.metadata\.prefer: is not a list") as caught:
            await call.receive()
        assert caught.value.code is StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("third", ["c", "b:grpc", "xdstp://a/b", "hidden"])
async def test_too_many_names_end_the_stream(serving: Serving, third: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever they are: services, ports of one, what can be none, what it may not see (P2)."""
    limits = ServerLimitsConfig(subscriptions=2)
    view = View("web", ["a", "b", "c"])
    async with serving("a", "b", "c", limits=limits, view=view) as served, served.client() as client:
        await client.ask(LISTENER, "a", "b")
        await client.next()
        # The same by another type are no more than they were.
        await client.ask(ENDPOINTS, "a", "b")
        await client.next()
        await client.ack(ENDPOINTS, "b", third)
        with pytest.raises(GrpcError, match="subscriptions: 3 of them") as caught:
            await client.next()
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        await wait_all_tasks_blocked()
        assert served.hub.watcher_count == 0
        assert served.limits.subscriptions == 0
    assert "xds stream refused" in caplog.text


async def test_a_wildcard_counts_as_one_with_what_it_brings(serving: Serving) -> None:
    """How many services there are is not the client's doing; an Envoy asks for the endpoints of each by name."""
    limits = ServerLimitsConfig(subscriptions=2)
    async with serving("a", "b", "c", limits=limits) as served, served.client() as client:
        await client.ask(CLUSTER)
        assert len(names(await client.next())) == 3
        await client.ack(CLUSTER)
        await client.ask(ENDPOINTS, "a", "b", "c")
        assert len((await client.next()).resources) == 3
        assert served.limits.subscriptions == 1
        await client.ack(ENDPOINTS, "a", "b", "c", "d", "e")
        with pytest.raises(GrpcError, match="subscriptions: 3 of them"):
            await client.next()


async def test_many_names_cost_as_much_as_there_are(serving: Serving) -> None:
    """Thousands of ports of one service, wanted and given up, are no work for each pair of them."""
    ports = [f"b:p{number}" for number in range(3_000)]
    limits = ServerLimitsConfig(subscriptions=3_000)
    async with serving("b", limits=limits) as served, served.client() as client:
        await client.ask(LISTENER, *ports)
        seen = set(names(await client.next()))
        assert seen == set(ports)
        await client.ack(LISTENER, "b")
        await wait_all_tasks_blocked()
        assert served.limits.subscriptions == 1


async def test_a_type_that_is_not_served_is_passed_over(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """What else an Envoy may want costs it none of what there is."""
    async with serving("b") as served, served.client() as client:
        await client.ask("type.googleapis.com/envoy.service.runtime.v3.Runtime", "x")
        await client.ask(LISTENER, "b")
        assert names(await client.next()) == ["b"]
    assert "xds type not served" in caplog.text


async def test_who_may_hold_all_of_a_service_is_told_of_no_part(serving: Serving) -> None:
    """D8: a restarted server whose other source is away keeps what clients have; who has nothing gets what there is."""
    sources = [HeldSource("one"), HeldSource("two")]
    async with serving(sources=sources, sync=False) as served:
        sources[0].update("b", ONE)
        sources[0].sync.set()
        await wait_all_tasks_blocked()
        async with served.client() as old, served.client() as new:
            await old.ask(CLUSTER, "b", version="7")
            await old.ask(ENDPOINTS, "b", version="7")
            await old.silence()
            await new.ask(ENDPOINTS, "b")
            assert nodes(await new.next()) == {"b": [(0, "n1")]}
            sources[1].update("b", TWO)
            sources[1].sync.set()
            assert names(await old.next()) == ["b"]
            assert nodes(await old.next()) == {"b": [(0, "n1"), (1, "n2")]}


@pytest.mark.parametrize("version", ["", "7"])
async def test_a_wildcard_is_told_what_there_is_unless_it_may_hold_more(serving: Serving, version: str) -> None:
    """D3: an Envoy that starts while a registry is away begins with the others' services."""
    sources = [HeldSource("one", "a"), HeldSource("two", "b")]
    async with serving(sources=sources, sync=False) as served, served.client() as client:
        sources[0].update("a", ONE)
        sources[0].sync.set()
        await client.ask(CLUSTER, version=version)
        if version:
            await client.silence()
        else:
            assert names(await client.next()) == ["a"]
            await client.ack(CLUSTER)
            await client.silence()
        sources[1].update("b", TWO)
        sources[1].sync.set()
        assert sorted(names(await client.next())) == ["a", "b"]


async def test_what_cannot_be_said_yet_withholds_nothing_else(serving: Serving) -> None:
    """D3: of listeners too; a name that the client cannot have from before is left out, and comes once it is known."""
    sources = [HeldSource("one", "a"), HeldSource("two", "b")]
    async with serving(sources=sources, sync=False) as served, served.client() as client:
        sources[0].update("a", ONE)
        sources[0].sync.set()
        await client.ask(LISTENER, "b")
        await client.silence()
        await client.ask(LISTENER, "a", "b")
        assert names(await client.next()) == ["a"]
        await client.ack(LISTENER, "a", "b")
        await client.silence()
        sources[1].update("b", TWO)
        sources[1].sync.set()
        assert sorted(names(await client.next())) == ["a", "b"]


@pytest.mark.parametrize("gone", [False, True])
async def test_what_changes_and_changes_back_is_sent_in_the_end(serving: Serving, gone: bool) -> None:
    """What is sent is what the watcher was given: what the hub had in between cannot be taken for known."""
    async with serving("b") as served, served.client() as client:
        kind = CLUSTER if gone else ENDPOINTS
        await client.ask(kind, "b")
        await client.next()
        await client.ack(kind, "b")
        await wait_all_tasks_blocked()

        def change(*, back: bool) -> None:
            if back:
                served.source.update("b", ONE, TWO)
            elif gone:
                served.source.remove("b")
            else:
                served.source.update("b", TWO)

        # The stream takes the change, and waits for its turn to send it; meanwhile it is undone.
        await served.service.turns.acquire()
        change(back=False)
        await wait_all_tasks_blocked()
        change(back=True)
        served.service.turns.release()

        def is_back(response: pb.DiscoveryResponse) -> bool:
            return names(response) == ["b"] and (gone or nodes(response) == {"b": [(0, "n1"), (1, "n2")]})

        with trio.fail_after(20):
            while not is_back(await client.next()):
                await client.ack(kind, "b")


async def test_names_that_change_while_a_response_is_made_show_nothing_hidden(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2: what was taken is what it was when it was taken, whatever is asked for between two steps."""
    view = View("web", ["open*"])
    async with serving("open", "secret", "open2", view=view) as served, served.client() as client:
        seen: dict[str, list[tuple[int, str]]] = {}
        original = served.service.endpoints

        def endpoints(name: str, *rest: Any) -> Any:
            # Many steps, between which the reader goes on.
            for _ in range(400):
                yield
            return (yield from original(name, *rest))

        monkeypatch.setattr(served.service, "endpoints", endpoints)
        monkeypatch.setattr("meshlocal.net.slices.SLICE", 0.0)
        monkeypatch.setattr(service_module, "in_slices", lambda steps: in_slices(steps, 0.0))
        for _ in range(3):
            await client.ask(ENDPOINTS, "open", "secret", "open2")
            for _ in range(100):
                await trio.lowlevel.checkpoint()
            await client.ask(ENDPOINTS, "open", "open2")
            for _ in range(500):
                await trio.lowlevel.checkpoint()
            await client.ask(ENDPOINTS, "open", "secret", "open2")
            with trio.fail_after(20):
                seen |= nodes(await client.next())
            await client.ack(ENDPOINTS, "open", "open2")
        assert seen.keys() >= {"open", "open2"}
        assert seen.get("secret", []) == []


async def test_what_is_hidden_looks_like_what_nobody_knows(serving: Serving) -> None:
    """S2: of endpoints too, and so does what can be no service."""
    async with serving("b", view=View("web", ["a*"])) as served, served.client() as client:
        await client.ask(ENDPOINTS, "b", "abc", "no//name")
        assert nodes(await client.next()) == {"b": [], "abc": [], "no//name": []}


async def test_endpoints_that_were_put_back_follow_though_the_first_were_nothing_new(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_RESPONSE", 10)
    monkeypatch.setattr(service_module, "_TURN", 1)
    async with serving("a", "b", "c") as served, served.client() as client:
        await client.ask(ENDPOINTS, "a", "b", "c")
        for _ in range(3):
            await client.next()
            await client.ack(ENDPOINTS, "a", "b", "c")
        # Nothing that the client sees, and then something; in one go.
        for service in ("a", "b"):
            served.source.update(service, ONE, make_instance("10.0.0.2", 80, labels={"node": "n2", "x": "1"}))
        served.source.update("c", ONE)
        assert nodes(await client.next()) == {"c": [(0, "n1")]}


async def test_routes_are_split_likewise(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_RESPONSE", 10)
    async with serving("a", "b") as served, served.client() as client:
        await client.ask(ROUTE, "a", "b")
        assert names(await client.next()) == ["a"]
        await client.ack(ROUTE, "a", "b")
        assert names(await client.next()) == ["b"]


async def test_a_name_that_is_asked_for_while_a_response_is_made_is_answered(serving: Serving) -> None:
    """Also if it does not exist, which takes a response that has nothing new."""
    async with serving("a") as served, served.client() as client:
        await client.ask(LISTENER, "a")
        await client.next()
        await served.service.turns.acquire()
        await client.ack(LISTENER, "a", "x")
        await wait_all_tasks_blocked()
        await client.ask(LISTENER, "a", "x", "y")
        await wait_all_tasks_blocked()
        served.service.turns.release()
        response = await client.next()
        assert names(response) == ["a"]


async def test_a_stream_that_says_nothing_is_a_watch_too(serving: Serving) -> None:
    """It has a place among those that are limited, and a drain ends it."""
    limits = ServerLimitsConfig(watchers=1)
    async with serving("a", limits=limits) as served, served.channel.call(STREAM) as silent:
        await wait_all_tasks_blocked()
        async with served.client() as client:
            await client.ask(LISTENER, "a")
            with pytest.raises(GrpcError, match="takes no more"):
                await client.next()
        await served.watches.drain(1)
        with pytest.raises(GrpcError, match="going away"):
            await silent.receive()


async def test_a_scoped_address_costs_its_service_none_of_the_others(serving: Serving) -> None:
    """RFC 4007: its zone is an interface of another host, and clients reject all that comes with it."""
    async with serving() as served, served.client() as client:
        served.source.update("b", ONE, make_instance("fe80::1%eth0", 80, labels={"node": "n1"}))
        await client.ask(ENDPOINTS, "b")
        [resource] = (await client.next()).resources
        [group] = endpoint_pb.ClusterLoadAssignment.FromString(resource.value).endpoints
        assert [each.endpoint.address.socket_address.address for each in group.lb_endpoints] == ["10.0.0.1"]


async def test_a_drain_ends_streams(serving: Serving) -> None:
    async with serving("b") as served, served.client() as client:
        await client.ask(LISTENER, "b")
        await client.next()
        await served.watches.drain(10)
        with pytest.raises(GrpcError, match="going away") as caught:
            await client.next()
        assert caught.value.code is StatusCode.UNAVAILABLE


@pytest.mark.parametrize("wildcard", [False, True])
async def test_a_client_that_leaves_leaves_nothing_behind(
    serving: Serving, wildcard: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving("b") as served:
        async with served.client() as client:
            await client.ask(CLUSTER, *([] if wildcard else ["b"]))
            await client.next()
        await wait_all_tasks_blocked()
        assert (served.service.streams, served.hub.watcher_count, len(served.watches)) == (0, 0, 0)
        assert not served.hub._services_watchers
        async with served.client() as client:
            await client.ask(CLUSTER)
            await client.next()
            await client.end()
            assert await client._call.receive() is None
        await wait_all_tasks_blocked()
        assert served.service.streams == 0
    assert "failed" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_encoded_endpoints_are_shared_and_bounded(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_KEPT", 150)
    monkeypatch.setattr(service_module, "_OVERHEAD", 0)
    async with serving("a", "b", "c") as served:
        for _ in range(2):
            async with served.client() as client:
                await client.ask(ENDPOINTS, "a", "b", "c")
                assert len((await client.next()).resources) == 3
        assert served.service._kept_size == sum(len(each.body) for each in served.service._kept.values())
        assert 0 < served.service._kept_size <= 150
