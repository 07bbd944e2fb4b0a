"""Chunked bodies: split at any byte, read alike; malformed ones refused wherever they are split."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.wire.http1.chunked import MAX_EXTENSIONS, ChunkedBody
from meshlocal.wire.http1.errors import ProtocolError


def read(body: ChunkedBody, pieces: list[bytes]) -> tuple[bytes, bytes]:
    """What passed on, and what was left over behind the body."""
    passed, rest = b"", b""
    for piece in pieces:
        if body.finished:
            rest += piece
            continue
        out, consumed = body.feed(piece)
        passed += b"".join(out)
        assert consumed == len(piece) or body.finished
        rest += piece[consumed:]
    return passed, rest


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(at)]


CUTS = st.lists(st.integers(0, 10_000), max_size=12)


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    extensions=st.lists(st.sampled_from([b"", b"", b";a", b";a=b", b';x="y z"']), min_size=7, max_size=7),
    trailers=st.sampled_from([b"", b"X-Sum: 1\r\n", b"Content-Length: 3\r\nX-Sum: 1\r\n", b"Host: c\r\n"]),
    rest=st.sampled_from([b"", b"GET / HTTP/1.1\r\n"]),
    cuts=CUTS,
    upper=st.booleans(),
)
def test_round_trip(
    chunks: list[bytes], extensions: list[bytes], trailers: bytes, rest: bytes, cuts: list[int], upper: bool
) -> None:
    size = "%X" if upper else "%x"
    wire = b"".join(
        (size % len(chunk)).encode() + extension + b"\r\n" + chunk + b"\r\n"
        for chunk, extension in zip(chunks, extensions, strict=False)
    )
    bare = b"".join((size % len(chunk)).encode() + b"\r\n" + chunk + b"\r\n" for chunk in chunks)
    wire += b"0" + extensions[6] + b"\r\n" + trailers + b"\r\n"
    kept = b"X-Sum: 1\r\n" if b"X-Sum" in trailers else b""
    pieces = split(wire + rest, cuts)

    body = ChunkedBody()
    assert read(body, pieces) == (bare + b"0\r\n" + kept + b"\r\n", rest)
    assert body.finished

    body = ChunkedBody(decode=True)
    assert read(body, pieces) == (b"".join(chunks), rest)
    assert body.finished


@pytest.mark.parametrize(
    "wire",
    [
        b"\r\n",
        b" 3\r\nabc\r\n0\r\n\r\n",
        b"3 \r\nabc\r\n0\r\n\r\n",
        b"3 ;a\r\nabc\r\n0\r\n\r\n",
        b"0x3\r\nabc\r\n0\r\n\r\n",
        b"+3\r\nabc\r\n0\r\n\r\n",
        b"-3\r\nabc\r\n0\r\n\r\n",
        b"g\r\n",
        b"3\nabc\r\n0\r\n\r\n",
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"3\r\nabc\n0\r\n\r\n",
        b"3\r\nabc0\r\n\r\n",
        b"3\r\nabc\rX0\r\n\r\n",
        b"3\r\nabc\r\r0\r\n\r\n",
        b"3\r\nabcX\n0\r\n\r\n",
        b"3;a\nb\r\nabc\r\n0\r\n\r\n",
        b"3;\0\r\nabc\r\n0\r\n\r\n",
        b"3;" + b"a" * 257 + b"\r\nabc\r\n0\r\n\r\n",
        b"10000000000000000\r\n",
        b"0\r\nA : b\r\n\r\n",
        b"0\r\n folded\r\n\r\n",
        b"0\r\nA: \0\r\n\r\n",
        b"0\r\nA: b\nC: d\r\n\r\n",
    ],
)
@pytest.mark.parametrize("decode", [False, True])
def test_malformed(wire: bytes, decode: bool) -> None:
    with pytest.raises(ProtocolError):
        read(ChunkedBody(decode=decode), [wire])
    with pytest.raises(ProtocolError):
        read(ChunkedBody(decode=decode), [wire[at : at + 1] for at in range(len(wire))])


def test_extensions_are_bounded() -> None:
    chunk = b"1;" + b"a" * 250 + b"\r\nx\r\n"
    with pytest.raises(ProtocolError):
        read(ChunkedBody(), [chunk * (MAX_EXTENSIONS // 250 + 1)])


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_trailers_are_bounded(end: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        read(ChunkedBody(max_trailers=100), [b"0\r\nA: " + b"a" * 100 + end])
    assert caught.value.status == 431


@given(st.binary(max_size=60) | st.text("0123af;\r\n xyz:", max_size=40).map(str.encode), CUTS)
def test_noise_splits_alike(noise: bytes, cuts: list[int]) -> None:
    """Whole or in pieces, noise is refused or read to the same bytes."""

    def outcome(pieces: list[bytes]) -> object:
        body = ChunkedBody()
        try:
            return *read(body, pieces), body.finished
        except ProtocolError:
            return "refused"

    assert outcome([noise] if noise else []) == outcome(split(noise, cuts))


@pytest.mark.parametrize("decode", [False, True])
def test_what_a_client_says_of_a_certificate_stands_in_no_trailer(decode: bool) -> None:
    """T4: an instance that merges trailers would believe it."""
    body = ChunkedBody(decode=decode)
    out, _ = read(body, [b"0\r\nX-Forwarded-Client-Cert: a\r\nx_forwarded_client_cert: b\r\nA: b\r\n\r\n"])
    passed = body.trailers if decode else out
    assert b"cert" not in passed.lower()
    assert b"A: b" in passed
