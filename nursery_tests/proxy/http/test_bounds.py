"""What one request leaves behind, what an idle proxy costs, and how connections end whole (P2, P3, S1, H1)."""

from __future__ import annotations

import gc
import select
import weakref
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from meshlocal.policy.health import Cause, State
from meshlocal.policy.picker import Picker
from meshlocal.proxy.http import forwarder as forwarder_module
from meshlocal.proxy.http.connection import ClientConnection
from meshlocal.proxy.http.request import HttpRequest
from meshlocal.proxy.http.waiting import Patience, Reminder
from meshlocal.wire.http1.messages import RequestBody
from meshlocal.wire.http1.request import RequestHead
from nursery_tests.proxy.http.conftest import Served, Upstream, closes, ok, response, stalls, until


async def slowly(upstream: Upstream, served: Served) -> None:
    """Answer after the proxy has begun to watch the clock."""
    await trio.sleep(0.03)
    await served.send(response(upstream.name.encode()))


async def test_a_finished_request_leaves_nothing_behind(
    proxy: Any, upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P2: not for as long as its deadline would have been. Its body goes with it."""
    made: list[weakref.ref[Any]] = []

    class Weak(HttpRequest):
        __slots__ = ("__weakref__",)

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    class WeakBody(RequestBody):
        __slots__ = ("__weakref__",)

        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            made.append(weakref.ref(self))

    # The lane keeps one request for the next, without a body.
    monkeypatch.setattr("meshlocal.proxy.http.lane.RequestBody", WeakBody)
    monkeypatch.setattr("meshlocal.proxy.http.serve.RequestBody", WeakBody)
    monkeypatch.setattr("meshlocal.proxy.http.connection.HttpRequest", Weak)
    one = await upstream("one", "n1")
    one.behaviour = slowly
    proxy.publish(one)
    async with await proxy.connect() as client:
        for _ in range(5):
            assert (await client.ask("POST", body=b"x" * 60_000)).status == 200
        assert len(made) >= 5
        gc.collect()
        # The last ones may still be in a frame.
        assert sum(each() is not None for each in made) <= 2


async def test_called_off_reminders_are_dropped(autojump_clock: trio.testing.MockClock) -> None:
    """P2: they hold no waiter, and are thrown away once they are many."""

    class Waiter:
        told = 0

        def on_slow(self) -> None:
            raise AssertionError

        def on_deadline(self) -> None:
            self.told += 1

    patience, waiter = Patience(), Waiter()
    for _ in range(10_000):
        patience.ask(1000.0, waiter).call_off()
    assert len(patience._asked) <= 1025
    kept = patience.ask(5.0, waiter)
    assert isinstance(kept, Reminder)
    with trio.move_on_after(20):
        await patience.run()
    assert waiter.told == 1


async def test_who_waits_is_told_after_any_rest(autojump_clock: trio.testing.MockClock) -> None:
    """A1, P3: the task that tells the time sleeps while nobody waits, and is there when somebody does."""
    steps = 0
    told: list[tuple[str, float]] = []

    class Waiter:
        def on_slow(self) -> None:
            told.append(("slow", trio.current_time()))
            patience.ask(began + 5.0, self)

        def on_deadline(self) -> None:
            told.append(("deadline", trio.current_time()))

    class Steps(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            nonlocal steps
            steps += "Patience" in task.name

    patience = Patience()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(patience.run)
        for rest in (0.0, 3.0, 1000.0):
            await trio.sleep(rest)
            began = trio.current_time()
            patience.add(Waiter(), began)
            await trio.sleep(10)
            assert [word for word, _ in told] == ["slow", "deadline"]
            assert 0.0099 <= told[0][1] - began <= 0.03
            assert 5.0 <= told[1][1] - began <= 5.03
            told.clear()
        counting = Steps()
        trio.lowlevel.add_instrument(counting)
        await trio.sleep(1000)
        trio.lowlevel.remove_instrument(counting)
        assert steps <= 2
        nursery.cancel_scope.cancel()


async def test_an_idle_proxy_makes_no_step(proxy: Any, upstream: Any) -> None:
    """P3: no timer without something to time."""
    steps: list[str] = []

    class Steps(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            steps.append(task.name)

    await trio.sleep(0.1)
    counting = Steps()
    trio.lowlevel.add_instrument(counting)
    await trio.sleep(0.3)
    trio.lowlevel.remove_instrument(counting)
    assert [name for name in steps if "HttpForwarder" in name or "Patience" in name] == []


@pytest.mark.parametrize("size", [65_536, 65_535, 65_537])
async def test_a_request_behind_one_that_fills_a_read_is_served(proxy: Any, upstream: Any, size: int) -> None:
    """Edge-triggered: what is behind a full read makes no event of its own."""
    one = await upstream("one", "n1")
    proxy.publish(one)
    async with await proxy.connect() as client:
        assert (await client.get("/first")).status == 200
        head = b"POST /exact HTTP/1.1\r\nhost: b\r\ncontent-length: %d\r\n\r\n"
        body = b"x" * (size - len(head % 65_000))
        raw = head % len(body) + body
        assert len(raw) == size
        await client.send(raw + b"GET /behind HTTP/1.1\r\nhost: b\r\n\r\n")
        for _ in range(2):
            assert (await client.response()).status == 200
    assert [line.split()[1] for line in one.heads] == [b"/first", b"/exact", b"/behind"]


@pytest.mark.parametrize("behind", [b"\r\n", b"GET /next HTTP/1.1\r\nhost: b\r\n\r\n"])
async def test_a_response_arrives_whole_though_input_is_left_unread(proxy: Any, upstream: Any, behind: bytes) -> None:
    """S1, RFC 9112, 9.6: to close with bytes unread would reset the connection, and the response with it."""
    one = await upstream("one", "n1")
    one.behaviour = slowly
    proxy.publish(one)
    for _ in range(3):
        async with await proxy.connect() as client:
            await client.send(b"GET / HTTP/1.1\r\nhost: b\r\nconnection: close\r\n\r\n" + behind)
            await trio.sleep(0.01)
            answered = await client.response()
            assert answered.body == b"one"
            assert await client.rest() == b""


async def test_a_drain_loses_no_response_to_a_client_that_pipelines(proxy: Any, upstream: Any) -> None:
    """S1: six of six were lost by a reset."""
    one = await upstream("one", "n1")
    one.behaviour = slowly
    proxy.publish(one)
    for _ in range(3):
        async with await proxy.connect() as client:
            await client.send(b"GET /a HTTP/1.1\r\nhost: b\r\n\r\n")
            await until(lambda: one.heads)
            await client.send(b"GET /b HTTP/1.1\r\nhost: b\r\n\r\n" * 20)
            proxy.forwarder.drain()
            answered = await client.response()
            assert answered.body == b"one"
            assert answered.fields["connection"] == "close"
            assert await client.rest() == b""
        proxy.forwarder.shared.draining = False
        one.heads.clear()


async def test_a_drain_does_not_wait_for_a_client_that_never_said_a_word(proxy: Any, upstream: Any) -> None:
    """S1: half a second, as for any other that is idle; not the ten of `header_timeout`."""
    proxy.publish(await upstream("one", "n1"))
    async with await proxy.connect() as client:
        await until(lambda: len(proxy.forwarder))
        began = trio.current_time()
        proxy.forwarder.drain()
        assert await client.rest() == b""
        assert trio.current_time() - began < 5
        await until(lambda: not len(proxy.forwarder))


async def test_requests_under_way_are_counted_by_instance(proxy: Any, upstream: Any) -> None:
    """Whoever looks for the busy one sees it, whether or not anything spills (F3)."""
    one, two = await upstream("one", "n1"), await upstream("two", "n2")
    proxy.publish(one, two)
    under_way = proxy.table["b"].fitness.under_way
    clients = [await proxy.connect() for _ in range(3)]
    for client in clients:
        assert (await client.get()).status == 200
    assert under_way == {}
    one.behaviour = stalls
    for client in clients:
        await client.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
    await until(lambda: under_way == {one.instance.key[:2]: 3})
    for client in clients:
        client.reset()
    await until(lambda: not under_way)


async def test_idle_clients_make_room_when_descriptors_run_out(
    proxy: Any, upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were idle longest go first, and none that is being served."""
    one = await upstream("one", "n1")
    proxy.publish(one)
    clients = []
    for _ in range(4):
        clients.append(await proxy.connect())
        assert (await clients[-1].get()).status == 200
    one.behaviour = stalls
    await clients[0].send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
    await until(lambda: len(one.heads) == 5)
    listener = proxy.listeners.current[0]
    # All were served a moment ago: their next requests may be on their way.
    proxy.listeners._on_full(listener, OSError(24, "Too many open files"))
    assert not any(each.expired for each in proxy.forwarder)
    monkeypatch.setattr(forwarder_module, "SHED_REST", 0.0)
    # Each listener asks, ten times a second: that is one look at all connections.
    proxy.listeners._on_full(listener, OSError(24, "Too many open files"))
    assert not any(each.expired for each in proxy.forwarder)
    await trio.sleep(0.15)
    proxy.listeners._on_full(listener, OSError(24, "Too many open files"))
    for client in clients[1:]:
        assert await client.rest() == b""
    await until(lambda: len(proxy.forwarder) == 1)
    assert listener.accept_errors == 3
    for client in clients:
        await trio.aclose_forcefully(client.stream)


async def test_only_so_many_idle_clients_are_looked_at_and_closed_at_once(
    proxy: Any, upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy with tens of thousands of clients must not stand still over them (P2): the oldest go, a few at a time."""
    monkeypatch.setattr(forwarder_module, "SHED_REST", 0.0)
    monkeypatch.setattr(forwarder_module, "SHED_AT_ONCE", 2)
    looked: list[object] = []
    has_input = ClientConnection.has_input
    monkeypatch.setattr(ClientConnection, "has_input", lambda each: looked.append(each) or has_input(each))
    proxy.publish(await upstream("one", "n1"))
    clients = []
    for _ in range(5):
        clients.append(await proxy.connect())
        assert (await clients[-1].get()).status == 200
    oldest = list(proxy.forwarder)
    await until(lambda: all(each.is_idle for each in oldest))
    for left in (3, 1):
        looked.clear()
        proxy.forwarder.shed()
        proxy.forwarder.shed()
        assert looked == oldest[3 - left : 5 - left]
        await until(partial(lambda wanted: len(proxy.forwarder) == wanted, left))
        await trio.sleep(0.15)
    for client in clients:
        await trio.aclose_forcefully(client.stream)


@pytest.mark.parametrize(
    ("said", "ejected"),
    [
        (response(b"nobody asked"), True),
        (b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n", False),
        (b"\r\n", False),
    ],
)
async def test_an_instance_that_answers_unasked_is_ejected(
    proxy: Any, upstream: Any, said: bytes, ejected: bool
) -> None:
    """H1: had it come a moment later, it would have been taken for the next client's answer. A 408 is a goodbye."""
    one, two = await upstream("one", "n1"), await upstream("two", "n1")
    proxy.publish(one, two)
    async with await proxy.connect() as client:
        for _ in range(2):
            assert (await client.get()).status == 200
        await one.open[0].send(said)
        health = proxy.table["b"].fitness.health
        place = one.instance.key[:2]
        await until(lambda: not any(place == idle for idle, count in pool_sizes(proxy) if count) or proxy.loop is None)
        if proxy.loop is None:
            proxy.forwarder.services["b"].pool.sweep(0.0)
        standing = health.standing(place, trio.current_time())
        assert (standing.state is State.EJECTED) == ejected
        assert (standing.cause is Cause.PROTOCOL) == ejected
        for _ in range(3):
            answer = await client.get()
            assert answer.body == b"two" or not ejected


def pool_sizes(proxy: Any) -> Any:
    return list(proxy.forwarder.services["b"].pool.sizes())


async def test_an_answer_to_an_older_request_readmits_nobody(proxy: Any, upstream: Any) -> None:
    """H1: what an attempt shows of its instance counts from when it began."""
    one, two = await upstream("one", "n1"), await upstream("two", "n2")
    go_on = trio.Event()

    async def waits(upstream: Upstream, served: Served) -> None:
        await go_on.wait()
        await served.send(response(b"late"))

    proxy.publish(one, two)
    health = proxy.table["b"].fitness.health
    async with await proxy.connect() as client:
        assert (await client.get()).status == 200
        one.behaviour = waits
        await client.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
        await until(lambda: len(one.heads) == 2)
        for _ in range(3):
            proxy.table["b"].fitness.failed(one.instance, "refused")
        assert health.standing(one.instance.key[:2], trio.current_time()).state is State.EJECTED
        go_on.set()
        assert (await client.response()).body == b"late"
        assert health.standing(one.instance.key[:2], trio.current_time()).state is State.EJECTED
        one.behaviour = ok


async def test_a_connect_timeout_below_the_time_of_patience_is_one(proxy: Any, upstream: Any) -> None:
    """A1, A2: it moves on to the next instance like any other."""
    one = await upstream("one", "n1")
    one.behaviour = closes
    two = await upstream("two", "n2")
    proxy.configure(attempts={"connect_timeout_local": 0.001, "connect_timeout": 0.004})
    proxy.publish(one, two)
    async with await proxy.connect() as client:
        assert (await client.get()).body == b"two"


async def test_a_client_that_is_cut_has_no_request_sent_for_it(proxy: Any, upstream: Any) -> None:
    """A3: between the cut and its task's end, a request that comes is nobody's to forward."""
    one = await upstream("one", "n1")
    proxy.publish(one)
    client = await proxy.connect()
    assert (await client.get()).status == 200
    (connection,) = proxy.forwarder
    connection.expire()
    handler = proxy.loop.handlers.get(connection.pipe.plain.fileno()) if proxy.loop is not None else None
    assert handler is None
    await client.rest()
    assert len(one.heads) == 1
    await trio.aclose_forcefully(client.stream)


async def test_what_was_read_for_a_task_counts_as_input(proxy: Any, upstream: Any) -> None:
    """A request of which some is read is no idle connection's, also before its task made a step."""
    one = await upstream("one", "n1")
    proxy.publish(one)
    client = await proxy.connect()
    assert (await client.get()).status == 200
    (connection,) = proxy.forwarder
    client.stream.socket._sock.send(b"GET / HTTP/1.1\r\nhost")
    if proxy.loop is not None:
        proxy.loop.handlers[connection.pipe.plain.fileno()](select.EPOLLIN)
    assert connection.has_input()
    await client.send(b": b\r\n\r\n")
    await until(lambda: len(one.heads) == 2)
    await trio.aclose_forcefully(client.stream)


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_an_idle_client_holds_nothing_of_its_last_request(proxy: Any, upstream: Any, method: str) -> None:
    """P2: neither a large head, nor a body, nor the instances of a snapshot that there was then."""
    one = await upstream("one", "n1")
    proxy.publish(one)
    body = b"x" * 5000 if method == "PUT" else None
    clients = []
    for _ in range(3):
        client = await proxy.connect()
        clients.append(client)
        for _ in range(3):
            assert (await client.ask(method, "/", body, padding="p" * 4000)).status == 200
        await until(lambda: all(each.is_idle for each in proxy.forwarder))
        proxy.publish(one)
    gc.collect()
    held = gc.get_objects()
    assert not [each for each in held if type(each) is RequestHead and b"p" * 4000 in each.raw]
    assert not [each for each in held if type(each) is RequestBody and each.size == 5000]
    latest = proxy.table["b"].picker
    assert [each for each in held if type(each) is Picker and each.selector is latest.selector] == [latest]
    for client in clients:
        await trio.aclose_forcefully(client.stream)


async def test_a_response_that_lasts_holds_no_instances_of_then(proxy: Any, upstream: Any) -> None:
    """P2: a stream of events may be open for days, and the snapshot that it was picked from have thousands."""

    async def begins(upstream: Upstream, served: Served) -> None:
        await served.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx")
        await trio.sleep_forever()

    one = await upstream("one", "n1")
    one.behaviour = begins
    proxy.publish(one)
    client = await proxy.connect()
    await client.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
    await client.until(b"\r\n\r\nx")
    proxy.publish(one)
    gc.collect()
    latest = proxy.table["b"].picker
    found = [each for each in gc.get_objects() if type(each) is Picker and each.selector is latest.selector]
    assert found == [latest]
    await trio.aclose_forcefully(client.stream)


async def test_nothing_is_connected_for_a_client_that_has_left(proxy: Any, upstream: Any) -> None:
    """A8: a connection that was made for it would be nobody's to close."""
    one = await upstream("one", "n1")
    proxy.publish(one)
    client = await proxy.connect()
    await until(lambda: len(proxy.forwarder) == 1)
    (connection,) = proxy.forwarder
    connection.left = True
    await client.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
    await until(lambda: len(proxy.forwarder) == 0)
    assert one.accepted == 0
    assert sum(proxy.requests().values()) == 1
    await trio.aclose_forcefully(client.stream)
