"""The discovery interface over WebSocket (RFC 6455): names, codecs and close codes.

One connection carries one call. Its path is the method's gRPC path, its first message the request, what follows the
responses. The subprotocol says how messages are written: `meshlocal.discovery.v1+proto` as binary frames, as gRPC has
them; `meshlocal.discovery.v1+json` as text frames, in the JSON that protobuf defines for them. A call that ends well
ends with 1000, one that fails with a code that tells how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from meshlocal.wire.grpc.status import GrpcError, StatusCode

PROTO = "meshlocal.discovery.v1+proto"
JSON = "meshlocal.discovery.v1+json"
BEARER = "meshlocal.bearer."
"""Begins a subprotocol that carries a token, in base64url: browsers can set no header."""

NORMAL = 1000
GOING_AWAY = 1001
PROTOCOL_ERROR = 1002
UNSUPPORTED = 1003
INVALID = 1007
POLICY = 1008
TOO_BIG = 1009
INTERNAL = 1011
STATUS_BASE = 4000
"""A gRPC status travels as this and its number, 4003 for INVALID_ARGUMENT."""

_MAX_REASON = 123
_STATUSES = {
    GOING_AWAY: StatusCode.UNAVAILABLE,
    PROTOCOL_ERROR: StatusCode.INTERNAL,
    UNSUPPORTED: StatusCode.INTERNAL,
    INVALID: StatusCode.INTERNAL,
    POLICY: StatusCode.INTERNAL,
    TOO_BIG: StatusCode.RESOURCE_EXHAUSTED,
    INTERNAL: StatusCode.UNKNOWN,
    1006: StatusCode.UNAVAILABLE,
    1012: StatusCode.UNAVAILABLE,
    1013: StatusCode.UNAVAILABLE,
}

M = TypeVar("M", bound=Message)


class Close(Exception):  # noqa: N818 - it is the end of a connection, not always a failure
    """Why a connection is closed.

    Attributes:
        code: of RFC 6455, section 7.4, or 4000 and a gRPC status.
        reason: for people.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.code} {self.reason}".rstrip()

    @classmethod
    def of(cls, error: GrpcError, *, draining: bool = False) -> Close:
        """What a call's status becomes; a server that goes away says 1001."""
        if draining and error.code is StatusCode.UNAVAILABLE:
            return cls(GOING_AWAY, shortened(error.message))
        return cls(STATUS_BASE + error.code, shortened(error.message))

    def status(self) -> GrpcError:
        """The status that the code stands for."""
        number = self.code - STATUS_BASE
        if 0 < number <= max(StatusCode):
            return GrpcError(StatusCode(number), self.reason)
        if self.code == NORMAL:
            return GrpcError(StatusCode.INTERNAL, "the server ended the call early")
        told = f"closed with {self.code}" + (f": {self.reason}" if self.reason else "")
        return GrpcError(_STATUSES.get(self.code, StatusCode.UNKNOWN), told)


def shortened(reason: str) -> str:
    """A reason that fits into a close frame."""
    return reason.encode()[:_MAX_REASON].decode(errors="ignore")


class Codec(Protocol):
    """How messages are written into frames."""

    def encode(self, message: Message) -> str | bytes:
        """A message's frame."""
        ...

    def encode_serialized(self, payload: bytes, kind: type[Message]) -> str | bytes:
        """The frame of a message that was serialized before."""
        ...

    def decode(self, frame: str | bytes, kind: type[M]) -> M:
        """The message in a frame.

        Raises:
            Close: the frame is of the wrong kind (1003), or no such message (1007).
        """
        ...


class ProtoCodec:
    """Messages as protobuf bytes, in binary frames."""

    def encode(self, message: Message) -> bytes:
        """See `Codec.encode`."""
        return message.SerializeToString()

    def encode_serialized(self, payload: bytes, kind: type[Message]) -> bytes:
        """See `Codec.encode_serialized`."""
        return payload

    def decode(self, frame: str | bytes, kind: type[M]) -> M:
        """See `Codec.decode`."""
        if isinstance(frame, str):
            raise Close(UNSUPPORTED, f"{PROTO} has binary frames, and this is a text frame")
        try:
            return kind.FromString(frame)
        except DecodeError:
            raise Close(INVALID, f"the frame is no {kind.DESCRIPTOR.full_name}") from None


MOST_JSON = 16_384
"""Characters of a request in JSON: what takes some 20 ms to read, in which nothing else runs. Room for 200 services."""


class JsonCodec:
    """Messages as protobuf's JSON, in text frames."""

    def encode(self, message: Message) -> str:
        """See `Codec.encode`."""
        from google.protobuf import json_format  # here: only servers that browsers ask have a use for it

        return json_format.MessageToJson(message, indent=None)

    def encode_serialized(self, payload: bytes, kind: type[Message]) -> str:
        """See `Codec.encode_serialized`."""
        return self.encode(kind.FromString(payload))

    def decode(self, frame: str | bytes, kind: type[M]) -> M:
        """See `Codec.decode`."""
        from google.protobuf import json_format

        if isinstance(frame, bytes):
            raise Close(UNSUPPORTED, f"{JSON} has text frames, and this is a binary frame")
        if len(frame) > MOST_JSON:
            raise Close(TOO_BIG, f"a request in JSON has {MOST_JSON} characters at most; {PROTO} takes larger ones")
        try:
            return json_format.Parse(frame, kind())
        except json_format.ParseError as error:
            raise Close(INVALID, shortened(f"the frame is no {kind.DESCRIPTOR.full_name}: {error}")) from None
        except RecursionError:
            raise Close(INVALID, "the frame is nested too deep") from None


def choose_codec(proposed: Sequence[str]) -> tuple[str, Codec] | None:
    """The first subprotocol that both sides speak, and its codec; None if there is none."""
    for name in proposed:
        if name == PROTO:
            return name, ProtoCodec()
        if name == JSON:
            return name, JsonCodec()
    return None
