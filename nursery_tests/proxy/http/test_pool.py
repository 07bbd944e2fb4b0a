"""Connections to instances: reused, bounded, aged, and closed when the instance leaves (A4, H2)."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio

from meshlocal.net.pipe import PlainPipe
from meshlocal.net.relay_loop import open_relay_loop
from meshlocal.proxy.http.pool import Pool
from meshlocal.proxy.http.pool import Upstream as Pooled
from nursery_tests.proxy.http.conftest import B, Client, Proxy, Served, Upstream, response, stalls, until


async def test_reuse_across_clients(proxy: Proxy, local: Upstream) -> None:
    for _ in range(10):
        assert (await proxy.ask()).body == b"local"
    assert local.accepted == 1
    statistics = proxy.forwarder.services[B].statistics
    assert (statistics.connections_made, statistics.connections_reused) == (1, 9)


async def busy(proxy: Proxy, local: Upstream, count: int) -> list[Client]:
    """As many requests under way at once, each on a connection of its own on both sides; all are answered then."""
    go_on = trio.Event()

    async def behaviour(upstream: Upstream, served: Served) -> None:
        await go_on.wait()
        await served.send(response(b"busy"))

    local.behaviour = behaviour
    before = len(local.heads)
    clients = [await proxy.connect() for _ in range(count)]
    for client in clients:
        await client.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
    await until(lambda: len(local.heads) == before + count)
    go_on.set()
    for client in clients:
        assert (await client.response()).body == b"busy"
    return clients


async def test_no_more_than_pool_size_are_kept(proxy: Proxy, local: Upstream) -> None:
    proxy.configure(http={"pool_size": 3})
    clients = await busy(proxy, local, 8)
    assert local.accepted == 8
    await until(lambda: len(local.open) == 3)
    assert proxy.pooled == 3
    for client in clients:
        client.reset()


async def test_pool_size_is_each_instances_own(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    local, far = pair
    proxy.configure(http={"pool_size": 2})
    clients = await busy(proxy, local, 4)
    proxy.publish(far)
    await until(lambda: not local.open)
    clients += await busy(proxy, far, 4)
    await until(lambda: len(far.open) == 2)
    # Both at once: the first ones are held while the second ones' requests are under way.
    proxy.publish(local, far)
    clients += await busy(proxy, local, 4)
    await until(lambda: len(local.open) == 2)
    assert len(far.open) == 2
    assert proxy.pooled == 4
    for client in clients:
        client.reset()


@pytest.mark.parametrize("later", [False, True])
async def test_those_that_grow_old_are_closed(proxy: Proxy, local: Upstream, later: bool) -> None:
    """The one used last is used next, so that those which are too many grow old."""
    clients = await busy(proxy, local, 4)
    proxy.configure(http={"pool_idle_timeout": 0.05})
    if later:
        with trio.fail_after(30):
            while len(local.open) > 1:
                assert (await clients[0].get()).body == b"busy"
                await trio.sleep(0.005)
        assert local.accepted == 4
    await until(lambda: not local.open)
    assert proxy.pooled == 0
    for client in clients:
        client.reset()


async def test_an_instance_that_leaves(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    """H2: idle connections to it close at once, a response under way goes on, and its connection closes then."""
    local, far = pair
    go_on = trio.Event()

    async def behaviour(upstream: Upstream, served: Served) -> None:
        await served.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nha")
        await go_on.wait()
        await served.send(b"lf")

    async with await proxy.connect() as client, await proxy.connect() as other:
        local.behaviour = behaviour
        await client.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
        await client.until(b"ha")
        local.behaviour = stalls
        await other.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
        await until(lambda: len(local.heads) == 2)
        other.reset()
        await until(lambda: len(local.open) == 1)
        proxy.publish(far)
        assert (await proxy.ask()).body == b"far"
        assert len(local.open) == 1
        go_on.set()
        assert await client.exactly(2) == b"lf"
        await until(lambda: not local.open)
        assert (await client.get()).body == b"far"
        assert len(far.open) == 1
        proxy.publish(local)
        await until(lambda: not far.open)


async def test_one_that_the_instance_closes_is_closed_here(proxy: Proxy, local: Upstream) -> None:
    await proxy.ask()
    assert proxy.pooled == 1
    await local.open[0].send_eof()
    await until(lambda: not local.open)
    await until(lambda: not proxy.pooled)


async def test_the_end_of_the_proxy_closes_them(proxy: Proxy, local: Upstream) -> None:
    await proxy.ask()
    assert len(local.open) == 1
    proxy.scope.cancel()
    await until(lambda: not local.open)


@contextmanager
def connected() -> Iterator[tuple[Pooled, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        near.setblocking(False)
        yield Pooled(PlainPipe(near), near.getpeername(), None), far


@pytest.mark.parametrize("looped", [False, True])
async def test_what_may_not_be_sent_again_goes_on_a_connection_that_was_looked_at(looped: bool) -> None:
    """A4: also when its end came so lately that the loop has not seen it."""
    with open_relay_loop() as loop, connected() as (upstream, far):
        pool = Pool(loop if looped else None)
        pool.put(upstream, 0.0, 5)
        # No checkpoint on the way: nobody else has had a look.
        far.close()
        assert pool.take(upstream.place, sure=True) is None
        assert upstream.sock is not None
        assert upstream.sock.fileno() == -1


async def test_a_connection_that_is_given_back_after_the_end_is_closed() -> None:
    pool = Pool()
    with connected() as (upstream, _):
        pool.close()
        pool.put(upstream, 0.0, 5)
        assert upstream.sock is not None
        assert upstream.sock.fileno() == -1


async def test_what_was_made_with_another_security_is_not_kept() -> None:
    """T1: nothing goes on in plaintext once TLS is configured, also what was in use meanwhile."""
    secured: Any = object()
    pool = Pool()
    with connected() as (idle, _), connected() as (used, _):
        pool.put(idle, 0.0, 5)
        pool.renew(secured)
        pool.put(used, 0.0, 5)
        assert len(pool) == 0
        assert [each.sock is not None and each.sock.fileno() for each in (idle, used)] == [-1, -1]
