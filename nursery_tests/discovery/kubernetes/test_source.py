"""The Kubernetes source over real TLS: what it asks for, and what it publishes of what it is told."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from meshlocal.discovery.hub import Hub
from meshlocal.discovery.kubernetes.kubeconfig import Content
from meshlocal.discovery.kubernetes.mapping import Defaults
from meshlocal.discovery.kubernetes.source import KubernetesSource, SlicesFoundError, _Run
from meshlocal.discovery.retry import Problems
from meshlocal.policy.kubernetes_options import KubernetesOptions
from meshlocal.policy.model import ServiceKey

SERVICE = "kubernetes.io/service-name"
ZONE, REGION = "topology.kubernetes.io/zone", "topology.kubernetes.io/region"


def part(
    name: Any,
    *endpoints: Any,
    service: Any = "b",
    namespace: Any = "shop",
    labels: Any = None,
    family: Any = "IPv4",
    port: Any = 9000,
) -> Any:
    """An EndpointSlice, its endpoints as `ADDRESS [NODE]`."""
    found = []
    for text in endpoints:
        address, *node = text.split()
        found.append({"addresses": [address]} | ({"nodeName": node[0]} if node else {}))
    return {
        "metadata": {"name": name, "namespace": namespace, "labels": {SERVICE: service} | (labels or {})},
        "addressType": family,
        "endpoints": found,
        "ports": [{"name": "grpc", "port": port, "protocol": "TCP"}],
    }


def node(name: Any, **labels: Any) -> Any:
    return {
        "metadata": {"name": name, "labels": {{"zone": ZONE, "region": REGION}[key]: labels[key] for key in labels}}
    }


def addresses(publications: Any) -> Any:
    """Service → its addresses."""
    return {service: sorted(key.address for key in instances) for service, instances in publications.services.items()}


def labels(publications: Any, address: Any, service: Any = "b.shop") -> Any:
    (found,) = [each.labels for key, each in publications.services[service].items() if key.address == address]
    return {name: found[name] for name in ("node", "zone", "region") if name in found}


def three(server: Any) -> None:
    slices = server.collections["/apis/discovery.k8s.io/v1/endpointslices"]
    slices.put("ADDED", part("b-1", "10.0.0.1 n1", "10.0.0.2 n2"))
    slices.put("ADDED", part("b-2", "10.0.0.3 n3"))
    slices.put("ADDED", part("c-1", "10.0.1.1 n1", service="c", namespace="play", labels={"tier": "x"}))


async def test_slices_of_a_service_are_merged(kube: Any) -> None:
    """A service's instances are those of all its slices, whichever came when; it is gone with the last of them."""
    async with kube.serving(three) as server, kube.following(server) as (_, publications):
        assert addresses(publications) == {"b.shop": ["10.0.0.1", "10.0.0.2", "10.0.0.3"], "c.play": ["10.0.1.1"]}
        server.put(kube.slices, "ADDED", part("b-3", "10.0.0.9"))
        await publications.until(lambda: len(publications.services["b.shop"]) == 4)
        for name in ("b-1", "b-2", "b-3"):
            server.put(kube.slices, "DELETED", part(name))
        await publications.until(lambda: "b.shop" not in publications.services)
        server.put(kube.slices, "MODIFIED", part("c-1", service="c", namespace="play"))
        await publications.until(lambda: not publications.services["c.play"])
        assert addresses(publications) == {"c.play": []}, "a service without endpoints is known"


async def test_namespaces(kube: Any) -> None:
    """Chosen namespaces are listed and watched one by one, and others never asked for."""
    options = "?namespace=shop&namespace=empty"
    async with kube.serving(three) as server, kube.following(server, options) as (source, publications):
        assert list(addresses(publications)) == ["b.shop"]
        server.put(kube.slices, "ADDED", part("d-1", "10.0.2.1", service="d", namespace="play"))
        server.put(kube.slices, "ADDED", part("d-1", "10.0.2.1", service="d", namespace="empty"))
        await publications.until(lambda: "d.empty" in publications.services)
        assert sorted(addresses(publications)) == ["b.shop", "d.empty"]
        asked = {(each.collection, each.namespace) for each in server.requests}
        assert asked == {(kube.slices, "shop"), (kube.slices, "empty"), (kube.nodes, "")}
        names = [each.name for each in source.details().resources]
        assert sorted(names) == ["endpointslices in empty", "endpointslices in shop", "nodes"]


async def test_selector(kube: Any) -> None:
    """The label selector goes to the server, with every list, page and watch."""
    async with kube.serving(three) as server, kube.following(server, "?selector=tier%3Dx") as (_, publications):
        assert addresses(publications) == {"c.play": ["10.0.1.1"]}
        await server.until(lambda: server.watching == 2)
        server.put(kube.slices, "ADDED", part("d-1", "10.0.2.1", service="d"))
        server.put(kube.slices, "ADDED", part("e-1", "10.0.3.1", service="e", labels={"tier": "x"}))
        await publications.until(lambda: "e.shop" in publications.services)
        assert "d.shop" not in publications.services
        asked = server.asked("list")[1:] + server.asked("watch")
        assert {query.get("labelSelector") for query in asked} == {"tier=x"}
        assert {query.get("labelSelector") for query in server.asked("watch", kube.nodes)} == {None}


async def test_large_clusters_are_listed_in_pages(kube: Any) -> None:
    """Every page but the last carries a token; together they are the whole."""

    def setup(server: Any) -> None:
        for number in range(25):
            server.collections[kube.slices].put("ADDED", part(f"s-{number}", f"10.0.0.{number + 1}"))

    limits = msgspec.structs.replace(kube.fast, page=10)
    async with kube.serving(setup) as server, kube.following(server, limits=limits) as (_, publications):
        assert len(publications.services["b.shop"]) == 25
        lists = [query for query in server.asked("list") if query["limit"] == "10"]
        assert ["continue" in query for query in lists] == [False, True, True]


async def test_zone_and_region_of_nodes(kube: Any) -> None:
    """They come from the endpoint, else from its node's labels, also when these change; a node that goes takes them."""

    def setup(server: Any) -> None:
        three(server)
        own = part("b-2", "10.0.0.3 n1")
        own["endpoints"][0]["zone"] = "z9"
        server.collections[kube.slices].put("MODIFIED", own)
        server.collections[kube.nodes].put("ADDED", node("n1", zone="z1", region="r1"))

    async with kube.serving(setup) as server, kube.following(server, zone="z0") as (_, publications):
        assert labels(publications, "10.0.0.1") == {"node": "n1", "zone": "z1", "region": "r1"}
        assert labels(publications, "10.0.0.2") == {"node": "n2", "zone": "z0"}
        assert labels(publications, "10.0.0.3") == {"node": "n1", "zone": "z9", "region": "r1"}
        await server.until(lambda: server.watching == 2)
        accepts = [each.headers["accept"].split(",")[0] for each in server.requests if each.collection == kube.nodes]
        assert accepts[1:] == [
            "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
            "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
        ], "a node's metadata is all it reads"
        server.put(kube.nodes, "MODIFIED", node("n1", zone="z2", region="r1"))
        server.put(kube.nodes, "ADDED", node("n2", zone="z3"))
        await publications.until(lambda: labels(publications, "10.0.0.2") == {"node": "n2", "zone": "z3"})
        await publications.until(lambda: labels(publications, "10.0.0.1")["zone"] == "z2")
        assert labels(publications, "10.0.1.1", "c.play") == {"node": "n1", "zone": "z2", "region": "r1"}
        server.put(kube.nodes, "DELETED", node("n1"))
        await publications.until(lambda: labels(publications, "10.0.0.1") == {"node": "n1", "zone": "z0"})
        assert labels(publications, "10.0.0.3") == {"node": "n1", "zone": "z9"}


async def test_nodes_that_may_not_be_read(kube: Any, caplog: Any) -> None:
    """Without the right to read nodes it does without, and says so once."""

    def setup(server: Any) -> None:
        three(server)
        server.forbidden = {kube.nodes}

    caplog.set_level("INFO")
    async with kube.serving(setup) as server, kube.following(server) as (source, publications):
        assert labels(publications, "10.0.0.1") == {"node": "n1"}
        assert publications.problem is None
        assert len(server.asked("list", kube.nodes)) == 1
        assert [each.name for each in source.details().resources] == ["endpointslices"]
        assert sum(record.getMessage().startswith("nodes are not read") for record in caplog.records) == 1


async def test_slices_that_may_not_be_read(kube: Any) -> None:
    """D3: without the right to read slices nothing is published; the server's words are reported."""

    def setup(server: Any) -> None:
        three(server)
        server.forbidden = {kube.slices}

    async with kube.serving(setup) as server, kube.following(server, in_sync=False) as (_, publications):
        await publications.until(lambda: publications.problem is not None)
        assert "403: endpointslices is forbidden" in publications.problem
        assert not publications.calls
        server.forbidden = set()
        await publications.until(lambda: publications.calls)
        assert publications.problem is None
        assert publications.calls == [("replace", ["b.shop", "c.play"])]


async def test_an_api_server_that_is_down_at_start(kube: Any) -> None:
    """D3: nothing is published before every list is complete; then everything at once."""

    def setup(server: Any) -> None:
        three(server)
        server.refuse = True

    async with kube.serving(setup) as server, kube.following(server, in_sync=False) as (_, publications):
        await server.until(lambda: server.accepted >= 4)
        assert publications.problem is not None
        assert not publications.calls
        server.refuse = False
        server.faults.append({"status": 503, "kind": "list", "collection": kube.slices})
        await publications.until(lambda: publications.calls)
        assert publications.calls == [("replace", ["b.shop", "c.play"])]
        assert publications.problem is None


async def test_an_outage_publishes_nothing(kube: Any) -> None:
    """D3: while the API server is away the last state stays; back again, only the difference is published."""
    async with kube.serving(three) as server, kube.following(server, "?nodes=no") as (source, publications):
        await server.until(lambda: server.watching == 1)
        calls = len(publications.calls)
        server.refuse, before = True, server.accepted
        await server.cut()
        await server.until(lambda: server.accepted >= before + 5)
        assert publications.problem is not None
        assert len(publications.calls) == calls
        slices = server.collections[kube.slices]
        slices.put("MODIFIED", part("b-2", "10.0.0.4 n3"))
        slices.compact()
        server.refuse = False
        server.wake()
        await publications.until(lambda: len(publications.calls) > calls)
        assert publications.calls[calls:] == [("update", "b.shop")]
        assert addresses(publications)["b.shop"] == ["10.0.0.1", "10.0.0.2", "10.0.0.4"]
        await publications.until(lambda: publications.problem is None)
        (watch,) = source.details().resources
        assert watch.lists == 2
        assert watch.failures >= 5


async def test_a_list_made_anew_removes_what_is_gone_in_one_step(kube: Any) -> None:
    """410: what vanished meanwhile goes, what did not change is not published again."""
    async with kube.serving(three) as server, kube.following(server, "?nodes=no") as (_, publications):
        await server.until(lambda: server.watching == 1)
        calls = len(publications.calls)
        same = publications.services["b.shop"]
        slices = server.collections[kube.slices]
        server.refuse = True
        await server.cut()
        slices.put("DELETED", part("c-1", namespace="play"))
        slices.compact()
        server.refuse = False
        await publications.until(lambda: "c.play" not in publications.services)
        assert publications.calls[calls:] == [("update", "c.play")]
        assert publications.services["b.shop"] is same


async def test_refused_credentials_are_read_again(kube: Any) -> None:
    """401: the credentials are looked up anew, once, within the same request; nobody sees a failure."""
    tokens = ["first"]

    def setup(server: Any) -> None:
        three(server)
        server.tokens = {"first"}

    async with kube.serving(setup) as server:
        found = []

        def find() -> Any:
            found.append(tokens[0])
            return kube.access(server, token=Content(tokens[0].encode()))

        async with kube.following(server, find=find) as (_, publications):
            assert found == ["first"]
            await server.until(lambda: server.watching == 2)
            server.tokens, tokens[0] = {"second"}, "second"
            await server.cut()
            await server.until(lambda: server.watching == 2)
            assert found == ["first", "second"], "two watches were refused, and one look-up did for both"
            server.put(kube.slices, "ADDED", part("b-3", "10.0.0.9"))
            await publications.until(lambda: len(publications.services["b.shop"]) == 4)
            server.tokens = set()
            await server.cut()
            await publications.until(lambda: "401: Unauthorized" in (publications.problem or ""))


async def test_watches_end_and_go_on(kube: Any) -> None:
    """A server that ends its watches in time is watched on from the last bookmark, and nothing is reported."""
    async with kube.serving(three) as server, kube.following(server, "?nodes=no") as (_, publications):
        for version in ("90", "95"):
            await server.until(lambda: server.watching == 1)
            line = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": version}}}
            server.collections[kube.slices].mark(json.dumps(line).encode() + b"\n")
            server.end_watches()
            await server.until(lambda version=version: server.asked("watch")[-1]["resourceVersion"] == version)
        assert publications.problems == [None]
        assert len(server.asked("list")) == 2, "one to see what there is, one to read it"


async def test_neither_slices_nor_endpoints(kube: Any) -> None:
    """A server without either is no cluster; it is asked until it is one."""

    def setup(server: Any) -> None:
        server.absent = {kube.slices, kube.endpoints}

    async with kube.serving(setup) as server, kube.following(server, in_sync=False) as (source, publications):
        await publications.until(lambda: publications.problem is not None)
        assert publications.problem == (
            "the API server: the API server answered 404: neither EndpointSlices nor Endpoints are there"
        )
        server.absent = {kube.slices}
        await publications.until(lambda: publications.calls)
        assert source.kind == "endpoints"


async def test_leaders_locks_are_no_services(kube: Any) -> None:
    """An Endpoints object that only holds a leader's lock is left out, also when it becomes one."""

    def setup(server: Any) -> None:
        server.absent = {kube.slices}
        server.collections[kube.endpoints].put("ADDED", {"metadata": {"name": "lock", "namespace": "shop"}})

    async with kube.serving(setup) as server, kube.following(server) as (_, publications):
        assert addresses(publications) == {"lock.shop": []}
        lock = {"name": "lock", "namespace": "shop", "annotations": {"control-plane.alpha.kubernetes.io/leader": "{}"}}
        server.put(kube.endpoints, "MODIFIED", {"metadata": lock})
        await publications.until(lambda: not publications.services)


async def test_an_object_that_cannot_be_read_keeps_what_it_said(kube: Any, caplog: Any) -> None:
    """One bad object harms no other, and not itself: it is reported once, and its last good state stays."""

    def setup(server: Any) -> None:
        three(server)
        server.collections[kube.slices].put("ADDED", part("bad", "10.0.5.1", service="d") | {"addressType": 7})

    async with kube.serving(setup) as server, kube.following(server, "?nodes=no") as (source, publications):
        assert sorted(addresses(publications)) == ["b.shop", "c.play"]
        bad = part("b-2", "10.0.0.7") | {"endpoints": "none"}
        for _ in range(3):
            server.put(kube.slices, "MODIFIED", bad)
        server.put(kube.slices, "ADDED", part("e-1", "10.0.3.1", service="e"))
        await publications.until(lambda: "e.shop" in publications.services)
        assert addresses(publications)["b.shop"] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
        assert source.details().left_out["unreadable"] == 2
        refused = [record.meshlocal_fields for record in caplog.records if "refused" in record.getMessage()]
        assert [(fields["object"], fields["served"]) for fields in refused] == [
            ("shop/bad", "nothing of it"),
            ("shop/b-2", "what it said before"),
        ]
        assert "endpoints" in refused[1]["problem"]
        server.put(kube.slices, "MODIFIED", part("b-2", "10.0.0.7"))
        await publications.until(lambda: "10.0.0.7" in addresses(publications)["b.shop"])
        assert source.details().left_out["unreadable"] == 1
        (watch,) = source.details().resources
        assert watch.lists == 1


async def test_dns_names_warn_once(kube: Any, caplog: Any) -> None:
    """FQDN slices are left out, counted, and one warning says so however many there are."""

    def setup(server: Any) -> None:
        for number in range(3):
            name = part(f"f-{number}", "b.example.com", service="f", family="FQDN")
            server.collections[kube.slices].put("ADDED", name)

    async with kube.serving(setup) as server, kube.following(server) as (source, publications):
        assert addresses(publications) == {"f.shop": []}
        assert source.details().left_out["fqdn"] == 3
        assert sum("DNS names" in record.getMessage() for record in caplog.records) == 1
        server.put(kube.slices, "DELETED", part("f-0"))
        await kube.until(lambda: source.details().left_out["fqdn"] == 2)


async def test_one_bad_address_leaves_the_others(kube: Any, caplog: Any) -> None:
    """An endpoint that cannot be used is left out and reported with its place; its neighbours stay."""
    async with kube.serving(three) as server, kube.following(server, "?nodes=no") as (source, publications):
        server.put(kube.slices, "MODIFIED", part("b-2", "10.0.0.3", "10.0.0.300", "fd00::1"))
        await kube.until(lambda: source.details().left_out["malformed"] == 2)
        assert addresses(publications)["b.shop"] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
        problems = [
            record.meshlocal_fields["problem"] for record in caplog.records if "left out" in record.getMessage()
        ]
        assert problems == [
            "endpoints[1].addresses[0]: '10.0.0.300' is neither an IPv4 nor an IPv6 address",
            "endpoints[2].addresses[0]: 'fd00::1' in a slice of IPv4 addresses",
        ]


async def test_in_a_hub(kube: Any) -> None:
    """D3: with the hub, nothing can be said of a service before the cluster was read; then it stays, whatever comes."""

    def setup(server: Any) -> None:
        three(server)
        server.refuse = True

    async with kube.serving(setup) as server:

        @asynccontextmanager
        async def hub_of(source: Any) -> AsyncIterator[Any]:
            hub = Hub([source], Random(0))
            async with trio.open_nursery() as nursery:
                await nursery.start(hub.run)
                yield hub
                nursery.cancel_scope.cancel()

        async with hub_of(kube.source(server)) as hub:
            await server.until(lambda: server.accepted >= 2)
            assert hub.snapshot("b.shop") is None
            assert hub.sources[0].problem is not None
            server.refuse = False
            with trio.fail_after(20):
                await hub.wait_in_sync()
            assert len(hub.snapshot("b.shop").instances) == 3
            assert hub.snapshot("nobody.shop").unknown
            assert hub.sources[0].problem is None
            await server.until(lambda: server.watching == 2)
            server.refuse = True
            await server.cut()
            await kube.until(lambda: hub.sources[0].problem is not None)
            assert len(hub.snapshot("b.shop").instances) == 3


async def test_details_before_it_runs(kube: Any) -> None:
    async with kube.serving() as server:
        source = kube.source(server)
        assert source.details() == ((), {})
        assert source.name == "kubernetes:"


@pytest.mark.parametrize("moment", range(12))
async def test_cancellation(kube: Any, moment: Any) -> None:
    """Cancelled at any moment of its start, it ends at once and leaves no connection behind."""
    async with kube.serving(three) as server:
        with trio.fail_after(20), trio.move_on_after(moment * 0.004) as scope:
            async with kube.following(server, in_sync=False):
                await trio.sleep_forever()
        assert scope.cancelled_caught
        await kube.until(lambda: server.open == 0)
        assert server.watching == 0


async def test_a_list_that_is_half_done_publishes_nothing(kube: Any) -> None:
    """D3, D8: after 410 the second page fails for a while; an event of another resource publishes only what it says."""

    def setup(server: Any) -> None:
        slices = server.collections[kube.slices]
        slices.put("ADDED", part("a-1", "10.0.0.1 n1", service="a"))
        slices.put("ADDED", part("z-1", "10.0.0.9 n1", service="z"))
        server.collections[kube.nodes].put("ADDED", node("n1", zone="z1"))

    limits = msgspec.structs.replace(kube.fast, page=1)
    seen = []
    async with kube.serving(setup) as server, kube.following(server, limits=limits) as (_, publications):
        update = publications.update
        publications.update = lambda service, instances: (
            seen.append((service, sorted(key.address for key in instances or ()))),
            update(service, instances),
        )
        await server.until(lambda: server.watching == 2)
        slices = server.collections[kube.slices]
        server.faults += [{"status": 503, "kind": "list", "collection": kube.slices, "page": "later"}] * 10
        server.refuse = True
        await server.cut()
        # The service moves from one slice to another while the server is away: the first page has the empty one.
        slices.put("MODIFIED", part("a-1", service="a"))
        slices.put("ADDED", part("y-1", "10.0.0.2 n1", service="a"))
        slices.compact()
        server.refuse = False
        server.wake()
        await server.until(lambda: len(server.faults) < 8)
        server.put(kube.nodes, "MODIFIED", node("n1", zone="z2"))
        await publications.until(lambda: labels(publications, "10.0.0.9", "z.shop")["zone"] == "z2")
        assert ("a.shop", []) not in seen
        await publications.until(lambda: addresses(publications)["a.shop"] == ["10.0.0.2"])
    assert ("a.shop", []) not in seen
    assert ("a.shop", ["10.0.0.1", "10.0.0.2"]) not in seen


async def test_the_right_to_read_nodes_may_come_later(kube: Any, monkeypatch: Any) -> None:
    """Granted while it runs, it is used: no restart."""
    monkeypatch.setattr("meshlocal.discovery.kubernetes.source.NODES_LOOK", 0.01)

    def setup(server: Any) -> None:
        three(server)
        server.collections[kube.nodes].put("ADDED", node("n1", zone="z1"))
        server.forbidden = {kube.nodes}

    async with kube.serving(setup) as server, kube.following(server) as (_, publications):
        assert labels(publications, "10.0.0.1") == {"node": "n1"}
        server.forbidden = set()
        await publications.until(lambda: labels(publications, "10.0.0.1") == {"node": "n1", "zone": "z1"})


async def test_slices_that_come_later_are_chosen(kube: Any, monkeypatch: Any) -> None:
    """An upgraded API server: the source begins anew, with them."""
    monkeypatch.setattr("meshlocal.discovery.kubernetes.source.SLICES_LOOK", 0.01)

    def setup(server: Any) -> None:
        three(server)
        server.absent = {kube.slices}

    async def until_it_begins_anew(server: Any) -> None:
        async with kube.following(server, in_sync=False) as (source, publications):
            await publications.until(lambda: publications.calls)
            assert source.kind == "endpoints"
            server.absent = set()
            await trio.sleep(20)

    async with kube.serving(setup) as server:
        with pytest.raises(BaseExceptionGroup) as raised:
            await until_it_begins_anew(server)
        assert raised.group_contains(SlicesFoundError)


async def test_a_source_that_begins_anew_waits_for_the_labels_it_had(kube: Any, monkeypatch: Any) -> None:
    """D1: what had its zone keeps it, though the nodes cannot be read at once this time."""

    def setup(server: Any) -> None:
        three(server)
        server.collections[kube.nodes].put("ADDED", node("n1", zone="z1"))

    async def run(source: Any, publications: Any, until: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nursery.start, source.run, publications)
            await until()
            nursery.cancel_scope.cancel()

    async with kube.serving(setup) as server:
        source, first, second = kube.source(server), kube.publications(), kube.publications()
        await run(source, first, lambda: first.until(lambda: first.calls))
        assert labels(first, "10.0.0.1")["zone"] == "z1"
        # Nobody who never had them waits at all.
        monkeypatch.setattr("meshlocal.discovery.kubernetes.source.NODES_WAIT", 0.0)
        server.faults += [{"status": 503, "kind": "list", "collection": kube.nodes}] * 5
        await run(source, second, lambda: second.until(lambda: second.calls))
        assert not server.faults
        assert second.calls == [("replace", ["b.shop", "c.play"])]
        assert labels(second, "10.0.0.1")["zone"] == "z1"


async def test_the_first_publication_waits_for_what_is_half_put() -> None:
    """D8: what is put in several steps counts whole, also in the first publication."""
    published: list[Any] = []
    publisher = SimpleNamespace(replace=published.append)
    run = _Run(publisher, Defaults("", ""), Problems(publisher, "kubernetes"))
    async with trio.open_nursery() as nursery:
        with run.hold():
            with run.hold():
                nursery.start_soon(run.publish_all)
                await wait_all_tasks_blocked()
            await wait_all_tasks_blocked()
            assert not published
        with trio.fail_after(5):
            while not published:
                await trio.lowlevel.checkpoint()
    assert published == [{}]


def test_a_source_of_namespaces_knows_what_it_cannot_know() -> None:
    """D8: other sources' services need not wait for it."""
    api: Any = None
    source = KubernetesSource(api, KubernetesOptions(namespaces=("shop",)), Random(0))
    names = ("b.shop", "b.play", "b", "b.shop.x", "db.primary.shop")
    assert [source.may_know(ServiceKey(name)) for name in names] == [True, False, False, False, True]
    everything = KubernetesSource(api, KubernetesOptions(), Random(0))
    assert everything.may_know(ServiceKey("b.play"))
