"""TCP connections through the proxy's data path (A1 to A8, L5, O1, O2, R1)."""

from __future__ import annotations

import errno
import os
import socket
import struct
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshlocal.client.statistics import Outcome, RequestKey
from meshlocal.net import relay_loop
from meshlocal.net.relay_loop import DEFERRAL, current_loop
from meshlocal.policy.config import AttemptPolicy
from meshlocal.policy.model import Instance, ServiceKey, make_instance
from nursery_tests.logged import events
from nursery_tests.ports import free_port
from nursery_tests.proxy.silent import silent

LIMIT = 20


@pytest.fixture(autouse=True)
def _descriptors_stay_level() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


def refusing(node: str | None = "n1", address: str = "127.0.0.1") -> Instance:
    return make_instance(address, free_port(), labels={"node": node} if node else {})


async def finish(proxy: Any) -> None:
    """Wait until every connection has ended and was counted."""
    await until(lambda: not len(proxy.forwarder))


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT):
        while not holds():  # noqa: ASYNC110 - the counts are plain numbers, with no event to wait for
            await trio.sleep(0.001)


async def test_connections_stay_on_the_node(proxy: Any, upstream: Any) -> None:
    """L3, O1: while an instance on this node answers, every connection goes to it."""
    local, remote = await upstream("local", "n1"), await upstream("remote", "n2")
    proxy.publish([remote, local])
    assert {await proxy.ask() for _ in range(20)} == {"local"}
    assert remote.accepted == 0
    await finish(proxy)
    assert proxy.requests == {RequestKey("node", "", Outcome.SERVED): 20}


async def test_a_refused_local_instance_is_retried_within_the_connection(proxy: Any, upstream: Any) -> None:
    """A2, H1, O1, O2, R1: the rest of the node, then the others evenly; the client sees nothing of it."""
    local = await upstream("local", "n1")
    n2, n3 = await upstream("n2", "n2"), await upstream("n3", "n3")
    dead = refusing("n1")
    proxy.publish([dead, local, n2, n3])
    assert {await proxy.ask() for _ in range(10)} == {"local"}
    local.stop()
    await wait_all_tasks_blocked()
    served = Counter([await proxy.ask() for _ in range(20)])
    assert served == {"n2": 10, "n3": 10}
    await finish(proxy)
    assert proxy.requests[RequestKey("other", "local_failed", Outcome.SERVED)] == 3
    assert proxy.requests[RequestKey("other", "local_ejected", Outcome.SERVED)] == 17
    assert proxy.table["b"].statistics.attempts[("node", "refused")] == 6


async def test_what_left_the_node_is_kept_and_the_rest_is_counted(proxy: Any, upstream: Any) -> None:
    """R1: of each attempt, which instance, what failed, and how long it took."""
    near, far = await upstream("near", "n1"), await upstream("far", "n2")
    proxy.publish([near, far])
    assert await proxy.ask() == "near"
    near.stop()
    await wait_all_tasks_blocked()
    assert await proxy.ask() == "far"
    await finish(proxy)
    [request] = proxy.table["b"].told.recent
    assert (request.asked.protocol, request.tier, request.reason, request.outcome) == (
        *("tcp", "other", "local_failed"),
        "served",
    )
    assert request.peer[0] == "127.0.0.1"
    [failed] = request.failures
    assert (failed.pick.instance, failed.error) == (near.instance, "refused")
    assert 0 <= failed.seconds <= request.seconds
    assert {tier: times.count for tier, times in proxy.table["b"].statistics.durations.items()} == {
        "node": 1,
        "other": 1,
    }


async def test_every_instance_failed_resets_the_client(proxy: Any) -> None:
    """A6: a client whose request failed everywhere is reset, and never sees a clean end."""
    proxy.publish([refusing("n1"), refusing("n2")])
    stream = await proxy.connect()
    with pytest.raises(trio.BrokenResourceError) as reset:
        await stream.receive_some(1)
    assert isinstance(reset.value.__cause__, OSError)
    assert reset.value.__cause__.errno == errno.ECONNRESET
    await stream.aclose()
    await finish(proxy)
    assert proxy.requests == {RequestKey("other", "local_failed", Outcome.FAILED): 1}


@pytest.mark.parametrize("unknown", [False, True])
async def test_no_instance_resets_the_client_at_once(proxy: Any, unknown: bool) -> None:
    """A6: no usable instance, or a service that no registry knows: reset at once, and counted as that."""
    proxy.publish([], unknown=unknown)
    assert await proxy.ask() == ""
    await finish(proxy)
    assert proxy.requests == {RequestKey("", "", Outcome.NO_INSTANCE): 1}


async def test_a_silent_local_instance_costs_its_connect_timeout(proxy: Any, upstream: Any) -> None:
    """A1: an instance that does not answer is given up after its tier's connect timeout, and the next one tried."""
    remote = await upstream("remote", "n2")
    proxy.configure(AttemptPolicy(connect_timeout_local=0.05, connect_timeout=LIMIT, deadline=LIMIT))
    with silent() as instance:
        proxy.publish([instance, remote])
        assert await proxy.ask() == "remote"
    await finish(proxy)
    assert proxy.table["b"].statistics.attempts[("node", "timeout")] == 1
    assert proxy.requests == {RequestKey("other", "local_failed", Outcome.SERVED): 1}


async def test_a_connect_timeout_may_be_as_short_as_one_likes(proxy: Any, upstream: Any) -> None:
    """A1: also shorter than the time after which a client that waits is watched."""
    remote = await upstream("remote", "n2")
    proxy.configure(AttemptPolicy(connect_timeout_local=0.001, connect_timeout=LIMIT, deadline=LIMIT))
    with silent() as instance:
        proxy.publish([instance, remote])
        assert await proxy.ask() == "remote"
    await finish(proxy)
    assert proxy.table["b"].statistics.attempts[("node", "timeout")] == 1


async def test_the_deadline_ends_all_attempts(proxy: Any) -> None:
    """A1: the request's deadline is over all of its attempts."""
    proxy.configure(AttemptPolicy(connect_timeout_local=LIMIT, deadline=0.05))
    with silent() as instance:
        proxy.publish([instance, refusing("n2")])
        assert await proxy.ask() == ""
    await finish(proxy)
    assert proxy.requests == {RequestKey("node", "", Outcome.DEADLINE): 1}
    assert proxy.table["b"].statistics.attempts == {("node", "abandoned"): 1}


async def test_max_attempts(proxy: Any, upstream: Any) -> None:
    """O5: no more instances are tried than `max_attempts`."""
    proxy.configure(AttemptPolicy(max_attempts=2))
    third = await upstream("third", "n3")
    proxy.publish([refusing("n1"), refusing("n1"), third])
    assert await proxy.ask() == ""
    await finish(proxy)
    assert third.accepted == 0
    assert proxy.requests == {RequestKey("node", "", Outcome.FAILED): 1}


async def test_a_request_waits_for_the_first_snapshot(proxy: Any, upstream: Any) -> None:
    """A7: a client that comes before discovery has spoken is served once it has; what it sent is not lost."""
    local = await upstream("local", "n1")
    async with await proxy.connect() as stream:
        await stream.send_all(b"early ")
        await stream.send_eof()
        await until(lambda: len(proxy.forwarder) == 1)
        proxy.publish([local])
        received = b"".join([data async for data in stream])
    assert received == b"local\nearly "
    await finish(proxy)


async def test_the_wait_for_the_first_snapshot_ends(proxy: Any) -> None:
    """A7: discovery that says nothing costs a request `first_snapshot_wait`, not for ever."""
    proxy.configure(AttemptPolicy(first_snapshot_wait=0.02))
    assert await proxy.ask() == ""
    await finish(proxy)
    assert proxy.requests == {RequestKey("", "", Outcome.NO_INSTANCE): 1}


def reset(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


@pytest.mark.parametrize("sent", [b"", b"hello"])
async def test_a_client_that_leaves_while_waiting_is_forgotten_at_once(proxy: Any, sent: bytes) -> None:
    """A8: a reset while waiting for the first snapshot, or for a slow instance, ends the request there and then."""
    proxy.configure(AttemptPolicy(connect_timeout_local=LIMIT, deadline=LIMIT, first_snapshot_wait=LIMIT))
    with silent() as instance, trio.fail_after(LIMIT / 2):
        for publish in (False, True):
            if publish:
                proxy.publish([instance])
            stream = await proxy.connect()
            if sent:
                await stream.send_all(sent)
            await until(lambda: len(proxy.forwarder) == 1)
            reset(stream)
            await finish(proxy)
    counts = Counter({key.outcome: count for key, count in proxy.requests.items()})
    assert set(counts) == {Outcome.CLIENT_LEFT}
    await finish(proxy)


async def test_half_close_in_both_orders(proxy: Any, upstream: Any) -> None:
    """A client that ended its stream still gets all of the answer, and the end after it."""
    proxy.publish([await upstream("local", "n1")])
    async with await proxy.connect() as stream:
        await stream.send_all(b"x" * 100_000)
        await stream.send_eof()
        received = b"".join([data async for data in stream])
    assert received == b"local\n" + b"x" * 100_000
    await finish(proxy)
    assert proxy.requests == {RequestKey("node", "", Outcome.SERVED): 1}
    statistics = proxy.table["b"].statistics
    assert (statistics.bytes_sent, statistics.bytes_received) == (100_000, 100_006)


async def test_an_upstream_reset_reaches_the_client_as_a_reset(proxy: Any, nursery: trio.Nursery) -> None:
    """A5: once connected, a request stays with its instance; if that resets, so does the proxy: no false end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy.publish([make_instance("127.0.0.1", listener.getsockname()[1], labels={"node": "n1"}), refusing("n2")])
        stream = await proxy.connect()
        accepted, _ = await trio.to_thread.run_sync(listener.accept)
        accepted.send(b"half of an ans")
        assert await stream.receive_some(64) == b"half of an ans"
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted.close()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(64)
        await stream.aclose()
    await finish(proxy)
    assert proxy.requests == {RequestKey("node", "", Outcome.CUT): 1}


async def test_many_that_expire_one_by_one_cost_few_looks(
    proxy: Any, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A1: each look is at all connections."""
    looks = []

    def cut_idle(now: float) -> float:
        looks.append(now)
        return 0.001

    monkeypatch.setattr(proxy.forwarder, "_cut_idle", cut_idle)
    with trio.move_on_after(10):
        await proxy.forwarder.sweep_idle()
    assert 10 <= len(looks) <= 101


async def test_each_is_cut_when_its_own_time_is_over(
    proxy: Any, upstream: Any, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A1: whenever in the sweep's round its last byte moved."""
    proxy.configure(AttemptPolicy(idle_timeout=10))
    proxy.publish([await upstream("local", "n1")])
    nursery.start_soon(proxy.forwarder.sweep_idle)
    await trio.sleep(3)
    async with await proxy.connect() as stream:
        assert await stream.receive_some(64) == b"local\n"
        (connection,) = proxy.forwarder
        active = connection.counters.last_activity
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
        assert 10 <= trio.current_time() - active <= 10.2
    await finish(proxy)
    assert proxy.requests == {RequestKey("node", "", Outcome.CUT): 1}


async def test_idle_connections_are_cut(proxy: Any, upstream: Any, nursery: trio.Nursery) -> None:
    """A1: a connection on which nothing moves for `idle_timeout` is reset; one that moves is not."""
    # Much longer than this machine may hold up the one that moves.
    proxy.configure(AttemptPolicy(idle_timeout=1.0))
    proxy.publish([await upstream("local", "n1")])
    nursery.start_soon(proxy.forwarder.sweep_idle)
    idle, busy = await proxy.connect(), await proxy.connect()
    assert await idle.receive_some(64) == b"local\n"
    assert await busy.receive_some(64) == b"local\n"
    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as talking:

            async def talk() -> None:
                while True:
                    await busy.send_all(b"x")
                    assert await busy.receive_some(1) == b"x"
                    await trio.sleep(0.02)

            talking.start_soon(talk)
            with pytest.raises(trio.BrokenResourceError):
                await idle.receive_some(1)
            talking.cancel_scope.cancel()
    await busy.send_eof()
    assert b"".join([data async for data in busy]).strip(b"x") == b""
    await busy.aclose()
    await idle.aclose()
    await finish(proxy)
    assert proxy.requests[RequestKey("node", "", Outcome.CUT)] == 1
    assert proxy.requests[RequestKey("node", "", Outcome.SERVED)] == 1


async def test_a_drain_that_runs_out_of_time_resets(proxy: Any, upstream: Any) -> None:
    """S1: what is left at the end of a drain is reset, on both sides, and counted."""
    proxy.publish([await upstream("local", "n1")])
    stream = await proxy.connect()
    assert await stream.receive_some(64) == b"local\n"
    proxy.connections.cancel_scope.cancel()
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some(64)
    await stream.aclose()
    assert proxy.forwarder.drained == 1
    await finish(proxy)


async def test_stopping_the_acceptors_leaves_connections_alone(proxy: Any, upstream: Any) -> None:
    """S1: no new connection after the acceptors stop, and the ones that are open go on."""
    proxy.publish([await upstream("local", "n1")])
    stream = await proxy.connect()
    assert await stream.receive_some(64) == b"local\n"
    port = proxy.port
    proxy.acceptors.cancel_scope.cancel()
    await wait_all_tasks_blocked()
    with pytest.raises(OSError, match="connect"):
        await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(b"still here")
    assert await stream.receive_some(64) == b"still here"
    await stream.send_eof()
    assert await stream.receive_some(64) == b""
    await stream.aclose()
    await finish(proxy)


async def test_an_instance_without_a_node_is_never_local(proxy: Any, upstream: Any) -> None:
    """L2: the others are tried with reason no_local, not as local ones."""
    proxy.publish([await upstream("anywhere", None)])
    assert await proxy.ask() == "anywhere"
    await finish(proxy)
    assert proxy.requests == {RequestKey("other", "no_local", Outcome.SERVED): 1}


async def test_removed_instances_keep_their_connections(proxy: Any, upstream: Any) -> None:
    """H2: an instance that discovery removes gets no new request; the connections that it has go on."""
    first, second = await upstream("first", "n1"), await upstream("second", "n1")
    proxy.publish([first])
    stream = await proxy.connect()
    assert await stream.receive_some(64) == b"first\n"
    proxy.publish([second])
    assert {await proxy.ask() for _ in range(4)} == {"second"}
    await stream.send_all(b"still")
    assert await stream.receive_some(64) == b"still"
    await stream.send_eof()
    assert await stream.receive_some(64) == b""
    await stream.aclose()
    await finish(proxy)


@contextmanager
def half_taken(proxy: Any) -> Iterator[socket.socket]:
    """A client whose connection was taken by the forwarder, while its task has not made a step."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, peer = listener.accept()
    accepted.setblocking(False)
    client.settimeout(LIMIT)
    with client:
        client.send(b"hello")
        proxy.forwarder.take(proxy.connections, ServiceKey("b"), accepted, peer)
        yield client


def ends_in_reset(client: socket.socket) -> bool:
    try:
        while client.recv(64):
            pass
    except ConnectionResetError:
        return True
    return False


def left_over(proxy: Any) -> list[int]:
    """What counts as under way."""
    service = proxy.table["b"]
    circuits = [*service.circuit.now.values(), *proxy.table.circuit.now.values()]
    under_way = sum(service.fitness.under_way.values())
    return [len(proxy.forwarder), service.statistics.open, service.statistics.connecting, under_way, *circuits]


async def keep_a_task(proxy: Any, upstream: Any) -> None:
    """Serve a connection, whose task waits for another one then, if there is a relay loop."""
    proxy.publish([await upstream("first", "n1")])
    assert await proxy.ask() == "first"
    await finish(proxy)
    await wait_all_tasks_blocked()
    assert len(proxy.connections.child_tasks) == proxy.forwarder.kept_tasks == (current_loop.get() is not None)


@pytest.mark.parametrize(
    ("begun", "kept"),
    [("connected", False), ("connecting", False), ("waiting", False), ("connected", True), ("connecting", True)],
)
async def test_a_drain_reaches_connections_whose_task_has_not_made_a_step(
    proxy: Any, upstream: Any, begun: str, kept: bool
) -> None:
    """S1: what was begun for it, an attempt or a relay, is the task's to end."""
    with silent() as instance:
        if kept:
            await keep_a_task(proxy, upstream)
        if begun == "connected":
            proxy.publish([await upstream("local", "n1")])
        elif begun == "connecting":
            proxy.publish([instance])
        with half_taken(proxy) as client:
            assert len(proxy.forwarder) == 1
            proxy.connections.cancel_scope.cancel()
            await finish(proxy)
            assert ends_in_reset(client)
    assert not any(left_over(proxy))
    assert proxy.forwarder.drained == 1


@pytest.mark.parametrize("kept", [False, True])
async def test_cut_before_its_task_has_made_a_step(proxy: Any, upstream: Any, kept: bool) -> None:
    """A1: as the idle sweep does, which may come at any time."""
    if kept:
        await keep_a_task(proxy, upstream)
    proxy.table["b"].statistics.requests.clear()
    proxy.publish([await upstream("local", "n1")])
    with half_taken(proxy) as client:
        (connection,) = proxy.forwarder
        connection.scope.cancel()
        await finish(proxy)
        assert ends_in_reset(client)
    assert not any(left_over(proxy))
    assert proxy.requests == {RequestKey(*(("node", "") if connection.pick else ("", "")), Outcome.CUT): 1}


async def test_a_fault_of_ours_costs_its_connection_only(
    proxy: Any, upstream: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it is met; the acceptor goes on."""
    local = await upstream("local", "n1")
    proxy.publish([local])

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    for place in ("meshlocal.proxy.tcp.connection.connect_at_once", "meshlocal.proxy.tcp.connection.RelayCounters"):
        with monkeypatch.context() as patch:
            patch.setattr(place, broken)
            assert await proxy.ask() == ""
        await finish(proxy)
        assert not any(left_over(proxy))
    assert await proxy.ask() == "local"
    await finish(proxy)
    assert proxy.requests == {
        RequestKey("", "", Outcome.ERROR): 1,
        RequestKey("node", "", Outcome.ERROR): 1,
        RequestKey("node", "", Outcome.SERVED): 1,
    }
    assert events(caplog.records) == ["connection failed by a fault in the proxy"] * 2


async def test_the_task_of_one_connection_serves_the_next(proxy: Any, upstream: Any) -> None:
    """And the next one's counts, limits and scope are its own. Once no more can come, it is gone."""
    await keep_a_task(proxy, upstream)
    tasks = set(proxy.connections.child_tasks)
    stream = await proxy.connect()
    assert await stream.receive_some(64) == b"first\n"
    await trio.sleep(2 * DEFERRAL)
    assert not tasks or proxy.connections.child_tasks == tasks
    (connection,) = proxy.forwarder
    connection.scope.cancel()
    await finish(proxy)
    await stream.aclose()
    assert await proxy.ask() == "first"
    await finish(proxy)
    assert not tasks or proxy.connections.child_tasks == tasks
    assert proxy.requests == {RequestKey("node", "", Outcome.SERVED): 2, RequestKey("node", "", Outcome.CUT): 1}
    assert not any(left_over(proxy))
    proxy.acceptors.cancel_scope.cancel()
    await until(lambda: not proxy.connections.child_tasks)


@pytest.mark.parametrize("proxy", ["loop"], indirect=True)
async def test_a_kept_task_holds_nothing_of_its_last_connection(proxy: Any, upstream: Any) -> None:
    """Neither what its client sent early, nor the snapshot of that time."""
    proxy.publish([await upstream("first", "n1")])
    stream = await proxy.connect()
    assert await stream.receive_some(64) == b"first\n"
    await trio.sleep(2 * DEFERRAL)
    (connection,) = proxy.forwarder
    held = [weakref.ref(connection.client.pipe.plain), weakref.ref(connection.upstream.plain)]
    del connection
    await stream.aclose()
    await finish(proxy)
    await wait_all_tasks_blocked()
    assert proxy.forwarder.kept_tasks == 1
    assert [each() for each in held] == [None, None]


@contextmanager
def instance_at_hand() -> Iterator[tuple[Instance, socket.socket]]:
    """An instance on this node whose connections the test itself accepts, without giving way to any task."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT)
        yield make_instance("127.0.0.1", listener.getsockname()[1], labels={"node": "n1"}), listener


@pytest.mark.parametrize("proxy", ["loop"], indirect=True)
@pytest.mark.parametrize("end", ["served", "reset by the instance", "faulty"])
async def test_a_short_connection_needs_no_step_of_a_task(
    proxy: Any, upstream: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    """It is over before its task makes one: counted and closed as by that, which serves the next one."""
    await keep_a_task(proxy, upstream)
    proxy.table["b"].statistics.requests.clear()
    monkeypatch.setattr(relay_loop, "DEFERRAL", LIMIT)  # as long as the others' steps take, on whatever machine
    with instance_at_hand() as (instance, listener):
        proxy.publish([instance])
        for _ in range(3):
            with half_taken(proxy) as client, monkeypatch.context() as patch:
                (connection,) = proxy.forwarder
                assert connection.kept is not None
                far, _ = listener.accept()
                with far:
                    far.settimeout(LIMIT)
                    assert far.recv(64) == b"hello"
                    far.send(b"answer")
                    client.shutdown(socket.SHUT_WR)
                    if end != "reset by the instance":
                        far.shutdown(socket.SHUT_WR)
                    else:
                        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        far.close()
                    if end == "faulty":
                        patch.setattr("meshlocal.proxy.tcp.connection.TcpConnection._outcome", lambda *_: 1 / 0)
                    await finish(proxy)
                assert connection.kept is not None, "its task made a step"
                assert len(proxy.connections.child_tasks) == 1
                assert ends_in_reset(client) == (end == "reset by the instance")
            assert not any(left_over(proxy))
    outcome = {
        "served": Outcome.SERVED,
        "reset by the instance": Outcome.CUT,
        "faulty": Outcome.ERROR,
    }[end]
    assert proxy.requests == {RequestKey("node", "", outcome): 3}
    faults = events(record for record in caplog.records if record.levelname == "ERROR")
    assert faults == (["connection failed by a fault in the proxy"] * 3 if end == "faulty" else [])


@pytest.mark.parametrize("proxy", ["loop"], indirect=True)
async def test_a_connection_that_is_over_before_its_new_task_begins(proxy: Any, upstream: Any) -> None:
    """The task finds nothing left to do."""
    with instance_at_hand() as (instance, listener):
        proxy.publish([instance])
        with half_taken(proxy) as client:
            (connection,) = proxy.forwarder
            assert connection.kept is None
            far, _ = listener.accept()
            with far:
                far.shutdown(socket.SHUT_WR)
                client.shutdown(socket.SHUT_WR)
                # As if the loop had slept and seen that before Trio came to the task.
                loop = current_loop.get()
                assert loop is not None
                loop.before_io_wait(0)
                assert len(proxy.forwarder) == 0
                await until(lambda: len(proxy.connections.child_tasks) == 1)
                await wait_all_tasks_blocked()
            assert client.recv(64) == b""
    assert await proxy.ask() == ""
    assert proxy.requests[RequestKey("node", "", Outcome.SERVED)] == 1
    assert not any(left_over(proxy))


async def test_many_short_connections_at_once(proxy: Any, upstream: Any) -> None:
    """Accepted in whatever order and batches: each gets its own answer, and all are counted."""
    proxy.publish([await upstream("local", "n1")])
    answers: list[bytes] = []

    async def ask(number: int) -> None:
        async with await proxy.connect() as stream:
            words = str(number).encode() * 100
            await stream.send_all(words)
            await stream.send_eof()
            answers.append(b"".join([data async for data in stream]))
            assert answers[-1] == b"local\n" + words

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(ask, number)
    await finish(proxy)
    assert len(answers) == 200
    assert proxy.requests == {RequestKey("node", "", Outcome.SERVED): 200}
    assert not any(left_over(proxy))
