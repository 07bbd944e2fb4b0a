"""Ejection of instances on which TCP connections fail (H1, O5, F1, R1)."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import trio

import meshlocal.proxy.tcp.connection
from meshlocal.client.statistics import Outcome, RequestKey
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.config import AttemptPolicy, ProxyConfig
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.health import Cause, State
from meshlocal.policy.model import HostPort, Instance, make_instance

LIMIT = 20
LONG = EjectionConfig(time=1000.0, max_time=1000.0)
SHORT = EjectionConfig(time=0.05, max_time=0.05)


def configure(proxy: Any, ejection: EjectionConfig = LONG, **attempts: Any) -> None:
    proxy.config = ProxyConfig(
        listen=(ListenAddress.parse("tcp://127.0.0.1:0=b"),), attempts=AttemptPolicy(**attempts), ejection=ejection
    )
    proxy.table.reconfigure(proxy.config, proxy.table.locality)


def place(instance: Instance) -> HostPort:
    return instance.key[:2]


def state(proxy: Any, instance: Instance) -> State:
    found: State = proxy.table["b"].fitness.health.standing(place(instance), trio.current_time()).state
    return found


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT):
        while not holds():  # noqa: ASYNC110 - the counts are plain numbers, with no event to wait for
            await trio.sleep(0.001)


async def finish(proxy: Any) -> None:
    await until(lambda: not len(proxy.forwarder))


@contextmanager
def reserved_port() -> Iterator[socket.socket]:
    """A bound socket that does not listen: connects are refused until it does."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock


def local_at(sock: socket.socket) -> Instance:
    return make_instance("127.0.0.1", sock.getsockname()[1], labels={"node": "n1"})


class Resetting:
    """An instance that accepts, and resets at once unless it is told to greet, or to hold the connection in silence."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.accepted = 0
        self.greets = False
        self.holds = False

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._socket.listen(64)
        self._socket.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._socket))
        task_status.started()
        while True:
            async with await listener.accept() as stream:
                self.accepted += 1
                if self.greets:
                    await stream.send_all(b"local\n")
                elif self.holds:
                    with suppress(trio.BrokenResourceError):
                        await stream.receive_some(1)
                else:
                    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def test_an_instance_that_refuses_is_ejected_after_three_connections(proxy: Any, upstream: Any) -> None:
    """H1, O5, R1: later connections go straight to the next tier, and say why."""
    configure(proxy)
    remote = await upstream("remote", "n2")
    with reserved_port() as sock:
        proxy.publish([local_at(sock), remote])
        assert {await proxy.ask() for _ in range(8)} == {"remote"}
        await finish(proxy)
        assert state(proxy, local_at(sock)) is State.EJECTED
    assert proxy.table["b"].statistics.attempts == {("node", "refused"): 3, ("other", "connected"): 8}
    assert proxy.requests == {
        RequestKey("other", "local_failed", Outcome.SERVED): 3,
        RequestKey("other", "local_ejected", Outcome.SERVED): 5,
    }


async def test_one_connection_readmits_an_instance_that_is_back(proxy: Any, upstream: Any, nursery: Any) -> None:
    """H1, F1: the first connection after the ejection finds out, and all others follow."""
    configure(proxy, SHORT)
    remote = await upstream("remote", "n2")
    with reserved_port() as sock:
        local = Resetting(sock)
        local.greets = True
        proxy.publish([local_at(sock), remote])
        for _ in range(3):
            await proxy.ask()
        assert state(proxy, local_at(sock)) is State.EJECTED
        await nursery.start(local.serve)
        await trio.sleep(2 * SHORT.time)
        assert [await proxy.ask() for _ in range(5)] == ["local"] * 5
        assert state(proxy, local_at(sock)) is State.ADMITTED
        nursery.cancel_scope.cancel()


async def test_all_instances_ejected_are_tried_all_the_same(proxy: Any, nursery: Any) -> None:
    """O5: no request fails because of what is remembered."""
    configure(proxy)
    with reserved_port() as sock, reserved_port() as other:
        proxy.publish([local_at(sock), make_instance("127.0.0.1", other.getsockname()[1], labels={"node": "n2"})])
        for _ in range(4):
            assert await proxy.ask() == ""
        local = Resetting(sock)
        local.greets = True
        await nursery.start(local.serve)
        assert await proxy.ask() == "local"
        assert state(proxy, local_at(sock)) is State.ADMITTED
        nursery.cancel_scope.cancel()


async def test_an_instance_that_resets_what_it_accepts_is_ejected(proxy: Any, upstream: Any, nursery: Any) -> None:
    """H1: its connects succeed every time; what it does with them counts."""
    configure(proxy)
    remote = await upstream("remote", "n2")
    with reserved_port() as sock:
        local = Resetting(sock)
        await nursery.start(local.serve)
        proxy.publish([local_at(sock), remote])
        answers = []
        for _ in range(8):
            answers.append(await proxy.ask())
            await finish(proxy)
        assert answers == [""] * 3 + ["remote"] * 5
        assert local.accepted == 3
        standing = proxy.table["b"].fitness.health.standing(place(local_at(sock)), trio.current_time())
        assert (standing.state, standing.cause) == (State.EJECTED, Cause.RESET)
        nursery.cancel_scope.cancel()


async def test_the_connection_that_readmits_an_instance_may_eject_it(proxy: Any, upstream: Any, nursery: Any) -> None:
    """H1: it connects at once, and that readmits it; that it resets the same connection is news all the same."""
    configure(proxy, EjectionConfig(failures=1, time=0.05, max_time=1000.0))
    remote = await upstream("remote", "n2")
    with reserved_port() as sock:
        proxy.publish([local_at(sock), remote])
        assert await proxy.ask() == "remote"
        await finish(proxy)
        assert state(proxy, local_at(sock)) is State.EJECTED
        local = Resetting(sock)
        await nursery.start(local.serve)
        await trio.sleep(0.1)
        assert await proxy.ask() == ""
        await finish(proxy)
        assert local.accepted == 1
        standing = proxy.table["b"].fitness.health.standing(place(local_at(sock)), trio.current_time())
        assert standing.cause is Cause.RESET
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("greets", [False, True])
async def test_a_connection_that_lives_ends_the_doubt(
    proxy: Any, upstream: Any, nursery: Any, greets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H1, F1: an instance ejected for resets is readmitted by a byte at the connection's end, or by its mere life."""
    monkeypatch.setattr(meshlocal.proxy.tcp.connection, "SETTLED", 0.05)
    configure(proxy, SHORT)
    remote = await upstream("remote", "n2")
    with reserved_port() as sock:
        local = Resetting(sock)
        await nursery.start(local.serve)
        proxy.publish([local_at(sock), remote])
        for _ in range(3):
            await proxy.ask()
            await finish(proxy)
        assert state(proxy, local_at(sock)) is State.EJECTED
        await trio.sleep(2 * SHORT.time)
        if greets:
            local.greets = True
            assert await proxy.ask() == "local"
            await finish(proxy)
        else:
            local.holds = True
            async with await proxy.connect():
                await until(lambda: state(proxy, local_at(sock)) is State.ADMITTED)
        assert state(proxy, local_at(sock)) is State.ADMITTED
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("settled", [False, True])
async def test_a_reset_after_a_long_silence_is_no_failure(
    proxy: Any, monkeypatch: pytest.MonkeyPatch, settled: bool
) -> None:
    """H1: a connection that lived for a while shows that its instance works, though it never said a word."""
    monkeypatch.setattr(meshlocal.proxy.tcp.connection, "SETTLED", 0.02 if settled else LIMIT)
    configure(proxy, EjectionConfig(failures=1, time=1000.0, max_time=1000.0))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT)
        proxy.publish([instance := local_at(listener)])
        async with await proxy.connect() as stream:
            await until(lambda: proxy.table["b"].statistics.open == 1)
            accepted, _ = listener.accept()
            await trio.sleep(0.03)
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            accepted.close()
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
        await finish(proxy)
    assert state(proxy, instance) is (State.ADMITTED if settled else State.EJECTED)


async def test_failures_of_this_host_eject_nobody(proxy: Any, upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """H1: that descriptors or ports ran out here says nothing about the instance."""

    def exhausted(address: str, port: int) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    configure(proxy)
    local = await upstream("local", "n1")
    proxy.publish([local])
    with monkeypatch.context() as patched:
        patched.setattr("meshlocal.client.connecting.Connecting", exhausted)
        for _ in range(5):
            assert await proxy.ask() == ""
    await finish(proxy)
    assert proxy.table["b"].statistics.attempts == {("node", "no_descriptors"): 5}
    assert state(proxy, local.instance) is State.ADMITTED
    assert await proxy.ask() == "local"


async def test_a_client_that_leaves_during_a_trial_leaves_no_verdict(proxy: Any, upstream: Any) -> None:
    """A8, H1: the next request makes the trial instead."""
    configure(proxy, SHORT, connect_timeout_local=LIMIT)
    remote = await upstream("remote", "n2")
    with reserved_port() as sock:
        instance = local_at(sock)
        proxy.publish([instance, remote])
        for _ in range(3):
            await proxy.ask()
        sock.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(sock.getsockname())
        await trio.sleep(2 * SHORT.time)
        stream = await proxy.connect()
        await until(lambda: state(proxy, instance) is State.TRIAL)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.aclose()
        await until(lambda: state(proxy, instance) is State.EJECTED)
        await finish(proxy)
        assert proxy.table["b"].fitness.health.is_due(place(instance), trio.current_time())
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("who", ["client", "proxy"])
async def test_a_trial_that_ends_before_the_instance_spoke_leaves_no_verdict(
    proxy: Any, upstream: Any, nursery: Any, monkeypatch: pytest.MonkeyPatch, replay: bool, who: str
) -> None:
    """A8, H1, S1: the client leaves, or the proxy cuts the connection; the next request makes the trial instead."""
    monkeypatch.setattr(meshlocal.proxy.tcp.connection, "SETTLED", LIMIT)
    configure(proxy, EjectionConfig(failures=1, time=0.2, max_time=0.2), replay=replay, replay_wait=None)
    remote = await upstream("remote", "n2")
    with reserved_port() as sock:
        instance = local_at(sock)
        local = Resetting(sock)
        await nursery.start(local.serve)
        proxy.publish([instance, remote])
        assert await proxy.ask() == ("remote" if replay else "")
        await finish(proxy)
        assert state(proxy, instance) is State.EJECTED
        local.holds = True
        await until(lambda: proxy.table["b"].fitness.health.is_due(place(instance), trio.current_time()))
        stream = await proxy.connect()
        await until(lambda: local.accepted == 2)
        assert state(proxy, instance) is State.TRIAL
        if who == "client":
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await stream.aclose()
        else:
            (connection,) = proxy.forwarder
            connection.scope.cancel()
        await finish(proxy)
        await stream.aclose()
        assert state(proxy, instance) is State.EJECTED
        assert proxy.table["b"].fitness.health.is_due(place(instance), trio.current_time())
        nursery.cancel_scope.cancel()


async def test_what_is_known_of_an_instance_survives_snapshots(proxy: Any, upstream: Any) -> None:
    """H1: keyed by the instance; and one that is gone is forgotten."""
    configure(proxy)
    remote = await upstream("remote", "n2")
    with reserved_port() as sock:
        local = local_at(sock)
        proxy.publish([local, remote])
        for _ in range(3):
            await proxy.ask()
        relabelled = make_instance(*place(local), labels={"node": "n1", "version": "2"})
        proxy.publish([relabelled, remote])
        assert state(proxy, local) is State.EJECTED
        proxy.publish([remote])
        proxy.publish([local, remote])
        assert state(proxy, local) is State.ADMITTED


async def test_an_abandoned_attempt_is_not_counted_as_the_failure_before_it(proxy: Any) -> None:
    """A1, A8: an attempt that the deadline ended is abandoned, whatever became of the one before."""
    configure(proxy, connect_timeout=LIMIT, deadline=0.1)
    with reserved_port() as refusing, reserved_port() as full:
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        proxy.publish([local_at(refusing), make_instance("127.0.0.1", full.getsockname()[1], labels={"node": "n2"})])
        assert await proxy.ask() == ""
        await finish(proxy)
        assert proxy.table["b"].statistics.attempts == {("node", "refused"): 1, ("other", "abandoned"): 1}
        for filler in fillers:
            filler.close()


async def test_discovery_is_asked_again_when_every_attempt_fails(
    proxy: Any, upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D5: not as long as any instance works, and not again and again."""
    monkeypatch.setattr("meshlocal.policy.feedback.PATIENCE", 0.02)
    configure(proxy, SHORT)
    asked: list[str] = []
    proxy.table.on_failing = asked.append
    remote = await upstream("remote", "n2")
    with reserved_port() as sock:
        proxy.publish([local_at(sock), remote])
        with trio.move_on_after(0.1):
            while True:
                assert await proxy.ask() == "remote"
        assert not asked
        proxy.publish([local_at(sock)])
        with trio.move_on_after(0.2):
            while True:
                assert await proxy.ask() == ""
        assert asked == ["b"]
