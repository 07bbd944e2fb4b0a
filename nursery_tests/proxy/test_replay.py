"""Replay of what a tcp client said to an instance that failed before its first byte (A5, A6, A8, H1)."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from meshlocal.client.statistics import Outcome, RequestKey
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.config import AttemptPolicy, ProxyConfig
from meshlocal.policy.config_health import LimitsConfig
from meshlocal.policy.health import Cause, State
from meshlocal.policy.limits import Limit
from meshlocal.policy.model import Instance, make_instance
from nursery_tests.proxy.silent import silent

LIMIT = 20
Talk = Callable[[trio.SocketStream], Awaitable[None]]


class Scripted:
    """An instance that treats every connection in one way, and keeps what it was sent."""

    def __init__(self, nursery: trio.Nursery, node: str, talk: Talk) -> None:
        self.nursery = nursery
        self.node = node
        self.talk = talk
        self.connections = 0
        self.instance: Instance

    async def start(self) -> Scripted:
        listeners = await self.nursery.start(trio.serve_tcp, self._serve, 0)
        port = listeners[0].socket.getsockname()[1]
        self.instance = make_instance("127.0.0.1", port, labels={"node": self.node})
        return self

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        try:
            async with stream:
                await self.talk(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


async def reset(stream: trio.SocketStream) -> None:
    """Reads something, and resets."""
    await stream.receive_some()
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def end(stream: trio.SocketStream) -> None:
    """Reads something, and ends without a word."""
    await stream.receive_some()


async def freeze(stream: trio.SocketStream) -> None:
    """Takes everything and says nothing."""
    while await stream.receive_some():
        pass
    await trio.sleep_forever()


async def upper(stream: trio.SocketStream) -> None:
    """Says each thing back in capitals, to the client's end."""
    async for received in stream:
        await stream.send_all(received.upper())


async def whole(stream: trio.SocketStream) -> None:
    """Waits for the client's end, and says everything back in capitals."""
    await stream.send_all(b"".join([received async for received in stream]).upper())


def configure(proxy: Any, **attempts: Any) -> None:
    listen = (ListenAddress.parse("tcp://127.0.0.1:0=b"),)
    proxy.config = ProxyConfig(listen=listen, attempts=AttemptPolicy(**{"replay": True, **attempts}))
    proxy.table.reconfigure(proxy.config, proxy.table.locality)


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT):
        while not holds():  # noqa: ASYNC110 - the counts are plain numbers, with no event to wait for
            await trio.sleep(0.001)


async def finish(proxy: Any) -> None:
    await until(lambda: not len(proxy.forwarder))


@pytest.fixture
def scripted(nursery: trio.Nursery) -> Callable[[str, Talk], Awaitable[Scripted]]:
    async def make(node: str, talk: Talk) -> Scripted:
        return await Scripted(nursery, node, talk).start()

    return make


async def ask(proxy: Any, words: bytes = b"hello", *, ends: bool = False) -> bytes:
    """What comes back for some words; empty if the connection was reset before."""
    answer = b""
    with trio.fail_after(LIMIT):
        try:
            async with await proxy.connect() as stream:
                await stream.send_all(words)
                if ends:
                    await stream.send_eof()
                while len(answer) < len(words):
                    received = await stream.receive_some()
                    if not received:
                        break
                    answer += received
        except trio.BrokenResourceError:
            return b""
    return answer


async def test_off_by_default_a_connection_stays_with_its_instance(proxy: Any, scripted: Any) -> None:
    """A5."""
    configure(proxy, replay=False)
    local, remote = await scripted("n1", reset), await scripted("n2", upper)
    proxy.publish([local.instance, remote.instance])
    assert await ask(proxy) == b""
    await finish(proxy)
    assert remote.connections == 0


@pytest.mark.parametrize(
    ("talk", "why", "ends"),
    [
        (reset, "reset", False),
        (reset, "reset", True),
        (end, "ended", False),
        (freeze, "timeout", False),
        (freeze, "timeout", True),
    ],
)
async def test_a_failure_before_the_first_byte_costs_the_client_nothing(
    proxy: Any, scripted: Any, talk: Talk, why: str, ends: bool
) -> None:
    """A5, H1: and an instance that does it three times is ejected."""
    configure(proxy, replay_wait=0.05)
    local, remote = await scripted("n1", talk), await scripted("n2", whole if ends else upper)
    proxy.publish([local.instance, remote.instance])
    assert [await ask(proxy, ends=ends) for _ in range(5)] == [b"HELLO"] * 5
    await finish(proxy)
    assert local.connections == 3
    statistics = proxy.table["b"].statistics
    assert statistics.replays == {why: 3}
    assert proxy.requests == {
        RequestKey("other", "local_failed", Outcome.SERVED): 3,
        RequestKey("other", "local_ejected", Outcome.SERVED): 2,
    }
    standing = proxy.table["b"].fitness.health.standing(local.instance.key[:2], trio.current_time())
    assert (standing.state, standing.cause) == (State.EJECTED, Cause.RESET)
    assert not proxy.table["b"].fitness.under_way


async def test_a_silent_end_answers_a_client_that_ended(proxy: Any, scripted: Any) -> None:
    """A5: a log sink reads to the end, and says nothing."""
    configure(proxy)
    local, remote = await scripted("n1", freeze_not), await scripted("n2", upper)
    proxy.publish([local.instance, remote.instance])
    assert await ask(proxy, ends=True) == b""
    await finish(proxy)
    assert remote.connections == 0
    assert proxy.requests == {RequestKey("node", "", Outcome.SERVED): 1}


async def freeze_not(stream: trio.SocketStream) -> None:
    while await stream.receive_some():
        pass


async def test_after_the_first_byte_the_connection_stays(proxy: Any, scripted: Any) -> None:
    """A5: what was answered cannot be asked again."""

    async def speak_and_reset(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"h")
        await reset(stream)

    configure(proxy)
    local, remote = await scripted("n1", speak_and_reset), await scripted("n2", upper)
    proxy.publish([local.instance, remote.instance])
    async with await proxy.connect() as stream:
        await stream.send_all(b"one")
        assert await stream.receive_some() == b"h"
        await stream.send_all(b"two")
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
    await finish(proxy)
    assert remote.connections == 0
    assert proxy.requests == {RequestKey("node", "", Outcome.CUT): 1}


async def test_more_than_may_be_held_stays(proxy: Any, scripted: Any) -> None:
    """A5: nothing is ever sent in part."""
    taken = trio.Event()

    async def take_and_reset(stream: trio.SocketStream) -> None:
        received = 0
        while received < 5000:
            received += len(await stream.receive_some())
        taken.set()
        await reset(stream)

    configure(proxy, replay_buffer=1000)
    local, remote = await scripted("n1", take_and_reset), await scripted("n2", upper)
    proxy.publish([local.instance, remote.instance])
    async with await proxy.connect() as stream:
        await stream.send_all(b"x" * 5000)
        await taken.wait()
        await stream.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
    await finish(proxy)
    assert remote.connections == 0


@pytest.mark.parametrize("size", [1, 999, 65_535, 65_536, 300_000])
async def test_every_byte_arrives_once_and_in_order(proxy: Any, scripted: Any, size: int) -> None:
    """A5: whatever was sent to whom before."""
    words = bytes(random.Random(size).choices(range(97, 123), k=size))
    configure(proxy)
    local, remote = await scripted("n1", reset), await scripted("n2", upper)
    proxy.publish([remote.instance] if size > 65_535 else [local.instance, remote.instance])

    answer = bytearray()
    async with await proxy.connect() as stream, trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, words)
        with trio.fail_after(LIMIT):
            while len(answer) < size:
                answer += await stream.receive_some()
    assert bytes(answer) == words.upper()
    await finish(proxy)


async def test_when_every_instance_failed_the_client_is_reset(proxy: Any, scripted: Any) -> None:
    """A5, A6: each was tried once."""
    configure(proxy)
    local, remote = await scripted("n1", reset), await scripted("n2", end)
    proxy.publish([local.instance, remote.instance])
    async with await proxy.connect() as stream:
        await stream.send_all(b"hello")
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
    await finish(proxy)
    assert (local.connections, remote.connections) == (1, 1)
    assert proxy.requests == {RequestKey("other", "local_failed", Outcome.FAILED): 1}


async def test_the_deadline_is_over_the_instances_that_were_left_too(
    proxy: Any, scripted: Any, autojump_clock: MockClock
) -> None:
    """A1, A5: the time that an instance was silent is spent."""
    configure(proxy, replay_wait=7, deadline=10, connect_timeout=100)
    local = await scripted("n1", freeze)
    with silent() as other:
        proxy.publish([local.instance, make_instance(*other.key[:2], labels={"node": "n2"})])
        async with await proxy.connect() as stream:
            began = trio.current_time()
            await stream.send_all(b"hello")
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            assert 10 <= trio.current_time() - began <= 10.1
        await finish(proxy)
    assert proxy.table["b"].statistics.replays == {"timeout": 1}
    assert proxy.requests == {RequestKey("other", "local_failed", Outcome.DEADLINE): 1}


async def test_a_client_that_says_nothing_waits_for_nobody(proxy: Any, scripted: Any) -> None:
    """A5: the wait begins with the client's words; an instance that speaks first just speaks."""

    async def greet_late(stream: trio.SocketStream) -> None:
        await trio.sleep(0.1)
        await stream.send_all(b"welcome")

    configure(proxy, replay_wait=0.01)
    local, remote = await scripted("n1", greet_late), await scripted("n2", upper)
    proxy.publish([local.instance, remote.instance])
    async with await proxy.connect() as stream:
        assert await stream.receive_some() == b"welcome"
    await finish(proxy)
    assert remote.connections == 0


async def test_a_client_that_leaves_leaves_nothing_behind(proxy: Any, scripted: Any) -> None:
    """A8."""
    configure(proxy)
    local = await scripted("n1", freeze)
    proxy.publish([local.instance])
    stream = await proxy.connect()
    await stream.send_all(b"hello")
    await until(lambda: local.connections == 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await stream.aclose()
    await finish(proxy)
    assert proxy.requests == {RequestKey("node", "", Outcome.CLIENT_LEFT): 1}
    assert not proxy.table["b"].fitness.under_way
    assert proxy.table["b"].statistics.open == 0


async def test_a_client_that_speaks_late_is_replayed_too(proxy: Any, scripted: Any) -> None:
    """A1, A5: the deadline is for connects. The first one was in time, and the next one answers at once."""
    local, far = await scripted("n1", reset), await scripted("n2", upper)
    configure(proxy, deadline=0.1)
    proxy.publish([local.instance, far.instance])
    with trio.fail_after(LIMIT):
        async with await proxy.connect() as stream:
            await until(lambda: local.connections == 1)
            await trio.sleep(0.2)
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"HELLO"
    await finish(proxy)
    assert proxy.requests == {RequestKey("other", "local_failed", Outcome.SERVED): 1}


async def test_a_client_that_speaks_late_is_replayed_to_the_last(proxy: Any, scripted: Any) -> None:
    """A1, A5, O5: to as many instances as there are."""
    first, second, far = await scripted("n1", reset), await scripted("n1", reset), await scripted("n2", upper)
    configure(proxy, deadline=0.1)
    proxy.publish([first.instance, second.instance, far.instance])
    with trio.fail_after(LIMIT):
        async with await proxy.connect() as stream:
            await until(lambda: first.connections + second.connections == 1)
            await trio.sleep(0.2)
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"HELLO"
    await finish(proxy)
    assert (first.connections, second.connections, far.connections) == (1, 1, 1)
    assert proxy.requests == {RequestKey("other", "local_failed", Outcome.SERVED): 1}


async def test_a_trial_that_is_not_made_is_anothers(proxy: Any, scripted: Any) -> None:
    """H1: an instance that was picked for its trial, and not tried because of a limit, is due as before."""
    local, far = await scripted("n1", reset), await scripted("n2", upper)
    configure(proxy)
    proxy.publish([local.instance, far.instance])
    state = proxy.table["b"]
    health, place = state.fitness.health, far.instance.key[:2]
    for _ in range(3):
        health.failed(place, trio.current_time() - 1000, Cause.CONNECT)
    assert health.is_due(place, trio.current_time())
    with trio.fail_after(LIMIT):
        async with await proxy.connect() as stream:
            await until(lambda: local.connections == 1)
            # Others wait meanwhile.
            state.circuit.limits = LimitsConfig(waiting=1)
            assert state.circuit.enter(Limit.WAITING)
            await stream.send_all(b"hello")
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
    await finish(proxy)
    state.circuit.leave(Limit.WAITING)
    assert far.connections == 0
    assert health.standing(place, trio.current_time()).state is State.EJECTED
    assert health.is_due(place, trio.current_time())
