"""Heads of HTTP/2 messages: what they say, and the same in HTTP/1.1, both ways (RFC 9113, section 8).

The engine refused what RFC 9113 forbids: names and values that are none, fields of a connection, pseudo-headers that
are missing, doubled or misplaced, a body that is not as long as its Content-Length. What is checked here is what
it leaves to others. What goes on as HTTP/1.1 is read once more, by the parser of HTTP/1.1's own heads
(`meshlocal.wire.http1`): what could be smuggled would have to pass both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeAlias

from meshlocal.wire.grpc.metadata import is_grpc, parse_timeout
from meshlocal.wire.grpc.status import GrpcError
from meshlocal.wire.http1.chunked import NO_TRAILERS
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.fields import CLIENT_CERT_SPELLINGS, TOKEN, OwnFields, end_to_end
from meshlocal.wire.http1.request import MARKS, HeadLimits, RequestHead, parse_content_length, read_authority
from meshlocal.wire.http1.response import ResponseHead
from meshlocal.wire.http2 import Headers

Fields: TypeAlias = "tuple[tuple[bytes, bytes], ...]"

_METHOD = re.compile(TOKEN + rb"++")
_FORWARDED = (b"x-forwarded-for", b"x-forwarded-proto")
_ONE_HOP = CLIENT_CERT_SPELLINGS | {b"proxy-authorization"}
"""Fields that are not passed on: the second is for a proxy, and that was this one (RFC 9110, 11.7.2)."""

_DECISIVE = frozenset(
    {
        *_ONE_HOP,
        b":authority",
        b":method",
        b":path",
        b":scheme",
        b"content-length",
        b"content-type",
        b"expect",
        b"grpc-timeout",
        b"host",
        b"idempotency-key",
        *MARKS,
        b"x-forwarded-for",
        b"x-forwarded-proto",
    }
)


MOST = 256
"""Heads that are kept."""

LONGEST = 32
"""Fields of a head that is kept."""


class KnownCalls:
    """Heads that were checked before, by their fields; see `meshlocal.wire.http1.known`, of which this is the like.

    Those with a grpc-timeout are not kept: hardly two are the same.

    Args:
        limits: how large a head may be.
    """

    __slots__ = ("_known", "limits")

    def __init__(self, limits: HeadLimits) -> None:
        self.limits = limits
        self._known: dict[tuple[Fields, bool], Http2RequestHead] = {}

    def request(self, fields: Fields, *, ends: bool) -> Http2RequestHead:
        """See `request_head`. The head is everybody's.

        Raises:
            ProtocolError: it is refused.
        """
        key = fields, ends
        head = self._known.get(key)
        if head is None:
            head = request_head(fields, self.limits, ends=ends)
            if head.timeout is None and len(fields) <= LONGEST:
                if len(self._known) >= MOST:
                    self._known.clear()
                self._known[key] = head
        return head


class Http2RequestHead(RequestHead):
    """A request's head as HTTP/2 has it. What its base says of HTTP/1.1's bytes, `raw` and `block`, is empty.

    Attributes:
        fields: all of them, the pseudo-headers first.
        scheme: `http` or `https`; empty for CONNECT.
        has_authority: it has `:authority`, and not only Host.
        ends: no body follows.
        grpc: it is a gRPC call.
        timeout: seconds that its client gives it (grpc-timeout); None if it does not say.
    """

    http2 = True

    __slots__ = ("ends", "fields", "grpc", "has_authority", "scheme", "timeout")

    def __init__(self, method: bytes, target: bytes, fields: Fields, *, ends: bool) -> None:
        super().__init__(b"", method, target, 1, b"")
        self.fields = fields
        self.scheme = b""
        self.has_authority = False
        self.ends = ends
        self.grpc = False
        self.timeout: float | None = None

    @property
    def has_body(self) -> bool:
        """See `RequestHead.has_body`."""
        return not self.ends

    def without_upgrade(self) -> RequestHead:
        """See `RequestHead.without_upgrade`: HTTP/2 has no upgrade."""
        return self


def request_head(fields: Fields, limits: HeadLimits, *, ends: bool) -> Http2RequestHead:
    """Read a request's head that the engine let pass.

    Args:
        fields: as they came.
        limits: how large it may be.
        ends: no body follows.

    Raises:
        ProtocolError: it is refused.
    """
    if len(fields) > limits.fields:
        raise ProtocolError(431, "too_many_headers", f"more than {limits.fields} header fields")
    if len(b"".join(map(b"".join, fields))) + 32 * len(fields) > limits.head:
        raise ProtocolError(431, "head_too_large", f"the head is larger than {limits.head} bytes")
    found: dict[bytes, bytes] = {}
    decisive: list[tuple[bytes, bytes]] = []
    for field in fields:
        name = field[0]
        if name in _DECISIVE:
            if name[0] == 0x3A:  # a colon
                found[name] = field[1]
            else:
                decisive.append(field)
    method = found[b":method"]
    target = found.get(b":path", b"")
    head = Http2RequestHead(method, target, fields, ends=ends)
    if not _METHOD.fullmatch(method):
        raise ProtocolError(400, "bad_request_line", "the method is no token")
    if len(target) > limits.target:
        raise ProtocolError(414, "target_too_long", f"the target is longer than {limits.target} bytes")
    authority = found.get(b":authority")
    if method == b"CONNECT":
        _read_connect(head, authority)
    else:
        head.scheme = found[b":scheme"]
        if head.scheme not in (b"http", b"https"):
            raise ProtocolError(400, "bad_target", "the scheme is neither http nor https")
        if b"#" in target:
            raise ProtocolError(400, "bad_target", "a fragment in the target")
        if target == b"*" and method != b"OPTIONS":
            raise ProtocolError(400, "bad_target", "the target * is for OPTIONS only")
        if authority is not None:
            head.has_authority = head.has_host = True
            read_authority(head, authority)
    _read_fields(head, decisive)
    return head


def _read_connect(head: Http2RequestHead, authority: bytes | None) -> None:
    if authority is None:
        raise ProtocolError(400, "bad_target", "CONNECT wants :authority HOST:PORT")
    read_authority(head, authority)
    if not head.host or head.authority == head.host:
        raise ProtocolError(400, "bad_target", "CONNECT wants :authority HOST:PORT")
    head.target = authority
    head.has_authority = head.has_host = True


def _read_fields(head: Http2RequestHead, decisive: Iterable[tuple[bytes, bytes]]) -> None:
    for name, value in decisive:
        if name == b"content-type":
            head.grpc = is_grpc(value)
        elif name == b"content-length":
            head.content_length = parse_content_length(value)
        elif name == b"grpc-timeout":
            try:
                head.timeout = parse_timeout(value)
            except GrpcError as error:
                raise ProtocolError(400, "bad_grpc_timeout", error.message) from None
        elif name == b"host":
            if not head.has_host:
                head.has_host = True
                read_authority(head, value)
            elif value != head.authority:
                # RFC 9113, 8.3.1.
                raise ProtocolError(400, "bad_host", "the Host field is not as :authority")
        elif name == b"expect":
            if value.lower() != b"100-continue":
                raise ProtocolError(417, "bad_expectation", "an expectation other than 100-continue")
            head.expect_continue = True
        elif name == b"idempotency-key":
            head.idempotency_key = True
        elif name in _ONE_HOP:
            head.hop_fields = True
        elif name in MARKS:
            head.note_mark(name, value)
        else:
            head.forwarded = True
    if head.ends and head.content_length is None:
        head.content_length = 0


# To HTTP/2.


def onward_request(head: Http2RequestHead, extra: Fields, *, authority: bytes, strip_forwarded: bool) -> Headers:
    """A request's fields for an instance that speaks HTTP/2.

    Args:
        head: as the client sent it.
        extra: to append.
        authority: for one that has neither `:authority` nor Host.
        strip_forwarded: leave X-Forwarded-For and -Proto out.
    """
    fields = head.fields
    if not head.has_host:
        fields = (*fields[:1], (b":authority", authority), *fields[1:])
    if head.hop_fields:
        fields = tuple(field for field in fields if field[0] not in _ONE_HOP)
    if strip_forwarded and head.forwarded:
        fields = tuple(field for field in fields if field[0] not in _FORWARDED)
    return (*fields, *extra) if extra else fields


def with_own(fields: Headers, head: RequestHead, own: OwnFields) -> Headers:
    """A request's fields with those that it alone gets."""
    if own.cut and head.marked:
        fields = [field for field in fields if field[0] not in own.cut]
    return [*fields, *own.fields()]


def with_timeout(fields: Headers, timeout: bytes) -> Headers:
    """The same fields with another grpc-timeout."""
    return [(name, timeout if name == b"grpc-timeout" else value) for name, value in fields]


def request_from_http1(raw_head: bytes, head: RequestHead) -> Headers:
    """The fields for HTTP/2 of a request that was made ready for HTTP/1.1 (`http1.rewrite.upstream_head`).

    Args:
        raw_head: that request's head, whose fields are all for the next hop.
        head: the same, read.
    """
    fields = [(b":method", head.method), (b":scheme", b"http"), (b":path", head.target)]
    if head.authority:
        fields.append((b":authority", head.authority))
    return fields + _fields_of(raw_head.partition(b"\r\n")[2], (b"host",))


def response_from_http1(head: ResponseHead, *, has_body: bool, extra: bytes = b"") -> Headers:
    """The fields for HTTP/2 of an HTTP/1.1 response.

    Args:
        head: as the instance sent it.
        has_body: a Content-Length says how long its body is, and not how long it would be.
        extra: field lines to append.
    """
    block = end_to_end(head.block, head.options) if head.hop_fields else head.block
    left_out: tuple[bytes, ...] = ()
    if head.status < 200 or head.status == 204 or (has_body and head.chunked):
        left_out = (b"content-length",)
    return [(b":status", b"%d" % head.status), *_fields_of(block + extra, left_out)]


def _fields_of(block: bytes, left_out: tuple[bytes, ...] = ()) -> list[tuple[bytes, bytes]]:
    """The field lines of a block as HTTP/2 has them: names in small letters, no framing of HTTP/1.1."""
    fields = []
    for line in block.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        name = name.lower()
        if colon and name != b"transfer-encoding" and name not in left_out:
            fields.append((name, value.strip(b" \t")))
    return fields


def trailers_from_http1(section: bytes) -> Headers:
    """The fields of a trailer section, which may be empty."""
    return _fields_of(section)


# To HTTP/1.1.


def request_to_http1(head: Http2RequestHead) -> bytes:
    """A request's head as an HTTP/1.1 client would have sent it; chunked, if it has a body of unknown length.

    Cookie crumbs become one field again (RFC 9113, 8.2.3). `te` goes no further: it is of the connection.
    """
    lines = [b"%b %b HTTP/1.1" % (head.method, head.target), b"host: " + head.authority]
    cookies = []
    for name, value in head.fields:
        if name == b"cookie":
            cookies.append(value)
        elif name[:1] != b":" and name not in (b"host", b"proxy-authorization", b"te"):
            lines.append(b"%b: %b" % (name, value))
    if cookies:
        lines.append(b"cookie: " + b"; ".join(cookies))
    if not head.ends and head.content_length is None:
        lines.append(b"transfer-encoding: chunked")
    lines += (b"", b"")
    return b"\r\n".join(lines)


def response_to_http1(fields: Headers, *, ends: bool, sized: bool = False) -> bytes:
    """A response's head, interim ones too, as an HTTP/1.1 instance would have sent it.

    Args:
        fields: as they came.
        ends: no body follows.
        sized: nothing has to say how long the body is; else it is chunked, where no field says it.
    """
    status = fields[0][1]
    lines = [b"HTTP/1.1 %b " % status]
    for name, value in fields[1:]:
        if name[:1] == b":":
            continue
        sized = sized or name == b"content-length"
        lines.append(b"%b: %b" % (name, value))
    if not sized and status[:1] != b"1" and status not in (b"204", b"304"):
        lines.append(b"content-length: 0" if ends else b"transfer-encoding: chunked")
    lines += (b"", b"")
    return b"\r\n".join(lines)


def request_trailers(fields: Headers) -> Fields:
    """A request's trailers that may go on, but for those that no trailer may have (RFC 9110, 6.5.1)."""
    return tuple(field for field in fields if field[0] not in NO_TRAILERS)


def trailers_to_http1(fields: Headers) -> bytes:
    """The last chunk of a body, with its trailers."""
    return b"0\r\n" + b"".join(b"%b: %b\r\n" % field for field in fields) + b"\r\n"


def grpc_status_of(fields: Headers) -> int:
    """The call's status in a head or in trailers; UNKNOWN where there is none that makes sense."""
    for name, value in fields:
        if name == b"grpc-status":
            return int(value) if value.isdigit() and len(value) <= 2 and int(value) <= 16 else 2
    return 2


def status_of(fields: Headers) -> int:
    """The status of a response that the engine let pass: `:status` comes first, as it is the only pseudo-header."""
    return int(fields[0][1])
