"""A request's head: strict parsing, the forms of its target, how its body is framed."""

from __future__ import annotations

import re
from typing import NamedTuple

import httptools

from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.fields import CLIENT_CERT_LOOKALIKE, FIELD_LINES, TOKEN, connection_options, explain

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\n"
"""How a client begins that takes it for known that HTTP/2 is served, as far as it looks like a head (RFC 9113, 3.4)."""

MARKS = frozenset({b"traceparent", b"tracestate", b"x-request-id"})
"""Fields that say which request one is, or of which trace."""

MAX_BODY = 10**18
"""The longest body that a Content-Length may announce: well within 64 bits, everywhere."""

_REQUEST = re.compile(rb"(" + TOKEN + rb"++) ([!-~]++) HTTP/1\.([01])\r\n(" + FIELD_LINES + rb")\r\n")
_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb"+) ([!-~]+) HTTP/([0-9])\.([0-9])")

_DECISIVE = re.compile(
    rb"\r\n(connection|content-length|expect|host|http2-settings|idempotency-key|keep-alive|proxy-authorization"
    rb"|proxy-connection|te|traceparent|tracestate|transfer-encoding|upgrade|x-forwarded-for|x-forwarded-proto"
    rb"|x-request-id|" + CLIENT_CERT_LOOKALIKE + rb"):[ \t]*+([^\r]*+)",
    re.IGNORECASE,
)
_HOST = re.compile(
    rb"((?:[A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2})*+|\[[0-9A-Fa-f:.]++(?:%25[A-Za-z0-9\-._~]++)?\])(?::([0-9]{0,5}))?"
)
_FIRST = re.compile(TOKEN)
_ABSOLUTE = re.compile(rb"([A-Za-z][A-Za-z0-9+.\-]*)://([^/?#]*)(.*)", re.DOTALL)


class HeadLimits(NamedTuple):
    """How large a head may be.

    Attributes:
        head: bytes of all of it (431).
        fields: header lines (431).
        target: bytes of the request's target (414).
    """

    head: int = 65536
    fields: int = 128
    target: int = 16384


class RequestHead:
    """A request's head that passed every check. Not changed once it is parsed: many requests may have the same.

    Attributes:
        raw: all its bytes, with the empty line.
        block: the bytes of its field lines.
        method: as it was sent; methods are case-sensitive.
        target: in origin-form or `*`; for CONNECT the authority.
        minor: 1 for HTTP/1.1, 0 for HTTP/1.0.
        http2: it came in HTTP/2 (`meshlocal.wire.http2_heads`).
        host: of the target if that was absolute, else of the Host field; without the port; empty if there is none.
        authority: the same with the port.
        as_sent: the target is the one that was sent.
        has_host: there is a Host field.
        content_length: of the body; None if it is chunked or absent.
        plain_size: bytes of the body, if all of it follows its head at once, and the connection stays HTTP: 0 for none.
            -1 if it is chunked, or held back until it is asked for, or if another protocol is asked for.
        chunked: the body is.
        keep_alive: the client lets the connection live on.
        options: of its Connection field.
        hop_fields: it has fields that do not go on to the next hop.
        upgrade: the protocols that the client would switch to; empty if none.
        expect_continue: the client waits for 100 before it sends the body.
        idempotency_key: it carries one, so that sending it twice does no harm.
        forwarded: it has an X-Forwarded-For or -Proto field.
        marked: it has a field that says which request it is, or of which trace.
        request_id: what it is called; empty: it does not say.
        trace_parent: the field `traceparent`; empty if there is none, and no trace's if there is more than one.
        timeout: seconds that its client gives it; None if it does not say. A call's (`meshlocal.wire.http2_heads`).
        onward: what goes to an instance behind the first line, by what it depends on (`rewrite.upstream_head`); shared
            by all heads with these field lines.
    """

    timeout: float | None = None
    http2 = False

    __slots__ = (
        "as_sent",
        "authority",
        "block",
        "chunked",
        "content_length",
        "expect_continue",
        "forwarded",
        "has_host",
        "hop_fields",
        "host",
        "idempotency_key",
        "keep_alive",
        "marked",
        "method",
        "minor",
        "onward",
        "options",
        "plain_size",
        "raw",
        "request_id",
        "target",
        "trace_parent",
        "upgrade",
    )

    def __init__(self, raw: bytes, method: bytes, target: bytes, minor: int, block: bytes) -> None:
        self.raw = raw
        self.method = method
        self.target = target
        self.minor = minor
        self.block = block
        self.keep_alive = minor == 1
        self.host = b""
        self.authority = b""
        self.as_sent = True
        self.has_host = False
        self.content_length: int | None = None
        self.plain_size = -1
        self.chunked = False
        self.options: frozenset[bytes] = frozenset()
        self.hop_fields = False
        self.upgrade = b""
        self.expect_continue = False
        self.idempotency_key = False
        self.forwarded = False
        self.marked = False
        self.request_id = b""
        self.trace_parent = b""
        self.onward: dict[tuple[bytes, bytes, bool, bytes], bytes] = {}

    def with_target(self, raw: bytes, target: bytes) -> RequestHead:
        """The head of the same request for another path; `raw` are all its bytes."""
        head = self._copy()
        head.raw = raw
        head.target = target
        return head

    def without_upgrade(self) -> RequestHead:
        """The head of the same request, but that the client would switch to no other protocol."""
        if not self.upgrade:
            return self
        head = self._copy()
        head.upgrade = b""
        return head

    def _copy(self) -> RequestHead:
        head = RequestHead.__new__(RequestHead)
        head.raw = self.raw
        head.target = self.target
        head.method = self.method
        head.minor = self.minor
        head.block = self.block
        head.keep_alive = self.keep_alive
        head.host = self.host
        head.authority = self.authority
        head.as_sent = self.as_sent
        head.has_host = self.has_host
        head.content_length = self.content_length
        head.plain_size = self.plain_size
        head.chunked = self.chunked
        head.options = self.options
        head.hop_fields = self.hop_fields
        head.upgrade = self.upgrade
        head.expect_continue = self.expect_continue
        head.idempotency_key = self.idempotency_key
        head.forwarded = self.forwarded
        head.marked = self.marked
        head.request_id = self.request_id
        head.trace_parent = self.trace_parent
        head.onward = self.onward
        return head

    @property
    def protocol(self) -> str:
        """The version of HTTP that it came in: `1.0`, `1.1` or `2`."""
        return "2" if self.http2 else "1.1" if self.minor else "1.0"

    @property
    def has_body(self) -> bool:
        """Whether bytes of a body follow."""
        return self.chunked or bool(self.content_length)

    def note_mark(self, name: bytes, value: bytes) -> None:
        """Note a field that says which request it is, or of which trace.

        Args:
            name: `x-request-id`, `traceparent` or `tracestate`.
            value: of the field. It decides nothing here, so that no value is refused.
        """
        if name == b"x-request-id":
            self.request_id = self.request_id or value
        elif name == b"traceparent":
            # Of two, neither counts (Trace Context, 3.2.2).
            self.trace_parent = b"-" if self.trace_parent else value
        self.marked = True

    def drop_marks(self, options: frozenset[bytes]) -> None:
        """Of those fields, pass over the ones that a Connection field keeps to this hop."""
        if b"x-request-id" in options:
            self.request_id = b""
        if b"traceparent" in options:
            self.trace_parent = b""


NO_HEAD = RequestHead(b"", b"", b"", 1, b"")
"""In the place of a request's head where there is none."""


class _NoCallbacks:
    """llhttp checks at its own speed when nobody asks it what it found."""


_NO_CALLBACKS = _NoCallbacks()


def parse_request(raw: bytes, limits: HeadLimits = HeadLimits()) -> RequestHead:  # noqa: B008 - it is immutable
    """Check and read a whole head, up to and with its empty line.

    Raises:
        ProtocolError: it is refused.
    """
    match = _REQUEST.fullmatch(raw)
    if match is None:
        raise _explain(raw, limits)
    method, target, minor, block = match.groups()
    if len(target) > limits.target:
        raise ProtocolError(414, "target_too_long", f"the target is longer than {limits.target} bytes")
    if block.count(b"\n") > limits.fields:
        raise ProtocolError(431, "too_many_headers", f"more than {limits.fields} header lines")
    head = RequestHead(raw, method, target, 1 if minor == b"1" else 0, block)
    _read_fields(head, match.end(3))
    if target[0] != 0x2F or method == b"CONNECT" or b"#" in target:
        _read_target(head)
    _second_opinion(raw)
    if not (head.chunked or head.expect_continue or head.upgrade) and head.method != b"CONNECT":
        head.plain_size = head.content_length or 0
    return head


def _second_opinion(raw: bytes) -> None:
    """Asked last: of what both refuse, ours says what is wrong in words that are documented."""
    try:
        httptools.HttpRequestParser(_NO_CALLBACKS).feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass  # CONNECT and Upgrade: to llhttp the end of HTTP on this connection
    except httptools.HttpParserInvalidMethodError:
        raise ProtocolError(501, "unknown_method", "the method is not known") from None
    except httptools.HttpParserError as error:
        raise ProtocolError(400, "bad_request", f"malformed request: {error}") from None


def _read_fields(head: RequestHead, start: int) -> None:
    """Read the fields that decide on the message. `start` is just before the CRLF of the first line."""
    connection: list[bytes] = []
    length: bytes | None = None
    encoding: bytes | None = None
    upgrade = b""
    for name, value in _DECISIVE.findall(head.raw, start):
        name = name.lower()
        if name == b"host":
            if head.has_host:
                raise ProtocolError(400, "bad_host", "more than one Host field")
            head.has_host = True
            read_authority(head, value.rstrip(b" \t"))
        elif name == b"connection":
            connection.append(value)
        elif name == b"content-length":
            if length is not None:
                raise ProtocolError(400, "bad_content_length", "more than one Content-Length field")
            length = value.rstrip(b" \t")
        elif name == b"transfer-encoding":
            if encoding is not None:
                raise ProtocolError(400, "bad_transfer_encoding", "more than one Transfer-Encoding field")
            encoding = value.rstrip(b" \t").lower()
        elif name == b"expect":
            if value.rstrip(b" \t").lower() != b"100-continue":
                raise ProtocolError(417, "bad_expectation", "an expectation other than 100-continue")
            head.expect_continue = head.minor == 1
        elif name == b"idempotency-key":
            head.idempotency_key = True
        elif name == b"upgrade":
            upgrade = upgrade + b"," + value if upgrade else value
            head.hop_fields = True
        elif name in (b"x-forwarded-for", b"x-forwarded-proto"):
            head.forwarded = True
        elif name in MARKS:
            head.note_mark(name, value.rstrip(b" \t"))
        else:
            head.hop_fields = True
    if connection:
        head.hop_fields = True
        head.options = options = connection_options(connection)
        if head.marked:
            head.drop_marks(options)
        if b"close" in options:
            head.keep_alive = False
        elif b"keep-alive" in options:
            head.keep_alive = True
        if upgrade and b"upgrade" in options and head.minor == 1:
            # A switch to HTTP/2 is for this hop alone, and is not made: to pass it on would open a way around
            # every rule that is applied to requests.
            head.upgrade = upgrade.strip(b" \t") if b"h2c" not in upgrade.lower() else b""
    if not head.has_host and head.minor == 1:
        raise ProtocolError(400, "bad_host", "no Host field")
    if encoding is not None:
        _read_transfer_encoding(head, encoding, length)
    elif length is not None:
        head.content_length = parse_content_length(length)


def _read_transfer_encoding(head: RequestHead, encoding: bytes, length: bytes | None) -> None:
    if length is not None:
        raise ProtocolError(400, "ambiguous_length", "both Content-Length and Transfer-Encoding")
    if head.minor == 0:
        raise ProtocolError(400, "bad_transfer_encoding", "Transfer-Encoding in HTTP/1.0")
    if encoding != b"chunked":
        before, _, last = encoding.rpartition(b",")
        if last.strip(b" \t") != b"chunked":
            raise ProtocolError(400, "bad_transfer_encoding", "the last transfer encoding is not chunked")
        if b"chunked" in (coding.strip(b" \t") for coding in before.split(b",")):
            raise ProtocolError(400, "bad_transfer_encoding", "chunked more than once")
        raise ProtocolError(501, "unknown_transfer_encoding", "a transfer encoding other than chunked")
    head.chunked = True
    head.hop_fields = True


def parse_content_length(value: bytes) -> int:
    """Read a Content-Length: digits and nothing else (RFC 9110, 8.6).

    Raises:
        ProtocolError: it is something else, or absurdly large.
    """
    if not value.isdigit() or len(value) > 19 or (length := int(value)) > MAX_BODY:
        raise ProtocolError(400, "bad_content_length", "Content-Length is no plain number")
    return length


_hosts: dict[bytes, bytes] = {}
"""Hosts by the authorities that came last: there are few."""

_LONGEST_KNOWN = 260
"""Bytes of an authority that is kept: a name of DNS, and a port."""


def read_authority(head: RequestHead, value: bytes) -> None:
    """Note what a Host field, or its like, says.

    Raises:
        ProtocolError: it is malformed.
    """
    head.authority = value
    host = _hosts.get(value)
    if host is None:
        match = _HOST.fullmatch(value)
        if match is None:
            raise ProtocolError(400, "bad_host", "the host is malformed")
        host = match[1]
        if len(value) <= _LONGEST_KNOWN:
            if len(_hosts) >= 1024:
                _hosts.clear()
            _hosts[value] = host
    head.host = host


def _read_target(head: RequestHead) -> None:
    """The forms of RFC 9112, section 3.2, other than a plain path."""
    target = head.target
    if b"#" in target:
        raise ProtocolError(400, "bad_target", "a fragment in the target")
    if head.method == b"CONNECT":
        match = _HOST.fullmatch(target)
        if match is None or not match[1] or not match[2]:
            raise ProtocolError(400, "bad_target", "CONNECT wants HOST:PORT")
        if head.has_body:
            raise ProtocolError(400, "bad_request", "CONNECT with a body")
        head.authority, head.host, head.as_sent = target, match[1], False
        return
    if target == b"*":
        if head.method != b"OPTIONS":
            raise ProtocolError(400, "bad_target", "the target * is for OPTIONS only")
        return
    match = _ABSOLUTE.fullmatch(target)
    if match is None:
        raise ProtocolError(400, "bad_target", "the target is neither a path nor an absolute URL")
    if match[1].lower() != b"http":
        raise ProtocolError(400, "bad_target", "the target's scheme is not http")
    if not match[2]:
        raise ProtocolError(400, "bad_target", "the target's host is missing")
    # The target's authority counts, whatever Host says (RFC 9112, 3.2.2).
    read_authority(head, match[2])
    if not head.host:
        raise ProtocolError(400, "bad_target", "the target's host is missing")
    rest = match[3]
    if not rest:
        rest = b"*" if head.method == b"OPTIONS" else b"/"
    elif rest[0] != 0x2F:
        rest = b"/" + rest
    head.target, head.as_sent = rest, False


def _explain(raw: bytes, limits: HeadLimits) -> ProtocolError:
    line = raw.partition(b"\r\n")[0]
    match = _REQUEST_LINE.fullmatch(line)
    if match is not None:
        if match[3] != b"1" or match[4] not in (b"0", b"1"):
            return ProtocolError(505, "version_not_supported", "an HTTP version other than 1.0 and 1.1")
        return explain(raw)
    if b"\r" in line or b"\n" in line:
        return ProtocolError(400, "bad_line_end", "a CR or LF alone in the head")
    if len(line) > limits.target + 64:
        return ProtocolError(414, "target_too_long", f"the target is longer than {limits.target} bytes")
    if line.count(b" ") == 1 and line.startswith(b"GET "):
        return ProtocolError(505, "version_not_supported", "HTTP/0.9 is not served")
    return ProtocolError(400, "bad_request_line", "malformed request line")


def check_unfinished(received: bytes | bytearray, limits: HeadLimits) -> None:
    """Whether a head whose end has not come may still become one.

    Raises:
        ProtocolError: it is too large already, or no HTTP/1.
    """
    line_end = received.find(b"\n", 0, limits.target + 64)
    if line_end < 0 and len(received) > limits.target + 64:
        raise ProtocolError(414, "target_too_long", f"the target is longer than {limits.target} bytes")
    if len(received) > limits.head:
        raise ProtocolError(431, "head_too_large", f"the head is larger than {limits.head} bytes")
    if line_end >= 0 and not HTTP2_PREFACE.startswith(received):
        match = _REQUEST_LINE.fullmatch(received, 0, max(line_end - 1, 0))
        if match is None or match[3] != b"1" or match[4] not in (b"0", b"1"):
            raise _explain(bytes(received), limits)
    if received and not _FIRST.match(received):
        raise ProtocolError(400, "bad_request_line", "this is not HTTP")
