"""Heads on their way to the next hop: RFC 9110, 7.6.1, both ways."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.wire.http1.fields import end_to_end
from meshlocal.wire.http1.request import parse_request
from meshlocal.wire.http1.response import Framing, parse_response
from meshlocal.wire.http1.rewrite import client_head, generated_answer, upstream_head


def up(raw: bytes, **options: object) -> bytes:
    return upstream_head(parse_request(raw), **options)  # type: ignore[arg-type]  # passed through


def test_untouched_head_is_the_very_bytes() -> None:
    raw = b"GET / HTTP/1.1\r\nHost: b\r\nX: y\r\n\r\n"
    assert up(raw) == raw


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        (b"Connection: keep-alive\r\n", b""),
        (b"connection: x-a, close\r\nX-A: 1\r\nX-B: 2\r\n", b"X-B: 2\r\n"),
        (b"Keep-Alive: 3\r\nTE: trailers\r\nProxy-Connection: a\r\nProxy-Authorization: b\r\nZ: 1\r\n", b"Z: 1\r\n"),
        (b"Upgrade: h2c\r\nHTTP2-Settings: A\r\nConnection: upgrade, http2-settings\r\n", b""),
        (b"Connection: host, content-length\r\nContent-Length: 0\r\n", b"Content-Length: 0\r\n"),
        (b"Trailer: X-Sum\r\nTransfer-Encoding:  CHUNKED\r\n", b"Trailer: X-Sum\r\ntransfer-encoding: chunked\r\n"),
        (b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b"connection: upgrade\r\nupgrade: websocket\r\n"),
        (b"TE: a\r\nTE: b\r\nTE: c\r\n", b""),
        (b"Te-x: a\r\nTE: b\r\n", b"Te-x: a\r\n"),
        # What a client says of a certificate (T4), in any spelling that an application may take for it.
        (b"X-Forwarded-Client-Cert: a\r\nA: b\r\nx-forwarded-client-cert: c\r\n", b"A: b\r\n"),
        (b"x_forwarded_client_cert: a\r\nX-Forwarded_Client-CERT: b\r\n", b""),
        (b"X-Forwarded-Client-Certs: a\r\n", b"X-Forwarded-Client-Certs: a\r\n"),
    ],
)
def test_request_hop_by_hop(fields: bytes, kept: bytes) -> None:
    assert up(b"GET / HTTP/1.1\r\nHost: b\r\n" + fields + b"\r\n") == b"GET / HTTP/1.1\r\nHost: b\r\n" + kept + b"\r\n"


@pytest.mark.parametrize(
    ("raw", "options", "expected"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", {"host": b"b"}, b"GET / HTTP/1.1\r\nHost: b\r\n\r\n"),
        (b"GET http://c:1/p HTTP/1.1\r\nHost: b\r\nX: y\r\n\r\n", {}, b"GET /p HTTP/1.1\r\nHost: c:1\r\nX: y\r\n\r\n"),
        (
            b"GET / HTTP/1.1\r\nHost: b\r\n\r\n",
            {"extra": b"via: 1.1 m\r\n"},
            b"GET / HTTP/1.1\r\nHost: b\r\nvia: 1.1 m\r\n\r\n",
        ),
        (
            b"GET / HTTP/1.1\r\nHost: b\r\nX-Forwarded-For: 1\r\nX-Forwarded-Proto: http\r\n\r\n",
            {"strip_forwarded": True},
            b"GET / HTTP/1.1\r\nHost: b\r\n\r\n",
        ),
    ],
)
def test_request_rewritten(raw: bytes, options: dict[str, object], expected: bytes) -> None:
    assert up(raw, **options) == expected


@pytest.mark.parametrize(
    ("raw", "framing", "options", "expected"),
    [
        (
            b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nA: b\r\nContent-Length: 1\r\n\r\n",
            Framing.LENGTH,
            {},
            b"HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 1\r\n\r\n",
        ),
        (
            b"HTTP/1.0 200 OK\r\nA: b\r\n\r\n",
            Framing.CHUNKED,
            {},
            b"HTTP/1.1 200 OK\r\nA: b\r\ntransfer-encoding: chunked\r\n\r\n",
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            Framing.CLOSE,
            {"close": True},
            b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n",
        ),
        (
            b"HTTP/1.1 200\r\nContent-Length: 1\r\n\r\n",
            Framing.LENGTH,
            {"announce_keep_alive": True},
            b"HTTP/1.1 200 \r\nContent-Length: 1\r\nconnection: keep-alive\r\n\r\n",
        ),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", Framing.NONE, {}, b"HTTP/1.1 204 No Content\r\n\r\n"),
        (
            b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
            Framing.NONE,
            {},
            b"HTTP/1.1 101 S\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        ),
    ],
)
def test_response(raw: bytes, framing: Framing, options: dict[str, object], expected: bytes) -> None:
    assert client_head(parse_response(raw), framing, **options) == expected  # type: ignore[arg-type]  # passed through


NAMES = [b"A", b"Connection", b"X-Listed", b"Keep-Alive", b"TE", b"Upgrade", b"Te", b"Teb", b"transfer-encoding"]
DROPPED = {b"connection", b"x-listed", b"keep-alive", b"te", b"upgrade", b"transfer-encoding"}


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from([b"", b" v", b"\tTE: x", b" Connection:"])), max_size=8)
)
def test_exactly_the_hop_fields_go(fields: list[tuple[bytes, bytes]]) -> None:
    def block(rows: list[tuple[bytes, bytes]]) -> bytes:
        return b"".join(name + b":" + value + b"\r\n" for name, value in rows)

    kept = [row for row in fields if row[0].lower() not in DROPPED]
    assert end_to_end(block(fields), frozenset({b"x-listed"})) == block(kept)


def test_generated_answer_parses() -> None:
    raw = generated_answer(503, "no_instance", "no instance is known", close=True)
    head, _, body = raw.partition(b"\r\n\r\n")
    parsed = parse_response(head + b"\r\n\r\n")
    assert parsed.status == 503
    assert parsed.content_length == len(body)
    assert b"x-meshlocal-error: no_instance\r\n" in raw
    assert body.count(b"\n") == 1
    assert generated_answer(408, "x", "y", without_body=True).endswith(b"\r\n\r\n")
