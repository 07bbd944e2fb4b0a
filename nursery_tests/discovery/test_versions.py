"""Clients and servers of versions that others still run (`exchanges`): each serves the other, as if it were its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from google.protobuf import json_format

from meshlocal.client.watch import DiscoveryWatch
from meshlocal.net.grpc.server import GrpcServer
from meshlocal.net.grpc.servercall import ServerCall
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.model import Instance, ServiceChange, ServiceKey, ServiceSnapshot
from nursery_tests.discovery.exchanges import FIRST, SECOND, THIRD, B, Interface, conversation

VERSIONS = sorted((Path(__file__).parent / "versions").iterdir())


@pytest.fixture(params=VERSIONS, ids=lambda folder: folder.name)
def version(request: pytest.FixtureRequest) -> tuple[Interface, dict[str, Any]]:
    folder: Path = request.param
    return Interface((folder / "interface.binpb").read_bytes()), json.loads((folder / "said.json").read_text())


async def test_its_clients_are_told_what_its_servers_told_them(version: tuple[Interface, dict[str, Any]]) -> None:
    """What a field means stays; what is new, it does not see."""
    interface, said = version
    assert await conversation(interface) == said


class Sink:
    def __init__(self) -> None:
        self.states: list[tuple[str, bool, list[Instance]]] = []
        self.some = trio.Event()

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        return iter(())

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        self.states.append(
            (snapshot.service, snapshot.unknown, sorted(snapshot.instances.values(), key=lambda each: each.key))
        )
        self.some.set()
        self.some = trio.Event()


async def test_its_servers_are_understood(version: tuple[Interface, dict[str, Any]], nursery: trio.Nursery) -> None:
    """A client of today reads the very events that they sent."""
    interface, said = version
    method = interface.methods["WatchInstances"]
    asked: list[Any] = []

    async def replay(call: ServerCall[Any, Any]) -> None:
        asked.append(await call.receive())
        for event in said["WatchInstances"]:
            await call.send(json_format.ParseDict(event, method.response_type()))
        await trio.sleep_forever()

    sockets = open_tcp_listeners("127.0.0.1", 0)
    await nursery.start(partial(GrpcServer({method: replay}).serve, sockets))
    url = DiscoveryUrl("grpc", "127.0.0.1", sockets[0].getsockname()[1])
    sink = Sink()
    nursery.start_soon(DiscoveryWatch([url], [B, ServiceKey("x")], sink, Random(0)).run)
    with trio.fail_after(20):
        while len(sink.states) < 6:
            await sink.some.wait()
    assert [(each.service, each.version) for each in asked[0].subscriptions] == [("b", ""), ("x", "")]
    by_service = {
        name: [(unknown, there) for service, unknown, there in sink.states if service == name] for name in "bx"
    }
    assert by_service["x"] == [(True, [])]
    assert by_service["b"] == [
        (False, [FIRST, SECOND]),
        (False, [FIRST, THIRD]),
        (False, [THIRD]),
        (False, [FIRST, THIRD, SECOND]),
        (True, []),
    ]
