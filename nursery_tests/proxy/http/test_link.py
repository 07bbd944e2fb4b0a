"""proxy/http/link: a peer that takes nothing is not heard either, and its connection ends when it has to."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest
import trio
from trio.lowlevel import checkpoint
from trio.testing import wait_all_tasks_blocked

from meshlocal.net.pipe import PlainPipe
from meshlocal.net.relay_loop import RelayLoop, open_relay_loop
from meshlocal.proxy.http.link import Link
from meshlocal.wire.http2 import Http2Limits, Http2Protocol, PingReceived
from nursery_tests.h2_peer import PREFACE

SETTINGS = b"\0\0\0\4\0\0\0\0\0"
PING = b"\0\0\x08\6\0\0\0\0\0pingpong"
PONG = b"\0\0\x08\6\1\0\0\0\0pingpong"
PINGS = 50_000
"""More than may wait to be answered, and more bytes than the sockets between the two hold."""
MOMENT = 0.05
"""Seconds in which nothing happens any more."""


class PlainLink(Link):
    """A connection whose events mean nothing.

    Attributes:
        ends: how often its streams were told.
    """

    handlers: ClassVar[dict[Any, Any]] = {}
    ends = 0

    def on_over(self) -> None:
        self.ends += 1


@pytest.fixture(params=["loop", "task"])
async def loop(request: pytest.FixtureRequest) -> AsyncIterator[RelayLoop | None]:
    if request.param == "task":
        yield None
        return
    with open_relay_loop() as made:
        assert made is not None
        yield made


def link_pair(room: int | None = None) -> tuple[socket.socket, trio.SocketStream]:
    """Two ends of a connection; with `room`, one that holds little."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
        if room is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
    return ours, trio.SocketStream(trio.socket.from_stdlib_socket(theirs))


class Blocked:
    """A link whose peer asks for more than it takes.

    Attributes:
        link: it.
        peer: the other end.
        sent: all that the peer had to say went out.
        served: the link's task ended.
    """

    def __init__(self, loop: RelayLoop | None) -> None:
        ours, self.peer = link_pair(4096)
        self.link = PlainLink(PlainPipe(ours), Http2Protocol(client=False, limits=Http2Limits()), loop, 65_535)
        self.sent = False
        self.served = False

    async def serve(self) -> None:
        await self.link.serve()
        self.served = True

    async def ask(self) -> None:
        try:
            await self.peer.send_all(PREFACE + SETTINGS + PING * PINGS)
        except trio.BrokenResourceError:
            return
        self.sent = True

    async def block(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self.serve)
        nursery.start_soon(self.ask)
        await wait_all_tasks_blocked(MOMENT)
        assert not self.sent


async def test_a_peer_that_takes_nothing_is_not_heard_and_loses_nothing(loop: RelayLoop | None) -> None:
    """P2: what it asks for would wait here without bound."""
    blocked = Blocked(loop)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await blocked.block(nursery)
            received = bytearray()
            while received.count(PONG) < PINGS:
                data = await blocked.peer.receive_some(65_536)
                assert data, blocked.link.problem
                received += data
            assert blocked.sent
            assert not blocked.link.over
            blocked.link.finish()
            await blocked.peer.aclose()
    assert blocked.link.ends == 1


class Counting(PlainLink):
    """Counts its PINGs, and what else had its turn between them.

    Attributes:
        runs: how many were handled in a row, each time.
        pings: all of them.
        caught_up: how often it had handled what was late.
    """

    batch: ClassVar[int] = 100
    handlers: ClassVar[dict[Any, Any]] = {PingReceived: lambda link, _: link.count()}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.runs: list[int] = []
        self.pings = 0
        self.caught_up = 0

    def count(self) -> None:
        self.runs[-1] += 1
        self.pings += 1

    def on_caught_up(self) -> None:
        self.caught_up += 1


async def test_a_flood_has_its_turns_among_others(loop: RelayLoop | None) -> None:
    """P2: between two batches of events, every task that can go on does."""
    ours, peer = link_pair()
    link = Counting(PlainPipe(ours), Http2Protocol(client=False, limits=Http2Limits()), loop, 65_535)
    link.runs.append(0)

    async def turn() -> None:
        while link.pings < 500:
            await checkpoint()
            link.runs.append(0)

    async def take() -> None:
        while await peer.receive_some(65_536):
            pass

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.serve)
            nursery.start_soon(take)
            nursery.start_soon(turn)
            await peer.send_all(PREFACE + SETTINGS + PING * 500)
            while link.pings < 500:
                await checkpoint()
            # Trio runs what can go on in any order, so that one may come last in a pass and first in the next.
            assert max(link.runs) <= 2 * Counting.batch
            assert not link.late
            link.finish()
            await peer.send_eof()
    assert link.pings == 500
    await peer.aclose()


async def test_what_is_late_is_handled_before_more_is_read(autojump_clock: object) -> None:
    ours, peer = link_pair()
    link = Counting(PlainPipe(ours), Http2Protocol(client=False, limits=Http2Limits()), None, 65_535)
    link.runs.append(0)
    link.receive(PREFACE + SETTINGS + PING * 250)
    await peer.send_all(PING)
    assert (link.pings, len(link.late), link.caught_up) == (99, 151, 0)
    link.on_event(0)
    assert (link.pings, len(link.late), link.caught_up) == (199, 51, 0)
    link.on_event(0)
    assert (link.pings, len(link.late), link.caught_up) == (251, 0, 1)
    link.receive(PING * 250)
    link.lose("gone")
    assert not link.late
    link.on_event(0)
    assert link.pings == 351, "what is over handles nothing more"
    ours.close()
    await peer.aclose()


@pytest.mark.parametrize("how", ["lost", "finished", "cancelled"])
async def test_a_connection_that_is_blocked_ends_when_it_has_to(loop: RelayLoop | None, how: str) -> None:
    """Its peer's kernel takes no more, and says nothing."""
    blocked = Blocked(loop)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await blocked.block(nursery)
            if how == "lost":
                blocked.link.lose("no answer to a ping")
            elif how == "finished":
                blocked.link.finish("enough")
            else:
                nursery.cancel_scope.cancel()
        assert blocked.served == (how != "cancelled")
        assert blocked.link.over
        assert blocked.link.ends == 1
        assert blocked.link.pipe.plain is not None
        assert blocked.link.pipe.plain.fileno() == -1
        await blocked.peer.aclose()
