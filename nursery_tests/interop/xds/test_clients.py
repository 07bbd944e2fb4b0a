"""Clients of other people's, node-local by discovery's xDS: gRPC's in Python and Node.js, and Envoy (D1, O1, A2)."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import trio

from meshlocal.net.grpc.client import open_channel
from meshlocal.net.grpc.health import CHECK, SERVING
from meshlocal.wire.pb.health_pb2 import HealthCheckRequest
from meshlocal.wire.xds import SERVICE_NAME
from nursery_tests.certificates import Authority
from nursery_tests.e2e.running import Place, Program
from nursery_tests.interop.xds.parts import World

NODES = ("n1", "n2", "n3")


async def begin(world: World, *arguments: str) -> Program:
    """An instance on each node, and discovery, which is returned."""
    for number, name in enumerate(NODES, start=1):
        await world.instance(name, number)
    await world.registry.hold(held(world, *NODES))
    return await world.discovery(*arguments)


def held(world: World, *names: str) -> dict[str, dict[str, str]]:
    """The registry's entries of the instances on these nodes."""
    return {name: {"address": world.address(int(name[1:]))} for name in names}


def failed(counts: Counter[str]) -> dict[str, int]:
    """The calls that nobody served."""
    return {name: count for name, count in counts.items() if name[0] != "n"}


async def test_calls_stay_on_the_node_whatever_the_registry(
    world_of_each: World, kind: str, nursery: trio.Nursery
) -> None:
    """Local killed: others, within the same call; back: back."""
    world = world_of_each
    await begin(world)
    client = await world.client(kind, "n2")
    await client.only("n2")
    await client.order("start 8")
    await world.instances["n2"].killed()
    await trio.sleep(0.5)
    away = await client.order("stop")
    assert away["n1"]
    assert away["n3"]
    if kind != "envoy":
        # What was under way is made again.
        assert failed(away) == {}
    # An Envoy does not repeat what an instance may have seen: at most one call of each place was there.
    assert sum(failed(away).values()) <= 8, failed(away)
    await client.only("n1", "n3")
    await world.instance("n2", 2)
    await client.only("n2")
    nursery.cancel_scope.cancel()


async def test_a_rollout_under_load_fails_no_call(world: World, kind: str, nursery: trio.Nursery) -> None:
    """The registry takes each instance out before it ends, as orchestrators do."""
    await begin(world)
    client = await world.client(kind, "n2")
    await client.only("n2")
    await client.order("start 8")
    for number, name in enumerate(NODES, start=1):
        await world.held_and_told(held(world, *(each for each in NODES if each != name)))
        old = world.instances[name]
        old.signal(signal.SIGTERM)
        await old.exited()
        await world.instance(name, number)
        await world.held_and_told(held(world, *NODES))
    counts = await client.order("stop")
    assert failed(counts) == {}
    assert counts.keys() == set(NODES)
    await client.only("n2")
    nursery.cancel_scope.cancel()


async def test_discovery_killed_and_back(world: World, kind: str, nursery: trio.Nursery) -> None:
    """D1: clients go on with what they know, also to fail over; once it is back, they hear what changed."""
    discovery = await begin(world)
    client = await world.client(kind, "n2")
    await client.only("n2")
    await client.order("start 4")
    await discovery.killed()
    await trio.sleep(0.5)
    assert failed(await client.order("stop")) == {}
    await client.only("n2")
    await world.instances["n2"].killed()
    await client.only("n1", "n3")
    await world.registry.hold(held(world, "n3"))
    await world.discovery()
    await client.only("n3")
    nursery.cancel_scope.cancel()


async def test_one_of_two_local_instances_takes_all(world: World, kind: str, nursery: trio.Nursery) -> None:
    """Priorities, overprovisioning: no request leaves the node while one of its instances lives."""
    for number, name in enumerate(("n1", "n2", "n2-too"), start=1):
        await world.instance(name, number)
    both: dict[str, Mapping[str, object]] = {
        **held(world, "n1", "n2"),
        "n2-too": {"address": world.address(3), "labels": {"node": "n2"}},
    }
    await world.registry.hold(both)
    await world.discovery()
    client = await world.client(kind, "n2")
    await client.only("n2", "n2-too")
    await world.instances["n2"].killed()
    # The registry still has it.
    await client.order("calls 40")
    assert await client.order("calls 40") == {"n2-too": 40}
    nursery.cancel_scope.cancel()


async def test_a_service_that_nobody_knows_yet(world: World, nursery: trio.Nursery) -> None:
    """Calls fail at once and say why; once it is known, they are served."""
    await world.instance("n1", 1)
    world.processes.write("instances.yaml", "services: {}")
    await world.discovery()
    client = await world.client("threads", "n1")
    [told] = await client.order("calls 1")
    assert told.startswith("UNAVAILABLE")
    assert "LDS resource b: does not exist" in told
    await world.registry.hold(held(world, "n1"))
    await client.only("n1")
    nursery.cancel_scope.cancel()


async def test_an_envoy_forwards_tcp_likewise(world: World, envoy_installed: None, nursery: trio.Nursery) -> None:
    await begin(world)
    _, port = await world.envoy("n2")
    client = await world.plain(port)
    await client.only("n2")
    await world.instances["n2"].killed()
    # One connection carries all calls: it goes to one of the others, at the first attempt of its client.
    served = await client.order("calls 12")
    assert max(served["n1"], served["n3"]) == 12
    nursery.cancel_scope.cancel()


SERVICES = "[{identity: 'spiffe://td/shop', services: [b]}]"


async def test_a_certificate_says_what_a_client_may_see(world: World, nursery: trio.Nursery, tmp_path: Path) -> None:
    """S2: over TLS, who shows none is refused, and what somebody may not see does not exist for it."""
    authority = Authority(tmp_path)
    server = authority.issue("server", ["localhost"])
    world.processes.write(
        "discovery.yaml",
        f"discovery: {{tls_certificate_file: {server.certificate}, tls_key_file: {server.key},"
        f" tls_client_ca_file: {authority.file}, allow: {SERVICES}}}",
    )
    await begin(world, "--config", "discovery.yaml")
    named = {"server_uri": f"localhost:{world.xds_port}"}

    def showing(name: str | None) -> dict[str, object]:
        files = {"ca_certificate_file": authority.file}
        if name is not None:
            pair = authority.issue(name, uris=[f"spiffe://td/{name}"])
            files |= {"certificate_file": pair.certificate, "private_key_file": pair.key}
        return {"channel_creds": [{"type": "tls", "config": files}], **named}

    await (await world.client("threads", "n2", **showing("shop"))).only("n2")
    for other in ("other", None):
        client = await world.client("threads", "n2", **showing(other))
        [told] = await client.order("calls 1")
        assert told.startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED"))
    metrics = await Place().metrics(world.admin_port)
    assert metrics("xds_streams") == 1
    assert metrics("discovery_refused_total", reason="not_allowed") > 0
    nursery.cancel_scope.cancel()


async def test_an_envoy_shows_a_token(
    world: World, envoy_installed: None, nursery: trio.Nursery, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    server = authority.issue("server", ["localhost"])
    world.processes.write("tokens", "s3cret,spiffe://td/shop\n")
    world.processes.write(
        "discovery.yaml",
        f"discovery: {{tls_certificate_file: {server.certificate}, tls_key_file: {server.key},"
        f" tokens_file: tokens, allow: {SERVICES}}}",
    )
    await begin(world, "--config", "discovery.yaml")
    tls = (
        "      type: STATIC\n",
        "      type: STATIC\n      transport_socket:\n        name: envoy.transport_sockets.tls\n"
        "        typed_config:\n"
        '          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext\n'
        "          sni: localhost\n"
        f"          common_tls_context: {{validation_context: {{trusted_ca: {{filename: {authority.file}}}}}}}\n",
    )
    token = (
        "{cluster_name: discovery}}]",
        "{cluster_name: discovery}, initial_metadata: [{key: authorization, value: Bearer s3cret}]}]",
    )
    http, _ = await world.envoy("n2", [tls, token])
    await (await world.plain(http)).only("n2")
    metrics = await Place().metrics(world.admin_port)
    assert metrics("discovery_refused_total", reason="unauthenticated") == 0
    assert metrics("xds_rejected_total") == 0
    nursery.cancel_scope.cancel()


async def test_nothing_that_is_sent_is_rejected(world: World, kind: str, nursery: trio.Nursery) -> None:
    """Of every type, by every client; and each is shown among those who watch."""
    await begin(world)
    client = await world.client(kind, "n2")
    await client.only("n2")
    await world.registry.hold(held(world, "n1", "n3"))
    await client.only("n1", "n3")
    metrics = await Place().metrics(world.admin_port)
    assert metrics("xds_rejected_total") == 0
    assert metrics("xds_streams") == 1
    assert metrics("xds_responses_total", type="ClusterLoadAssignment") >= 2
    assert metrics("xds_responses_total", type="Cluster") == 1
    assert metrics("xds_responses_total", type="RouteConfiguration") == 1
    _, page = await Place().get(world.admin_port, "/proxies")
    [shown] = json.loads(page)["proxies"]
    assert (shown["name"], shown["node"]) == ("edge-1" if kind == "envoy" else "shop-1", "n2")
    assert shown["software"]
    assert (list(shown["services"]), shown["behind"]) == (["b"], 0)
    nursery.cancel_scope.cancel()


async def test_the_port_says_whether_it_serves(world: World, nursery: trio.Nursery) -> None:
    """Health by the name of the service that is there, and reflection."""
    await begin(world)
    async with open_channel("127.0.0.1", world.xds_port) as channel:
        for name in ("", SERVICE_NAME):
            answer = await channel.unary(CHECK, HealthCheckRequest(service=name))
            assert answer.status == SERVING
    nursery.cancel_scope.cancel()
