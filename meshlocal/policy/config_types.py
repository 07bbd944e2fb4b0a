"""What the sections of the configuration are made of."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

MAX_SECONDS = 2_592_000.0
"""The longest time that may be configured: 30 days."""

Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=MAX_SECONDS)]
SecondsOrZero: TypeAlias = Annotated[float, Meta(ge=0, le=MAX_SECONDS)]
Microseconds: TypeAlias = Annotated[int, Meta(ge=0, le=1000)]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=1024)]
Workers: TypeAlias = Annotated[int, Meta(ge=1, le=256)]
Count: TypeAlias = Annotated[int, Meta(ge=1, le=1_000_000)]
Bytes: TypeAlias = Annotated[int, Meta(ge=0, le=2**50)]
MessageSize: TypeAlias = Annotated[int, Meta(ge=1024, le=2**30)]
ByteRate: TypeAlias = Annotated[int, Meta(ge=8192, le=2**40)]
Window: TypeAlias = Annotated[int, Meta(ge=1024, le=2**24)]
Percent: TypeAlias = Annotated[int, Meta(ge=0, le=100)]
AnyPercent: TypeAlias = Annotated[float, Meta(ge=0, le=100)]
GrpcStatus: TypeAlias = Literal[
    "CANCELLED",
    "UNKNOWN",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "ABORTED",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
]
Status: TypeAlias = Annotated[int, Meta(ge=400, le=599)]
AnyStatus: TypeAlias = Annotated[int, Meta(ge=200, le=599)]
PortNumber: TypeAlias = Annotated[int, Meta(ge=1, le=65535)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mapping of the configuration."""
