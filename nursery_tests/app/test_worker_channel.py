"""app/worker_channel: messages come whole and in order, however their bytes come, and end with the peer."""

from __future__ import annotations

import pickle
import struct

import pytest
import trio
import trio.testing

from meshlocal.admin.messages import Request, Response
from meshlocal.app import worker
from meshlocal.app.signals import Stop
from meshlocal.app.worker_channel import SEND_LIMIT, Answer, Beat, Call, Channel, Configure, Show, Start, StopOrder
from meshlocal.policy.config import Config

MESSAGES: list[object] = [
    Start(1, 2, Config()),
    Call(1, Configure(Config())),
    Call(2, Show(Request("GET", "/services", "worker=2", {"accept": "text/html"}))),
    Answer(2, Response(200, "text/plain", b"x" * 200_000)),
]


async def test_messages_come_as_they_were_sent() -> None:
    near, far = trio.testing.lockstep_stream_pair()
    sender, receiver = Channel(near), Channel(far)

    async def send() -> None:
        for message in MESSAGES:
            await sender.send(message)
        await sender.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        assert [await receiver.receive() for _ in MESSAGES] == MESSAGES
        assert await receiver.receive() is None
    await receiver.aclose()


async def test_what_is_cut_within_a_message_is_its_end() -> None:
    near, far = trio.testing.memory_stream_pair()
    receiver = Channel(far)
    await near.send_all(b"\0\0\0\x10half")
    await near.aclose()
    assert await receiver.receive() is None


async def test_a_message_that_was_begun_is_sent_whole(autojump_clock: trio.testing.MockClock) -> None:
    """A sender that is cancelled half-way leaves a channel that others can go on with: an order to stop, for one."""
    near, far = trio.testing.lockstep_stream_pair()
    sender, receiver = Channel(near), Channel(far)
    received: list[object] = []

    async def read_later() -> None:
        await trio.sleep(1)
        received.append(await receiver.receive())
        received.append(await receiver.receive())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_later)
        with trio.move_on_after(0.01) as scope:
            await sender.send(MESSAGES[0])
        assert scope.cancel_called
        await sender.send(MESSAGES[1])
    assert received == [MESSAGES[0], MESSAGES[1]]
    await near.aclose()


async def test_nothing_follows_a_message_that_was_not_sent_whole(autojump_clock: trio.testing.MockClock) -> None:
    """To a process that has stopped: what came next would be read as its rest."""
    near, far = trio.testing.lockstep_stream_pair()
    sender = Channel(near)
    began = trio.current_time()
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError):
            await sender.send(MESSAGES[0])
    assert trio.current_time() - began == pytest.approx(SEND_LIMIT)
    await far.aclose()


async def test_a_message_that_cannot_be_read_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    """P1: the package was upgraded below a supervisor that runs, and its workers say what it does not know."""
    near, far = trio.testing.memory_stream_pair()
    receiver = Channel(far)
    unknown = b"\x80\x04cmeshlocal.app.of_tomorrow\nNews\n."
    for data in (unknown, b"no pickle", pickle.dumps(MESSAGES[1])):
        await near.send_all(struct.pack("!I", len(data)) + data)
    assert await receiver.receive() == MESSAGES[1]
    assert caplog.text.count("cannot be read; was it upgraded?") == 2


async def test_a_slow_order_holds_up_neither_a_beat_nor_a_stop(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """P1: a worker that imports, or makes a long page, is not one that hangs; its connections are not to be cut."""
    near, far = trio.testing.memory_stream_pair()
    above, channel = Channel(near), Channel(far)
    shown = trio.Event()

    async def answer(process: object, message: object, routes: object) -> Response:
        shown.set()
        await trio.sleep(1000)
        return Response(200, "text/plain", b"")

    class Process:
        stop = Stop()

    monkeypatch.setattr(worker, "_answer", answer)
    monkeypatch.setattr(worker, "proxy_routes", lambda process: {})
    async with trio.open_nursery() as nursery:
        await nursery.start(worker.Supervised(channel).command, Process())
        await above.send(Call(1, Show(Request("GET", "/", "", {}))))
        await shown.wait()
        await above.send(Call(2, Beat()))
        with trio.fail_after(1):
            assert await above.receive() == Answer(2, True)
        await above.send(StopOrder())
        with trio.fail_after(1):
            await Process.stop.requested.wait()
        nursery.cancel_scope.cancel()
