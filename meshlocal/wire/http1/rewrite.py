"""Heads for the next hop, and answers of the proxy's own.

Lines are cut out of a head and others appended. What comes of that is kept with the head, whose field lines many
messages share (`meshlocal.wire.http1.known`).
"""

from __future__ import annotations

from http import HTTPStatus

from meshlocal.wire.http1.fields import NO_FIELDS, OwnFields, end_to_end, end_to_end_head, without
from meshlocal.wire.http1.request import RequestHead
from meshlocal.wire.http1.response import Framing, ResponseHead

_FORWARDED = (b"x-forwarded-for", b"x-forwarded-proto")
_CHUNKED = b"transfer-encoding: chunked\r\n"

_KEPT = 8
"""Ways of passing the same head on that are remembered: most heads have one."""


def upstream_head(
    head: RequestHead,
    extra: bytes = b"",
    *,
    host: bytes = b"",
    strip_forwarded: bool = False,
    own: OwnFields = NO_FIELDS,
) -> bytes:
    """The request's head for an instance, always HTTP/1.1.

    Args:
        head: as the client sent it.
        extra: whole field lines to append.
        host: for the Host field of a request that has none.
        strip_forwarded: leave X-Forwarded-For and -Proto out.
        own: what this request alone gets, so that it is not kept.
    """
    key = extra, host, strip_forwarded, head.upgrade
    fields = head.onward.get(key) if head.as_sent else None
    if fields is None:
        fields = _fields_to_instance(head, extra, host, strip_forwarded)
        if head.as_sent and len(head.onward) < _KEPT:
            head.onward[key] = fields
    if own.cut and head.marked:
        fields = without(fields[:-2], own.cut) + b"\r\n"
    return b"%b %b HTTP/1.1\r\n%b%b" % (head.method, head.target, own.lines, fields)


def _fields_to_instance(head: RequestHead, extra: bytes, host: bytes, strip_forwarded: bool) -> bytes:
    """All behind the first line, with the empty line."""
    block = end_to_end(head.block, head.options) if head.hop_fields else head.block
    if strip_forwarded and head.forwarded:
        block = without(block, _FORWARDED)
    parts: list[bytes] = []
    if not head.as_sent:
        block = without(block, (b"host",))
        parts += (b"Host: ", head.authority, b"\r\n")
    elif not head.has_host:
        parts += (b"Host: ", host, b"\r\n")
    parts += (block, extra)
    if head.chunked:
        parts.append(_CHUNKED)
    if head.upgrade:
        parts += (b"connection: upgrade\r\nupgrade: ", head.upgrade, b"\r\n")
    parts.append(b"\r\n")
    return b"".join(parts)


def client_head(
    head: ResponseHead, framing: Framing, *, extra: bytes = b"", close: bool = False, announce_keep_alive: bool = False
) -> bytes:
    """The response's head for the client, always HTTP/1.1.

    Args:
        head: as the instance sent it.
        framing: how the body is framed on its way to the client.
        extra: whole field lines to append.
        close: the connection ends after this response.
        announce_keep_alive: the client speaks HTTP/1.0, which wants to be told that the connection stays.
    """
    key = framing, extra, close, announce_keep_alive
    known = head.onward.get(key)
    if known is None:
        known = _to_client(head, framing, extra, close, announce_keep_alive)
        if len(head.onward) < _KEPT:
            head.onward[key] = known
    return known


def _to_client(head: ResponseHead, framing: Framing, extra: bytes, close: bool, announce_keep_alive: bool) -> bytes:
    status = head.status
    if head.minor == 1 and head.reason and status >= 200 and status != 204 and not head.upgrade:
        # Lines are cut out of it and appended: the head stays one piece.
        whole = end_to_end_head(head.raw, head.options) if head.hop_fields else head.raw
        if whole is not None:
            if framing is Framing.CHUNKED:
                extra += _CHUNKED
            if close:
                extra += b"connection: close\r\n"
            elif announce_keep_alive:
                extra += b"connection: keep-alive\r\n"
            return b"%b%b\r\n" % (whole[:-2], extra) if extra else whole
    block = end_to_end(head.block, head.options) if head.hop_fields else head.block
    if head.content_length is not None and (head.status < 200 or head.status == 204):
        block = without(block, (b"content-length",))
    parts = [b"HTTP/1.1 %d" % head.status, head.reason or b" ", b"\r\n", block, extra]
    if framing is Framing.CHUNKED:
        parts.append(_CHUNKED)
    if head.upgrade and head.status in (101, 426):
        parts += (b"connection: upgrade\r\nupgrade: ", head.upgrade, b"\r\n")
    elif close:
        parts.append(b"connection: close\r\n")
    elif announce_keep_alive:
        parts.append(b"connection: keep-alive\r\n")
    parts.append(b"\r\n")
    return b"".join(parts)


def generated_answer(
    status: int,
    reason: str,
    text: str,
    *,
    extra: bytes = b"",
    close: bool = False,
    announce_keep_alive: bool = False,
    without_body: bool = False,
) -> bytes:
    """An answer of the proxy's own: one line of text, and `x-meshlocal-error: <reason>`."""
    body = f"meshlocal: {text}\n".encode()
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    connection = "connection: close\r\n" if close else "connection: keep-alive\r\n" if announce_keep_alive else ""
    head = (
        f"HTTP/1.1 {status} {phrase}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {len(body)}\r\n"
        f"x-meshlocal-error: {reason}\r\n{connection}"
    ).encode()
    return b"".join((head, extra, b"\r\n", b"" if without_body else body))
