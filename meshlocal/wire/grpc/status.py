"""gRPC status codes, and how HTTP/2 errors and HTTP statuses become them (gRPC's PROTOCOL-HTTP2.md)."""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]
"""Pairs of a lower-case key and its value: bytes where the key ends in `-bin`, text elsewhere. Keys may repeat."""


PUSHBACK = "grpc-retry-pushback-ms"
"""The metadata in which a server says how many milliseconds it wants to be left alone (gRFC A6)."""


class StatusCode(IntEnum):
    """The canonical codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class GrpcError(Exception):
    """A call that ended with another status than OK.

    Raised by a server's handler, it becomes the call's status. `trailing` is the metadata that goes with it.
    `unprocessed` says that the server provably did not see the call (REFUSED_STREAM, a GOAWAY below its stream, or
    nothing sent): another server may be tried, whatever the method does.
    """

    def __init__(
        self, code: StatusCode, message: str = "", trailing: Metadata = (), *, unprocessed: bool = False
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.trailing = trailing
        self.unprocessed = unprocessed

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}" if self.message else self.code.name


_FROM_HTTP2 = {
    0x0: StatusCode.INTERNAL,  # NO_ERROR
    0x1: StatusCode.INTERNAL,  # PROTOCOL_ERROR
    0x2: StatusCode.INTERNAL,  # INTERNAL_ERROR
    0x3: StatusCode.INTERNAL,  # FLOW_CONTROL_ERROR
    0x4: StatusCode.INTERNAL,  # SETTINGS_TIMEOUT
    0x6: StatusCode.INTERNAL,  # FRAME_SIZE_ERROR
    0x7: StatusCode.UNAVAILABLE,  # REFUSED_STREAM
    0x8: StatusCode.CANCELLED,  # CANCEL
    0x9: StatusCode.INTERNAL,  # COMPRESSION_ERROR
    0xA: StatusCode.INTERNAL,  # CONNECT_ERROR
    0xB: StatusCode.RESOURCE_EXHAUSTED,  # ENHANCE_YOUR_CALM
    0xC: StatusCode.PERMISSION_DENIED,  # INADEQUATE_SECURITY
}

_FROM_HTTP_STATUS = {
    400: StatusCode.INTERNAL,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.UNIMPLEMENTED,
    429: StatusCode.UNAVAILABLE,
    502: StatusCode.UNAVAILABLE,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.UNAVAILABLE,
}


def from_http2_error(error_code: int) -> StatusCode:
    """The status of a call whose stream was reset with this HTTP/2 error code (RFC 9113 section 7)."""
    return _FROM_HTTP2.get(error_code, StatusCode.UNKNOWN)


def from_http_status(http_status: int) -> StatusCode:
    """The status of a call that was answered with this HTTP status and no grpc-status."""
    return _FROM_HTTP_STATUS.get(http_status, StatusCode.UNKNOWN)


def parse_status(value: bytes) -> StatusCode:
    """The value of grpc-status. A code that gRPC does not define, or no number, is UNKNOWN."""
    try:
        return StatusCode(int(value))
    except ValueError:
        return StatusCode.UNKNOWN
