"""A response's head: strict parsing, and where its body ends (RFC 9112, 6.3)."""

from __future__ import annotations

import re
from enum import StrEnum

import httptools

from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.fields import FIELD_LINES, connection_options, explain
from meshlocal.wire.http1.request import HeadLimits, parse_content_length

_RESPONSE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])((?: [\t -~\x80-\xff]*+)?+)\r\n(" + FIELD_LINES + rb")\r\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] [1-9][0-9][0-9](?: [\t -~\x80-\xff]*)?")
_DECISIVE = re.compile(
    rb"\r\n(connection|content-length|keep-alive|proxy-connection|te|transfer-encoding|upgrade):[ \t]*+([^\r]*+)",
    re.IGNORECASE,
)


class Framing(StrEnum):
    """How the end of a response's body is told."""

    NONE = "none"
    """There is no body."""
    LENGTH = "length"
    """By Content-Length."""
    CHUNKED = "chunked"
    """By chunks."""
    CLOSE = "close"
    """By the end of the connection."""


class ResponseHead:
    """A response's head that passed every check.

    Attributes:
        raw: all its bytes, with the empty line.
        block: the bytes of its field lines.
        status: 100 to 999.
        reason: the phrase, with the space before it; may be empty.
        minor: 1 for HTTP/1.1, 0 for HTTP/1.0.
        content_length: as the field says; None if there is none.
        chunked: Transfer-Encoding is chunked.
        keep_alive: the upstream lets the connection live on.
        options: of its Connection field.
        hop_fields: it has fields that do not go on to the next hop.
        upgrade: the Upgrade field; empty if there is none.
        usual: where the body ends, for the answer to a request of any method but HEAD.
        size: bytes of that body, if the head says it; -1 if it does not, or is an interim one.
        onward: what goes to the client, by what it depends on (`rewrite.client_head`).
    """

    __slots__ = (
        "block",
        "chunked",
        "content_length",
        "hop_fields",
        "keep_alive",
        "minor",
        "onward",
        "options",
        "raw",
        "reason",
        "size",
        "status",
        "upgrade",
        "usual",
    )

    def __init__(self, raw: bytes, minor: int, status: int, reason: bytes, block: bytes) -> None:
        self.raw = raw
        self.minor = minor
        self.status = status
        self.reason = reason
        self.block = block
        self.keep_alive = minor == 1
        self.content_length: int | None = None
        self.chunked = False
        self.options: frozenset[bytes] = frozenset()
        self.hop_fields = False
        self.upgrade = b""
        self.usual = Framing.NONE
        self.size = -1
        self.onward: dict[tuple[Framing, bytes, bool, bool], bytes] = {}

    def framing(self, method: bytes) -> Framing:
        """Where the body ends, for the answer to a request of this method."""
        return Framing.NONE if method == b"HEAD" else self.usual


class _NoCallbacks:
    """llhttp checks at its own speed when nobody asks it what it found."""


_NO_CALLBACKS = _NoCallbacks()


def parse_response(raw: bytes, limits: HeadLimits = HeadLimits()) -> ResponseHead:  # noqa: B008 - it is immutable
    """Check and read a whole head, up to and with its empty line.

    Raises:
        ProtocolError: it is malformed.
    """
    match = _RESPONSE.fullmatch(raw)
    if match is None:
        if not _STATUS_LINE.fullmatch(raw.partition(b"\r\n")[0]):
            raise ProtocolError(502, "bad_status_line", "malformed status line")
        raise explain(raw)
    minor, status, reason, block = match.groups()
    if block.count(b"\n") > limits.fields:
        raise ProtocolError(502, "too_many_headers", f"more than {limits.fields} header lines")
    head = ResponseHead(raw, 1 if minor == b"1" else 0, int(status), reason, block)
    _read_fields(head, match.end(3))
    # Asked last: of what both refuse, ours says what is wrong in words that are documented.
    try:
        httptools.HttpResponseParser(_NO_CALLBACKS).feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass  # 101: to llhttp the end of HTTP on this connection
    except httptools.HttpParserError as error:
        raise ProtocolError(502, "bad_response", f"malformed response: {error}") from None
    head.usual = _usual_framing(head)
    if head.status >= 200 and head.usual in (Framing.LENGTH, Framing.NONE):
        head.size = (head.content_length or 0) if head.usual is Framing.LENGTH else 0
    return head


def _usual_framing(head: ResponseHead) -> Framing:
    status = head.status
    if status < 200 or status == 204 or status == 304:
        return Framing.NONE
    if head.chunked:
        return Framing.CHUNKED
    if head.content_length is not None:
        return Framing.LENGTH if head.content_length else Framing.NONE
    return Framing.CLOSE


def _read_fields(head: ResponseHead, start: int) -> None:
    connection: list[bytes] = []
    encoding: bytes | None = None
    for name, value in _DECISIVE.findall(head.raw, start):
        name = name.lower()
        if name == b"content-length":
            if head.content_length is not None:
                raise ProtocolError(502, "bad_content_length", "more than one Content-Length field")
            head.content_length = parse_content_length(value.rstrip(b" \t"))
            continue
        head.hop_fields = True
        if name == b"connection":
            connection.append(value)
        elif name == b"transfer-encoding":
            if encoding is not None:
                raise ProtocolError(502, "bad_transfer_encoding", "more than one Transfer-Encoding field")
            encoding = value.rstrip(b" \t").lower()
        elif name == b"upgrade":
            head.upgrade = value.rstrip(b" \t")
    if connection:
        options = head.options = connection_options(connection)
        if b"close" in options:
            head.keep_alive = False
        elif b"keep-alive" in options:
            head.keep_alive = True
    if encoding is not None:
        if head.content_length is not None:
            raise ProtocolError(502, "ambiguous_length", "both Content-Length and Transfer-Encoding")
        if encoding != b"chunked" or head.minor == 0:
            raise ProtocolError(502, "bad_transfer_encoding", "a transfer encoding other than chunked in HTTP/1.1")
        head.chunked = True
    if (head.status < 200 or head.status == 204) and (head.chunked or head.content_length):
        # Forbidden (RFC 9110, 8.6; RFC 9112, 6.1). There is no body whatever they say, but what follows is not to
        # be trusted to be the next response.
        head.keep_alive = False
