"""What a watch on discovery meets costs it an attempt, and nothing more (D1, D6, P1). Over each transport."""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import trio
import trustme

from meshlocal.client import watch as watch_module
from meshlocal.client.watch import DiscoveryWatch
from meshlocal.net.grpc.servercall import ServerCall
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.policy import model
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.backoff import Backoff
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.policy.config_discovery import ServerLimitsConfig
from meshlocal.policy.model import ServiceChange, ServiceKey, ServiceSnapshot
from meshlocal.wire.discovery_codec import heartbeat_event, snapshot_event
from meshlocal.wire.discovery_methods import WATCH_INSTANCES
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import discovery_pb2 as pb
from nursery_tests.client.test_watch import (
    LIMIT,
    SCHEME,
    B,
    C,
    Sink,
    addresses,
    at,
    discovery,
    serving,
    until,
    watch,
)
from nursery_tests.ports import free_port


@pytest.fixture(params=["grpc", "ws"], autouse=True)
def scheme(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs over each transport."""
    token = SCHEME.set(request.param)
    yield request.param
    SCHEME.reset(token)


def end(client: socket.socket) -> None:
    """Close, after what the client said was read."""
    client.settimeout(LIMIT)
    client.recv(65536)
    client.close()


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()


def talk_nonsense(client: socket.socket) -> None:
    client.sendall(b"\x15\x03\x01\x00\x02\x02\x28nonsense")
    client.close()


@pytest.mark.parametrize("do", [end, reset, talk_nonsense])
@pytest.mark.parametrize("loop", ["trio", "asyncio"])
def test_a_tls_handshake_that_comes_to_nothing_costs_an_attempt(
    do: Callable[[socket.socket], None], loop: str, scheme: str
) -> None:
    """D1, P1: a server at its limit of connections ends them in the handshake, and so does one that restarts."""
    port = free_port()
    (listener,) = open_tcp_listeners("127.0.0.1", port)
    listener.setblocking(True)
    listener.settimeout(LIMIT)

    async def main() -> None:
        following = watch(Sink(), DiscoveryUrl(f"{scheme}s" if scheme == "grpc" else "wss", "127.0.0.1", port))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(following.run)
            for _ in range(3):
                client = await anyio.to_thread.run_sync(lambda: listener.accept()[0])
                await anyio.to_thread.run_sync(do, client)
            await until(lambda: following.status.reconnects >= 3)
            assert not following.status.connected
            assert following.status.problem
            assert "fault of this program" not in following.status.problem
            tasks.cancel_scope.cancel()

    with listener:
        anyio.run(main, backend=loop)


async def test_after_failed_handshakes_the_server_is_watched(
    tmp_path: Path, nursery: trio.Nursery, scheme: str
) -> None:
    """D1: the same watch goes on once the server speaks TLS again."""
    authority = trustme.CA()
    (tmp_path / "ca.pem").write_bytes(authority.cert_pem.bytes())
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    port = free_port()
    options = DiscoveryClientConfig(backoff_initial=0.01, backoff_max=0.02, ca_file=str(tmp_path / "ca.pem"))
    url = DiscoveryUrl("grpcs" if scheme == "grpc" else "wss", "127.0.0.1", port)
    sink = Sink()
    following = DiscoveryWatch([url], [B], sink, random.Random(0), options)
    nursery.start_soon(following.run)
    await until(lambda: following.status.reconnects >= 2)
    async with discovery({B: model.index([at(1)])}, port, ssl_context=context):
        assert addresses(await sink.until(lambda each: each.service == B)) == ["10.0.0.1"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfe\x00binary", "holds no token"),
        ("gänsefüßchen".encode(), "holds no token"),
        (b"", "holds no token"),
        (b"two words\nand a line", "holds no token"),
        (None, "No such file or directory"),
    ],
)
async def test_a_token_file_that_holds_no_token_costs_an_attempt(
    tmp_path: Path, nursery: trio.Nursery, content: bytes | None, problem: str
) -> None:
    """P1: it is read for each connection, so it may be wrong at any time; once it is right, it is used."""
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    sink = Sink()
    async with discovery({B: model.index([at(1)])}) as (url, _):
        options = DiscoveryClientConfig(backoff_initial=0.01, backoff_max=0.02, token_file=str(file))
        following = DiscoveryWatch([url], [B], sink, random.Random(0), options)
        nursery.start_soon(following.run)
        await until(lambda: following.status.reconnects >= 2)
        assert problem in (following.status.problem or "")
        assert str(file) in (following.status.problem or "")
        file.write_bytes(b"secret\n")
        await sink.until(lambda each: each.service == B)
        nursery.cancel_scope.cancel()


async def test_whatever_a_watch_meets_it_goes_on(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    """P1: a fault in what takes the snapshots is told with its traceback, and costs an attempt."""

    class Broken(Sink):
        broken = 2

        def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
            if self.broken:
                self.broken -= 1
                raise KeyError("of ours")
            super().publish(snapshot)

    sink = Broken()
    async with discovery({B: model.index([at(1)])}) as (url, _):
        following = watch(sink, url)
        nursery.start_soon(following.run)
        await sink.until(lambda each: each.service == B)
        assert following.status.reconnects == 2
        assert "KeyError: 'of ours'" in caplog.text
        assert "Traceback" in caplog.text
        nursery.cancel_scope.cancel()


def answering(*events: pb.WatchInstancesResponse, then: Callable[[], Any] = trio.sleep_forever) -> Any:
    """A server that sends these events on each watch; returns its routes and the requests that came."""
    requests: list[pb.WatchInstancesRequest] = []

    async def handler(call: ServerCall[Any, Any]) -> None:
        request = await call.receive()
        assert request is not None
        requests.append(request)
        for event in events:
            await call.send(event)
        await then()

    return {WATCH_INSTANCES: handler}, requests


async def test_a_server_that_does_not_know_is_left_for_one_that_does(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D6: and the one that knows is kept."""
    monkeypatch.setattr(watch_module, "PENDING_LIMIT", 0.05)
    sink = Sink()
    pending, requests = answering(heartbeat_event(10, [B]))
    async with serving(pending) as unknowing, discovery({B: model.index([at(1)])}) as (knowing, _):
        following = watch(sink, unknowing, knowing)
        nursery.start_soon(following.run)
        await sink.until(lambda each: addresses(each) == ["10.0.0.1"])
        await until(lambda: following.status.confirmed_at is not None)
        assert following.status.source == str(knowing)
        await trio.sleep(0.2)
        assert following.status.source == str(knowing)
        assert len(requests) == 1
        nursery.cancel_scope.cancel()


async def test_where_no_server_knows_what_is_known_stays(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D6: they are visited in turn, less and less often; what was held is neither lost nor called current."""
    monkeypatch.setattr(watch_module, "PENDING_LIMIT", 0.02)
    sink = Sink()
    first, at_first = answering(heartbeat_event(10, [B]))
    second, at_second = answering(heartbeat_event(10, [B]))
    held = ServiceSnapshot(B, "v1", model.index([at(1)]))
    async with serving(first) as one, serving(second) as two:
        options = DiscoveryClientConfig(backoff_initial=0.001, backoff_max=0.001)
        following = DiscoveryWatch([one, two], [B], sink, random.Random(0), options, [held])
        nursery.start_soon(following.run)
        await until(lambda: len(at_first) >= 3 and len(at_second) >= 2)
        # Each visit asks to go on from what is held.
        assert {each.subscriptions[0].version for each in [*at_first, *at_second]} == {"v1"}
        assert sink.snapshots == []
        assert following.status.confirmed_at is None
        assert following._leave_at() - following._pending_since >= 0.04 or not following._pending
        nursery.cancel_scope.cancel()


async def test_a_single_server_is_stayed_with_however_little_it_knows(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D6."""
    monkeypatch.setattr(watch_module, "PENDING_LIMIT", 0.01)
    pending, requests = answering(heartbeat_event(10, [B]))
    async with serving(pending) as url:
        following = watch(Sink(), url)
        nursery.start_soon(following.run)
        await until(lambda: following.status.connected)
        await trio.sleep(0.1)
        assert len(requests) == 1
        assert following.status.reconnects == 0
        nursery.cancel_scope.cancel()


async def test_a_first_snapshot_may_take_long_as_long_as_it_comes(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """D1: the limit is for silence, not for the whole: hundreds of watchers share a server's link after a restart."""
    monkeypatch.setattr(watch_module, "FIRST_EVENT_LIMIT", 0.4)
    crowd = [model.make_instance(f"10.1.{n >> 8}.{n & 255}", 1, labels={"filler": "x" * 600}) for n in range(400)]
    sink = Sink()
    async with discovery({B: model.index(crowd)}) as (url, _), slow_link(url.port) as (port, passed):
        following = watch(sink, DiscoveryUrl(scheme, "127.0.0.1", port))
        following._config = DiscoveryClientConfig(backoff_initial=0.01, backoff_max=0.02)
        nursery.start_soon(following.run)
        snapshot = await sink.until(lambda each: each.service == B)
        assert len(snapshot.instances) == 400
        assert following.status.reconnects == 0
        assert passed[-1] - passed[0] > 0.5
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def slow_link(port: int) -> AsyncIterator[tuple[int, list[float]]]:
    """A relay whose way back takes 16 KiB every 50 ms; yields its port, and when something passed."""
    (listener,) = open_tcp_listeners("127.0.0.1", 0)
    passed: list[float] = []

    async def there(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        async for piece in source:
            await sink.send_all(piece)

    async def back(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        while piece := await source.receive_some(16384):
            await sink.send_all(piece)
            passed.append(trio.current_time())
            await trio.sleep(0.05)

    async def serve(client: trio.SocketStream) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", port) as server, trio.open_nursery() as nursery:
            nursery.start_soon(there, client, server)
            nursery.start_soon(back, server, client)

    listening = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.serve_listeners, serve, [listening]))
        yield listener.getsockname()[1], passed
        nursery.cancel_scope.cancel()


async def test_silence_before_the_first_event_is_a_failure(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "FIRST_EVENT_LIMIT", 0.05)
    silent, requests = answering()
    async with serving(silent) as url:
        following = watch(Sink(), url)
        nursery.start_soon(following.run)
        await until(lambda: len(requests) >= 2)
        assert following.status.problem == "no answer in time"
        nursery.cancel_scope.cancel()


async def test_more_services_than_one_stream_takes_are_followed_on_several(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server takes 1,000 on one watch by default, and refuses the whole of one that asks for more."""
    monkeypatch.setattr(watch_module, "MOST_SUBSCRIPTIONS", 10)
    names = [ServiceKey(f"s{number}") for number in range(35)]
    sink = Sink()
    async with discovery({name: model.index([at(1)]) for name in names}) as (url, source):
        following = watch(sink, url, services=tuple(names))
        nursery.start_soon(following.run)
        await until(lambda: {each.service for each in sink.snapshots} == set(names))
        await until(lambda: following.status.confirmed_at is not None)
        assert source.publisher is not None
        source.publisher.update(names[33], model.index([at(2)]))
        await sink.until(lambda each: each.service == names[33] and addresses(each) == ["10.0.0.2"])
        assert following.status.reconnects == 0
        nursery.cancel_scope.cancel()


async def test_an_event_of_a_service_that_was_just_dropped_is_passed_over(nursery: trio.Nursery) -> None:
    """It was under way; nothing that is held is in doubt because of it."""
    proceed = trio.Event()
    sink = Sink()
    late = snapshot_event(ServiceSnapshot(B, "v1", model.index([at(1)])))

    async def handler(call: ServerCall[Any, Any]) -> None:
        request = await call.receive()
        assert request is not None
        if any(each.service == B for each in request.subscriptions):
            await call.send(snapshot_event(ServiceSnapshot(C, "v1", model.index([at(3)]))))
            await proceed.wait()
            await call.send(late)
            await call.send(heartbeat_event(10, []))
        else:
            await call.send(heartbeat_event(10, []))
        await trio.sleep_forever()

    async with serving({WATCH_INSTANCES: handler}) as url:
        following = watch(sink, url, services=(B, C))
        nursery.start_soon(following.run)
        await sink.until(lambda each: each.service == C)
        following.follow([C])
        proceed.set()
        await until(lambda: following.status.confirmed_at is not None)
        assert following.status.reconnects == 0
        assert [each.service for each in sink.snapshots] == [C]
        assert list(following._held) == [C]
        nursery.cancel_scope.cancel()


async def test_a_flood_of_followed_services_costs_few_streams(nursery: trio.Nursery) -> None:
    """The first new one is asked for at once; what comes within the next moments goes together."""
    sink = Sink()
    routes, requests = answering(heartbeat_event(10, []))
    async with serving(routes) as url:
        following = watch(sink, url)
        nursery.start_soon(following.run)
        await until(lambda: len(requests) == 1)
        await trio.sleep(watch_module.FOLLOW_PAUSE)
        for number in range(100):
            following.follow([B, *(ServiceKey(f"n{n}") for n in range(number + 1))])
            await trio.sleep(0.001)
        await until(lambda: len(requests[-1].subscriptions) == 101)
        assert len(requests) <= 5
        nursery.cancel_scope.cancel()


async def test_what_takes_long_to_come_comes_though_others_are_followed_all_the_time(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that is given up before its services came is given longer the next time."""
    monkeypatch.setattr(watch_module, "FOLLOW_PAUSE", 0.01)
    sink = Sink()

    async def slow(call: ServerCall[pb.WatchInstancesRequest, pb.WatchInstancesResponse]) -> None:
        await call.receive()
        await trio.sleep(0.3)
        await call.send(snapshot_event(ServiceSnapshot(B, "v1", model.index([at(1)]))))
        await call.send(heartbeat_event(10, []))
        await trio.sleep_forever()

    async with serving({WATCH_INSTANCES: slow}) as url:
        following = watch(sink, url)
        following._follow_pause = watch_module.FOLLOW_PAUSE
        nursery.start_soon(following.run)

        async def change() -> None:
            for number in range(10_000):
                following.follow([B, ServiceKey(f"s{number % 2}")])
                await trio.sleep(0.01)

        nursery.start_soon(change)
        await sink.until(lambda each: each.service == B)
        # Whoever has all of it again follows others as quickly as before.
        await until(lambda: following._follow_pause == 0.01)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("lasts", "longest", "grows"), [(0.0, 60.0, True), (0.06, 0.05, False)])
async def test_a_server_that_answers_and_fails_is_asked_less_and_less(
    nursery: trio.Nursery, lasts: float, longest: float, grows: bool
) -> None:
    """One that lasted for a while is asked again at once: it may have been restarted."""
    sink = Sink()

    async def failing(call: ServerCall[pb.WatchInstancesRequest, pb.WatchInstancesResponse]) -> None:
        await call.receive()
        await call.send(heartbeat_event(10, []))
        await trio.sleep(lasts)
        raise GrpcError(StatusCode.INTERNAL, "always")

    async with serving({WATCH_INSTANCES: failing}) as url:
        following = watch(sink, url)
        following._config = DiscoveryClientConfig(backoff_initial=0.001, backoff_max=longest)
        following._backoff = Backoff(0.001, longest, random.Random(0))
        nursery.start_soon(following.run)
        await until(lambda: following.status.reconnects == 8)
        assert (following._backoff._ceiling > 0.1) is grows
        nursery.cancel_scope.cancel()


async def test_without_services_the_server_is_still_known_to_be_there(nursery: trio.Nursery) -> None:
    """A proxy that routes by host, and had no request yet, is as connected as any other."""
    sink = Sink()
    async with discovery({B: model.index([at(1)])}) as (url, _):
        following = watch(sink, url, services=())
        nursery.start_soon(following.run)
        await until(lambda: following.status.connected)
        assert following.status.confirmed_at is not None
        following.follow([B])
        await sink.until(lambda each: each.service == B)
        nursery.cancel_scope.cancel()


async def test_without_services_a_server_that_is_away_is_said(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "PROBE_INTERVAL", 0.01)
    async with trio.open_nursery() as inner:
        async with discovery({B: model.index([at(1)])}) as (url, _):
            following = watch(Sink(), url, services=())
            inner.start_soon(following.run)
            await until(lambda: following.status.connected)
        await until(lambda: not following.status.connected)
        assert following.status.problem
        inner.cancel_scope.cancel()
    nursery.cancel_scope.cancel()


async def test_before_anything_was_heard_the_age_counts_from_the_start(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    """An alert on the age, or on what is unconfirmed, must fire for who never heard anything. The log says so, too."""
    following = watch(Sink(), DiscoveryUrl(SCHEME.get(), "127.0.0.1", free_port()))
    assert following.status.age(1.0) is None
    assert following.status.unconfirmed
    nursery.start_soon(following.run)
    await until(lambda: following.status.reconnects >= 1)
    began = following.status.began
    assert began is not None
    assert following.status.age(began + 17) == 17
    assert following.status.unconfirmed
    assert "discovery is away, and nothing is known yet" in caplog.text
    nursery.cancel_scope.cancel()


async def test_a_server_under_load_is_left_alone_for_as_long_as_it_asks(scheme: str) -> None:
    """gRFC A6: grpc-retry-pushback-ms. It is spread by chance, and bounded."""
    following = watch(Sink(), DiscoveryUrl(scheme, "127.0.0.1", 1))

    def pause(*trailing: tuple[str, str | bytes]) -> float:
        return following._explain(GrpcError(StatusCode.RESOURCE_EXHAUSTED, "full", tuple(trailing)))[1]

    assert 2.0 <= pause(("grpc-retry-pushback-ms", "2000")) <= 3.0
    assert 60.0 <= pause(("grpc-retry-pushback-ms", "99999999999")) <= 90.0
    for nothing in ("", "-1", "soon", "1.5"):
        assert pause(("grpc-retry-pushback-ms", nothing)) == 0.0
    assert pause(("other", "2000")) == 0.0
    assert pause() == 0.0


def test_a_stream_asks_for_what_a_server_takes_by_default() -> None:
    assert ServerLimitsConfig().subscriptions == watch_module.MOST_SUBSCRIPTIONS


async def test_a_stream_that_waits_is_not_held_to_what_another_has_heard(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D6: what was pending when a stream began to wait may be known when its time is over."""
    monkeypatch.setattr(watch_module, "PENDING_LIMIT", 0.05)
    watching = watch(Sink(), DiscoveryUrl("grpc", "a", 1), DiscoveryUrl("grpc", "b", 1))
    now = anyio.current_time()
    watching._pending, watching._pending_since = {B}, now

    class Silent:
        received = 0

        async def receive(self) -> None:
            watching._pending.clear()
            await anyio.sleep(0.2)

    assert await watching._next(Silent(), 10.0) is None
    watching._pending, watching._pending_since = {B}, now
    with pytest.raises(TimeoutError):
        await watching._next(Silent(), 0.1)


async def test_what_else_is_followed_gives_a_server_that_does_not_know_no_more_time(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D6: names that come and go must not keep a proxy with it."""
    monkeypatch.setattr(watch_module, "PENDING_LIMIT", 0.4)
    monkeypatch.setattr(watch_module, "FOLLOW_PAUSE", 0.01)
    sink = Sink()
    pending, _ = answering(heartbeat_event(10, [B]))
    async with serving(pending) as unknowing, discovery({B: model.index([at(1)])}) as (knowing, _):
        following = watch(sink, unknowing, knowing)
        nursery.start_soon(following.run)

        async def change() -> None:
            for number in range(1000):
                following.follow([B, ServiceKey(f"s{number % 2}")])
                await trio.sleep(0.1)

        nursery.start_soon(change)
        await until(lambda: following.status.source == str(knowing))
        nursery.cancel_scope.cancel()
