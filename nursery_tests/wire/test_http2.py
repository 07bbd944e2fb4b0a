"""HTTP/2's engine, against itself and against another one (h2): what they agree on is RFC 9113's, not one's opinion."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hpack
import pytest
from h2 import events as h2_events
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.wire.http2 import (
    DEFAULT_WINDOW,
    HEADER_SLACK,
    MAX_STREAM_ID,
    PREFACE,
    DataReceived,
    ErrorCode,
    Event,
    GoAwayReceived,
    Http2Error,
    Http2Limits,
    Http2Protocol,
    InformationalResponseReceived,
    PingAcknowledged,
    RequestReceived,
    ResponseReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
    goaway,
    header_list_size,
)
from nursery_tests.h2_peer import GoAway, GoAwaySplitter, H2Peer, H2PeerError

REQUEST = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/a.B/C"), (b":authority", b"x")]
RESPONSE = [(b":status", b"200")]

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 1, 1, 4, 8


def frame(kind: int, flags: int, stream_id: int, body: bytes = b"") -> bytes:
    """One frame (RFC 9113, 4.1)."""
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream_id) + body


def head(fields: Sequence[tuple[bytes, bytes]], stream_id: int = 1, flags: int = END_STREAM | END_HEADERS) -> bytes:
    """A HEADERS frame with these fields."""
    return frame(HEADERS, flags, stream_id, hpack.Encoder().encode(fields))


def pair(**limits: Any) -> tuple[Http2Protocol, Http2Protocol]:
    """A client and a server that have greeted each other."""
    set_limits = Http2Limits(**limits)
    client, server = Http2Protocol(client=True, limits=set_limits), Http2Protocol(client=False, limits=set_limits)
    exchange(client, server)
    return client, server


def exchange(client: Http2Protocol, server: Http2Protocol) -> tuple[list[Event], list[Event]]:
    """What the client and the server saw, once neither has more to say."""
    seen: tuple[list[Event], list[Event]] = ([], [])
    while True:
        to_server, to_client = client.data_to_send(), server.data_to_send()
        if not (to_server or to_client):
            return seen
        if to_server:
            seen[1].extend(server.receive(to_server))
        if to_client:
            seen[0].extend(client.receive(to_client))


def kinds(events: Sequence[Event]) -> list[type]:
    return [type(event) for event in events]


# Whole messages


def test_a_message_goes_both_ways_with_interim_head_and_trailers() -> None:
    client, server = pair()
    stream_id = client.send_request(REQUEST)
    client.send_data(stream_id, b"request")
    client.send_trailers(stream_id, [(b"a", b"b")])
    _, seen = exchange(client, server)
    assert kinds(seen) == [RequestReceived, DataReceived, TrailersReceived]
    assert seen[0].headers == tuple(REQUEST)  # type: ignore[attr-defined]
    server.send_informational(stream_id, [(b":status", b"103")])
    server.send_response(stream_id, RESPONSE)
    server.send_data(stream_id, b"response")
    server.send_trailers(stream_id, [(b"grpc-status", b"0")])
    seen, _ = exchange(client, server)
    assert kinds(seen) == [
        InformationalResponseReceived,
        ResponseReceived,
        DataReceived,
        TrailersReceived,
        StreamClosed,
    ]


# GOAWAY (6.8)


def test_streams_below_a_goaway_go_on_after_it_was_sent_and_received() -> None:
    client, server = pair()
    first, second = client.send_request(REQUEST), client.send_request(REQUEST)
    exchange(client, server)
    server.send_goaway(first, debug_data=b"draining")
    seen, _ = exchange(client, server)
    assert kinds(seen) == [GoAwayReceived, StreamClosed]
    assert seen[1].stream_id == second  # type: ignore[attr-defined]
    assert seen[1].error_code == ErrorCode.REFUSED_STREAM  # type: ignore[attr-defined]
    client.send_data(first, b"request", end_stream=True)
    server.send_response(first, RESPONSE)
    server.send_data(first, b"response", end_stream=True)
    seen, seen_by_server = exchange(client, server)
    assert kinds(seen)[:2] == [ResponseReceived, DataReceived]
    assert DataReceived in kinds(seen_by_server)
    with pytest.raises(Http2Error):
        client.send_request(REQUEST)


def test_a_stream_that_was_under_way_when_the_end_was_announced_is_served() -> None:
    """The first of two GOAWAYs, which fixes no last stream, also on an idle connection."""
    client, server = pair()
    stream_id = client.send_request(REQUEST, end_stream=True)
    to_server = client.data_to_send()
    server.send_goaway(MAX_STREAM_ID, debug_data=b"draining")
    told = client.receive(server.data_to_send())
    assert told == [told[0]]
    assert isinstance(told[0], GoAwayReceived)
    assert (told[0].last_stream_id, told[0].debug_data) == (MAX_STREAM_ID, b"draining")
    assert kinds(server.receive(to_server)) == [RequestReceived]
    server.send_goaway(server.highest_inbound_stream_id)
    server.send_response(stream_id, RESPONSE, end_stream=True)
    seen, _ = exchange(client, server)
    assert kinds(seen)[:3] == [GoAwayReceived, ResponseReceived, StreamClosed]
    assert client.finished
    assert server.receive(b"") == []
    assert server.finished


def test_what_comes_behind_the_end_is_ignored() -> None:
    client, server = pair()
    server.send_goaway(0)
    exchange(client, server)
    assert client.finished
    assert client.receive(frame(PING, 0, 0, b"12345678")) == []
    server.send_goaway(0)
    server.ping(b"12345678")


# Limits


def test_streams_that_were_opened_before_the_limit_was_known_are_refused_one_by_one() -> None:
    limits = Http2Limits(max_streams=2)
    eager, late = Http2Protocol(client=True, limits=limits), Http2Protocol(client=False, limits=limits)
    for _ in range(4):
        eager.send_request(REQUEST)
    told = late.receive(eager.data_to_send())
    assert kinds(told).count(RequestReceived) == 2
    seen = eager.receive(late.data_to_send())
    refused = [event for event in seen if isinstance(event, StreamReset)]
    assert [(each.stream_id, each.error_code) for each in refused] == [(5, 7), (7, 7)]
    assert eager.peer_max_streams == 2


def test_a_peer_that_names_no_limit_has_none() -> None:
    client = Http2Protocol(client=True, limits=Http2Limits())
    assert client.peer_max_streams == 100
    client.receive(frame(SETTINGS, 0, 0))
    assert client.settings_received
    assert client.peer_max_streams == 2**32 - 1
    assert client.peer_max_header_list_size is None
    client.receive(frame(SETTINGS, 0, 0, struct.pack(">HIHI", 3, 7, 6, 1000)))
    assert client.peer_max_streams == 7
    assert client.peer_max_header_list_size == 1000


def test_fields_are_taken_up_to_the_slack_and_end_the_connection_beyond_it() -> None:
    limit = 1000
    client, server = pair(max_header_list_size=limit)
    assert client.peer_max_header_list_size == limit
    fields = [*REQUEST, (b"x", b"y" * (HEADER_SLACK * limit - header_list_size(REQUEST) - 33))]
    assert header_list_size(fields) == HEADER_SLACK * limit
    client.send_request(fields)
    _, seen = exchange(client, server)
    assert kinds(seen) == [RequestReceived]
    client.send_request([*fields, (b"a", b"")])
    with pytest.raises(Http2Error, match="header list") as caught:
        exchange(client, server)
    assert caught.value.error_code == ErrorCode.ENHANCE_YOUR_CALM


def test_header_lists_count_32_bytes_a_field() -> None:
    assert header_list_size([(b"ab", b"c"), (b"", b"")]) == 67


# Windows


def test_windows_bound_what_is_sent_until_it_is_given_back() -> None:
    client, server = pair()
    stream_id = client.send_request(REQUEST)
    assert client.sendable(stream_id) == 0
    exchange(client, server)
    sent = 0
    while size := client.sendable(stream_id):
        client.send_data(stream_id, bytes(size))
        sent += size
    assert sent == DEFAULT_WINDOW
    other = client.send_request(REQUEST)
    exchange(client, server)
    assert client.sendable(other) > 0, "one full stream must not stop another"
    assert client.sendable(stream_id) == 0
    server.acknowledge(stream_id, sent)
    seen, _ = exchange(client, server)
    assert [event.stream_id for event in seen if isinstance(event, WindowUpdated)] == [stream_id]
    assert client.sendable(stream_id) == DEFAULT_WINDOW


@given(
    st.lists(st.tuples(st.sampled_from([1, 3]), st.binary(max_size=3)), max_size=20),
    st.sampled_from([None, "data", "empty"]),
)
def test_neighbouring_frames_of_a_streams_data_are_one_event(pieces: list[tuple[int, bytes]], end: str | None) -> None:
    """What each stream gets is the same, in the same order; only what is empty and ends nothing stays by itself."""
    client, server = pair()
    for _ in range(2):
        client.send_request(REQUEST)
    exchange(client, server)
    sent = b"".join(frame(DATA, 0, stream_id, data) for stream_id, data in pieces)
    last = b"end" if end == "data" else b""
    if end is not None:
        sent += frame(DATA, END_STREAM, 3, last)
    seen = [event for event in server.receive(sent) if isinstance(event, DataReceived)]
    for stream_id in (1, 3):
        own = b"".join(data for each, data in pieces if each == stream_id)
        own += last if stream_id == 3 else b""
        assert b"".join(event.data for event in seen if event.stream_id == stream_id) == own
    assert [event.stream_id for event in seen if event.end_stream] == ([3] if end else [])
    for first, second in itertools.pairwise(seen):
        joined = first.stream_id == second.stream_id and first.data and (second.data or second.end_stream)
        assert not joined
    assert sum(not event.data and not event.end_stream for event in seen) == sum(not data for _, data in pieces)


def test_what_the_window_does_not_allow_waits_and_is_counted() -> None:
    client, server = pair(window=1000)
    stream_id = client.send_request(REQUEST)
    exchange(client, server)
    client.send_data(stream_id, bytes(3000), end_stream=True)
    _, seen = exchange(client, server)
    assert [len(event.data) for event in seen if isinstance(event, DataReceived)] == [1000]
    assert client.waiting(stream_id) == 2000
    client.reset(stream_id, ErrorCode.CANCEL)
    client.data_to_send()
    assert client.waiting(stream_id) == 0


def test_bytes_of_a_stream_that_is_gone_are_given_back_to_the_connection() -> None:
    """C2: else a few calls that were given up would leave no room for any other."""
    client, server = pair(max_streams=1, window=10_000, connection_window=DEFAULT_WINDOW)
    for _ in range(20):
        stream_id = client.send_request(REQUEST)
        client.send_data(stream_id, bytes(10_000))
        assert client.waiting(stream_id) == 10_000
        exchange(client, server)
        assert client.waiting(stream_id) == 0
        server.reset(stream_id, ErrorCode.CANCEL)
        server.acknowledge(stream_id, 10_000)
        exchange(client, server)


def test_acknowledging_and_resetting_a_stream_that_is_gone_is_harmless() -> None:
    client, server = pair()
    stream_id = client.send_request(REQUEST)
    client.send_data(stream_id, bytes(1000))
    exchange(client, server)
    client.reset(stream_id, ErrorCode.CANCEL)
    client.reset(stream_id, ErrorCode.CANCEL)
    _, seen = exchange(client, server)
    assert kinds(seen) == [StreamReset, StreamClosed]
    server.reset(stream_id, ErrorCode.CANCEL)
    server.acknowledge(stream_id, 1000)
    assert server.highest_inbound_stream_id == stream_id


@pytest.mark.parametrize(
    "send",
    [
        lambda side, stream_id: side.send_data(stream_id, b"x"),
        lambda side, stream_id: side.end_stream(stream_id),
        lambda side, stream_id: side.send_trailers(stream_id, [(b"a", b"b")]),
    ],
)
def test_nothing_is_sent_on_a_stream_that_is_gone(send: Callable[[Http2Protocol, int], None]) -> None:
    client, server = pair()
    stream_id = client.send_request(REQUEST)
    exchange(client, server)
    server.reset(stream_id, ErrorCode.CANCEL)
    exchange(client, server)
    for side in (client, server):
        with pytest.raises(Http2Error):
            send(side, stream_id)
    with pytest.raises(Http2Error):
        server.send_response(stream_id, RESPONSE)
    assert client.sendable(stream_id) == 0


# The table: what breaks the rules, section by section, at a server that saw the preface and SETTINGS.


class Case(NamedTuple):
    """One thing that RFC 9113 forbids.

    Attributes:
        section: of RFC 9113, or RFC 7541 where it says so.
        wire: what the client sends.
        ends: the codes with which the connection may end; empty: it goes on.
        resets: the codes with which the stream may be reset; empty: it is not.
        ours: what our engine does instead; empty: it does that.
        theirs: the same of h2.
    """

    section: str
    wire: bytes
    ends: tuple[ErrorCode, ...] = ()
    resets: tuple[ErrorCode, ...] = ()
    ours: str = ""
    theirs: str = ""


P, F, S, W, C, R = (
    ErrorCode.PROTOCOL_ERROR,
    ErrorCode.FRAME_SIZE_ERROR,
    ErrorCode.STREAM_CLOSED,
    ErrorCode.FLOW_CONTROL_ERROR,
    ErrorCode.COMPRESSION_ERROR,
    ErrorCode.REFUSED_STREAM,
)
OPEN = head(REQUEST, flags=END_HEADERS)
DONE = head(REQUEST)
CUT = hpack.Encoder().encode(REQUEST)


def with_fields(*fields: tuple[bytes, bytes]) -> bytes:
    return head([*REQUEST, *fields])


def without(name: bytes) -> bytes:
    return head([each for each in REQUEST if each[0] != name])


IGNORED = "let pass"
"""nghttp2 ignores what comes on a stream that is over, and the priorities that RFC 9113 took out of use (5.3.2)."""

COARSE = "ended with PROTOCOL_ERROR"
"""h2 has one code for all that cannot be read."""

CASES = {
    # Frames
    "a frame of an unknown type": Case("4.1", frame(0x16, 0, 0, b"anything")),
    "reserved bit of a stream's number": Case("4.1", frame(PING, 0, 1 << 31, b"12345678")),
    "DATA larger than was allowed": Case("4.2", OPEN + frame(DATA, 0, 1, bytes(16_385)), (F,)),
    "HEADERS larger than was allowed": Case("4.2", frame(HEADERS, END_HEADERS, 1, bytes(16_385)), (F,)),
    "a head that cannot be decompressed": Case("4.3", frame(HEADERS, 5, 1, b"\xff\xff\xff\xff"), (C,), theirs=COARSE),
    "another frame within a head": Case("4.3", frame(HEADERS, 1, 1, CUT) + frame(PING, 0, 0, b"12345678"), (P,)),
    "another stream's frame within a head": Case("4.3", frame(HEADERS, 1, 1, CUT) + head(REQUEST, 3), (P,)),
    # Streams
    "DATA on an idle stream": Case("5.1", frame(DATA, 0, 1, b"x"), (P,)),
    "RST_STREAM on an idle stream": Case("5.1", frame(RST_STREAM, 0, 1, b"\0\0\0\x08"), (P,)),
    "WINDOW_UPDATE on an idle stream": Case("5.1", frame(WINDOW_UPDATE, 0, 1, b"\0\0\0\x01"), (P,)),
    "CONTINUATION on an idle stream": Case("5.1", frame(CONTINUATION, 4, 1, CUT), (P,)),
    "DATA on a half-closed stream": Case("5.1", DONE + frame(DATA, 0, 1, b"x"), (S,), (S,)),
    "HEADERS on a half-closed stream": Case("5.1", DONE + head([(b"a", b"b")]), (S,), (S,)),
    "DATA on a stream that its client reset": Case(
        "5.1", OPEN + frame(RST_STREAM, 0, 1, b"\0\0\0\x08") + frame(DATA, 0, 1, b"x"), (S,), (S,), ours=IGNORED
    ),
    "an even stream": Case("5.1.1", head(REQUEST, 2), (P,)),
    "a stream lower than one before": Case("5.1.1", head(REQUEST, 5) + head(REQUEST, 3), (P,), (S,), ours=IGNORED),
    # Frames by type
    "DATA on the connection": Case("6.1", frame(DATA, 0, 0, b"x"), (P,)),
    "DATA that is all padding and more": Case("6.1", OPEN + frame(DATA, PADDED, 1, b"\x06hello"), (P,)),
    "HEADERS on the connection": Case("6.2", head(REQUEST, 0), (P,)),
    "HEADERS that is all padding and more": Case("6.2", frame(HEADERS, END_HEADERS | PADDED, 1, b"\xff" + CUT), (P,)),
    "PRIORITY on the connection": Case("6.3", frame(PRIORITY, 0, 0, bytes(5)), (P,), ours=IGNORED),
    "PRIORITY of four bytes": Case("6.3", OPEN + frame(PRIORITY, 0, 1, bytes(4)), (F,), (F,)),
    "RST_STREAM on the connection": Case("6.4", frame(RST_STREAM, 0, 0, bytes(4)), (P,)),
    "RST_STREAM of three bytes": Case("6.4", OPEN + frame(RST_STREAM, 0, 1, bytes(3)), (F,)),
    "SETTINGS with ACK and a body": Case("6.5", frame(SETTINGS, ACK, 0, bytes(6)), (F,), theirs=COARSE),
    "SETTINGS on a stream": Case("6.5", frame(SETTINGS, 0, 1), (P,)),
    "SETTINGS of five bytes": Case("6.5", frame(SETTINGS, 0, 0, bytes(5)), (F,)),
    "ENABLE_PUSH of 2": Case("6.5.2", frame(SETTINGS, 0, 0, struct.pack(">HI", 2, 2)), (P,)),
    "INITIAL_WINDOW_SIZE of 2^31": Case("6.5.2", frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1 << 31)), (W,)),
    "MAX_FRAME_SIZE of 16383": Case("6.5.2", frame(SETTINGS, 0, 0, struct.pack(">HI", 5, 16_383)), (P,)),
    "MAX_FRAME_SIZE of 2^24": Case("6.5.2", frame(SETTINGS, 0, 0, struct.pack(">HI", 5, 1 << 24)), (P,)),
    "an unknown setting": Case("6.5.2", frame(SETTINGS, 0, 0, struct.pack(">HI", 0xFF, 1))),
    "PUSH_PROMISE of a client": Case("6.6", OPEN + frame(PUSH_PROMISE, 4, 1, b"\0\0\0\x02" + CUT), (P,)),
    "PING on a stream": Case("6.7", frame(PING, 0, 1, b"12345678"), (P,)),
    "PING of one byte": Case("6.7", frame(PING, 0, 0, b"x"), (F,)),
    "GOAWAY on a stream": Case("6.8", frame(GOAWAY, 0, 1, bytes(8)), (P,)),
    "GOAWAY of four bytes": Case("6.8", frame(GOAWAY, 0, 0, bytes(4)), (F, P)),
    "WINDOW_UPDATE by 0 on the connection": Case("6.9", frame(WINDOW_UPDATE, 0, 0, bytes(4)), (P,)),
    "WINDOW_UPDATE by 0 on a stream": Case("6.9", OPEN + frame(WINDOW_UPDATE, 0, 1, bytes(4)), (P,), (P,)),
    "WINDOW_UPDATE of three bytes": Case("6.9", frame(WINDOW_UPDATE, 0, 0, bytes(3)), (F,)),
    "a connection's window that overflows": Case("6.9.1", frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), (W,)),
    "a stream's window that overflows": Case(
        "6.9.1", OPEN + frame(WINDOW_UPDATE, 0, 1, b"\x7f\xff\xff\xff"), (W,), (W,)
    ),
    "CONTINUATION of nothing": Case("6.10", OPEN + frame(CONTINUATION, 4, 1, CUT), (P,)),
    "CONTINUATION behind DATA": Case("6.10", OPEN + frame(DATA, 0, 1, b"x") + frame(CONTINUATION, 4, 1, CUT), (P,)),
    # Messages
    "a second head that does not end the stream": Case(
        "8.1", OPEN + frame(DATA, 0, 1, b"x") + head([(b"a", b"b")], flags=END_HEADERS), (P,), (P,)
    ),
    "an uppercase name": Case("8.2.1", with_fields((b"X-A", b"b")), (P,), (P,)),
    "a space in a name": Case("8.2.1", with_fields((b"x a", b"b")), (P,), (P,)),
    "a colon in a name": Case("8.2.1", with_fields((b"x:a", b"b")), (P,), (P,)),
    "an empty name": Case("8.2.1", with_fields((b"", b"b")), (P,), (P,)),
    "CR and LF in a value": Case("8.2.1", with_fields((b"a", b"b\r\nc: d")), (P,), (P,)),
    "LF in a value": Case("8.2.1", with_fields((b"a", b"b\nc: d")), (P,), (P,)),
    "NUL in a value": Case("8.2.1", with_fields((b"a", b"b\0")), (P,), (P,)),
    "a connection field": Case("8.2.2", with_fields((b"connection", b"close")), (P,), (P,)),
    "a transfer-encoding field": Case("8.2.2", with_fields((b"transfer-encoding", b"chunked")), (P,), (P,)),
    "te other than trailers": Case("8.2.2", with_fields((b"te", b"gzip")), (P,), (P,)),
    "te trailers": Case("8.2.2", with_fields((b"te", b"trailers"))),
    "an unknown pseudo-header": Case("8.3", head([*REQUEST, (b":test", b"x")]), (P,), (P,)),
    "a response's pseudo-header in a request": Case("8.3", head([*REQUEST, (b":status", b"200")]), (P,), (P,)),
    "a pseudo-header in trailers": Case("8.3", OPEN + head([(b":method", b"GET")]), (P,), (P,)),
    "a pseudo-header behind a field": Case("8.3", head([*REQUEST[1:], (b"a", b"b"), REQUEST[0]]), (P,), (P,)),
    "an empty path": Case("8.3.1", head([(n, b"" if n == b":path" else v) for n, v in REQUEST]), (P,), (P,)),
    "no method": Case("8.3.1", without(b":method"), (P,), (P,)),
    "no scheme": Case("8.3.1", without(b":scheme"), (P,), (P,)),
    "no path": Case("8.3.1", without(b":path"), (P,), (P,)),
    "two methods": Case("8.3.1", head([REQUEST[0], *REQUEST]), (P,), (P,)),
    "two schemes": Case("8.3.1", head([REQUEST[1], *REQUEST]), (P,), (P,)),
    "two paths": Case("8.3.1", head([REQUEST[2], *REQUEST]), (P,), (P,)),
    "less body than content-length says": Case(
        "8.1.1", head([*REQUEST, (b"content-length", b"2")], flags=4) + frame(DATA, 1, 1, b"x"), (P,), (P,)
    ),
    "more body than content-length says": Case(
        "8.1.1", head([*REQUEST, (b"content-length", b"1")], flags=4) + frame(DATA, 1, 1, b"xyz"), (P,), (P,)
    ),
    # HPACK
    "an index that is not there": Case("RFC 7541 2.3.3", frame(HEADERS, 5, 1, CUT + b"\xc6"), (C,), theirs=COARSE),
    "a table larger than was allowed": Case(
        "RFC 7541 4.2", frame(HEADERS, 5, 1, b"\x3f\xe1\xff\x03" + CUT), (C,), theirs=COARSE
    ),
    "a table's size behind a field": Case("RFC 7541 4.2", frame(HEADERS, 5, 1, CUT + b"\x20"), (C,), theirs=COARSE),
    "Huffman padding of more than 7 bits": Case(
        "RFC 7541 5.2",
        frame(HEADERS, 5, 1, CUT + b"\x00\x85\xf2\xb2\x4a\x84\xff\x84\x49\x50\x9f\xff"),
        (C,),
        theirs=COARSE,
    ),
    "Huffman padding of zeroes": Case(
        "RFC 7541 5.2", frame(HEADERS, 5, 1, CUT + b"\x00\x85\xf2\xb2\x4a\x84\xff\x83\x49\x50\x90"), (C,), theirs=COARSE
    ),
    "index 0": Case("RFC 7541 6.1", frame(HEADERS, 5, 1, CUT + b"\x80"), (C,), theirs=COARSE),
}


class Verdict(NamedTuple):
    """What a server did: the code with which it ended the connection, and those with which it reset streams."""

    end: int | None
    resets: list[int]


def frames_of(wire: bytes) -> list[tuple[int, bytes]]:
    """The types and bodies of the frames that a server sent."""
    found, position = [], 0
    while position < len(wire):
        size = int.from_bytes(wire[position : position + 3], "big")
        found.append((wire[position + 3], wire[position + 9 : position + 9 + size]))
        position += 9 + size
    return found


def verdict_in(wire: bytes) -> Verdict:
    frames = frames_of(wire)
    ends = [int.from_bytes(body[4:8], "big") for kind, body in frames if kind == GOAWAY]
    return Verdict(
        ends[0] if ends else None, [int.from_bytes(body, "big") for kind, body in frames if kind == RST_STREAM]
    )


def ours(wire: bytes) -> Verdict:
    server = Http2Protocol(client=False, limits=Http2Limits())
    server.data_to_send()
    raised = None
    try:
        server.receive(PREFACE + frame(SETTINGS, 0, 0) + wire)
    except Http2Error as error:
        raised = error.error_code
    verdict = verdict_in(server.data_to_send())
    assert verdict.end == raised, "what is raised is what the peer is told"
    return verdict


def theirs(wire: bytes) -> Verdict:
    server = H2Peer(client=False, max_streams=100, max_header_list_size=16_384)
    server.outgoing.clear()
    try:
        server.receive(PREFACE + frame(SETTINGS, 0, 0) + wire)
    except H2PeerError:
        verdict = verdict_in(bytes(server.outgoing))
        return verdict if verdict.end is not None else Verdict(ErrorCode.PROTOCOL_ERROR, verdict.resets)
    return verdict_in(bytes(server.outgoing))


def judged(case: Case, verdict: Verdict) -> str:
    """What is wrong with a verdict; empty if nothing is."""
    if verdict.end is not None:
        return "" if verdict.end in case.ends else f"ended with {ErrorCode.name_of(verdict.end)}"
    if verdict.resets:
        return "" if verdict.resets[0] in case.resets else f"reset with {ErrorCode.name_of(verdict.resets[0])}"
    return "let pass" if case.ends or case.resets else ""


@pytest.mark.parametrize("name", CASES)
def test_what_rfc_9113_forbids_is_refused(name: str) -> None:
    case = CASES[name]
    assert judged(case, ours(case.wire)) == case.ours, case.section


@pytest.mark.parametrize("name", CASES)
def test_another_engine_refuses_the_same(name: str) -> None:
    case = CASES[name]
    assert judged(case, theirs(case.wire)) == case.theirs, case.section


# The same at a client


CLIENT_CASES = {
    "an even stream's response": (head(RESPONSE, 2), (P,)),
    "a push": (frame(SETTINGS, ACK, 0) + frame(PUSH_PROMISE, 4, 1, b"\0\0\0\x02" + CUT), (P,)),
    "a second final head": (head(RESPONSE, flags=4) + head(RESPONSE, flags=4), (P,)),
    "DATA before the head": (frame(DATA, 0, 1, b"x"), (P,)),
    "no status": (head([(b"a", b"b")]), (P,)),
    "a status of two digits": (head([(b":status", b"20")]), (P,)),
    "two statuses": (head([*RESPONSE, *RESPONSE]), (P,)),
    "a request's pseudo-header": (head([*RESPONSE, (b":path", b"/")]), (P,)),
    "101": (head([(b":status", b"101")], flags=4), (P,)),
    "an interim head that ends the stream": (head([(b":status", b"103")]), (P,)),
    "a connection field": (head([*RESPONSE, (b"connection", b"close")]), (P,)),
    "CR and LF in a value": (head([*RESPONSE, (b"a", b"b\r\nc: d")]), (P,)),
    "more body than content-length says": (
        head([*RESPONSE, (b"content-length", b"1")], flags=4) + frame(DATA, 1, 1, b"xyz"),
        (P,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLIENT_CASES)
def test_what_a_server_may_not_say_fails_its_stream_or_its_connection(name: str) -> None:
    wire, codes = CLIENT_CASES[name]
    client = Http2Protocol(client=True, limits=Http2Limits())
    client.receive(frame(SETTINGS, 0, 0))
    assert client.send_request(REQUEST) == 1
    client.data_to_send()
    came = []
    try:
        told = client.receive(wire)
        client.data_to_send()
        told += client.receive(frame(SETTINGS, ACK, 0))
        came = [event.error_code for event in told if isinstance(event, StreamClosed)]
    except Http2Error as error:
        came = [error.error_code]
    assert came
    assert came[0] in codes


# Bytes in any pieces


@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_bytes_may_come_in_any_pieces(cuts: list[int]) -> None:
    wire = PREFACE + frame(SETTINGS, 0, 0) + OPEN + frame(DATA, 0, 1, b"abc") + frame(PING, 0, 0, b"12345678")
    wire += frame(DATA, END_STREAM, 1, b"def") + goaway(0, 0, b"bye")
    server = Http2Protocol(client=False, limits=Http2Limits())
    told: list[Event] = []
    start = 0
    for cut in [*sorted(cuts), len(wire)]:
        told += server.receive(wire[start:cut])
        start = max(start, cut)
    assert b"".join(event.data for event in told if isinstance(event, DataReceived)) == b"abcdef"
    assert [event.debug_data for event in told if isinstance(event, GoAwayReceived)] == [b"bye"]


@given(wire=st.binary(max_size=200), preface=st.booleans())
def test_any_bytes_give_events_or_an_end_that_is_said(wire: bytes, preface: bool) -> None:
    server = Http2Protocol(client=False, limits=Http2Limits())
    server.data_to_send()
    try:
        server.receive(PREFACE + frame(SETTINGS, 0, 0) + wire if preface else wire)
    except Http2Error:
        sent = [kind for kind, _ in frames_of(server.data_to_send())]
        assert sent[-1] == GOAWAY
        assert server.finished
    assert server.receive(b"") == [] or not server.finished


def test_no_preface_is_an_error() -> None:
    server = Http2Protocol(client=False, limits=Http2Limits())
    with pytest.raises(Http2Error, match="magic"):
        server.receive(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


# Both engines as peers


def test_the_other_engine_is_understood_and_understands() -> None:
    client = H2Peer(client=True, max_streams=10, max_header_list_size=1000)
    server = Http2Protocol(client=False, limits=Http2Limits())
    client.send_headers(1, REQUEST)
    client.send_data(1, b"request", end_stream=True)

    def to_us() -> list[Event]:
        wire = bytes(client.outgoing)
        client.outgoing.clear()
        return server.receive(wire)

    told = to_us()
    assert [type(event) for event in told][-2:] == [RequestReceived, DataReceived]
    server.send_response(1, RESPONSE)
    server.send_data(1, b"response")
    server.send_trailers(1, [(b"grpc-status", b"0")])
    server.ping(b"12345678")
    server.send_goaway(MAX_STREAM_ID, ErrorCode.NO_ERROR, b"bye")
    seen = client.receive(server.data_to_send())
    assert [event for event in seen if isinstance(event, GoAway)] == [GoAway(MAX_STREAM_ID, 0, b"bye")]
    assert [type(event) for event in seen if not isinstance(event, GoAway)][-3:] == [
        h2_events.DataReceived,
        h2_events.TrailersReceived,
        h2_events.StreamEnded,
    ]
    assert PingAcknowledged in kinds(to_us())


def test_the_goaway_that_is_written_here_is_read_elsewhere() -> None:
    assert GoAwaySplitter(preface=False).split(goaway(7, 11, b"why")) == [GoAway(7, 11, b"why")]
