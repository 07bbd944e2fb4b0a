"""The chunked transfer coding, read strictly (RFC 9112, 7.1).

`ChunkedBody` looks for the end of a body and lets the bytes pass that came: chunk sizes and data go on as they are,
only chunk extensions, which belong to one hop, and trailer fields that no trailer may have are cut out. What is
incomplete at the end of one piece of input, a size line, say, is held until the rest of it comes.
"""

from __future__ import annotations

import re
from typing import TypeAlias

from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.fields import CLIENT_CERT_SPELLINGS, FIELDS, without

Piece: TypeAlias = "bytes | memoryview"
"""Bytes that pass on; a view into what was fed."""

MAX_EXTENSIONS = 16384
"""Bytes of extensions in one body: they cost work and carry nothing."""

_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(;[\t -~\x80-\xff]{0,255})?\r\n")
_PARTIAL_SIZE = re.compile(rb"[0-9A-Fa-f]{0,15}(?:(?<=[0-9A-Fa-f])(?:;[\t -~\x80-\xff]{0,255})?\r?)?")

NO_TRAILERS = frozenset(
    {
        b"authorization",
        b"connection",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"cookie",
        b"host",
        b"keep-alive",
        b"proxy-authorization",
        b"proxy-connection",
        b"set-cookie",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        *CLIENT_CERT_SPELLINGS,
    }
)
"""Fields for framing, routing and authentication: they have no meaning in a trailer (RFC 9110, 6.5.1)."""

_SIZE_LINE, _DATA, _DATA_END, _TRAILERS, _END = range(5)


class ChunkedBody:
    """One body, from its first size line to the end of its trailers.

    Args:
        decode: what passes is the data alone, for a recipient that reads no chunks; trailers are in `trailers` then.
        max_trailers: bytes of the trailer section at most.

    Attributes:
        finished: the end of the body came.
        trailers: with `decode`, the field lines behind it, but for those that no trailer may have.
    """

    __slots__ = ("_decode", "_extensions", "_held", "_left", "_max_trailers", "_state", "finished", "trailers")

    def __init__(self, *, decode: bool = False, max_trailers: int = 16384) -> None:
        self._decode = decode
        self._max_trailers = max_trailers
        self._state = _SIZE_LINE
        self._left = 0
        self._held = b""
        self._extensions = 0
        self.finished = False
        self.trailers = b""

    def feed(self, data: bytes) -> tuple[list[Piece], int]:
        """Take what came.

        Returns:
            What passes on, and how much of `data` belonged to the body: less than all of it only once `finished`.

        Raises:
            ProtocolError: it is malformed. What passed before may have been sent already.
        """
        before = len(self._held)
        if before:
            data = self._held + data
            self._held = b""
        out: list[Piece] = []
        view = memoryview(data)
        end = len(data)
        at = start = 0  # what lies between start and at passes in one piece
        while self._state != _END:
            if self._state == _DATA:
                taken = min(self._left, end - at)
                at += taken
                self._left -= taken
                if self._left:
                    break
                self._state = _DATA_END
            elif self._state == _DATA_END:
                if end - at < 2:
                    if end > at and data[at] != 0x0D:
                        raise ProtocolError(400, "bad_chunk", "a chunk's data does not end where its size says")
                    break
                if data[at : at + 2] != b"\r\n":
                    raise ProtocolError(400, "bad_chunk", "a chunk's data does not end where its size says")
                if self._decode:
                    if start < at:
                        out.append(view[start:at])
                    start = at + 2
                at += 2
                self._state = _SIZE_LINE
            elif self._state == _SIZE_LINE:
                match = _SIZE.match(data, at)
                if match is None:
                    if not _PARTIAL_SIZE.fullmatch(data, at):
                        raise ProtocolError(400, "bad_chunk", "a malformed chunk size")
                    break
                size = int(match[1], 16)
                if match[2] is not None:
                    self._count_extension(len(match[2]))
                    if not self._decode:
                        out.append(view[start : match.end(1)])
                        start = match.end() - 2
                at = match.end()
                if self._decode:
                    start = at
                self._left = size
                self._state = _DATA if size else _TRAILERS
            else:
                section = self._trailer_section(data, at)
                if section is None:
                    break
                at += len(section)
                if self._decode:
                    start = at
                    self.trailers = without(section[:-2], NO_TRAILERS) if len(section) > 2 else b""
                elif len(section) > 2:
                    out.append(view[start : at - len(section)])
                    out.append(without(section[:-2], NO_TRAILERS) + b"\r\n")
                    start = at
                self._state = _END
                self.finished = True
        if start < at:
            out.append(view[start:at])
        if not self.finished:
            self._held = data[at:]
            return out, end - before
        return out, at - before

    def _count_extension(self, size: int) -> None:
        self._extensions += size
        if self._extensions > MAX_EXTENSIONS:
            raise ProtocolError(400, "bad_chunk", f"more than {MAX_EXTENSIONS} bytes of chunk extensions")

    def _trailer_section(self, data: bytes, at: int) -> bytes | None:
        """The trailer fields and their empty line; None if they are not complete."""
        if data.startswith(b"\r\n", at):
            return b"\r\n"
        end = data.find(b"\r\n\r\n", at)
        if (end if end >= 0 else len(data)) - at > self._max_trailers:
            raise ProtocolError(431, "trailers_too_large", f"trailers of more than {self._max_trailers} bytes")
        if end < 0:
            return None
        section = data[at : end + 4]
        if not FIELDS.fullmatch(section, 0, len(section) - 2):
            raise ProtocolError(400, "bad_trailer", "malformed trailers")
        return section
