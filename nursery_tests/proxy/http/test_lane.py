"""Requests served in the lane (`meshlocal.proxy.http.lane`): nobody can tell them from others."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from meshlocal.client.connecting import SLOW
from meshlocal.client.statistics import Outcome, RequestKey
from meshlocal.policy.config_health import LimitsConfig
from meshlocal.policy.health import State
from meshlocal.policy.limits import Limit
from meshlocal.policy.locality import Locality
from meshlocal.proxy.http.h1.upstream import H1Upstream
from meshlocal.proxy.http.request import HttpRequest
from nursery_tests.proxy.http.conftest import (
    LIMIT,
    B,
    Behaviour,
    EndedError,
    Proxy,
    Served,
    Upstream,
    Upstreams,
    ok,
    response,
    stalls,
    until,
)
from nursery_tests.proxy.http.test_retries import FAILURES, MOVED, SAME, TABLE

SERVED = RequestKey("node", "", Outcome.SERVED)


def in_lane(proxy: Proxy) -> bool:
    return proxy.loop is not None


def counted(proxy: Proxy) -> dict[str, Any]:
    """All that is counted of the service, but times."""
    service = proxy.forwarder.services[B]
    statistics = service.state.statistics
    return {
        "requests": dict(statistics.requests),
        "picks": dict(statistics.picks),
        "attempts": dict(statistics.attempts),
        "bytes": (statistics.bytes_sent, statistics.bytes_received),
        "responses": dict(service.statistics.responses),
        "timed": sum(each.count for each in service.state.statistics.responses.values()),
        "connections": (service.statistics.connections_made, service.statistics.connections_reused),
        "under way": (service.state.circuit.now[Limit.REQUESTS], proxy.table.circuit.now[Limit.REQUESTS]),
    }


async def test_all_is_counted(proxy: Proxy, local: Upstream) -> None:
    """R1."""
    async with await proxy.connect() as client:
        for status in ("200 OK", "404 Not Found", "204 No Content", "200 OK"):
            body = b"" if status.startswith("204") else b"12345"

            async def says(_: Upstream, served: Served, answer: bytes = response(body, status)) -> None:
                await served.send(answer)

            local.behaviour = says
            assert (await client.get()).status == int(status[:3])
    await proxy.idle()
    assert counted(proxy) == {
        "requests": {SERVED: 4},
        "picks": {("node", ""): 4},
        "attempts": {("node", "answered"): 4},
        "bytes": (0, 15),
        "responses": {("node", "", "2xx", "1.1"): 3, ("node", "", "4xx", "1.1"): 1},
        "timed": 4,
        "connections": (1, 3),
        "under way": (0, 0),
    }


async def test_a_response_in_pieces_is_passed_on_whole(proxy: Proxy, local: Upstream) -> None:
    """Wherever it is cut."""
    whole = response(b"hello", x="y")

    async with await proxy.connect() as client:
        await client.get()
        for cut in range(1, len(whole)):

            async def in_two(_: Upstream, served: Served, cut: int = cut) -> None:
                await served.send(whole[:cut])
                # The loop has seen the first piece by then.
                await trio.testing.wait_all_tasks_blocked(0.002)
                await served.send(whole[cut:])

            local.behaviour = in_two
            assert (await client.get()).body == b"hello"
    await proxy.idle()
    assert proxy.requests() == {SERVED: len(whole)}
    assert local.accepted == 1


@pytest.mark.parametrize("extra", [b"x", response(b"forged")])
async def test_more_than_a_response_costs_the_connection(proxy: Proxy, local: Upstream, extra: bytes) -> None:
    """What is behind a response is nobody's, and what comes next would not be trusted."""

    async def says_more(_: Upstream, served: Served) -> None:
        await served.send(response(b"local") + extra)

    local.behaviour = says_more
    async with await proxy.connect() as client:
        for _ in range(3):
            assert (await client.get()).body == b"local"
    assert local.accepted == 3


@pytest.mark.parametrize("reads", [1, 2, 6])
async def test_more_than_a_response_that_fills_its_reads(
    proxy: Proxy, local: Upstream, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    """What is behind it makes no other event, and is the response to no other request."""
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %04d\r\n\r\n"
    size = reads * 64 - len(head % 0)
    whole = head % size + b"x" * size

    async def says_more(_: Upstream, served: Served) -> None:
        # All of it is there when the first of it is read.
        await served.send(whole + response(b"forged"))

    monkeypatch.setattr("meshlocal.proxy.http.lane.CHUNK", 64)
    monkeypatch.setattr("meshlocal.proxy.http.h1.upstream.CHUNK", 64)
    async with await proxy.connect() as client:
        for number in range(1, 4):
            local.behaviour = ok
            assert (await client.get()).body == b"local"
            assert local.accepted == number
            local.behaviour = says_more
            assert (await client.get()).body == b"x" * size
            assert local.accepted == number


async def test_an_instance_that_closes_after_its_response(proxy: Proxy, local: Upstream) -> None:
    async def last(_: Upstream, served: Served) -> bool:
        await served.send(response(b"local", connection="close"))
        return False

    async with await proxy.connect() as client:
        await client.get()
        local.behaviour = last
        for _ in range(3):
            answer = await client.get()
            assert answer.body == b"local"
            assert "connection" not in answer.fields
    await proxy.idle()
    assert proxy.requests() == {SERVED: 4}


async def test_what_is_configured_meanwhile_holds(proxy: Proxy, local: Upstream) -> None:
    """S2: a response that begins later is told of."""
    async with await proxy.connect() as client:
        assert "x-meshlocal-attempts" not in (await client.get()).fields

        async def configures(_: Upstream, served: Served) -> None:
            proxy.configure(http={"response_headers": True})
            await served.send(response(b"local"))

        local.behaviour = configures
        answer = await client.get()
    assert answer.fields["x-meshlocal-attempts"] == "1"
    assert answer.fields["x-meshlocal-instance"] == f"127.0.0.1:{local.port}"
    await proxy.idle()
    assert proxy.requests() == {SERVED: 2}


ZONES = Locality({"node": "n1"}, prefer=("node", "zone"))


async def usual(_: Upstream, served: Served) -> None:
    await served.send(response(b"far"))


async def in_pieces(_: Upstream, served: Served) -> None:
    await served.send(response(b"far")[:-1])
    await trio.testing.wait_all_tasks_blocked(0.002)
    await served.send(b"r")


async def late(_: Upstream, served: Served) -> None:
    await trio.sleep(5 * SLOW)
    await served.send(response(b"far"))


async def on_another(upstream: Upstream, served: Served) -> bool:
    upstream.behaviour = ok
    return False


@pytest.mark.parametrize("answers", [usual, in_pieces, late, on_another])
async def test_fewer_tiers_meanwhile(
    proxy: Proxy, upstream: Upstreams, nursery: trio.Nursery, answers: Behaviour
) -> None:
    """S2: a request is counted for the tier that its instance was in when it was picked."""
    far = await upstream("far", "n2")
    proxy.table.reconfigure(proxy.config, ZONES)
    proxy.publish(far)
    one_tier_less = Locality({"node": "n1"})
    async with await proxy.connect() as client:
        assert (await client.get()).body == b"far"

        async def configures(upstream: Upstream, served: Served) -> bool | None:
            proxy.table.reconfigure(proxy.config, one_tier_less)
            return await answers(upstream, served)

        far.behaviour = configures
        assert (await client.get()).body == b"far"
    await proxy.idle()
    assert counted(proxy)["requests"] == {RequestKey("other", "no_local", Outcome.SERVED): 2}
    assert counted(proxy)["attempts"] == {("other", "answered"): 2}
    assert counted(proxy)["under way"] == (0, 0)


async def test_fewer_tiers_before_the_next_instance(proxy: Proxy, upstream: Upstreams) -> None:
    """S2: a plan goes on to the end, with the tiers that it began with."""
    near, far = await upstream("near", "n1"), await upstream("far", "n2")
    proxy.table.reconfigure(proxy.config, ZONES)
    proxy.publish(near, far)
    async with await proxy.connect() as client:
        assert (await client.get()).body == b"near"

        async def refuses(upstream: Upstream, served: Served) -> bool:
            proxy.table.reconfigure(proxy.config, Locality({"node": "n1"}))
            upstream.refuse()
            return False

        near.behaviour = refuses
        assert (await client.get()).body == b"far"
    await proxy.idle()
    assert proxy.requests() == {SERVED: 1, RequestKey("other", "local_failed", Outcome.SERVED): 1}
    assert counted(proxy)["under way"] == (0, 0)


async def test_fewer_tiers_before_the_client_leaves(proxy: Proxy, upstream: Upstreams) -> None:
    """S2, A8: and nobody else's requests suffer."""
    far = await upstream("far", "n2")
    proxy.table.reconfigure(proxy.config, ZONES)
    proxy.publish(far)
    async with await proxy.connect() as other:
        assert (await other.get()).body == b"far"
        client = await proxy.connect()
        assert (await client.get()).body == b"far"
        ended = trio.Event()

        async def waits(upstream: Upstream, served: Served) -> bool:
            upstream.behaviour = ok
            proxy.table.reconfigure(proxy.config, Locality({"node": "n1"}))
            client.reset()
            try:
                return await stalls(upstream, served)
            finally:
                ended.set()

        far.behaviour = waits
        await client.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
        with trio.fail_after(LIMIT):
            await ended.wait()
        assert (await other.get()).body == b"far"
    await proxy.idle()
    assert counted(proxy)["under way"] == (0, 0)
    assert proxy.forwarder.shared.patience.waiting == {}


@pytest.mark.parametrize("failure", TABLE["kept"])
async def test_what_follows_from_a_failure(proxy: Proxy, pair: tuple[Upstream, Upstream], failure: str) -> None:
    """A2, A3, A4: the same as for other requests, which are served otherwise if their responses tell of it."""
    local, far = pair
    expected, _ = TABLE["kept"][failure]
    proxy.configure(attempts={"attempt_timeout": 0.05 if failure == "stalls" else None})
    async with await proxy.connect() as client:
        assert (await client.get()).body == b"local"

        async def once(upstream: Upstream, served: Served) -> bool | None:
            local.behaviour = ok
            return await FAILURES[failure](upstream, served)

        local.behaviour = once
        answer = await client.get()
        if expected == MOVED:
            assert answer.body == b"far"
        elif expected == SAME:
            assert answer.body == b"local"
        else:
            assert answer.told == expected
        assert (await client.get()).body == b"local"
    assert len(local.heads) == 3 + (expected == SAME)
    assert len(far.heads) == (expected == MOVED)
    assert counted(proxy)["under way"] == (0, 0)


async def test_a_status_to_retry_moves_on(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    """A3."""
    local, _far = pair

    async def busy(_: Upstream, served: Served) -> None:
        await served.send(response(b"", "503 Busy"))

    async with await proxy.connect() as client:
        assert (await client.get()).body == b"local"
        local.behaviour = busy
        assert (await client.get()).body == b"far"
        local.behaviour = ok
        assert (await client.get()).body == b"local"
    await proxy.idle()
    assert proxy.requests() == {SERVED: 2, RequestKey("other", "local_failed", Outcome.SERVED): 1}


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_no_more_requests_than_the_limit(proxy: Proxy, local: Upstream, method: str) -> None:
    """And the refused one is counted once."""
    proxy.configure(limits=LimitsConfig(requests=1))
    release = trio.Event()

    async def waits(_: Upstream, served: Served) -> None:
        await release.wait()
        await served.send(response(b"local"))

    async with await proxy.connect() as one, await proxy.connect() as two:
        assert (await one.get()).body == b"local"
        assert (await two.get()).body == b"local"
        local.behaviour = waits
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.get)
            await until(lambda: len(local.heads) == 3)
            assert (await two.ask(method)).told == (503, "limit_requests")
            release.set()
        assert (await two.ask(method)).body == b"local"
    await proxy.idle()
    assert proxy.table.circuit.refused[Limit.REQUESTS] == 1
    assert counted(proxy)["under way"] == (0, 0)


class Stingy:
    """A socket whose next `send` takes less than all, or fails."""

    def __init__(self, sock: socket.socket | None, send: Callable[[socket.socket, bytes], int]) -> None:
        assert sock is not None
        self._sock = sock
        self._send: Callable[[socket.socket, bytes], int] | None = send

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def send(self, data: bytes) -> int:
        send, self._send = self._send, None
        return self._sock.send(data) if send is None else send(self._sock, data)


def takes_half(sock: socket.socket, data: bytes) -> int:
    return sock.send(data[: len(data) // 2])


def is_full(sock: socket.socket, data: bytes) -> int:
    raise BlockingIOError(errno.EAGAIN, "full")


def is_dead(sock: socket.socket, data: bytes) -> int:
    raise ConnectionResetError(errno.ECONNRESET, "reset")


@pytest.mark.parametrize("send", [takes_half, is_full, is_dead])
async def test_an_instance_that_does_not_take_all(
    proxy: Proxy, local: Upstream, monkeypatch: pytest.MonkeyPatch, send: Callable[[socket.socket, bytes], int]
) -> None:
    """A4: it gets the request once and whole, on another connection if this one is dead."""
    async with await proxy.connect() as client:
        await client.get()
        await until(lambda: proxy.pooled == 1)
        (upstream,) = next(iter(proxy.forwarder.services[B].pool._idle.values()))
        monkeypatch.setattr(upstream.pipe, "plain", Stingy(upstream.pipe.plain, send))
        assert (await client.get("/second")).body == b"local"
        assert [head.partition(b" HTTP")[0] for head in local.heads] == [b"GET /", b"GET /second"]
        # And it is as good for the next one as any other.
        assert (await client.get("/third")).body == b"local"
        assert local.accepted == (2 if send is is_dead else 1)
        await until(lambda: proxy.requests() == {SERVED: 3})


@pytest.mark.parametrize("send", [takes_half, is_full, is_dead])
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("split", [False, True])
async def test_a_client_that_does_not_take_all(
    proxy: Proxy,
    local: Upstream,
    monkeypatch: pytest.MonkeyPatch,
    send: Callable[[socket.socket, bytes], int],
    method: str,
    split: bool,
) -> None:
    """It gets the response once and whole, in whatever pieces that came, or none if it is gone."""
    whole = response(b"local")

    async def answers(_: Upstream, served: Served) -> None:
        if split:
            await served.send(whole[:-2])
            await trio.testing.wait_all_tasks_blocked(0.002)
        await served.send(whole[-2:] if split else whole)

    async with await proxy.connect() as client:
        await client.get()
        local.behaviour = answers
        await until(lambda: proxy.pooled == 1)
        (connection,) = proxy.forwarder
        monkeypatch.setattr(connection.pipe, "plain", Stingy(connection.pipe.plain, send))
        if send is is_dead:
            await client.send(f"{method} / HTTP/1.1\r\nhost: b\r\n\r\n".encode())
            assert await client.is_reset()
            await until(lambda: proxy.requests() == {SERVED: 1, RequestKey("node", "", Outcome.CUT): 1})
        else:
            assert (await client.ask(method)).body == b"local"
            assert (await client.ask(method)).body == b"local"
            await until(lambda: proxy.requests() == {SERVED: 3})


@pytest.mark.parametrize("step", ["start", "take_whole", "complete", "finish"])
async def test_a_fault_in_it_harms_nobody_else(
    proxy: Proxy, local: Upstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    """It is logged, and ends one connection."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    async with await proxy.connect() as one, await proxy.connect() as two:
        await one.get()
        await two.get()
        faulty = in_lane(proxy) or step != "take_whole"
        with monkeypatch.context() as patched:
            patched.setattr(HttpRequest if step == "finish" else H1Upstream, step, fails)
            await two.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
            if step in ("complete", "finish") or not faulty:
                assert (await two.response()).body == b"local"
            if faulty:
                assert await two.is_reset()
        assert (await one.get()).body == b"local"
    assert ("fault in the proxy" in caplog.text) == faulty


async def test_most_responses_are_taken_whole(proxy: Proxy, local: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise little of this would be tested: of plain ones all but each connection's first, those to HEAD, and
    those whose bodies come after their heads."""
    taken = []
    take_whole = H1Upstream.take_whole

    def counts(upstream: H1Upstream, data: bytes) -> bool:
        taken.append(found := take_whole(upstream, data))
        return found

    monkeypatch.setattr(H1Upstream, "take_whole", counts)
    async with await proxy.connect() as client:
        for _ in range(5):
            await client.get()
            await client.ask("HEAD")
            await client.ask("POST", body=b"x")
    assert sum(taken) == (4 if in_lane(proxy) else 0)
    assert len(taken) == (9 if in_lane(proxy) else 0)


def slots(thing: object) -> dict[str, object]:
    """Every attribute of an object that has no others."""
    names = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    return {name: getattr(thing, name) for name in names}


async def test_what_is_kept_for_the_next_request_is_as_good_as_new(
    proxy: Proxy, local: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of one request is left in the next, whatever came between them."""
    seen: list[tuple[dict[str, object], dict[str, object]]] = []
    start = H1Upstream.start

    def compares(upstream: H1Upstream, now: float) -> None:
        request = upstream.request
        fresh = HttpRequest(request.client, request.head, request.started, request.body)
        assert upstream.service is not None
        fresh.admit(upstream.service)
        fresh.plan, fresh.pick, fresh.tier, fresh.attempts = request.plan, request.pick, request.tier, 1
        fresh.began, fresh._trying, fresh._counts = request.began, True, request._counts
        if request.body is not None:
            # Its time began when the body was there.
            fresh.deadline = request.deadline
        seen.append((slots(request), slots(fresh)))
        new = H1Upstream(request, upstream.service, upstream.upstream)
        # Looked at only with a head, and set with it.
        new._size, new._whole_reusable = upstream._size, upstream._whole_reusable
        seen.append((slots(upstream), slots(new)))
        fresh.end(Outcome.ERROR)
        start(upstream, now)

    monkeypatch.setattr(H1Upstream, "start", compares)

    async def gone(_: Upstream, served: Served) -> None:
        await served.send(response(b"", "503 Busy"))

    async with await proxy.connect() as client:
        for method in ("GET", "GET", "HEAD", "GET", "POST", "GET", "GET", "PUT", "HEAD", "GET", "GET"):
            await client.ask(method, body=b"x" if method in ("POST", "PUT") else None)
            local.behaviour = gone if method == "PUT" else ok
    assert len(seen) >= 22
    for got, fresh in seen:
        assert got == fresh


async def breaks_off(_: Upstream, served: Served) -> bool:
    await served.send(response(b"local")[:-1])
    return False


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_response_that_breaks_off_is_an_attempt(proxy: Proxy, local: Upstream, method: str) -> None:
    """Whoever served it: each pick is an attempt in the end."""
    async with await proxy.connect() as client:
        await client.get()
        local.behaviour = breaks_off
        await client.send(f"{method} / HTTP/1.1\r\nhost: b\r\ncontent-length: 0\r\n\r\n".encode())
        with pytest.raises((trio.BrokenResourceError, EndedError)):
            await client.response()
    await proxy.idle()
    assert counted(proxy)["requests"] == {SERVED: 1, RequestKey("node", "", Outcome.CUT): 1}
    assert counted(proxy)["picks"] == {("node", ""): 2}
    assert counted(proxy)["attempts"] == {("node", "answered"): 2}


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_request_that_a_stop_cuts_is_an_attempt(
    proxy: Proxy, local: Upstream, method: str, *, begun: bool
) -> None:
    """S1: counted once, and nothing of it is left."""
    under_way = trio.Event()

    async def answers_in_part(_: Upstream, served: Served) -> bool:
        if begun:
            await served.send(response(b"local")[:-1])
        under_way.set()
        return await stalls(local, served)

    async with await proxy.connect() as client:
        await client.get()
        local.behaviour = answers_in_part
        await client.send(f"{method} / HTTP/1.1\r\nhost: b\r\ncontent-length: 0\r\n\r\n".encode())
        await under_way.wait()
        if begun:
            await client.until(b"loca")
        proxy.scope.cancel()
        await proxy.ended.wait()
    assert counted(proxy)["requests"] == {SERVED: 1, RequestKey("node", "", Outcome.DRAINED): 1}
    assert counted(proxy)["attempts"] == (
        {("node", "answered"): 2} if begun else {("node", "answered"): 1, ("node", "abandoned"): 1}
    )
    assert counted(proxy)["under way"] == (0, 0)
    assert proxy.forwarder.shared.patience.waiting == {}
    assert proxy.loop is None or not proxy.loop.handlers


async def test_a_trial_whose_client_left_is_over(
    proxy: Proxy, local: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H1: it brought no verdict, so that the next request may try."""
    health = proxy.table[B].fitness.health

    async def interim(_: Upstream, served: Served) -> bool:
        (connection,) = proxy.forwarder
        monkeypatch.setattr(connection.pipe, "plain", Stingy(connection.pipe.plain, is_dead))
        await served.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        return await stalls(local, served)

    async with await proxy.connect() as client:
        await client.get()
        place = local.instance.key[:2]
        for _ in range(3):
            health.failed(place, trio.current_time())
        health.unfit[place].until = 0.0
        local.behaviour = interim
        await client.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
        assert await client.is_reset()
    await proxy.idle()
    assert health.standing(place, trio.current_time()).state is State.EJECTED
    assert health.is_due(place, trio.current_time())
