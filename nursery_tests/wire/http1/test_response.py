"""Response heads: what is refused, and where a body ends."""

import pytest

from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.response import Framing, parse_response


def response(fields: bytes = b"", line: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return line + b"\r\n" + fields + b"\r\n"


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (response(b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n"), "ambiguous_length"),
        (response(b"Content-Length: 3\r\nContent-Length: 3\r\n"), "bad_content_length"),
        (response(b"Content-Length: x\r\n"), "bad_content_length"),
        (response(b"Transfer-Encoding: gzip\r\n"), "bad_transfer_encoding"),
        (response(b"Transfer-Encoding: gzip, chunked\r\n"), "bad_transfer_encoding"),
        (response(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"), "bad_transfer_encoding"),
        (response(b"Transfer-Encoding: chunked\r\n", b"HTTP/1.0 200 OK"), "bad_transfer_encoding"),
        (response(b"A: b\r\n c\r\n"), "folded_header"),
        (response(b"A : b\r\n"), "bad_header"),
        (response(b"A: b\0\r\n"), "bad_header"),
        (response(b"A: b\n"), "bad_line_end"),
        (response(b"A: b\rC: d\r\n"), "bad_line_end"),
        (response(b"A: b\r\n" * 129), "too_many_headers"),
        (response(line=b"HTTP/1.1 OK"), "bad_status_line"),
        (response(line=b"HTTP/1.1 99 OK"), "bad_status_line"),
        (response(line=b"HTTP/1.1 2000 OK"), "bad_status_line"),
        (response(line=b"HTTP/1.1  200 OK"), "bad_status_line"),
        (response(line=b"HTTP/2.0 200 OK"), "bad_status_line"),
        (response(line=b"ICY 200 OK"), "bad_status_line"),
        (response(line=b"SSH-2.0-OpenSSH"), "bad_status_line"),
        (b"HTTP/1.1 200 OK\n\r\n\r\n", "bad_status_line"),
    ],
)
def test_refused(head: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_response(head)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("head", "method", "framing", "keep_alive"),
    [
        (response(b"Content-Length: 3\r\n"), b"GET", Framing.LENGTH, True),
        (response(b"Content-Length: 0\r\n"), b"GET", Framing.NONE, True),
        (response(b"Content-Length: 3\r\n"), b"HEAD", Framing.NONE, True),
        (response(b"Transfer-Encoding: chunked\r\n"), b"GET", Framing.CHUNKED, True),
        (response(b"Transfer-Encoding: chunked\r\n"), b"HEAD", Framing.NONE, True),
        (response(), b"GET", Framing.CLOSE, True),
        (response(line=b"HTTP/1.1 204 No Content"), b"GET", Framing.NONE, True),
        (response(b"Content-Length: 3\r\n", b"HTTP/1.1 204 No Content"), b"GET", Framing.NONE, False),
        (response(b"Content-Length: 3\r\n", b"HTTP/1.1 304 Not Modified"), b"GET", Framing.NONE, True),
        (response(line=b"HTTP/1.1 100 Continue"), b"POST", Framing.NONE, True),
        (response(b"Connection: close\r\nContent-Length: 3\r\n"), b"GET", Framing.LENGTH, False),
        (response(b"Content-Length: 3\r\n", b"HTTP/1.0 200 OK"), b"GET", Framing.LENGTH, False),
        (response(b"Connection: keep-alive\r\n", b"HTTP/1.0 200 OK"), b"GET", Framing.CLOSE, True),
        (response(line=b"HTTP/1.1 200"), b"GET", Framing.CLOSE, True),
        (response(line=b"HTTP/1.1 200 "), b"GET", Framing.CLOSE, True),
        (response(line=b"HTTP/1.1 200 Sch\xf6n"), b"GET", Framing.CLOSE, True),
    ],
)
def test_framing(head: bytes, method: bytes, framing: Framing, keep_alive: bool) -> None:
    """RFC 9112, 6.3."""
    parsed = parse_response(head)
    assert parsed.framing(method) is framing
    assert parsed.keep_alive is keep_alive
