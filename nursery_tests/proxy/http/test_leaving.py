"""Clients that leave (A8), the proxy that stops (S1) or changes its configuration (S2): nothing stays behind."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext, suppress

import pytest
import trio
import trio.lowlevel
from trio.testing import wait_all_tasks_blocked

from meshlocal.client.statistics import Outcome, RequestKey
from meshlocal.net.relay_loop import current_loop, open_relay_loop
from nursery_tests.proxy.http.conftest import (
    LIMIT,
    B,
    Behaviour,
    Client,
    EndedError,
    Proxy,
    Served,
    Upstream,
    closes,
    ok,
    response,
    says,
    stalls,
    until,
)
from nursery_tests.proxy.silent import silent

GET = b"GET / HTTP/1.1\r\nhost: b\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 2\r\n\r\nhi"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _descriptors_stay_level() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() <= before


def assert_nothing_is_left(proxy: Proxy) -> None:
    """What was counted as under way is not any more."""
    state = proxy.table[B]
    for circuit in (state.circuit, proxy.table.circuit):
        assert set(circuit.now.values()) == {0}
    assert (state.in_use, state.statistics.connecting, state.statistics.open) == (0, 0, 0)
    assert not proxy.forwarder.shared.patience.waiting
    loop = current_loop.get()
    if loop is not None:
        assert len(loop) == 0
        listening = {sock.fileno() for listener in proxy.listeners.current for sock in listener.sockets}
        assert len(loop.handlers.keys() - listening) == proxy.pooled


async def switch(upstream: Upstream, served: Served) -> bool:
    await served.send(b"HTTP/1.1 101 Switching\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
    while await served.more():
        await served.send(served.received)
        served.received = b""
    return False


async def endless(upstream: Upstream, served: Served) -> bool:
    await served.send(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        await served.send(bytes(1000))
        await trio.lowlevel.checkpoint()


async def half(upstream: Upstream, served: Served) -> bool:
    await served.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello")
    return await stalls(upstream, served)


LEAVING = {
    "no answer": (stalls, GET, b"", Outcome.CLIENT_LEFT),
    "no answer to a body": (
        stalls,
        b"PUT / HTTP/1.1\r\nhost: b\r\ncontent-length: 5\r\n\r\nhello",
        b"",
        Outcome.CLIENT_LEFT,
    ),
    "half an answer": (half, GET, b"hello", Outcome.CUT),
    "an endless answer": (endless, GET, bytes(1000), Outcome.CUT),
    "a tunnel": (
        switch,
        b"GET / HTTP/1.1\r\nhost: b\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        b"\r\n\r\n",
        Outcome.CUT,
    ),
}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("case", LEAVING)
async def test_a_client_that_leaves(proxy: Proxy, pair: tuple[Upstream, Upstream], case: str, kept: bool) -> None:
    """A8: its attempt ends at once, on the instance's side too, and no other is made."""
    local, far = pair
    behaviour, sent, seen, outcome = LEAVING[case]
    async with await proxy.connect() as client:
        if kept:
            await client.get()
        local.behaviour = behaviour
        await client.send(sent)
        if seen:
            await client.until(seen)
        else:
            await until(lambda: len(local.heads) == 1 + kept)
        client.reset()
        await proxy.idle()
        await until(lambda: not local.open)
    assert proxy.requests()[RequestKey("node", "", outcome)] == 1
    assert not far.accepted
    assert_nothing_is_left(proxy)


async def test_a_client_that_leaves_within_its_body(proxy: Proxy, local: Upstream) -> None:
    proxy.configure(attempts={"replay_buffer": 0})
    local.reads_bodies = False
    local.behaviour = stalls
    async with await proxy.connect() as client:
        await client.send(b"PUT / HTTP/1.1\r\nhost: b\r\ncontent-length: 500\r\n\r\nhello")
        await until(lambda: local.heads)
        client.reset()
        await proxy.idle()
        await until(lambda: not local.open)
    assert proxy.requests() == {RequestKey("node", "", Outcome.CLIENT_LEFT): 1}
    assert_nothing_is_left(proxy)


@pytest.mark.parametrize("kept", [False, True])
async def test_a_client_that_leaves_after_a_body_that_streamed(proxy: Proxy, local: Upstream, kept: bool) -> None:
    """A8."""
    proxy.configure(attempts={"replay_buffer": 0})
    async with await proxy.connect() as client:
        if kept:
            await client.get()
        local.behaviour = stalls
        await client.send(b"PUT / HTTP/1.1\r\nhost: b\r\ncontent-length: 5\r\n\r\nhello")
        await until(lambda: b"hello" in local.bodies)
        await wait_all_tasks_blocked()
        client.reset()
        await proxy.idle()
        await until(lambda: not local.open)
    assert proxy.requests()[RequestKey("node", "", Outcome.CLIENT_LEFT)] == 1
    assert_nothing_is_left(proxy)


async def test_a_client_that_leaves_during_a_connect(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    """A8: no other instance is tried then."""
    _local, far = pair
    proxy.configure(attempts={"connect_timeout_local": 1000.0})
    with silent() as instance:
        proxy.publish(instance, far)
        async with await proxy.connect() as client:
            await client.send(GET)
            await until(lambda: proxy.table[B].statistics.connecting)
            client.reset()
            await proxy.idle()
    assert proxy.requests() == {RequestKey("node", "", Outcome.CLIENT_LEFT): 1}
    assert not far.accepted
    assert_nothing_is_left(proxy)


async def test_a_client_that_leaves_while_a_snapshot_is_awaited(proxy: Proxy) -> None:
    async with await proxy.connect() as client:
        await client.send(GET)
        await until(lambda: proxy.table[B].statistics.connecting)
        client.reset()
        await proxy.idle()
    assert_nothing_is_left(proxy)


async def test_a_client_that_ends_its_stream_has_not_left(proxy: Proxy, local: Upstream) -> None:
    """It may still be listening, as `nc` does; the connection ends after the response."""
    go_on = trio.Event()

    async def behaviour(upstream: Upstream, served: Served) -> None:
        await go_on.wait()
        await ok(upstream, served)

    local.behaviour = behaviour
    for _ in range(2):
        async with await proxy.connect() as client:
            await client.send(GET)
            await until(lambda: local.heads)
            await client.send_eof()
            if not go_on.is_set():
                # Long enough for the proxy to have noticed, on any machine that is not much too busy.
                await trio.sleep(0.05)
                go_on.set()
            assert (await client.response()).body == b"local"
            assert await client.rest() == b""
    assert local.accepted == 1


async def drain(proxy: Proxy) -> None:
    """As the whole proxy does it (S1)."""
    assert proxy.acceptors is not None
    proxy.acceptors.cancel_scope.cancel()
    proxy.forwarder.drain()


@pytest.mark.parametrize("kept", [False, True])
async def test_drain(proxy: Proxy, local: Upstream, kept: bool) -> None:
    """S1: the response under way says `connection: close`; idle connections close; nothing is lost that was sent."""
    go_on = trio.Event()

    async def behaviour(upstream: Upstream, served: Served) -> None:
        await go_on.wait()
        await ok(upstream, served)

    async with await proxy.connect() as idle, await proxy.connect() as busy, await proxy.connect() as sends:
        await idle.get()
        await sends.get()
        if kept:
            await busy.get()
        heard = len(local.heads)
        local.behaviour = behaviour
        await busy.send(GET)
        await until(lambda: len(local.heads) == heard + 1)
        # On its way to the proxy when the drain begins.
        await sends.stream.socket.send(GET)
        await drain(proxy)
        assert await idle.rest() == b""
        go_on.set()
        for client in (busy, sends):
            answer = await client.response()
            assert (answer.body, answer.fields["connection"]) == (b"local", "close")
            assert await client.rest() == b""
    await proxy.idle()
    assert proxy.forwarder.shared.drained == 0
    assert_nothing_is_left(proxy)


async def test_a_request_that_comes_just_after_a_drain_began(proxy: Proxy, local: Upstream) -> None:
    """S1: its client could not know; it is answered, and told that the connection ends."""
    async with await proxy.connect() as client, await proxy.connect() as late, await proxy.connect() as ending:
        await client.get()
        await late.get()
        # The response that is under way when the drain begins said already that the connection stays.
        go_on = trio.Event()

        async def behaviour(upstream: Upstream, served: Served) -> None:
            await served.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\na")
            await go_on.wait()
            await served.send(b"b")

        local.behaviour = behaviour
        await ending.send(GET)
        await ending.until(b"\r\n\r\na")
        local.behaviour = ok
        await drain(proxy)
        await client.send(POST)
        answer = await client.response()
        assert (answer.body, answer.fields["connection"]) == (b"local", "close")
        assert await client.rest() == b""
        go_on.set()
        assert await ending.exactly(1) == b"b"
        await ending.send(POST)
        answer = await ending.response()
        assert (answer.body, answer.fields["connection"]) == (b"local", "close")
        # Who says nothing is not waited for.
        assert await late.rest() == b""
    await proxy.idle()
    assert_nothing_is_left(proxy)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("request_behind", [b"", GET])
async def test_an_answer_of_the_proxys_own_amid_a_drain(
    proxy: Proxy, local: Upstream, kept: bool, request_behind: bytes
) -> None:
    """S1: it says `connection: close` like any other, and the connection ends with it, whatever is behind."""
    go_on = trio.Event()

    async def behaviour(upstream: Upstream, served: Served) -> bool:
        await go_on.wait()
        return False

    async with await proxy.connect() as client:
        if kept:
            await client.get()
        local.behaviour = behaviour
        await client.send(POST + request_behind)
        await until(lambda: len(local.heads) == 1 + kept)
        await drain(proxy)
        go_on.set()
        answer = await client.response()
        assert (answer.told, answer.fields["connection"]) == ((502, "no_response"), "close")
        # No other request is waited for. But what the client still sends must not cost it the answer: it is read on
        # until the client ends, too.
        assert await client.rest() == b""
    await proxy.idle()
    assert len(local.heads) == 1 + kept
    assert_nothing_is_left(proxy)


async def test_a_request_that_is_refused_amid_a_drain(proxy: Proxy, local: Upstream) -> None:
    """S1: its answer says `connection: close`, too."""
    async with await proxy.connect() as client:
        await client.get()
        await drain(proxy)
        answer = await client.get(host="1.2.3.4")
        assert (answer.told, answer.fields["connection"]) == ((503, "unknown_host"), "close")
        assert await client.rest() == b""
    await proxy.idle()
    assert_nothing_is_left(proxy)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("held", [False, True])
async def test_a_client_that_ends_its_stream_with_its_request(
    proxy: Proxy, local: Upstream, kept: bool, held: bool
) -> None:
    """A8: it is answered; and its connection ends then, also where its end came together with the request."""
    go_on = trio.Event()

    async def behaviour(upstream: Upstream, served: Served) -> None:
        if held:
            await go_on.wait()
        await ok(upstream, served)

    async with await proxy.connect() as client:
        if kept:
            await client.get()
        local.behaviour = behaviour
        # Nothing else runs between the two.
        client.stream.socket._sock.send(GET)  # type: ignore[attr-defined]  # without a checkpoint
        client.stream.socket.shutdown(socket.SHUT_WR)
        if held:
            await until(lambda: len(local.heads) == 1 + kept)
            go_on.set()
        assert (await client.response()).body == b"local"
        assert await client.rest() == b""
    await proxy.idle()
    assert_nothing_is_left(proxy)


@pytest.mark.parametrize("case", LEAVING)
async def test_a_drain_that_runs_out_of_time(proxy: Proxy, local: Upstream, case: str) -> None:
    """S1: what is cut is reset, and counted, so that the exit status can tell."""
    behaviour, sent, seen, _ = LEAVING[case]
    async with await proxy.connect() as client:
        await client.get()
        local.behaviour = behaviour
        await client.send(sent)
        if seen:
            await client.until(seen)
        else:
            await until(lambda: len(local.heads) == 2)
        await drain(proxy)
        assert proxy.connections is not None
        proxy.connections.cancel_scope.cancel()
        client.received = b""
        with pytest.raises(trio.BrokenResourceError):
            await client.rest()
        await until(lambda: not local.open)
    assert proxy.forwarder.shared.drained == 1
    assert proxy.requests()[RequestKey("node", "", Outcome.DRAINED)] == 1


async def test_reconfigure(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    """S2: requests that begin now go by it, on connections that stay; the pool stays too."""
    local, _ = pair
    async with await proxy.connect() as client:
        assert "via" not in (await client.get()).fields
        proxy.configure(http={"via": "mesh", "response_headers": True})
        answer = await client.get()
        assert (answer.fields["via"], answer.fields["x-meshlocal-tier"]) == ("1.1 mesh", "node")
    assert local.accepted == 1


async def test_a_fault_of_the_proxys_own_harms_nobody_else(
    proxy: Proxy, local: Upstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and ends one connection."""

    def fails(*_: object, **__: object) -> bytes:
        raise RuntimeError("a bug")

    async with await proxy.connect() as one, await proxy.connect() as two:
        await one.get()
        with monkeypatch.context() as patched:
            patched.setattr("meshlocal.proxy.http.request.HttpRequest.begin_response", fails)
            await two.send(GET)
            assert await two.is_reset()
        assert (await one.get()).body == b"local"
    assert "fault in the proxy" in caplog.text
    assert proxy.requests()[RequestKey("node", "", Outcome.ERROR)] == 1
    await proxy.idle()
    assert_nothing_is_left(proxy)


# Cancellation at each step.


class CancelAt(trio.abc.Instrument):
    """Cancels the connections when their tasks have made so many steps, as a drain that ran out of time does.

    Attributes:
        done: they made as many.
    """

    def __init__(self, connections: trio.Nursery, steps: int) -> None:
        self._connections = connections
        self._left = steps
        self.done = False

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        nursery = task.parent_nursery
        while nursery is not None and nursery is not self._connections:
            nursery = nursery.parent_task.parent_nursery
        if nursery is None or self.done:
            return
        self._left -= 1
        if self._left < 0:
            self.done = True
            self._connections.cancel_scope.cancel()


async def plain(client: Client) -> None:
    for _ in range(3):
        await client.get()


async def upload(client: Client) -> None:
    await client.send(b"PUT / HTTP/1.1\r\nhost: b\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(3):
        await client.send(b"5\r\nhello\r\n")
        await trio.lowlevel.checkpoint()
    await client.send(b"0\r\n\r\n")
    await client.response()


async def large_upload(client: Client) -> None:
    await client.ask("PUT", "/", bytes(3_000_000))


async def expects(client: Client) -> None:
    await client.send(b"PUT / HTTP/1.1\r\nhost: b\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
    await client.until(b"HTTP/1.1 100 Continue\r\n\r\n")
    await client.send(b"hello")
    await client.response()


async def large_download(client: Client) -> None:
    await client.get("/large")


async def pipelined(client: Client) -> None:
    await client.send(GET * 3)
    for _ in range(3):
        await client.response()


async def tunnel(client: Client) -> None:
    await client.send(b"CONNECT b:80 HTTP/1.1\r\nhost: b\r\n\r\n" + GET)
    await client.until(b"\r\n\r\n")
    await client.response()
    await client.send_eof()
    await client.rest()


async def upgrade(client: Client) -> None:
    await client.send(b"GET /switch HTTP/1.1\r\nhost: b\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nx")
    await client.until(b"\r\n\r\nx")
    await client.send_eof()
    await client.rest()


async def refused(client: Client) -> None:
    await client.send(b"GET / HTTP/1.1\r\nhost: b\r\nnonsense\r\n\r\n")
    await client.response()
    await client.rest()


async def slow(client: Client) -> None:
    await client.get("/slow")


async def behaviour(upstream: Upstream, served: Served) -> bool | None:
    path = served.head.split(b" ")[1]
    if b"expect" in served.head:
        await served.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    if path == b"/switch":
        return await switch(upstream, served)
    if path == b"/slow":
        await trio.sleep(0.03)
    await served.read_body()
    await served.send(response(bytes(3_000_000) if path == b"/large" else b"ok"))
    return None


SCENARIOS: list[Callable[[Client], Awaitable[None]]] = [
    plain,
    upload,
    large_upload,
    expects,
    large_download,
    pipelined,
    tunnel,
    upgrade,
    refused,
    slow,
]


CASES = [(scenario, behaviour) for scenario in SCENARIOS] + [
    (scenario, fails)
    for scenario in (plain, upload, expects, pipelined)
    for fails in (closes, says(response(b"", "503 Busy")))
]


@pytest.mark.parametrize("looped", [True, False], ids=["lane", "tasks"])
@pytest.mark.parametrize(("scenario", "local_behaviour"), CASES)
async def test_cancelled_at_each_step(
    nursery: trio.Nursery, scenario: Callable[[Client], Awaitable[None]], local_behaviour: Behaviour, looped: bool
) -> None:
    """Whatever a connection was doing, nothing of it stays behind."""
    local, far = Upstream("local", "n1", nursery), Upstream("far", "n2", nursery)
    for each in (local, far):
        each.reads_bodies = False
        await nursery.start(each.serve)
    local.behaviour, far.behaviour = local_behaviour, behaviour
    before = descriptors()
    with open_relay_loop() if looped else nullcontext():
        for steps in range(300):
            if not await _is_cancelled(nursery, [local, far], scenario, steps):
                break
            await until(lambda: not local.open and not far.open)
            # The loop has one.
            assert descriptors() <= before + looped
        else:
            raise AssertionError("no end of steps")
    assert steps > 2


async def _is_cancelled(
    nursery: trio.Nursery, instances: list[Upstream], scenario: Callable[[Client], Awaitable[None]], steps: int
) -> bool:
    """Play a scenario with a proxy of its own, cancelled after so many steps; tells whether it came to that."""
    proxy = Proxy(nursery)
    await nursery.start(proxy.serve)
    proxy.publish(*instances)
    assert proxy.connections is not None
    cancel = CancelAt(proxy.connections, steps)
    trio.lowlevel.add_instrument(cancel)
    try:
        with trio.fail_after(LIMIT):
            async with await proxy.connect() as client:
                with suppress(trio.BrokenResourceError, EndedError):
                    await scenario(client)
        await proxy.idle()
        assert_nothing_is_left(proxy)
    finally:
        trio.lowlevel.remove_instrument(cancel)
        proxy.scope.cancel()
        await proxy.ended.wait()
    return cancel.done
