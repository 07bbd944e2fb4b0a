"""app/worker_channel: messages come whole and in order, however their bytes come, and end with the peer."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from meshlocal.admin.messages import Request, Response
from meshlocal.app.worker_channel import Answer, Call, Channel, Configure, Show, Start
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


async def test_nothing_follows_a_message_that_was_not_sent_whole() -> None:
    """Cancelled half-way: what came next would be read as its rest."""
    near, far = trio.testing.lockstep_stream_pair()
    sender = Channel(near)
    with trio.move_on_after(0.01) as scope:
        await sender.send(MESSAGES[0])
    assert scope.cancelled_caught
    with pytest.raises(trio.BrokenResourceError):
        await sender.send(MESSAGES[0])
    await far.aclose()
