"""Request heads: what is refused and with which status, what is read out of the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.request import HTTP2_PREFACE, HeadLimits, check_unfinished, parse_request

HOST = b"Host: b\r\n"


def request(line: bytes = b"GET / HTTP/1.1", fields: bytes = HOST) -> bytes:
    return line + b"\r\n" + fields + b"\r\n"


REFUSED = [
    # (what, head, status, reason)
    (
        "both lengths",
        request(fields=HOST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n"),
        400,
        "ambiguous_length",
    ),
    (
        "both lengths, the other way",
        request(fields=b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n" + HOST),
        400,
        "ambiguous_length",
    ),
    ("length twice", request(fields=HOST + b"Content-Length: 3\r\nContent-Length: 3\r\n"), 400, "bad_content_length"),
    ("two lengths", request(fields=HOST + b"Content-Length: 3\r\nContent-Length: 4\r\n"), 400, "bad_content_length"),
    ("length list", request(fields=HOST + b"Content-Length: 3, 3\r\n"), 400, "bad_content_length"),
    ("length with a sign", request(fields=HOST + b"Content-Length: +3\r\n"), 400, "bad_content_length"),
    ("negative length", request(fields=HOST + b"Content-Length: -3\r\n"), 400, "bad_content_length"),
    ("hex length", request(fields=HOST + b"Content-Length: 0x3\r\n"), 400, "bad_content_length"),
    ("empty length", request(fields=HOST + b"Content-Length: \r\n"), 400, "bad_content_length"),
    ("length in words", request(fields=HOST + b"Content-Length: three\r\n"), 400, "bad_content_length"),
    ("length with a space within", request(fields=HOST + b"Content-Length: 1 2\r\n"), 400, "bad_content_length"),
    (
        "length beyond 64 bits",
        request(fields=HOST + b"Content-Length: 18446744073709551617\r\n"),
        400,
        "bad_content_length",
    ),
    (
        "length beyond sense",
        request(fields=HOST + b"Content-Length: 9000000000000000000\r\n"),
        400,
        "bad_content_length",
    ),
    ("folded header", request(fields=HOST + b"A: b\r\n c\r\n"), 400, "folded_header"),
    ("folded with a tab", request(fields=HOST + b"A: b\r\n\tc\r\n"), 400, "folded_header"),
    ("fold at the start", request(fields=b" A: b\r\n" + HOST), 400, "folded_header"),
    ("bare LF", b"GET / HTTP/1.1\nHost: b\n\n\r\n\r\n", 400, "bad_line_end"),
    ("bare LF between headers", request(fields=HOST + b"A: b\nC: d\r\n"), 400, "bad_line_end"),
    ("bare CR in a value", request(fields=HOST + b"A: b\rC: d\r\n"), 400, "bad_line_end"),
    ("NUL in a value", request(fields=HOST + b"A: b\0c\r\n"), 400, "bad_header"),
    ("NUL in a name", request(fields=HOST + b"A\0: b\r\n"), 400, "bad_header"),
    ("control character", request(fields=HOST + b"A: \x01\r\n"), 400, "bad_header"),
    ("space before the colon", request(fields=HOST + b"A : b\r\n"), 400, "bad_header"),
    ("space before the colon of a length", request(fields=HOST + b"Content-Length : 3\r\n"), 400, "bad_header"),
    ("no colon", request(fields=HOST + b"nothing\r\n"), 400, "bad_header"),
    ("empty name", request(fields=HOST + b": b\r\n"), 400, "bad_header"),
    ("name with a bracket", request(fields=HOST + b"A(b): c\r\n"), 400, "bad_header"),
    ("name not ASCII", request(fields=HOST + b"\xc3\xa4: c\r\n"), 400, "bad_header"),
    ("no host", request(fields=b""), 400, "bad_host"),
    ("two hosts", request(fields=HOST + HOST), 400, "bad_host"),
    ("two different hosts", request(fields=HOST + b"host: c\r\n"), 400, "bad_host"),
    ("host with a space", request(fields=b"Host: a b\r\n"), 400, "bad_host"),
    ("host with a path", request(fields=b"Host: b/c\r\n"), 400, "bad_host"),
    ("host with a user", request(fields=b"Host: u@b\r\n"), 400, "bad_host"),
    ("HTTP/0.9", b"GET /\r\n\r\n", 505, "version_not_supported"),
    ("HTTP/2.0", request(b"GET / HTTP/2.0"), 505, "version_not_supported"),
    ("HTTP/1.2", request(b"GET / HTTP/1.2"), 505, "version_not_supported"),
    ("http/1.1", request(b"GET / http/1.1"), 400, "bad_request_line"),
    ("two spaces", request(b"GET  / HTTP/1.1"), 400, "bad_request_line"),
    ("tab", request(b"GET\t/ HTTP/1.1"), 400, "bad_request_line"),
    ("space at the end", request(b"GET / HTTP/1.1 "), 400, "bad_request_line"),
    ("space in the target", request(b"GET /a b HTTP/1.1"), 400, "bad_request_line"),
    ("target not ASCII", request(b"GET /\xc3\xa4 HTTP/1.1"), 400, "bad_request_line"),
    ("unknown method", request(b"FROB / HTTP/1.1"), 501, "unknown_method"),
    ("small letters", request(b"get / HTTP/1.1"), 501, "unknown_method"),
    ("gzip, chunked", request(fields=HOST + b"Transfer-Encoding: gzip, chunked\r\n"), 501, "unknown_transfer_encoding"),
    (
        "chunked, chunked",
        request(fields=HOST + b"Transfer-Encoding: chunked, chunked\r\n"),
        400,
        "bad_transfer_encoding",
    ),
    ("gzip", request(fields=HOST + b"Transfer-Encoding: gzip\r\n"), 400, "bad_transfer_encoding"),
    ("chunked, gzip", request(fields=HOST + b"Transfer-Encoding: chunked, gzip\r\n"), 400, "bad_transfer_encoding"),
    ("identity", request(fields=HOST + b"Transfer-Encoding: identity\r\n"), 400, "bad_transfer_encoding"),
    ("xchunked", request(fields=HOST + b"Transfer-Encoding: xchunked\r\n"), 400, "bad_transfer_encoding"),
    ("quoted chunked", request(fields=HOST + b'Transfer-Encoding: "chunked"\r\n'), 400, "bad_transfer_encoding"),
    (
        "encoding twice",
        request(fields=HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"),
        400,
        "bad_transfer_encoding",
    ),
    (
        "encoding in HTTP/1.0",
        request(b"POST / HTTP/1.0", HOST + b"Transfer-Encoding: chunked\r\n"),
        400,
        "bad_transfer_encoding",
    ),
    ("other expectation", request(fields=HOST + b"Expect: miracles\r\n"), 417, "bad_expectation"),
    ("* with GET", request(b"GET * HTTP/1.1"), 400, "bad_target"),
    ("relative path", request(b"GET a/b HTTP/1.1"), 400, "bad_target"),
    ("fragment", request(b"GET /a#b HTTP/1.1"), 400, "bad_target"),
    ("https target", request(b"GET https://b/ HTTP/1.1"), 400, "bad_target"),
    ("target with a user", request(b"GET http://u:p@b/ HTTP/1.1"), 400, "bad_host"),
    ("target without host", request(b"GET http:///a HTTP/1.1"), 400, "bad_target"),
    ("CONNECT without port", request(b"CONNECT b HTTP/1.1"), 400, "bad_target"),
    ("CONNECT with a path", request(b"CONNECT /b HTTP/1.1"), 400, "bad_target"),
    ("CONNECT with a body", request(b"CONNECT b:80 HTTP/1.1", HOST + b"Content-Length: 3\r\n"), 400, "bad_request"),
    ("bad connection option", request(fields=HOST + b"Connection: a b\r\n"), 400, "bad_connection"),
    ("long target", request(b"GET /" + b"a" * 20000 + b" HTTP/1.1"), 414, "target_too_long"),
    ("many headers", request(fields=HOST + b"A: b\r\n" * 128), 431, "too_many_headers"),
]


@pytest.mark.parametrize(("head", "status", "reason"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(head: bytes, status: int, reason: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_request(head)
    assert (caught.value.status, caught.value.reason) == (status, reason)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (request(), {"method": b"GET", "target": b"/", "host": b"b", "keep_alive": True, "has_body": False}),
        (request(fields=b"hOsT:b:80 \t\r\n"), {"host": b"b", "authority": b"b:80"}),
        (request(fields=b"Host: [::1]:80\r\n"), {"host": b"[::1]", "authority": b"[::1]:80"}),
        (request(fields=b"Host:\r\n"), {"host": b"", "has_host": True}),
        (request(b"GET / HTTP/1.0", b""), {"minor": 0, "keep_alive": False, "has_host": False}),
        (request(b"GET / HTTP/1.0", b"Connection: Keep-Alive\r\n"), {"keep_alive": True}),
        (request(fields=HOST + b"Connection: close\r\n"), {"keep_alive": False, "hop_fields": True}),
        (request(fields=HOST + b"Connection: keep-alive, CLOSE\r\n"), {"keep_alive": False}),
        (request(fields=HOST + b"Connection: a,\r\nConnection: , b\r\n"), {"options": frozenset({b"a", b"b"})}),
        (request(fields=HOST + b"Content-Length: 0\r\n"), {"content_length": 0, "has_body": False}),
        (request(fields=HOST + b"Content-Length: 12 \r\n"), {"content_length": 12, "has_body": True}),
        (request(fields=HOST + b"Transfer-Encoding: Chunked\r\n"), {"chunked": True, "has_body": True}),
        (request(fields=HOST + b"Expect: 100-Continue\r\n"), {"expect_continue": True}),
        (request(b"GET / HTTP/1.0", b"Expect: 100-continue\r\n"), {"expect_continue": False}),
        (request(fields=HOST + b"Idempotency-Key: x\r\n"), {"idempotency_key": True}),
        (request(fields=HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"), {"upgrade": b"websocket"}),
        (request(fields=HOST + b"Upgrade: websocket\r\n"), {"upgrade": b"", "hop_fields": True}),
        (
            request(fields=HOST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n"),
            {"upgrade": b""},
        ),
        (
            request(b"GET http://c:8080/p?q HTTP/1.1"),
            {"target": b"/p?q", "host": b"c", "authority": b"c:8080", "as_sent": False},
        ),
        (request(b"GET HTTP://c?q HTTP/1.1"), {"target": b"/?q", "host": b"c"}),
        (request(b"OPTIONS http://c HTTP/1.1"), {"target": b"*", "host": b"c"}),
        (request(b"OPTIONS * HTTP/1.1"), {"target": b"*", "host": b"b"}),
        (request(b"CONNECT c:443 HTTP/1.1"), {"host": b"c", "authority": b"c:443"}),
        (request(fields=HOST + b"A: \xe4\r\n"), {"hop_fields": False}),
    ],
)
def test_read(head: bytes, expected: dict[str, object]) -> None:
    parsed = parse_request(head)
    assert {name: getattr(parsed, name) for name in expected} == expected


LIMITS = HeadLimits(head=1000, fields=10, target=100)


@pytest.mark.parametrize(
    ("received", "status"),
    [
        (b"GET /" + b"a" * 200, 414),
        (b"GET / HTTP/1.1\r\n" + b"a" * 1000, 431),
        (b"GET / HTTP/1.1\n", 400),
        (b"GET /\r\n", 505),
        (b"\x16\x03\x01\x02", 400),
        (b"GET * HTTP/2.0\r\n", 505),
        (b"PRI * HTTP/2.1\r\n", 505),
        (b"PRI * HTTP/2.0\r\nhost: b\r\n", 505),
    ],
)
def test_refused_before_its_end(received: bytes, status: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_unfinished(received, LIMITS)
    assert caught.value.status == status


WHOLE = request(b"GET /some/path?query=1 HTTP/1.1", HOST + b"User-Agent: x\r\nContent-Length: 5\r\n")


@given(st.sampled_from([WHOLE, HTTP2_PREFACE]), st.data())
def test_no_beginning_of_a_good_head_is_refused(whole: bytes, data: st.DataObject) -> None:
    """Nor one of HTTP/2's preface, which has an answer of its own once it is whole.

    One that ends with something else is refused as soon as its first line is there.
    """
    check_unfinished(whole[: data.draw(st.integers(0, len(whole) - 1))], LIMITS)
    bad = whole.replace(b" HTTP/", b" HTTQ/")
    with pytest.raises(ProtocolError):
        check_unfinished(bad[: data.draw(st.integers(bad.index(b"\n") + 1, len(bad)))], LIMITS)


@given(
    st.binary(max_size=200)
    | st.lists(
        st.sampled_from(
            [
                b"GET ",
                b"/",
                b" HTTP/1.1",
                b"\r\n",
                b"\n",
                b"\r",
                b"Host: b",
                b"Content-Length:",
                b" 1",
                b"Transfer-Encoding: chunked",
                b"\0",
                b" ",
                b":",
                b"a",
                b"Connection: ",
                b"http://c",
                b"\t",
            ]
        ),
        max_size=20,
    ).map(b"".join)
)
def test_what_passes_has_one_meaning(noise: bytes) -> None:
    """Whatever is thrown at it, a head passes or is refused; and what passes is plain enough for any other parser."""
    for raw in (noise, b"GET / HTTP/1.1\r\nHost: b\r\n" + noise + b"\r\n\r\n"):
        try:
            head = parse_request(raw)
        except ProtocolError:
            continue
        assert raw.endswith(b"\r\n\r\n")
        assert raw.count(b"\r\n\r\n") == 1
        assert b"\0" not in raw
        assert raw.count(b"\r") == raw.count(b"\n") == raw.count(b"\r\n")
        lines = raw[:-4].split(b"\r\n")[1:]
        names = [line.partition(b":")[0].lower() for line in lines]
        assert all(name and name == name.strip() for name in names)
        assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
        assert names.count(b"host") <= 1
        assert head.chunked == (b"transfer-encoding" in names)
