"""Connections of a transport to one instance: who gets which, and who waits (A8, H2)."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import httpcore
import httpx
import pytest

from meshlocal.httpx import _KIND
from meshlocal.library.http_pool import Connection, InstancePool
from meshlocal.library.http_wire import Record
from meshlocal.testing import Upstream, UpstreamConnection, http, open_upstream

Run = Callable[[Callable[[], Awaitable[None]]], None]
LIMIT = 20


class Pool:
    """A pool of one instance, and requests to it."""

    def __init__(self, upstream: Upstream, **limits: Any) -> None:
        self.upstream = upstream
        self.pool = InstancePool(_KIND, None, httpx.Limits(**limits))

    async def send(self, **timeouts: float) -> Taken:
        url = httpcore.URL(scheme=b"http", host=b"127.0.0.1", port=self.upstream.port, target=b"/")
        request = httpcore.Request("GET", url, headers=[(b"host", b"b")], extensions={"timeout": timeouts})
        record = Record()
        response, connection = await self.pool.send(request, record)
        return Taken(self.pool, response, connection, record)


class Taken:
    """A response, and what it came by."""

    def __init__(self, pool: InstancePool, response: httpcore.Response, connection: Connection, record: Record) -> None:
        self._pool = pool
        self._response = response
        self.connection = connection
        self.record = record

    async def done(self) -> None:
        try:
            await self._response.aread()
        finally:
            with anyio.CancelScope(shield=True):
                await self.close()

    async def close(self) -> None:
        await self._response.aclose()
        await self._pool.put(self.connection)


@asynccontextmanager
async def opened(**limits: Any) -> AsyncIterator[Pool]:
    async with open_upstream(behaviour=http()) as upstream:
        its = Pool(upstream, **limits)
        yield its
        await its.pool.aclose()
        assert (len(its.pool.connections), its.pool.idle, its.pool.waiting, its.pool._opening) == (0, 0, 0, 0)


def test_a_connection_serves_one_request_after_another(on_loop: Run) -> None:
    async def main() -> None:
        async with opened() as its:
            first = await its.send()
            assert first.record.fresh
            await first.done()
            second = await its.send()
            assert (second.record.fresh, second.connection) == (False, first.connection)
            third = await its.send()
            assert third.connection is not first.connection
            await second.done()
            await third.done()
            assert its.upstream.accepted == its.pool.idle == 2

    on_loop(main)


def test_one_that_ended_meanwhile_is_not_taken(on_loop: Run) -> None:
    """A4: as far as this host knows."""

    async def main() -> None:
        async with opened() as its:
            await (await its.send()).done()
            its.upstream.cut()
            await anyio.sleep(0.01)
            again = await its.send()
            assert again.record.fresh
            await again.done()
            assert len(its.pool.connections) == 1

    on_loop(main)


def test_one_whose_response_was_not_read_is_closed(on_loop: Run) -> None:
    async def main() -> None:
        async with opened() as its:
            await (await its.send()).close()
            assert (its.pool.idle, len(its.pool.connections)) == (0, 0)

    on_loop(main)


def test_no_more_are_kept_than_may_be(on_loop: Run) -> None:
    async def main() -> None:
        async with opened(max_keepalive_connections=1) as its:
            taken = [await its.send() for _ in range(3)]
            for each in taken:
                await each.done()
            assert (its.pool.idle, len(its.pool.connections)) == (1, 1)

    on_loop(main)


def test_of_those_that_wait_who_came_first_comes_first(on_loop: Run) -> None:
    async def main() -> None:
        async with opened(max_connections=1) as its:
            order: list[int] = []

            async def ask(number: int) -> None:
                taken = await its.send()
                order.append(number)
                await taken.done()

            first = await its.send()
            async with anyio.create_task_group() as tasks:
                for number in range(5):
                    tasks.start_soon(ask, number)
                    await anyio.wait_all_tasks_blocked()
                assert its.pool.waiting == 5
                await first.done()
            assert order == [0, 1, 2, 3, 4]
            assert its.upstream.accepted == 1

    on_loop(main)


def test_who_waits_too_long_gives_up(on_loop: Run) -> None:
    async def main() -> None:
        async with opened(max_connections=1) as its:
            first = await its.send()
            with pytest.raises(httpx.PoolTimeout, match="all connections to the instance are in use"):
                await its.send(pool=0.01)
            await first.done()
            await (await its.send(pool=0.01)).done()

    on_loop(main)


def test_a_turn_is_not_lost_with_who_had_it(on_loop: Run) -> None:
    """A8: the one that is cancelled just when it could go on leaves it to the next."""

    async def main() -> None:
        async with opened(max_connections=1) as its:
            served: list[int] = []

            async def ask(number: int, scope: anyio.CancelScope) -> None:
                with scope:
                    taken = await its.send()
                    served.append(number)
                    await taken.done()

            first = await its.send()
            scopes = [anyio.CancelScope(), anyio.CancelScope()]
            async with anyio.create_task_group() as tasks:
                for number, scope in enumerate(scopes):
                    tasks.start_soon(ask, number, scope)
                    await anyio.wait_all_tasks_blocked()
                # Both in the same step: it was given the connection, and it is cancelled.
                await first._response.aread()
                await first._response.aclose()
                its.pool._lay_aside(first.connection)
                assert its.pool.waiting == 1
                scopes[0].cancel()
            assert served == [1]
            assert its.pool.idle == len(its.pool.connections) == 1

    on_loop(main)


def test_a_connect_that_fails_makes_room(on_loop: Run) -> None:
    async def main() -> None:
        async with opened(max_connections=1) as its:
            its.upstream.refuse()
            for _ in range(3):
                with pytest.raises(httpx.ConnectError):
                    await its.send(pool=0.01)
            its.upstream.accept()
            await (await its.send(pool=0.01)).done()

    on_loop(main)


def test_those_that_are_closed_are_taken_by_nobody(on_loop: Run) -> None:
    """By several at once: each has its own, and none is looked for twice."""

    async def main() -> None:
        async with opened() as its:
            for each in [await its.send() for _ in range(10)]:
                await each.done()
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(its.pool.close_idle)
                tasks.start_soon(its.pool.close_idle, math.inf)
                await anyio.lowlevel.checkpoint()
                again = await its.send()
                await again.done()
            assert its.pool.idle == len(its.pool.connections) <= 1
            await its.pool.close_idle()
            assert its.pool.connections == set()

    on_loop(main)


def test_a_pool_whose_instance_left_keeps_nothing(on_loop: Run) -> None:
    """H2."""

    async def main() -> None:
        async with opened() as its:
            taken = await its.send()
            its.pool.retired = True
            await taken.done()
            assert its.pool.connections == set()

    on_loop(main)


def test_what_was_sent_and_received_is_known(on_loop: Run) -> None:
    """A3: of an attempt that failed, it decides whether there may be another."""

    async def breaks(connection: UpstreamConnection) -> None:
        await connection.receive()
        await connection.send(b"HTTP/1.1 200")

    async def main() -> None:
        async with opened() as its:
            its.upstream.behave(breaks)
            url = httpcore.URL(scheme=b"http", host=b"127.0.0.1", port=its.upstream.port, target=b"/")
            request = httpcore.Request("GET", url, headers=[(b"host", b"b")], extensions={"timeout": {}})
            record = Record()
            with pytest.raises(httpx.RemoteProtocolError):
                await its.pool.send(request, record)
            assert (record.fresh, record.sent, record.received, record.connect_error) == (True, True, 12, "")
            assert record.asked is not None
            assert its.pool.connections == set()

    on_loop(main)


def test_nobody_is_passed_by(on_loop: Run) -> None:
    """Who asks again and again does not take the connection that another waits for."""

    async def main() -> None:
        async with opened(max_connections=1) as its:
            asked = [0, 0, 0]

            async def ask(number: int) -> None:
                while asked[number] < 20:
                    await (await its.send(pool=LIMIT)).done()
                    asked[number] += 1
                    assert max(asked) - min(asked) <= 2

            async with anyio.create_task_group() as tasks:
                for number in range(3):
                    tasks.start_soon(ask, number)
            assert asked == [20, 20, 20]

    on_loop(main)


def test_what_is_for_something_else_gives_way(on_loop: Run) -> None:
    """A connection is for one scheme, address and name of a certificate."""

    async def main() -> None:
        async with opened(max_connections=1) as its:
            await (await its.send()).done()
            (connection,) = its.pool.connections
            connection.key = (connection.key[0], "other.example")
            again = await its.send()
            assert again.connection is not connection
            await again.done()
            assert its.pool.connections == {again.connection}
            assert its.upstream.accepted == 2

    on_loop(main)


def test_a_response_that_nobody_asked_for_is_nobodys(on_loop: Run) -> None:
    """What httpcore holds behind a response is no answer to the next request."""

    async def says_more(connection: UpstreamConnection) -> None:
        one = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"
        while await connection.receive():
            await connection.send(one + b"one" + one + b"two")

    async def main() -> None:
        async with opened() as its:
            its.upstream.behave(says_more)
            await (await its.send()).done()
            with pytest.raises(httpx.RemoteProtocolError, match="a response that nobody asked for"):
                await its.send()
            assert its.pool.connections == set()

    on_loop(main)


@pytest.mark.parametrize("step", range(1, 6))
def test_a_request_that_is_cancelled_leaves_nothing_open(on_loop: Run, step: int) -> None:
    """Also between the pool and httpcore: what is dropped is closed."""

    async def main() -> None:
        async with opened(max_connections=1) as its:
            await (await its.send()).done()
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:

                    async def cancel() -> None:
                        for _ in range(step):
                            await anyio.lowlevel.checkpoint()
                        scope.cancel()

                    tasks.start_soon(cancel)
                    await (await its.send()).done()
            with anyio.fail_after(LIMIT):
                while its.upstream.open > len(its.pool.connections):  # noqa: ASYNC110 - the kernel tells nobody
                    await anyio.sleep(0.001)
            await (await its.send(pool=LIMIT)).done()

    on_loop(main)


def test_who_waits_for_a_connection_of_a_closed_pool_is_told(on_loop: Run) -> None:
    async def main() -> None:
        async with opened(max_connections=1) as its:
            first = await its.send()
            told: list[str] = []

            async def ask() -> None:
                try:
                    await its.send()
                except httpx.ConnectError as error:
                    told.append(str(error))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                await its.pool.aclose()
            assert told == ["the client was closed"]
            await first.close()

    on_loop(main)


def test_writes_leave_others_their_turn(on_loop: Run) -> None:
    """And are cancelled, however fast the instance reads."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"x"

    async def main() -> None:
        async with opened() as its:
            url = httpcore.URL(scheme=b"http", host=b"127.0.0.1", port=its.upstream.port, target=b"/")
            headers = [(b"host", b"b"), (b"transfer-encoding", b"chunked")]
            turns = 0

            async def turn() -> None:
                nonlocal turns
                while True:
                    await anyio.lowlevel.checkpoint()
                    turns += 1

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(turn)
                body = pieces()
                request = httpcore.Request("PUT", url, headers=headers, content=body, extensions={"timeout": {}})
                response, connection = await its.pool.send(request, Record())
                assert turns > 100
                await response.aread()
                await response.aclose()
                await its.pool.put(connection)
                tasks.cancel_scope.cancel()

    on_loop(main)


def test_what_was_closed_is_read_no_more(on_loop: Run) -> None:
    """By an error of httpcore's, which its callers know."""

    async def main() -> None:
        async with opened() as its:
            taken = await its.send()
            await taken.done()
            wire = taken.connection.wire
            await wire.aclose()
            await wire.aclose()
            for _ in range(2):
                with pytest.raises(httpcore.ReadError):
                    await wire.read(10)
            with pytest.raises(httpcore.WriteError):
                await wire.write(b"x")
            assert wire.get_extra_info("is_readable")
            await its.pool.close_idle()

    on_loop(main)


def test_what_takes_a_wait_to_close_is_closed_with_the_next(on_loop: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TLS does: one that gives way counts no more at once."""

    async def main() -> None:
        async with opened(max_connections=1) as its:
            await (await its.send()).done()
            (connection,) = its.pool.connections
            connection.key = (connection.key[0], "other.example")
            with monkeypatch.context() as patch:
                patch.setattr(connection.wire, "close_now", lambda: False)
                again = await its.send()
            assert its.pool.connections == {again.connection}
            assert not connection.http.is_closed()
            await again.done()
            assert connection.http.is_closed()

    on_loop(main)
