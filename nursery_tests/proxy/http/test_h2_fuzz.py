"""Whatever frames a client or an instance sends: its connection ends in good order, or goes on, and no more.

The same frames each time; with the profile `fuzz`, many more, and new ones.
"""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import hpack
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.client.services import ServiceTable
from meshlocal.net.pipe import PlainPipe
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.locality import Locality
from meshlocal.policy.model import ServiceKey, ServiceSnapshot, index, make_instance
from meshlocal.proxy.http.calls import Calls
from meshlocal.proxy.http.h2.client import H2ClientLink
from meshlocal.proxy.http.links import UpstreamLink
from meshlocal.proxy.http.shared import HttpShared
from meshlocal.wire.http1.request import NO_HEAD
from meshlocal.wire.http2 import PREFACE, Http2Limits, Http2Protocol
from nursery_tests.proxy.http.h2 import CALL, GET, GRPC_OK, OK, POST

B = ServiceKey("b")
SETTINGS = b"\0\0\0\4\0\0\0\0\0"


def frame(kind: int, flags: int, stream_id: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream_id) + body


def head(fields: list[tuple[bytes, bytes]]) -> bytes:
    return hpack.Encoder().encode(fields)


REQUESTS = [head(each) for each in (GET, POST, CALL, [*CALL, (b"grpc-timeout", b"1S")])]
RESPONSES = [head(each) for each in (OK, GRPC_OK, [(b":status", b"103")], [(b"grpc-status", b"0")])]


def frames(heads: list[bytes]) -> st.SearchStrategy[list[bytes]]:
    """Frames of all types, sensible and not."""
    bodies = st.one_of(st.sampled_from(heads), st.binary(max_size=24), st.just(b"\0\0\0\0\2hi"))
    numbers = st.sampled_from([0, 1, 3, 5, 7, 2, 9])
    flags = st.sampled_from([0, 1, 4, 5, 8, 13, 255])
    kinds = st.sampled_from([0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11])
    return st.lists(st.builds(frame, kinds, flags, numbers, bodies), max_size=30)


class Pipe:
    """Takes everything."""

    told = b""

    def __init__(self) -> None:
        self.plain: socket.socket | None = None
        self.out: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.out.append(bytes(data))
        return len(data)


class Both:
    """A client's connection, and one to the only instance, without sockets."""

    def __init__(self, nursery: trio.Nursery) -> None:
        config = ProxyConfig(listen=(ListenAddress.parse("http://127.0.0.1:0=b"),))
        self.table = ServiceTable(config, Locality({"node": "n1"}), random.Random(1))
        instance = make_instance("127.0.0.1", 9000, labels={"node": "n1"})
        self.table.publish(ServiceSnapshot(B, "1", index([instance])))
        shared = HttpShared(self.table, config, random.Random(1))
        self.socket, self._other = socket.socketpair()
        made: Any = shared.find(B, NO_HEAD, time.monotonic())
        made.links._run = lambda link: None
        self.upstream: UpstreamLink = made.links.adopt(PlainPipe(self.socket), instance.key[:2], made.config, None)
        self.client = H2ClientLink(Pipe(), shared, B, ("127.0.0.1", 1), None, Calls(nursery, None))  # type: ignore[arg-type] # what is used of it
        self.upstream.pipe = Pipe()
        self.instance = Http2Protocol(client=False, limits=Http2Limits())
        self.flush()

    def flush(self) -> None:
        for _ in range(4):
            for link in (self.client, self.upstream):
                link.flush()

    def sent_to_instance(self) -> bytes:
        pipe: Any = self.upstream.pipe
        data = b"".join(pipe.out)
        pipe.out.clear()
        return data

    def close(self) -> None:
        self.socket.close()
        self._other.close()

    def check(self) -> None:
        """What is over has let go of everything."""
        for link in (self.client, self.upstream):
            if link.over:
                assert not link.streams
        live = [stream for stream in self.client.streams.values() if stream.request is not None]
        assert self.table[B].in_use == len(live)


def run(test: Callable[[Both], None]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            both = Both(nursery)
            try:
                test(both)
            finally:
                both.client.lose("over")
                both.upstream.lose("over")
                assert both.table[B].in_use == 0 or nursery.child_tasks
                both.close()
                nursery.cancel_scope.cancel()
        assert both.table[B].in_use == 0

    trio.run(main)


@given(wire=frames(REQUESTS), preface=st.booleans())
def test_whatever_a_client_sends(wire: list[bytes], preface: bool) -> None:
    def test(both: Both) -> None:
        both.client.receive(PREFACE + SETTINGS if preface else b"")
        for each in wire:
            both.client.receive(each)
            both.flush()
            both.check()

    run(test)


@given(wire=frames(RESPONSES))
def test_whatever_an_instance_sends(wire: list[bytes]) -> None:
    def test(both: Both) -> None:
        both.client.receive(PREFACE + SETTINGS)
        both.upstream.receive(SETTINGS)
        encoder = hpack.Encoder()
        for stream_id, fields in ((1, GET), (3, CALL), (5, POST)):
            both.client.receive(frame(1, 4 if fields is not GET else 5, stream_id, encoder.encode(fields)))
        both.client.receive(frame(0, 1, 3, b"\0\0\0\0\2hi"))
        both.flush()
        for each in wire:
            both.upstream.receive(each)
            both.flush()
            both.check()

    run(test)


@pytest.mark.parametrize("pieces", [1, 7])
def test_a_call_through_both(pieces: int) -> None:
    """What the others stand on does work."""

    def test(both: Both) -> None:
        wire = PREFACE + SETTINGS + frame(1, 4, 1, head(CALL)) + frame(0, 1, 1, b"\0\0\0\0\2hi")
        both.upstream.receive(SETTINGS)
        for start in range(0, len(wire), pieces):
            both.client.receive(wire[start : start + pieces])
        both.flush()
        told = both.instance.receive(both.sent_to_instance())
        assert [type(each).__name__ for each in told][-2:] == ["RequestReceived", "DataReceived"]
        both.instance.send_response(1, GRPC_OK)
        both.instance.send_data(1, b"\0\0\0\0\2hi")
        both.instance.send_trailers(1, [(b"grpc-status", b"0")])
        both.upstream.receive(both.instance.data_to_send())
        both.flush()
        assert not both.client.streams
        assert both.table[B].in_use == 0

    run(test)
