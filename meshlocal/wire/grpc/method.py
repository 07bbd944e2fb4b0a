"""What a client and a server must agree on to make a call."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

Req = TypeVar("Req", bound=Message)
Resp = TypeVar("Resp", bound=Message)

_PATH = re.compile(r"/[A-Za-z_][\w.]*/[A-Za-z_]\w*", re.ASCII)


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
