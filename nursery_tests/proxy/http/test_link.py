"""proxy/http/link: a peer that takes nothing is not heard either, and its connection ends when it has to."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from meshlocal.net.pipe import PlainPipe
from meshlocal.net.relay_loop import RelayLoop, open_relay_loop
from meshlocal.proxy.http.link import Link
from meshlocal.wire.http2 import Http2Limits, Http2Protocol
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


def small_pair() -> tuple[socket.socket, trio.SocketStream]:
    """Two ends of a connection that holds little."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
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
        ours, self.peer = small_pair()
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
