"""Length-prefixed messages."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.wire.grpc.framing import PREFIX, MessageDecoder, check_encoding, encode_message
from meshlocal.wire.grpc.status import GrpcError, StatusCode


def drain(decoder: MessageDecoder) -> list[bytes]:
    messages = []
    while (message := decoder.next_message()) is not None:
        messages.append(message)
    return messages


@given(
    messages=st.lists(st.tuples(st.binary(max_size=200), st.booleans()), max_size=6),
    cuts=st.lists(st.integers(0, 1500), max_size=20),
)
def test_messages_come_out_whole_however_the_bytes_are_cut(messages: list[tuple[bytes, bool]], cuts: list[int]) -> None:
    wire = b"".join(encode_message(payload, compress=compress) for payload, compress in messages)
    decoder = MessageDecoder(gzip=True)
    received = []
    start = 0
    for cut in [*sorted(cuts), len(wire)]:
        decoder.feed(wire[start:cut])
        start = max(start, cut)
        received += drain(decoder)
    decoder.finish()
    assert received == [payload for payload, _ in messages]


def test_a_stream_that_ends_within_a_message_is_internal() -> None:
    for length in range(1, 8):
        decoder = MessageDecoder()
        decoder.feed(encode_message(b"abc")[:length])
        assert drain(decoder) == ([] if length < 8 else [b"abc"])
        with pytest.raises(GrpcError) as caught:
            decoder.finish()
        assert caught.value.code is StatusCode.INTERNAL


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (b"\x02\0\0\0\0", StatusCode.INTERNAL),
        (encode_message(b"abc", compress=True), StatusCode.INTERNAL),  # its headers named no compression
        (PREFIX.pack(0, 101), StatusCode.RESOURCE_EXHAUSTED),  # before a byte of it came
        (PREFIX.pack(0, 2**32 - 1), StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_bad_prefixes(wire: bytes, code: StatusCode) -> None:
    decoder = MessageDecoder(100)
    decoder.feed(wire)
    with pytest.raises(GrpcError) as caught:
        decoder.next_message()
    assert caught.value.code is code


def test_a_message_of_exactly_the_limit_passes() -> None:
    decoder = MessageDecoder(100, gzip=True)
    decoder.feed(encode_message(bytes(100)) + encode_message(bytes(100), compress=True))
    assert drain(decoder) == [bytes(100), bytes(100)]


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (gzip.compress(bytes(101)), StatusCode.RESOURCE_EXHAUSTED),
        (gzip.compress(bytes(10_000_000))[:50_000], StatusCode.RESOURCE_EXHAUSTED),  # a bomb
        (b"no gzip at all", StatusCode.INTERNAL),
        (gzip.compress(b"abc")[:-1], StatusCode.INTERNAL),
        (gzip.compress(b"abc") + b"more", StatusCode.INTERNAL),
    ],
)
def test_bad_compressed_messages(payload: bytes, code: StatusCode) -> None:
    limit = 100 if len(payload) <= 100 else 20_000
    decoder = MessageDecoder(limit, gzip=True)
    decoder.feed(PREFIX.pack(1, len(payload)) + payload)
    with pytest.raises(GrpcError) as caught:
        decoder.next_message()
    assert caught.value.code is code


def test_encodings() -> None:
    assert not check_encoding(None)
    assert not check_encoding(b"identity")
    assert check_encoding(b"gzip")
    with pytest.raises(GrpcError, match="snappy") as caught:
        check_encoding(b"snappy")
    assert caught.value.code is StatusCode.UNIMPLEMENTED
