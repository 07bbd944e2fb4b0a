"""Length-prefixed messages (gRPC's PROTOCOL-HTTP2.md): a flag byte, four bytes of length, the message."""

from __future__ import annotations

import struct
import zlib

from meshlocal.wire.grpc.status import GrpcError, StatusCode

PREFIX = struct.Struct(">BI")
ACCEPT_ENCODING = b"identity,gzip"
DEFAULT_MAX_MESSAGE_SIZE = 4 * 1024 * 1024
_GZIP_WINDOW = 16 + zlib.MAX_WBITS


class MessageTooLargeError(GrpcError):
    """RESOURCE_EXHAUSTED: a message is larger than this side takes."""

    def __init__(self, message: str) -> None:
        super().__init__(StatusCode.RESOURCE_EXHAUSTED, message)


def encode_message(payload: bytes, *, compress: bool = False) -> bytes:
    """A message with its prefix, gzip-compressed if asked."""
    return b"".join(split_message(payload, compress=compress))


def split_message(payload: bytes, *, compress: bool = False) -> tuple[bytes, bytes]:
    """A message's prefix, and what comes behind it: the payload itself, so that a thousand senders share one."""
    if compress:
        compressor = zlib.compressobj(wbits=_GZIP_WINDOW)
        payload = compressor.compress(payload) + compressor.flush()
    return PREFIX.pack(compress, len(payload)), payload


def check_encoding(encoding: bytes | None) -> bool:
    """Whether grpc-encoding names gzip.

    Raises:
        GrpcError: UNIMPLEMENTED, it names an encoding other than gzip and identity.
    """
    if encoding is None or encoding == b"identity":
        return False
    if encoding == b"gzip":
        return True
    name = encoding[:32].decode("ascii", "replace")
    raise GrpcError(StatusCode.UNIMPLEMENTED, f"grpc-encoding {name!r} is not supported (identity, gzip)")


class MessageDecoder:
    """Cuts a byte stream, fed in pieces of any size, into messages.

    `max_size` bounds a message in bytes, before and after decompression. `gzip` says whether the stream's
    grpc-encoding allows compressed messages.
    """

    __slots__ = ("_buffer", "_gzip", "_max_size")

    def __init__(self, max_size: int = DEFAULT_MAX_MESSAGE_SIZE, *, gzip: bool = False) -> None:
        self._buffer = bytearray()
        self._max_size = max_size
        self._gzip = gzip

    def __len__(self) -> int:
        """How many bytes are held."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray) -> None:
        """Take bytes that came."""
        self._buffer += data

    def next_message(self) -> bytes | None:
        """The next whole message; None until more bytes come.

        Raises:
            GrpcError: INTERNAL, malformed or compressed against the headers.
            MessageTooLargeError: over the limit: known from the prefix, before the message is held.
        """
        if len(self._buffer) < PREFIX.size:
            return None
        flag, length = PREFIX.unpack_from(self._buffer)
        if flag > 1:
            raise GrpcError(StatusCode.INTERNAL, f"message with flag byte {flag}")
        if flag and not self._gzip:
            raise GrpcError(StatusCode.INTERNAL, "compressed message, but grpc-encoding names no compression")
        if length > self._max_size:
            raise MessageTooLargeError(f"message of {length} bytes, limit {self._max_size}")
        end = PREFIX.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(memoryview(self._buffer)[PREFIX.size : end])
        del self._buffer[:end]
        return _decompress(payload, self._max_size) if flag else payload

    def finish(self) -> None:
        """The stream ended.

        Raises:
            GrpcError: INTERNAL, it ended within a message.
        """
        if self._buffer:
            raise GrpcError(StatusCode.INTERNAL, "stream ended within a message")


def _decompress(payload: bytes, max_size: int) -> bytes:
    decompressor = zlib.decompressobj(wbits=_GZIP_WINDOW)
    try:
        message = decompressor.decompress(payload, max_size + 1)
    except zlib.error as error:
        raise GrpcError(StatusCode.INTERNAL, f"message is not valid gzip: {error}") from None
    if len(message) > max_size:
        raise MessageTooLargeError(f"message decompresses to more than the limit of {max_size}")
    if not decompressor.eof or decompressor.unused_data:
        raise GrpcError(StatusCode.INTERNAL, "message is not exactly one gzip member")
    return message
