"""bench/streamer: what it answers is HTTP/2, and all of it."""

from __future__ import annotations

import socket
from collections import Counter

from h2.events import DataReceived, ResponseReceived, StreamEnded, TrailersReceived

from bench.streamer import MESSAGES, SIZE, Connection
from nursery_tests.h2_peer import H2Peer

CALLS = 5
"""More than one window of the connection's holds."""


def test_each_call_is_answered_with_all_messages() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        Connection(theirs).start()
        peer = H2Peer(client=True, max_streams=100, max_header_list_size=16_384)
        fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/s"), (b":authority", b"x")]
        for _ in range(CALLS):
            stream_id = peer.next_stream_id()
            peer.send_headers(stream_id, fields)
            peer.send_data(stream_id, b"ask", end_stream=True)
        ours.settimeout(20)
        seen: Counter[object] = Counter()
        data: Counter[int] = Counter()
        while seen[StreamEnded] < CALLS:
            ours.sendall(peer.outgoing)
            peer.outgoing.clear()
            received = ours.recv(65_536)
            assert received, seen
            for event in peer.receive(received):
                seen[type(event)] += 1
                if isinstance(event, DataReceived):
                    data[event.stream_id] += len(event.data)
                    peer.acknowledge(event.stream_id, event.flow_controlled_length)
    assert data == dict.fromkeys(range(1, 2 * CALLS, 2), MESSAGES * (5 + SIZE))
    assert (seen[DataReceived], seen[ResponseReceived], seen[TrailersReceived]) == (CALLS * MESSAGES, CALLS, CALLS)
