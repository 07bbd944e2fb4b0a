"""Header fields: their grammar, and cutting lines out of a block of them.

A *block* is the raw bytes of zero or more field lines, each with its CRLF, that `FIELDS` matches as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from meshlocal.wire.http1.errors import ProtocolError

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
"""One character of a token (RFC 9110, 5.6.2)."""

FIELD_LINES = rb"(?:" + TOKEN + rb"++:[\t -~\x80-\xff]*+\r\n)*+"
"""Field lines as RFC 9112, section 5, wants them, without obs-fold."""

FIELDS = re.compile(FIELD_LINES)

CLIENT_CERT = b"x-forwarded-client-cert"
"""Names the client's certificate to an instance, as Envoy does."""

CLIENT_CERT_LOOKALIKE = rb"x[-_]forwarded[-_]client[-_]cert"
"""That, and what applications behind CGI's naming take for the same (RFC 3875, 4.1.18)."""

CLIENT_CERT_SPELLINGS = frozenset(
    f"x{first}forwarded{second}client{third}cert".encode() for first in "-_" for second in "-_" for third in "-_"
)
"""The same as names, in small letters."""

# Fields that belong to one connection (RFC 9110, 7.6.1), beside those that its Connection field lists.
# Transfer-Encoding is written anew by who frames the body; Proxy-Authorization is for a proxy, and that was this one.
# X-Forwarded-Client-Cert says who the peer of one connection proved to be: what a client says of it is never passed on.
# What stands in front is the end of the line before, which is quicker to look for than any name.
_HOP = re.compile(
    rb"\r\n(?:connection|http2-settings|keep-alive|proxy-authorization|proxy-connection|te"
    rb"|transfer-encoding|upgrade|" + CLIENT_CERT_LOOKALIKE + rb"):[^\r]*+",
    re.IGNORECASE,
)

_NEVER_LISTED = frozenset({b"host", b"content-length", b"transfer-encoding", b"close", b"keep-alive", b""})
"""What a Connection field may not take away: the fields that a message's meaning hangs on, and its own options."""

_LIST_ITEM = re.compile(TOKEN + rb"++")


_COMMON_OPTIONS = {
    b"keep-alive": frozenset({b"keep-alive"}),
    b"Keep-Alive": frozenset({b"keep-alive"}),
    b"close": frozenset({b"close"}),
    b"Close": frozenset({b"close"}),
    b"Upgrade": frozenset({b"upgrade"}),
}


class OwnFields:
    """What the head of one request gets on its way to an instance that others with the same fields do not.

    Attributes:
        lines: whole field lines, with names in small letters.
        cut: names of fields that it must not have beside these.
    """

    __slots__ = ("cut", "lines")

    def __init__(self, lines: bytes = b"", cut: frozenset[bytes] = frozenset()) -> None:
        self.lines = lines
        self.cut = cut

    def fields(self) -> list[tuple[bytes, bytes]]:
        """The same, name by name."""
        found = []
        for line in self.lines.split(b"\r\n")[:-1]:
            name, _, value = line.partition(b": ")
            found.append((name, value))
        return found


NO_FIELDS = OwnFields()


def connection_options(values: Collection[bytes]) -> frozenset[bytes]:
    """The options of all Connection fields, in small letters.

    Raises:
        ProtocolError: an option is no token.
    """
    if len(values) == 1:
        (value,) = values
        common = _COMMON_OPTIONS.get(value)
        if common is not None:
            return common
    options = set()
    for value in values:
        for option in value.lower().split(b","):
            option = option.strip(b" \t")
            if option and not _LIST_ITEM.fullmatch(option):
                raise ProtocolError(400, "bad_connection", "the Connection field has what is no token")
            options.add(option)
    options.discard(b"")
    return frozenset(options)


def end_to_end(block: bytes, options: frozenset[bytes]) -> bytes:
    """The block without the fields of this connection: those of RFC 9110, 7.6.1, and those that `options` lists."""
    block = _HOP.sub(b"", b"\r\n" + block)[2:]
    listed = options - _NEVER_LISTED
    return without(block, listed) if listed else block


def end_to_end_head(raw: bytes, options: frozenset[bytes]) -> bytes | None:
    """A whole head without the fields of this connection; None if `options` lists more than those always are."""
    return _HOP.sub(b"", raw) if options <= _NEVER_LISTED else None


def without(block: bytes, names: Collection[bytes]) -> bytes:
    """The block without the fields of these names, which are in small letters."""
    if not block:
        return block
    kept = [line for line in block[:-2].split(b"\r\n") if line.partition(b":")[0].lower() not in names]
    kept.append(b"")
    return b"\r\n".join(kept)


def explain(head: bytes) -> ProtocolError:
    """What is wrong with a head whose first line is good, but whose fields do not fit the grammar."""
    if b"\0" in head:
        return ProtocolError(400, "bad_header", "a NUL byte in the head")
    lines = head.split(b"\r\n")
    for line in lines[1:]:
        if b"\r" in line or b"\n" in line:
            return ProtocolError(400, "bad_line_end", "a CR or LF alone in the head")
        if line[:1] in (b" ", b"\t"):
            return ProtocolError(400, "folded_header", "a folded header line")
        name, colon, _ = line.partition(b":")
        if not line:
            break
        if not colon:
            return ProtocolError(400, "bad_header", "a header line without a colon")
        if name.rstrip(b" \t") != name:
            return ProtocolError(400, "bad_header", "a space between a header's name and its colon")
        if not _LIST_ITEM.fullmatch(name):
            return ProtocolError(400, "bad_header", "a header's name is no token")
    return ProtocolError(400, "bad_header", "a control character in a header")
