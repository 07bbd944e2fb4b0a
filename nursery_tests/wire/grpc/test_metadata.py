"""grpc-timeout, grpc-message and custom metadata."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.wire.grpc.metadata import (
    MAX_TIMEOUT,
    decode_grpc_message,
    decode_metadata,
    encode_grpc_message,
    encode_metadata,
    format_timeout,
    header,
    is_grpc,
    parse_timeout,
)
from meshlocal.wire.grpc.status import GrpcError, StatusCode


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(b"1H", 3600), (b"2M", 120), (b"3S", 3), (b"4m", 0.004), (b"5u", 5e-6), (b"6n", 6e-9), (b"99999999S", 99999999)],
)
def test_timeouts_in_each_unit(value: bytes, seconds: float) -> None:
    assert parse_timeout(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", [b"", b"S", b"1", b"1s", b"-1S", b"1.5S", b"123456789S", b" 1S", b"1S ", b"1S\n"])
def test_malformed_timeouts(value: bytes) -> None:
    with pytest.raises(GrpcError) as caught:
        parse_timeout(value)
    assert caught.value.code is StatusCode.INTERNAL


@given(st.floats(0, MAX_TIMEOUT * 2, allow_nan=False))
def test_a_formatted_timeout_is_never_shorter_and_hardly_longer(seconds: float) -> None:
    value = format_timeout(seconds)
    parsed = parse_timeout(value)
    assert parsed > 0
    if seconds < MAX_TIMEOUT:
        assert seconds * (1 - 1e-12) <= parsed <= seconds * 1.0001 + 2e-9
    else:
        assert parsed == MAX_TIMEOUT


def test_an_endless_timeout_is_the_longest() -> None:
    assert format_timeout(math.inf) == b"99999999H"
    assert format_timeout(-1) == b"1n"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_message_survives_percent_encoding(text: str) -> None:
    encoded = encode_grpc_message(text)
    assert all(0x20 <= byte < 0x7F for byte in encoded)
    assert decode_grpc_message(encoded) == text


@pytest.mark.parametrize(
    ("value", "text"), [(b"100%", "100%"), (b"%zz", "%zz"), (b"%41%4", "A%4"), (b"%ff", "\N{REPLACEMENT CHARACTER}")]
)
def test_a_wrongly_encoded_message_is_kept(value: bytes, text: str) -> None:
    assert decode_grpc_message(value) == text


_text = st.tuples(
    st.from_regex(r"x-[0-9a-z_.]{1,8}", fullmatch=True),
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E)).map(lambda value: value.strip(" ")),
)
_binary = st.tuples(st.from_regex(r"x-[a-z]{1,8}-bin", fullmatch=True), st.binary(max_size=40))


@given(st.lists(st.one_of(_text, _binary)))
def test_metadata_survives(metadata: list[tuple[str, str | bytes]]) -> None:
    assert decode_metadata(encode_metadata(metadata)) == tuple(metadata)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("", "a"),
        ("Upper", "a"),
        ("with space", "a"),
        (":path", "/"),
        ("grpc-timeout", "1S"),
        ("te", "trailers"),
        ("content-type", "a"),
        ("key", "line\nbreak"),
        ("key", "\N{LATIN SMALL LETTER A WITH DIAERESIS}"),
        ("key", " outer"),
        ("key", b"bytes"),
        ("key-bin", "text"),
    ],
)
def test_metadata_that_may_not_be_sent_is_named(key: str, value: str | bytes) -> None:
    with pytest.raises(ValueError, match="metadata"):
        encode_metadata([(key, value)])


def test_binary_metadata_comes_padded_or_not_and_in_lists() -> None:
    headers = [(b":path", b"/"), (b"a-bin", b"AA=="), (b"a-bin", b"AQ,Ag=="), (b"grpc-status", b"0"), (b"b", b"\xe4")]
    assert decode_metadata(headers) == (("a-bin", b"\0"), ("a-bin", b"\1"), ("a-bin", b"\2"), ("b", "\xe4"))
    with pytest.raises(GrpcError, match="a-bin"):
        decode_metadata([(b"a-bin", b"!!")])


def test_the_first_field_of_a_name() -> None:
    headers = [(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]
    assert header(headers, b"a") == b"1"
    assert header(headers, b"c") is None


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        (b"application/grpc", True),
        (b"application/grpc+proto", True),
        (b"application/grpc;charset=utf-8", True),
        (b"application/grpc ; charset=utf-8", True),
        (b"application/grpc-web+proto", False),
        (b"application/grpcish", False),
        (b"application/json", False),
        (b"", False),
    ],
)
def test_content_types_of_grpc(content_type: bytes, expected: bool) -> None:
    assert is_grpc(content_type) is expected
