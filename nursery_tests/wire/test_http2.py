"""HTTP/2 over h2, with GOAWAY kept out of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from h2.errors import ErrorCodes
from h2.events import DataReceived, RequestReceived, ResponseReceived, StreamEnded, StreamReset
from hyperframe.frame import GoAwayFrame, PingFrame, SettingsFrame
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.wire.http2 import (
    DEFAULT_WINDOW,
    MAX_STREAM_ID,
    PREFACE,
    GoAway,
    GoAwaySplitter,
    Http2Error,
    Http2Protocol,
    header_list_size,
)

REQUEST = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/a.B/C"), (b":authority", b"x")]
RESPONSE = [(b":status", b"200")]


def ping(payload: bytes) -> bytes:
    return PingFrame(0, opaque_data=payload).serialize()


def goaway(last: int, code: int = 0, debug: bytes = b"") -> bytes:
    return GoAwayFrame(0, last_stream_id=last, error_code=code, additional_data=debug).serialize()


@given(
    frames=st.lists(
        st.one_of(st.just(b"ping"), st.just(b"settings"), st.tuples(st.integers(0, 9), st.binary(max_size=9)))
    ),
    cuts=st.lists(st.integers(0, 300)),
    preface=st.booleans(),
)
def test_goaway_is_cut_out_wherever_the_bytes_are_cut(
    frames: list[bytes | tuple[int, bytes]], cuts: list[int], preface: bool
) -> None:
    wire = others = PREFACE if preface else b""
    expected = []
    for frame in frames:
        if isinstance(frame, tuple):
            wire += goaway(frame[0], 0, frame[1])
            expected.append(GoAway(frame[0], 0, frame[1]))
        else:
            each = ping(b"12345678") if frame == b"ping" else SettingsFrame(0).serialize()
            wire, others = wire + each, others + each
    splitter = GoAwaySplitter(preface=preface)
    parts: list[bytes | GoAway] = []
    start = 0
    for cut in [*sorted(cuts), len(wire)]:
        parts += splitter.split(wire[start:cut])
        start = max(start, cut)
    assert [part for part in parts if isinstance(part, GoAway)] == expected
    assert b"".join(part for part in parts if isinstance(part, bytes)) == others


@pytest.mark.parametrize("frame", [b"\0\0\x07\x07\0\0\0\0\0", b"\0\0\x08\x07\0\0\0\0\x01"])
def test_a_malformed_goaway_is_an_error(frame: bytes) -> None:
    with pytest.raises(Http2Error, match="GOAWAY"):
        GoAwaySplitter(preface=False).split(frame)


def pair(**limits: int) -> tuple[Http2Protocol, Http2Protocol]:
    arguments = {"max_streams": 10, "max_header_list_size": 1000} | limits
    client, server = Http2Protocol(client=True, **arguments), Http2Protocol(client=False, **arguments)
    exchange(client, server)
    return client, server


def exchange(client: Http2Protocol, server: Http2Protocol) -> tuple[list[object], list[object]]:
    """What the client and the server saw, once neither has more to say."""
    seen: tuple[list[object], list[object]] = ([], [])
    while client.outgoing or server.outgoing:
        to_server, to_client = bytes(client.outgoing), bytes(server.outgoing)
        client.outgoing.clear()
        server.outgoing.clear()
        seen[1].extend(server.receive(to_server))
        seen[0].extend(client.receive(to_client))
    return seen


def kinds(events: Sequence[object]) -> list[type]:
    return [type(event) for event in events]


def test_streams_below_a_goaway_go_on_after_it_was_sent_and_received() -> None:
    client, server = pair()
    client.send_headers(1, REQUEST)
    exchange(client, server)
    server.send_goaway(1, debug_data=b"draining")
    seen, _ = exchange(client, server)
    assert seen == [GoAway(1, 0, b"draining")]
    client.send_data(1, b"request", end_stream=True)
    server.send_headers(1, RESPONSE)
    server.send_data(1, b"response", end_stream=True)
    seen, seen_by_server = exchange(client, server)
    assert kinds(seen) == [ResponseReceived, DataReceived, StreamEnded]
    assert kinds(seen_by_server) == [DataReceived, StreamEnded]


def test_streams_over_the_announced_limit_are_left_to_the_caller() -> None:
    client, _ = pair(max_streams=2)
    assert client.peer_max_streams == 2
    client.send_headers(1, REQUEST)
    client.send_headers(3, REQUEST)
    with pytest.raises(Http2Error):
        client.send_headers(5, REQUEST)
    eager = Http2Protocol(client=True, max_streams=2, max_header_list_size=1000)
    for stream_id in (1, 3, 5):  # it has not seen the server's SETTINGS yet
        eager.send_headers(stream_id, REQUEST)
    late = Http2Protocol(client=False, max_streams=2, max_header_list_size=1000)
    assert kinds(late.receive(bytes(eager.outgoing))).count(RequestReceived) == 3


def test_windows_bound_what_is_sent_until_it_is_acknowledged() -> None:
    client, server = pair()
    client.send_headers(1, REQUEST)
    sent = 0
    while size := client.sendable(1):
        client.send_data(1, bytes(size))
        sent += size
    assert sent == DEFAULT_WINDOW
    client.send_headers(3, REQUEST)
    assert client.sendable(3) > 0, "one full stream must not stop another"
    exchange(client, server)
    server.acknowledge(1, sent)
    exchange(client, server)
    assert client.sendable(1) > 0


def test_acknowledging_and_resetting_a_stream_that_is_gone_is_harmless() -> None:
    client, server = pair()
    client.send_headers(1, REQUEST)
    client.send_data(1, bytes(1000))
    exchange(client, server)
    client.reset(1, ErrorCodes.CANCEL)
    client.reset(1, ErrorCodes.CANCEL)
    _, seen = exchange(client, server)
    assert kinds(seen) == [StreamReset]
    server.reset(1, ErrorCodes.CANCEL)
    server.acknowledge(1, 1000)
    assert server.highest_inbound_stream_id == 1


def test_a_protocol_error_leaves_a_goaway_with_its_code() -> None:
    _, server = pair()
    with pytest.raises(Http2Error):
        server.receive(b"\0\0\x01\x06\0\0\0\0\0x")  # a PING of one byte
    goaways = [part for part in GoAwaySplitter(preface=False).split(bytes(server.outgoing)) if isinstance(part, GoAway)]
    assert [each.error_code for each in goaways] == [ErrorCodes.FRAME_SIZE_ERROR]


def test_a_frame_that_is_too_large_is_refused_by_its_header() -> None:
    _, server = pair()
    with pytest.raises(Http2Error, match="16385"):
        server.receive((16_385).to_bytes(3, "big") + b"\x00\0\0\0\0\x01")
    (last,) = [part for part in GoAwaySplitter(preface=False).split(bytes(server.outgoing)) if isinstance(part, GoAway)]
    assert last.error_code == ErrorCodes.FRAME_SIZE_ERROR


def test_no_preface_is_an_error() -> None:
    server = Http2Protocol(client=False, max_streams=1, max_header_list_size=1000)
    with pytest.raises(Http2Error, match="preface"):
        server.receive(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


def test_a_header_bomb_is_an_error() -> None:
    client, server = pair()
    client.send_headers(1, [*REQUEST, *[(b"x", b"y" * 100)] * 100])
    with pytest.raises(Http2Error, match="header"):
        exchange(client, server)


def test_header_lists_count_32_bytes_a_field() -> None:
    assert header_list_size([(b"ab", b"c"), (b"", b"")]) == 67


def test_stream_ids_run_out() -> None:
    client, _ = pair()
    assert client.next_stream_id() == 1
    client.send_headers(MAX_STREAM_ID, REQUEST)
    with pytest.raises(Http2Error):
        client.next_stream_id()
