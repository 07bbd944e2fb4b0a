"""What happens at once: events that the relay's loop finds together, before anything of them was sent."""

from __future__ import annotations

import os

import pytest
import trio

from meshlocal.client.statistics import RequestKey
from nursery_tests.proxy.http.conftest import Client, Proxy, Served, Upstream, Wire, ok, response, until

SERVED = RequestKey("node", "", "served")


def write(wire: Wire, data: bytes) -> None:
    """Send without a wait, so that nothing else runs before what is done next."""
    assert os.write(wire.stream.socket.fileno(), data) == len(data)


def request(method: str, body: bytes = b"") -> bytes:
    return f"{method} / HTTP/1.1\r\nhost: b\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


METHODS = pytest.mark.parametrize(("method", "body"), [("GET", b""), ("POST", b"x" * 100)])
FIRST = pytest.mark.parametrize("request_first", [True, False], ids=["request first", "request last"])


@METHODS
@FIRST
@pytest.mark.parametrize("last_words", [b"", response(b"idle for too long", "408 Request Timeout")], ids=["", "408"])
async def test_a_kept_connection_that_ends_as_a_request_comes_costs_nothing(
    proxy: Proxy, local: Upstream, method: str, body: bytes, request_first: bool, last_words: bytes
) -> None:
    """A4: it is sent once, on another connection; what was said on the old one is nobody's response."""
    async with await proxy.connect() as client:
        assert (await client.get()).body == b"local"
        await until(lambda: proxy.pooled == 1)
        (kept,) = local.open
        if request_first:
            write(client, request(method, body))
        if last_words:
            write(kept, last_words)
        kept.stream.socket.close()
        if not request_first:
            write(client, request(method, body))
        answer = await client.response(method)
    assert (answer.status, answer.body) == (200, b"local")
    assert local.accepted == 2
    assert local.bodies == [b"", body]
    assert proxy.requests() == {SERVED: 2}


async def test_what_nobody_asked_for_is_no_response(proxy: Proxy, local: Upstream) -> None:
    """A4: also if the connection stays open after it."""
    async with await proxy.connect() as client:
        assert (await client.get()).body == b"local"
        await until(lambda: proxy.pooled == 1)
        write(client, request("GET"))
        write(local.open[0], response(b"forged"))
        assert (await client.response()).body == b"local"
    assert local.accepted == 2


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_what_nobody_asked_for_is_no_response_to_one_of_many(proxy: Proxy, local: Upstream, method: str) -> None:
    """A4: also if the loop has sent the request before it looks at what was there already."""
    clients: list[Client] = []
    body = b"x" if method == "PUT" else b""
    release = trio.Event()

    async def together(upstream: Upstream, served: Served) -> None:
        # So that each client has a connection of its own.
        if len(local.heads) == 40:
            release.set()
        await release.wait()
        await ok(upstream, served)

    local.behaviour = together
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                clients.append(await proxy.connect())
                nursery.start_soon(clients[-1].get)
        await until(lambda: proxy.pooled == 40)
        local.behaviour = ok
        for client in clients:
            write(client, request(method, body))
        for kept in local.open:
            write(kept, response(b"forged"))
        for client in clients:
            assert (await client.response()).body == b"local"
    finally:
        for client in clients:
            client.stream.socket.close()
    await proxy.idle()
    assert proxy.requests() == {SERVED: 80}


async def test_many_requests_at_once_are_all_answered(proxy: Proxy, local: Upstream) -> None:
    """More of them than the loop lets wait for the end of its turn."""
    clients: list[Client] = []
    try:
        for _ in range(70):
            clients.append(await proxy.connect())
            assert (await clients[-1].get()).body == b"local"
        for client in clients:
            write(client, request("GET") * 2)
        for client in clients:
            assert (await client.response()).body == b"local"
            assert (await client.response()).body == b"local"
    finally:
        for client in clients:
            client.stream.socket.close()
    await proxy.idle()
    assert proxy.requests() == {SERVED: 210}


@pytest.mark.parametrize("response_first", [True, False], ids=["response first", "response last"])
async def test_a_client_that_resets_as_its_response_comes(proxy: Proxy, local: Upstream, response_first: bool) -> None:
    """A8: it ends, and the next client's response is its own."""
    client = await proxy.connect()
    assert (await client.get()).body == b"local"

    async def meanwhile(upstream: Upstream, served: Served) -> None:
        if response_first:
            write(served, response(b"lost"))
        client.reset()
        if not response_first:
            write(served, response(b"lost"))
        local.behaviour = ok

    local.behaviour = meanwhile
    write(client, request("GET"))
    await until(lambda: len(local.heads) == 2)
    await proxy.idle()
    assert (await proxy.ask()).body == b"local"
    ended = proxy.requests()
    assert ended.pop(SERVED) in (2, 3)  # the kernel took the response, perhaps
    assert sum(ended.values()) <= 1
