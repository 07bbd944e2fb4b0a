"""Clients that misbehave. Others notice nothing, and nothing of them stays behind (A8)."""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from nursery_tests.campaign.campaign import Fault, Scene
from nursery_tests.campaign.fleet import CONNECTIONS
from nursery_tests.campaign.grpc import HEADER_LIST, STREAM, STREAMS, call_headers, message
from nursery_tests.campaign.load import LIMIT
from nursery_tests.h2_peer import H2Peer

MISBEHAVING = 5
"""Clients of each kind at a time."""

AGAIN = 0.1
"""Seconds until each comes again."""

_TCP_REPAIR = 19  # linux/tcp.h

HEAD = b"POST /bad HTTP/1.1\r\nHost: get\r\nContent-Length: 100\r\n\r\n"
"""To the service of GETs, so that nobody looks for it among the load's POSTs."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def _calls(said: bytes, *, whole: bool, count: int = 1) -> bytes:
    """What a client sends on a fresh connection, with so many calls; what each says may be a part of a message."""
    client = H2Peer(client=True, max_streams=STREAMS, max_header_list_size=HEADER_LIST)
    for _ in range(count):
        stream_id = client.next_stream_id()
        client.send_headers(stream_id, call_headers("call", STREAM))
        client.send_data(stream_id, said, end_stream=whole)
    return bytes(client.outgoing)


CALL = _calls(message(b"bad"), whole=True)
HALF_CALL = _calls(message(b"bad")[:6], whole=False)
MANY_CALLS = _calls(message(b"bad") * 10, whole=False, count=STREAMS // 2)

Act = Callable[[Scene, trio.SocketStream, bytes], Awaitable[None]]


async def _misbehave(scene: Scene, act: Act, said: dict[str, list[bytes]]) -> None:
    """Have clients come and act, one after the other, for as long as the fault lasts."""
    target = scene.fleet.target

    async def come(kind: str, data: bytes) -> None:
        while True:
            # Some are reset because there are too many of them.
            with suppress(trio.BrokenResourceError, ConnectionResetError):
                async with await scene.fleet.place.connect(target.host, target.ports[kind]) as stream:
                    await act(scene, stream, data)
            await trio.sleep(AGAIN)

    with trio.move_on_after(scene.seconds):
        async with trio.open_nursery() as nursery:
            for kind, datas in said.items():
                for data in datas:
                    for _ in range(MISBEHAVING):
                        nursery.start_soon(come, kind, data)


_PARTS = {
    "tcp": [b"", b"half"],
    "replay": [b"", b"half"],
    "get": [b"", HEAD[:20], HEAD, HEAD + b"half"],
    "call": [_PREFACE[:10], CALL[: len(_PREFACE) + 5], CALL[:-20], HALF_CALL],
}


async def stall(scene: Scene) -> None:
    async def act(_: Scene, stream: trio.SocketStream, data: bytes) -> None:
        await stream.send_all(data)
        await trio.sleep_forever()

    await _misbehave(scene, act, _PARTS)


async def trickle(scene: Scene) -> None:
    async def act(_: Scene, stream: trio.SocketStream, data: bytes) -> None:
        for at in range(len(data)):
            await stream.send_all(data[at : at + 1])
            await trio.sleep(0.03)

    slowly = HEAD + b"x" * 50
    said = {"tcp": [b"a line that takes its time"], "replay": [b"likewise"], "get": [slowly], "call": [CALL]}
    await _misbehave(scene, act, said)


async def never_read(scene: Scene) -> None:
    async def act(_: Scene, stream: trio.SocketStream, data: bytes) -> None:
        await stream.send_all(data)
        while data is not MANY_CALLS:
            await stream.send_all(data)
        await trio.sleep_forever()

    get = b"GET /bad HTTP/1.1\r\nHost: get\r\n\r\n" * 20
    lines = [b"a line\n" * 200]
    await _misbehave(scene, act, {"tcp": lines, "replay": lines, "get": [get], "call": [MANY_CALLS]})


async def half_close(scene: Scene) -> None:
    answered = 0

    async def act(_: Scene, stream: trio.SocketStream, data: bytes) -> None:
        nonlocal answered
        await stream.send_all(data)
        await stream.send_eof()
        answer = b""
        with trio.fail_after(LIMIT):
            async for part in stream:
                answer += part
        # Who ends its own stream may be listening still (A8).
        assert b" bad\n" in answer, (data, answer)
        answered += 1

    get = b"GET /bad HTTP/1.1\r\nHost: get\r\n\r\n"
    await _misbehave(scene, act, {"tcp": [b"bad\n"], "replay": [b"bad\n"], "get": [get], "call": [CALL]})
    assert answered >= MISBEHAVING * 4


async def resets(scene: Scene) -> None:
    async def act(_: Scene, stream: trio.SocketStream, data: bytes) -> None:
        await stream.send_all(data)
        await trio.sleep(scene.rng.uniform(0, 0.05))
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    await _misbehave(scene, act, _PARTS)


async def vanish(scene: Scene) -> None:
    async def act(_: Scene, stream: trio.SocketStream, data: bytes) -> None:
        await stream.send_all(data)
        # As if its machine had lost power: the kernel forgets the connection without a word (CRIU needs that).
        stream.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)

    await _misbehave(scene, act, _PARTS)


FLOOD = 200
"""Connections beyond what the limits allow."""

SLOW = 0.1


async def flood(scene: Scene) -> None:
    fleet = scene.fleet
    # Each request takes its time, so that many are under way.
    for member in fleet.members.values():
        await member.tell(f"slow {SLOW}")
    scene.allow("tcp", ["reset"], math.inf, "are more than there may be")
    scene.allow("get", ["503"], math.inf, "are more than there may be")
    scene.allow("call stream", ["exhausted"], math.inf, "are more than there may be")
    get = b"GET /bad HTTP/1.1\r\nHost: get\r\n\r\n"

    async def act(_: Scene, stream: trio.SocketStream, data: bytes) -> None:
        await stream.send_all(data)
        while await stream.receive_some(65536):
            if data is get:
                await stream.send_all(get)

    said = {"tcp": [b"bad"] * (FLOOD // MISBEHAVING), "get": [get] * 6, "call": [MANY_CALLS]}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_misbehave, scene, act, said)
        metrics = await fleet.place.measured(
            fleet.admin,
            lambda metrics: (
                min(metrics("limit_refused_total", service=service) for service in ("tcp", "get", "call")) > 0
            ),
        )
        assert metrics("connections_open", service="tcp") <= CONNECTIONS
    for member in fleet.members.values():
        await member.tell("work")


LIMITS = (
    Fault(
        "more clients come than the limits allow",
        "who is too many is refused at once with a reason; other services notice nothing; memory stays bounded",
        flood,
    ),
)

FAULTS = (
    Fault("clients stall", "nothing fails; they are ended in time", stall),
    Fault("clients trickle", "nothing fails", trickle),
    Fault("clients never read", "nothing fails, memory stays bounded", never_read),
    Fault("clients half-close", "nothing fails, and they get their answers (A8)", half_close),
    Fault("clients reset", "nothing fails, nothing of them stays (A8)", resets),
    Fault("clients vanish", "nothing fails; they are ended in time", vanish),
)
