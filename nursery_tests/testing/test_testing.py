"""`meshlocal.testing` itself: what a test tells an upstream, a source and a clock to do is what happens."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Awaitable, Callable

import anyio
import httpx
import pytest
import trio

import meshlocal
from meshlocal.testing import (
    FakeSource,
    HttpRequest,
    HttpResponse,
    Upstream,
    UpstreamConnection,
    answer,
    echo,
    http,
    open_upstream,
    reset,
    run,
    silent,
    virtual_clock,
)

LIMIT = 30
Run = Callable[[Callable[[], Awaitable[None]]], None]


@pytest.fixture(params=["trio", "asyncio"])
def on_loop(request: pytest.FixtureRequest) -> Run:
    def run(main: Callable[[], Awaitable[None]]) -> None:
        async def limited() -> None:
            with anyio.fail_after(LIMIT):
                await main()

        anyio.run(limited, backend=request.param)

    return run


async def talk(upstream: Upstream, said: bytes = b"") -> bytes:
    """All that it says to who says this, and ends."""
    async with await anyio.connect_tcp("127.0.0.1", upstream.port) as stream:
        if said:
            await stream.send(said)
        await stream.send_eof()
        received = b""
        try:
            while True:
                received += await stream.receive()
        except anyio.EndOfStream:
            return received


async def connections(upstream: Upstream, count: int) -> None:
    while upstream.open != count:  # noqa: ASYNC110 - the kernel tells nobody
        await anyio.sleep(0.01)


def test_an_instance_describes_itself(on_loop: Run) -> None:
    async def main() -> None:
        async with open_upstream("b1", node="n1", labels={"zone": "z1"}, port_name="grpc") as upstream:
            instance = upstream.instance
            assert (instance.key.address, instance.key.port, instance.key.port_name) == (
                "127.0.0.1",
                upstream.port,
                "grpc",
            )
            assert dict(instance.labels) == {"node": "n1", "zone": "z1"}
            assert await talk(upstream) == b"b1\n"
        async with open_upstream(node="n1") as named, open_upstream() as nameless:
            assert (named.name, nameless.name) == ("n1", "upstream")
            assert nameless.instance.node == ""

    on_loop(main)


def test_behaviours(on_loop: Run) -> None:
    """`echo`, `answer`, `silent`, `reset`, and one of a test's own; for all connections, or the next few."""

    async def shouting(connection: UpstreamConnection) -> None:
        await connection.send((await connection.receive()).upper())

    async def main() -> None:
        async with open_upstream("b") as upstream:
            assert await talk(upstream, b"hello") == b"b\nhello"
            upstream.behave(answer(b"bye"))
            assert await talk(upstream, b"hello") == b"bye"
            assert await talk(upstream) == b"", "nothing came that could be answered"
            upstream.behave(silent)
            assert await talk(upstream, b"hello") == b""
            upstream.behave(echo)
            upstream.behave(shouting, times=2)
            upstream.behave(reset, times=1)
            for expected in (b"HELLO", b"HELLO"):
                assert await talk(upstream, b"hello") == expected
            with pytest.raises(anyio.BrokenResourceError):
                await talk(upstream, b"hello")
            assert await talk(upstream, b"hello") == b"b\nhello"
            upstream.behave(shouting, times=5)
            upstream.behave(echo)
            assert await talk(upstream, b"hello") == b"b\nhello", "a new rule is for all that come"
            assert upstream.accepted == 9
            await connections(upstream, 0)

    on_loop(main)


def test_states(on_loop: Run) -> None:
    """Refusing, hanging, killed, back: on the same port, which nobody else gets meanwhile."""

    async def main() -> None:
        async with open_upstream("b") as upstream:
            async with await anyio.connect_tcp("127.0.0.1", upstream.port) as first:
                assert await first.receive() == b"b\n"
                upstream.refuse()
                with pytest.raises(OSError):
                    await talk(upstream)
                await first.send(b"still")
                assert await first.receive() == b"still", "what is open goes on"
                with pytest.raises(OSError), socket.socket() as thief:
                    thief.bind(("127.0.0.1", upstream.port))
                upstream.accept()
                assert await talk(upstream) == b"b\n"
                upstream.kill()
                with pytest.raises(anyio.BrokenResourceError):
                    await first.receive()
            with pytest.raises(OSError):
                await talk(upstream)
            for _ in range(2):
                upstream.hang()
                with anyio.move_on_after(0.3) as waited:
                    await talk(upstream)
                assert waited.cancelled_caught
                upstream.accept()
                assert await talk(upstream) == b"b\n"
            await connections(upstream, 0)

    on_loop(main)


def test_http(on_loop: Run) -> None:
    """Requests are kept, responses are as a test makes them, bad requests are told."""

    def respond(request: HttpRequest) -> HttpResponse | None:
        if request.target == "/reset":
            return None
        return HttpResponse(201, request.body[::-1], {"X-Method": request.method}, close=request.target == "/close")

    async def main() -> None:
        async with open_upstream("b", behaviour=http()) as upstream, httpx.AsyncClient(timeout=LIMIT) as client:
            base = f"http://127.0.0.1:{upstream.port}"
            assert (await client.get(base)).text == "b"
            upstream.behave(http(HttpResponse(503, b"busy")))
            assert (await client.get(base)).text == "b", "a connection that is open goes on as it began"
            upstream.cut()
            upstream.behave(http(respond))
            await connections(upstream, 0)
            got = await client.post(f"{base}/a?q=1", content=b"abc", headers={"X-One": "1"})
            assert (got.status_code, got.text, got.headers["x-method"]) == (201, "cba", "POST")
            request = upstream.requests[-1]
            assert (request.method, request.target, request.body) == ("POST", "/a?q=1", b"abc")
            assert request.headers["x-one"] == "1"
            assert (await client.get(f"{base}/close")).headers["connection"] == "close"
            with pytest.raises(httpx.TransportError):
                await client.get(f"{base}/reset")
            pipelined = b"GET /1 HTTP/1.1\r\nHost: b\r\n\r\n" * 3
            assert (await talk(upstream, pipelined)).count(b"HTTP/1.1 201 Created") == 3
            assert (await talk(upstream, b"no http\r\n\r\n")).startswith(b"HTTP/1.1 400 ")

    on_loop(main)


def test_a_failure_of_the_test_comes_out_as_it_is(on_loop: Run) -> None:
    """No group around an assertion; a behaviour of the test's own that fails is told too; no socket is left."""

    async def broken(connection: UpstreamConnection) -> None:
        await connection.receive()
        raise ZeroDivisionError

    async def both() -> None:
        async with open_upstream(behaviour=broken) as upstream:
            try:
                await talk(upstream)
                await anyio.sleep(LIMIT)
            finally:
                raise AssertionError("the test's")

    async def main() -> None:
        with pytest.raises(AssertionError, match="the test's"):
            async with open_upstream() as upstream, await anyio.connect_tcp("127.0.0.1", upstream.port):
                raise AssertionError("the test's")
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block is what is tested
            async with open_upstream(behaviour=broken) as upstream:
                await talk(upstream)
                await anyio.sleep(LIMIT)
        with pytest.raises(BaseExceptionGroup) as caught:
            await both()
        assert caught.group_contains(ZeroDivisionError)
        assert caught.group_contains(AssertionError, match="the test's")
        with anyio.move_on_after(0.05) as scope:
            async with open_upstream() as upstream:
                upstream.hang()
                await anyio.sleep(LIMIT)
        assert scope.cancelled_caught
        gc.collect()  # what was not closed would warn now

    on_loop(main)


def test_a_source_publishes_to_every_mesh(on_loop: Run) -> None:
    """Set, removed, away and back: each mesh sees it, of the services that it follows."""
    one, two = meshlocal.make_instance("10.0.0.1", 1), meshlocal.make_instance("10.0.0.2", 1)
    source = FakeSource({"b": [one]})

    def steps(mesh: meshlocal.Mesh) -> list[meshlocal.Instance]:
        return [step.instance for step in mesh.plan("b").steps]

    async def main() -> None:
        async with meshlocal.open_mesh(source) as first, meshlocal.open_mesh(source) as second:
            assert source.followed == frozenset()
            for mesh in (first, second):
                await mesh.wait_heard("b")
                assert steps(mesh) == [one]
            assert source.followed == {"b"}
            source.set("b", one, two)
            source.set("c", one)
            assert sorted(map(str, (each.key for each in steps(first)))) == ["10.0.0.1:1", "10.0.0.2:1"]
            source.go_away("rebooting")
            source.remove("b")
            assert len(steps(second)) == 2, "an outage is no empty service"
            assert (second.statistics().connected, second.statistics().problem) == (False, "rebooting")
            source.come_back()
            assert steps(first) == steps(second) == []
            assert not first.plan("b").known
            assert second.statistics().problem is None
            with pytest.raises(ValueError, match="no good"):
                source.set("no good")

    on_loop(main)
    assert source.followed == frozenset(), "a mesh that is closed follows nothing"


def test_time_passes_when_everybody_waits() -> None:
    """Hours take no time, results come back, and bytes on their way are not outrun."""

    async def main(hours: int) -> float:
        async with open_upstream("b") as upstream:
            start = trio.current_time()
            await trio.sleep(hours * 3600)
            with trio.fail_after(0.2):
                assert await talk(upstream) == b"b\n"
            return trio.current_time() - start

    start = time.monotonic()
    assert run(main, 5) == pytest.approx(5 * 3600, abs=0.2)
    assert trio.run(main, 1, clock=virtual_clock()) >= 3600
    assert time.monotonic() - start < 1000


def test_a_connection_is_cut_however_young_it_is() -> None:
    """Also one that was accepted just now, and whose behaviour has not begun."""

    async def main() -> None:
        async with open_upstream() as upstream:
            for number in range(1, 21):
                with socket.create_connection(("127.0.0.1", upstream.port)) as client:
                    client.settimeout(LIMIT)
                    with anyio.fail_after(LIMIT):
                        while upstream.accepted < number:
                            await anyio.lowlevel.checkpoint()
                        upstream.cut()
                        while upstream.open:
                            await anyio.lowlevel.checkpoint()
                    assert _ends_by_a_reset(client)

    anyio.run(main, backend="trio")


def _ends_by_a_reset(client: socket.socket) -> bool:
    try:
        while client.recv(64):
            pass
    except ConnectionResetError:
        return True
    return False
