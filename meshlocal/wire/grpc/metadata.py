"""gRPC's header values: grpc-timeout, grpc-message and custom metadata (gRPC's PROTOCOL-HTTP2.md)."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterable
from urllib.parse import unquote_to_bytes

from meshlocal.wire.grpc.status import PUSHBACK, GrpcError, Metadata, StatusCode

_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_NANOSECONDS = {b"H": 3600 * 10**9, b"M": 60 * 10**9, b"S": 10**9, b"m": 10**6, b"u": 10**3, b"n": 1}
_KEY = re.compile(r"[0-9a-z_.-]+")
_VALUE = re.compile(r"[\x20-\x7e]*")
_RESERVED = frozenset(["te", "content-type", "content-length", "connection", "host", "transfer-encoding", "user-agent"])
_UNESCAPED = frozenset(range(0x20, 0x7F)) - {ord("%")}
MAX_TIMEOUT = 99_999_999 * 3600.0
"""The longest grpc-timeout, in seconds."""


def parse_timeout(value: bytes) -> float:
    """The seconds that a grpc-timeout gives.

    Raises:
        GrpcError: INTERNAL, the value is malformed.
    """
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise GrpcError(StatusCode.INTERNAL, f"malformed grpc-timeout {value[:32]!r}")
    return int(match[1]) * _NANOSECONDS[match[2]] / 1e9


def format_timeout(seconds: float) -> bytes:
    """A grpc-timeout of at least `seconds`, in the finest unit whose count has at most 8 digits. Never zero."""
    if seconds >= MAX_TIMEOUT:
        return b"99999999H"
    nanoseconds = max(1, math.ceil(seconds * 1e9))
    for unit in (b"n", b"u", b"m", b"S", b"M"):
        count = -(-nanoseconds // _NANOSECONDS[unit])
        if count <= 99_999_999:
            return b"%d%s" % (count, unit)
    return b"%dH" % -(-nanoseconds // _NANOSECONDS[b"H"])


def encode_grpc_message(text: str) -> bytes:
    """Percent-encode a status message: UTF-8, escaping what is not printable ASCII, and `%`."""
    raw = text.encode("utf-8", "replace")
    return b"".join(bytes((byte,)) if byte in _UNESCAPED else b"%%%02X" % byte for byte in raw)


def decode_grpc_message(value: bytes) -> str:
    """Undo `encode_grpc_message`. What is wrongly encoded is kept as it came, never an error."""
    return unquote_to_bytes(value).decode("utf-8", "replace")


def encode_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> list[tuple[bytes, bytes]]:
    """Custom metadata as header fields.

    Raises:
        ValueError: a key or value that may not be sent; the text names it.
    """
    fields: list[tuple[bytes, bytes]] = []
    for key, value in metadata:
        if not _KEY.fullmatch(key):
            raise ValueError(f"metadata key {key!r}: only 0-9, a-z, '_', '-' and '.' are allowed")
        if key in _RESERVED or (key.startswith("grpc-") and key != PUSHBACK):
            raise ValueError(f"metadata key {key!r} is reserved")
        if key.endswith("-bin"):
            if not isinstance(value, bytes):
                raise ValueError(f"metadata {key!r}: a '-bin' value must be bytes")
            fields.append((key.encode(), base64.b64encode(value).rstrip(b"=")))
            continue
        if not isinstance(value, str) or not _VALUE.fullmatch(value) or value != value.strip(" "):
            raise ValueError(f"metadata {key!r}: a value must be printable ASCII text without outer spaces")
        fields.append((key.encode(), value.encode()))
    return fields


def decode_metadata(headers: Iterable[tuple[bytes, bytes]]) -> Metadata:
    """The custom metadata among header fields: all but pseudo-headers and those that gRPC or HTTP define, and of these
    the one that tells a client when to come back.

    Raises:
        GrpcError: INTERNAL, a `-bin` value is no base64 text.
    """
    metadata: list[tuple[str, str | bytes]] = []
    for raw_key, raw_value in headers:
        key = raw_key.decode("ascii", "replace")
        reserved = key.startswith((":", "grpc-")) or (key in _RESERVED and key != "user-agent")
        if reserved and key != PUSHBACK:
            continue
        if key.endswith("-bin"):
            metadata.extend((key, _decode_binary(key, part)) for part in raw_value.split(b","))
        else:
            metadata.append((key, raw_value.decode("latin-1")))
    return tuple(metadata)


def _decode_binary(key: str, value: bytes) -> bytes:
    text = value.strip(b" ").rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise GrpcError(StatusCode.INTERNAL, f"metadata {key!r} is no base64 text") from None


def is_grpc(content_type: bytes) -> bool:
    """Whether a content type is gRPC's: `application/grpc`, alone or with a suffix or parameters (gRPC over HTTP/2,
    "Requests"). gRPC-Web's are not."""
    return content_type.startswith(b"application/grpc") and content_type[16:17] in (b"", b"+", b";", b" ")


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The value of the first field of this (lower-case) name."""
    for key, value in headers:
        if key == name:
            return value
    return None
