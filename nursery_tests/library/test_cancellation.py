"""Cancelled at each of its awaits, whatever the library does leaves nothing behind: no socket, no task, no count (A8).

`Steps` runs an operation and cancels it when it comes to its n-th await. A test does so for each n, until one run comes
to its end.
"""

from __future__ import annotations

import gc
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
import trio
from trio.testing import MockClock

import meshlocal
from meshlocal.client.links import open_link
from meshlocal.client.watch import DiscoveryWatch
from meshlocal.httpx import MeshTransport
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.policy.model import ServiceKey
from meshlocal.testing import FakeSource, http, open_upstream, silent, virtual_clock
from meshlocal.wire.discovery_methods import LIST_SERVICES
from meshlocal.wire.pb import discovery_pb2 as pb

Run = Callable[[Callable[[], Awaitable[None]]], None]
MOST = 400
"""More awaits than any operation here has: a run that does not end is a fault of the test."""


class Steps:
    """Awaits a coroutine, and cancels a scope when the coroutine waits for the n-th time."""

    def __init__(self, operation: Coroutine[Any, Any, None], step: int, scope: anyio.CancelScope) -> None:
        self._operation = operation
        self._left = step
        self._scope = scope

    def __await__(self) -> Generator[Any, Any, None]:
        inner = self._operation.__await__()
        send = _sending(inner, None)
        while True:
            try:
                yielded = send()
            except StopIteration:
                return
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()
            try:
                got = yield yielded
            except BaseException as error:  # noqa: BLE001 - it goes on to the operation
                send = _throwing(inner, error)
            else:
                send = _sending(inner, got)


def _throwing(inner: Generator[Any, Any, None], error: BaseException) -> Callable[[], Any]:
    return lambda: inner.throw(error)


def _sending(inner: Generator[Any, Any, None], value: Any) -> Callable[[], Any]:
    return lambda: inner.send(value)


async def at_each_await(
    operation: Callable[[], Coroutine[Any, Any, None]], check: Callable[[], Awaitable[None]]
) -> int:
    """Cancel an operation at each of its awaits in turn, and check after each; returns how many there were."""
    for step in range(1, MOST):
        with anyio.CancelScope() as scope:
            await Steps(operation(), step, scope)
        gc.collect()
        await check()
        if not scope.cancelled_caught:
            return step - 1
    raise AssertionError("the operation does not end")


async def closed(*upstreams: Any) -> None:
    with anyio.fail_after(30):
        while any(each.open for each in upstreams):  # noqa: ASYNC110 - the kernel tells nobody
            await anyio.sleep(0.01)


def assert_nothing_counted(mesh: meshlocal.Mesh) -> None:
    for state in mesh.core.services:
        assert (state.in_use, state.statistics.connecting, state.fitness.under_way) == (0, 0, {})
        assert set(state.circuit.now.values()) == {0}


@pytest.mark.parametrize("near_is", ["well", "refusing", "hanging", "late"])
def test_a_stream(near_is: str) -> None:
    """At every await of `open_tcp_stream`: the wait for a snapshot, each connect, each move to the next instance."""

    async def main() -> None:
        async with open_upstream(node="n1") as near, open_upstream(node="n2") as far:
            if near_is == "refusing":
                near.refuse()
            elif near_is == "hanging":
                near.hang()

            async def operation() -> None:
                source = FakeSource({"b": [near.instance, far.instance]})
                async with meshlocal.open_mesh(source, node_name="n1") as mesh:
                    if near_is == "late":
                        source.go_away()
                    async with trio.open_nursery() as nursery:
                        if near_is == "late":
                            nursery.start_soon(_come_back, source)
                        try:
                            async with await mesh.open_tcp_stream("b") as stream:
                                assert await stream.receive_some() in (b"n1\n", b"n2\n")
                        finally:
                            assert_nothing_counted(mesh)

            async def check() -> None:
                await closed(near, far)

            assert await at_each_await(operation, check) >= 4

    trio.run(main, clock=virtual_clock())


async def _come_back(source: FakeSource) -> None:
    await trio.sleep(1)
    source.come_back()


@pytest.mark.parametrize("near_is", ["well", "refusing", "silent"])
def test_a_request(on_loop: Run, near_is: str) -> None:
    """At every await of a request, from its first to its body's end, on each loop; the mesh serves on after each."""

    async def body() -> AsyncIterator[bytes]:
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
            yield b"x" * 1000

    async def main() -> None:
        policy = meshlocal.AttemptPolicy(attempt_timeout=0.05)
        source = FakeSource()
        async with (
            open_upstream(node="n1", behaviour=silent if near_is == "silent" else http()) as near,
            open_upstream(node="n2", behaviour=http()) as far,
            meshlocal.open_mesh(source, node_name="n1", attempts=policy) as mesh,
        ):
            source.set("b", near.instance, far.instance)
            await mesh.wait_heard("b")
            if near_is == "refusing":
                near.refuse()

            async def operation() -> None:
                transport = MeshTransport(mesh)
                async with httpx.AsyncClient(transport=transport) as client:
                    try:
                        answer = await client.put("http://b/", content=body())
                        assert answer.text == ("n1" if near_is == "well" else "n2")
                    finally:
                        assert_nothing_counted(mesh)

            async def check() -> None:
                await closed(near, far)

            assert await at_each_await(operation, check) >= 5

    on_loop(main)


@pytest.mark.parametrize("loop", ["trio", "asyncio"])
@pytest.mark.parametrize("scheme", ["grpc", "ws", "grpcs", "wss"])
def test_a_question_to_a_discovery_server(request: pytest.FixtureRequest, scheme: str, loop: str) -> None:
    """At every await of the discovery client: connecting, TLS, the handshake, the call, the goodbye."""
    server = request.getfixturevalue("secured" if scheme in ("grpcs", "wss") else "plain")

    async def operation() -> None:
        ca_file, token_file = (str(file) if file is not None else None for file in (server.ca_file, server.token_file))
        options = DiscoveryClientConfig(connect_timeout=30, ca_file=ca_file, token_file=token_file)
        async with open_link(DiscoveryUrl.parse(server.urls[scheme]), options) as link:
            await link.unary(LIST_SERVICES, pb.ListServicesRequest())

    async def check() -> None:
        await operation()

    async def main() -> None:
        with anyio.fail_after(120):
            assert await at_each_await(operation, check) >= 5

    anyio.run(main, backend=loop)


@pytest.mark.parametrize("loop", ["trio", "asyncio"])
@pytest.mark.parametrize("scheme", ["grpc", "ws"])
def test_a_watch_of_a_discovery_server(plain: Any, scheme: str, loop: str) -> None:
    """At every await of the task that runs the watch, until a snapshot came: its streams are its children."""

    class Sink:
        def __init__(self, heard: anyio.CancelScope) -> None:
            self._heard = heard

        def prepare(self, snapshot: meshlocal.ServiceSnapshot) -> Iterator[None]:
            return iter(())

        def publish(self, snapshot: meshlocal.ServiceSnapshot, change: object = None) -> None:
            self._heard.cancel()

    async def operation() -> None:
        urls = [DiscoveryUrl.parse(plain.urls[scheme])]
        with anyio.CancelScope() as heard:
            await DiscoveryWatch(urls, [ServiceKey("nobody")], Sink(heard), random.Random(0)).run()

    async def main() -> None:
        with anyio.fail_after(120):
            assert await at_each_await(operation, anyio.lowlevel.checkpoint) >= 1

    anyio.run(main, backend=loop)


def test_opening_watching_and_closing_a_mesh(on_loop: Run) -> None:
    """At every await from the opening of a mesh to its end; the source is let go each time."""
    source = FakeSource({"b": [meshlocal.make_instance("10.0.0.1", 1)]})

    async def operation() -> None:
        async with meshlocal.open_mesh(source) as mesh:
            await mesh.wait_heard("b")
            async for _ in mesh.watch("b"):
                break
            assert mesh.plan("b").heard

    async def check() -> None:
        assert source._feeds == []

    async def main() -> None:
        assert await at_each_await(operation, check) >= 3

    on_loop(main)


async def test_the_steps_reach_every_await(autojump_clock: MockClock) -> None:
    """What the tests above stand on: each await is met once, in order, and cancelled there."""
    reached: list[int] = []

    async def operation() -> None:
        for number in range(5):
            try:
                await anyio.sleep(1)
            except trio.Cancelled:
                reached.append(number)
                raise

    assert await at_each_await(operation, anyio.lowlevel.checkpoint) == 5
    assert reached == [0, 1, 2, 3, 4]
