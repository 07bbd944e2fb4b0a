"""What a client and a server must agree on to make a call."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from meshlocal.wire.grpc.status import GrpcError, StatusCode

Req = TypeVar("Req", bound=Message)
Resp = TypeVar("Resp", bound=Message)
Sent = TypeVar("Sent")
Got = TypeVar("Got")
_Sent_contra = TypeVar("_Sent_contra", contravariant=True)
_Got_co = TypeVar("_Got_co", covariant=True)

_PATH = re.compile(r"/[A-Za-z_][\w.]*/[A-Za-z_]\w*", re.ASCII)


class CallMethod(Protocol[_Sent_contra, _Got_co]):
    """What a client needs of a method to call it."""

    @property
    def path(self) -> str:
        """`/package.Service/Method`."""
        ...

    def serialize(self, request: _Sent_contra, /) -> bytes:
        """A request as bytes."""
        ...

    def parse(self, payload: bytes, /) -> _Got_co:
        """A response. Raises GrpcError, INTERNAL, where the bytes are none."""
        ...


@dataclass(frozen=True, slots=True)
class CodedMethod(Generic[Sent, Got]):
    """A method of whatever messages, with what turns them into bytes and back.

    Attributes:
        path: `/package.Service/Method`.
        serializer: makes bytes of a request.
        deserializer: makes a response of bytes; what it raises becomes INTERNAL.
    """

    path: str
    serializer: Callable[[Sent], bytes]
    deserializer: Callable[[bytes], Got]

    def serialize(self, request: Sent) -> bytes:
        """See `CallMethod.serialize`."""
        return self.serializer(request)

    def parse(self, payload: bytes) -> Got:
        """See `CallMethod.parse`."""
        try:
            return self.deserializer(payload)
        except Exception as error:
            raise GrpcError(StatusCode.INTERNAL, f"response of {self.path} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class Method(Generic[Req, Resp]):
    """One method of a service. `path` is `/package.Service/Method`.

    Raises:
        ValueError: `path` has another shape.
    """

    path: str
    request_type: type[Req]
    response_type: type[Resp]
    client_streaming: bool = False
    server_streaming: bool = False

    def __post_init__(self) -> None:
        if not _PATH.fullmatch(self.path):
            raise ValueError(f"method path {self.path!r}: expected '/package.Service/Method'")

    @property
    def service(self) -> str:
        """`package.Service`."""
        return self.path.split("/")[1]

    def serialize(self, request: Req) -> bytes:
        """See `CallMethod.serialize`."""
        return request.SerializeToString()

    def parse(self, payload: bytes) -> Resp:
        """See `CallMethod.parse`."""
        try:
            return self.response_type.FromString(payload)
        except DecodeError as error:
            name = self.response_type.DESCRIPTOR.full_name
            raise GrpcError(StatusCode.INTERNAL, f"response is no {name}: {error}") from error
