"""What a real API server sent through a service's life, step by step: after each, all that is published."""

from __future__ import annotations

from typing import Any

import pytest

NODES = {"n1": ("z1", "r1"), "n2": ("z1", "r1"), "n3": ("z2", "r1")}
PORTS = (("8080", "http"), ("9000", "grpc"))


def expect(services: Any, *, nodes: Any) -> Any:
    """Full text of every instance, from `ADDRESS [NODE] STATE` each, one instance a port."""
    return {
        f"{service}.shop": {
            _text(service, endpoint, port, nodes)
            for endpoint in endpoints
            for port in (PORTS[1:] if service == "manual" else PORTS)
        }
        for service, endpoints in services.items()
    }


def _text(service: Any, endpoint: Any, port: Any, nodes: Any) -> Any:
    address, *node, state = endpoint.split()
    labels = {"cluster": "c1", "cluster_id": "c1", "namespace": "shop", "registry": "kubernetes", "service": service}
    if node:
        zone, region = NODES[node[0]]
        labels["node"] = node[0]
        # Manual slices name a node without its zone; 10.77.9.8 alone has one.
        if nodes or service != "manual" or address == "10.77.9.8":
            labels["zone"] = zone
        if nodes:
            labels["region"] = region
    number, name = port
    host = f"[{address}]" if ":" in address else address
    shown = " ".join(f"{key}={value}" for key, value in sorted(labels.items()))
    return f"{host}:{number}/tcp {name} {state} {shown}"


B1, B1B, B2, B3 = "10.77.1.10 n1", "10.77.1.11 n1", "10.77.2.10 n2", "10.77.3.10 n3"
B2V2, B3V2 = "10.77.2.20 n2", "10.77.3.20 n3"
MANUAL_1 = ["10.77.9.9 rs", "10.77.9.8 n1 rs"]
MANUAL_6 = [*MANUAL_1, "fd77::9 n2 rs"]
MIRRORED = ["10.77.9.6 n3 rs", "10.77.9.7 rs", "10.77.9.5 -"]


def ready(*endpoints: Any) -> Any:
    return [f"{endpoint} rs" for endpoint in endpoints]


# Each row: which step of steps.txt, how many lines of the watch it took, the endpoints of b (and of headless, which has
# the same selector) after it, and of manual.
SLICE_STEPS = [
    ("1", 2, ready(B1, B1B, B2, B3), None),
    ("2", 2, [*ready(B1, B1B, B3), f"{B2} -"], None),
    ("3", 2, ready(B1, B1B, B2, B3), None),
    ("4", 2, [*ready(B1B, B2, B3), f"{B1} st"], None),
    ("5", 2, ready(B1B, B2, B3), None),
    ("6 terminating", 2, [*ready(B1B, B3), f"{B2} st"], None),
    ("6 gone", 2, ready(B1B, B3), None),
    ("6 a new address", 2, [*ready(B1B, B3), f"{B2V2} -"], None),
    ("6 ready", 2, ready(B1B, B3, B2V2), None),
    ("6 terminating", 2, [*ready(B1B, B2V2), f"{B3} st"], None),
    ("6 gone", 2, ready(B1B, B2V2), None),
    ("6 a new address", 2, [*ready(B1B, B2V2), f"{B3V2} -"], None),
    ("6 ready", 2, ready(B1B, B2V2, B3V2), None),
    ("7", 1, ready(B1B, B2V2, B3V2), MANUAL_1),
    ("8", 1, ready(B1B, B2V2, B3V2), MANUAL_6),
    ("9", 1, ready(B1B, B2V2, B3V2), MANUAL_6),
    ("10", 1, ready(B1B, B2V2, B3V2), [*MANUAL_6, *MIRRORED]),
    ("11", 11, [], [*MANUAL_6, *MIRRORED]),
    # No garbage collector ran: the slices of a deleted service stayed, without endpoints. Three bookmarks.
    ("12", 3, [], [*MANUAL_6, *MIRRORED]),
]
# Endpoints know no terminating: such an address is gone at once.
ENDPOINTS_STEPS = [
    ("1", 2, ready(B1, B1B, B2, B3), None),
    ("2", 2, [*ready(B1, B1B, B3), f"{B2} -"], None),
    ("3", 2, ready(B1, B1B, B2, B3), None),
    ("4 and 5", 2, ready(B1B, B2, B3), None),
    ("6 gone", 2, ready(B1B, B3), None),
    ("6 a new address", 2, [*ready(B1B, B3), f"{B2V2} -"], None),
    ("6 ready", 2, ready(B1B, B3, B2V2), None),
    ("6 gone", 2, ready(B1B, B2V2), None),
    ("6 a new address", 2, [*ready(B1B, B2V2), f"{B3V2} -"], None),
    ("6 ready", 2, ready(B1B, B2V2, B3V2), None),
    ("10", 1, ready(B1B, B2V2, B3V2), MIRRORED),
    ("11", 6, [], MIRRORED),
    ("12", 4, None, MIRRORED),
]


def services(b: Any, manual: Any) -> Any:
    found = {"headless": b or []}
    if b is not None:
        found["b"] = b
    return found if manual is None else found | {"manual": manual}


def labelled_nodes(server: Any, kube: Any) -> None:
    for name, (zone, region) in NODES.items():
        labels = {"topology.kubernetes.io/zone": zone, "topology.kubernetes.io/region": region, "tier": "x"}
        server.collections[kube.nodes].put("ADDED", {"metadata": {"name": name, "labels": labels}, "spec": {"big": 1}})


@pytest.mark.parametrize("kind", ["slices", "endpoints"])
@pytest.mark.parametrize(
    ("way", "nodes"),
    [
        ("a line a chunk", True),
        ("a line a chunk", False),
        ("all in one chunk", True),
        ("in chunks of 700 bytes", True),
        ("cut in a line", True),
    ],
)
async def test_every_step(kube: Any, kind: Any, way: Any, nodes: Any) -> None:
    """After each step the whole of what is published is what the cluster then held, however its bytes came."""
    collection, name, steps = {
        "slices": (kube.slices, "endpointslices", SLICE_STEPS),
        "endpoints": (kube.endpoints, "endpoints", ENDPOINTS_STEPS),
    }[kind]
    lines = kube.lines(f"{name}.watch.jsonl")
    assert sum(count for _, count, _, _ in steps) == len(lines)

    def setup(server: Any) -> None:
        server.load(collection, f"{name}.list.json")
        labelled_nodes(server, kube)
        server.split = {"all in one chunk": "whole", "in chunks of 700 bytes": 700}.get(way)
        if kind == "endpoints":
            server.absent = {kube.slices}

    async with kube.serving(setup) as server:
        options = "" if nodes else "?nodes=no"
        async with kube.following(server, options, cluster="c1") as (source, publications):

            def shown() -> Any:
                return kube.show(publications.services)

            def wanted(b: Any, manual: Any) -> Any:
                found = expect(services(b, manual), nodes=nodes)
                if kind == "endpoints" and not nodes:
                    # Endpoints say nothing of zones.
                    found = {key: {drop_zone(text) for text in texts} for key, texts in found.items()}
                return found

            def watch() -> Any:
                return next(each for each in source.details().resources if each.name == name)

            assert shown() == wanted(ready(B1, B2, B3), None)
            events = 0
            for step, count, b, manual in steps:
                await server.until(lambda: server.watching == (2 if nodes else 1))
                if way == "cut in a line":
                    before = len(server.asked("watch", collection))
                    server.faults.append({"kind": "watch", "collection": collection, "cut": 300})
                    await server.cut()
                    await server.until(lambda before=before: len(server.asked("watch", collection)) > before)
                piece, lines = lines[:count], lines[count:]
                events += sum(b'"BOOKMARK"' not in line[:20] for line in piece)
                server.play(collection, piece)
                await kube.until(lambda events=events: watch().events == events)
                assert shown() == wanted(b, manual), step
            assert publications.problem is None or way == "cut in a line"
            last = source.details()
            assert watch().lists == 1, "nothing made it list again"
            left_out = {cause: count for cause, count in last.left_out.items() if count}
            assert left_out == ({"not_tcp": 2, "fqdn": 1} if kind == "slices" else {})


def drop_zone(text: Any) -> Any:
    return " ".join(word for word in text.split(" ") if not word.startswith("zone="))


async def test_a_change_publishes_its_service_only(kube: Any) -> None:
    """A change of one object publishes one service, and shares the instances that did not change."""
    lines = kube.lines("endpointslices.watch.jsonl")

    async with (
        kube.serving(lambda server: server.load(kube.slices, "endpointslices.list.json")) as server,
        kube.following(server, "?nodes=no") as (_, publications),
    ):
        assert publications.calls == [("replace", ["b.shop", "headless.shop"])]
        before = publications.services["b.shop"]
        server.play(kube.slices, [line for line in lines[2:3] if b'"name":"b-8dz9l"' in line])
        await publications.until(lambda: len(publications.calls) > 1)
        assert publications.calls[1:] == [("update", "b.shop")]
        after = publications.services["b.shop"]
        assert sorted({key.address for key in before if after[key] is before[key]}) == ["10.77.1.10", "10.77.3.10"]
        assert sorted({key.address for key in after}) == ["10.77.1.10", "10.77.1.11", "10.77.2.10", "10.77.3.10"]
