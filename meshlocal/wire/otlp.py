"""Spans as OTLP has them (OpenTelemetry protocol 1.10): what an exporter sends, and what it is answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from google.protobuf.message import DecodeError

from meshlocal.policy.steps import Steps
from meshlocal.wire.pb.traces_pb2 import (
    AnyValue,
    ArrayValue,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
    InstrumentationScope,
    KeyValue,
    Resource,
    ResourceSpans,
    ScopeSpans,
    Status,
)
from meshlocal.wire.pb.traces_pb2 import Span as SpanMessage

CONTENT_TYPE = "application/x-protobuf"

Value: TypeAlias = "str | int | tuple[str, ...]"

_SERVER, _CLIENT = SpanMessage.SPAN_KIND_SERVER, SpanMessage.SPAN_KIND_CLIENT

_REMOTE_KNOWN, _REMOTE = 0x100, 0x200
"""Flags of a span: it is known whether its parent is in another process, and it is."""

_AT_ONCE = 8
"""Spans that a step encodes."""

_ATTRIBUTES_KEPT = 1024
"""Attributes whose bytes are kept."""


class Span(NamedTuple):
    """One span.

    Attributes:
        name: of few values.
        server: something asked this process; else this process asked something.
        trace_id: 128 bits.
        span_id: 64 bits, not 0.
        parent_id: 0: none.
        remote: its parent is another process's.
        start: nanoseconds since 1970.
        end: likewise.
        attributes: by name; empty texts are left out.
        error: what failed, in a few words; empty: nothing, as far as this span can tell.
        failed: whether something did.
    """

    name: str
    server: bool
    trace_id: int
    span_id: int
    parent_id: int
    remote: bool
    start: int
    end: int
    attributes: Mapping[str, Value]
    error: str = ""
    failed: bool = False


def encode_spans(resource: Mapping[str, Value], scope: tuple[str, str], spans: Iterable[Span]) -> Steps[bytes]:
    """The body of an export, in steps: an `ExportTraceServiceRequest`.

    What is encoded is joined, as the encoding allows: a message's bytes behind another one's are both of them in one
    (https://protobuf.dev/programming-guides/encoding/#last-one-wins).

    Args:
        resource: attributes of who made the spans.
        scope: the name and version of what did.
        spans: as they are made: none is asked for before its step.
    """
    encoded = [ScopeSpans(scope=InstrumentationScope(name=scope[0], version=scope[1])).SerializeToString()]
    for number, span in enumerate(spans):
        encoded.append(_within(_SPANS_OF_SCOPE, _encode(span)))
        if number % _AT_ONCE == _AT_ONCE - 1:
            yield
    yield
    made_by = Resource(attributes=[_key_value(*each) for each in resource.items() if each[1] != ""])
    of_resource = ResourceSpans(resource=made_by).SerializeToString()
    return _within(_OF_REQUEST, of_resource + _within(_SCOPES_OF_RESOURCE, b"".join(encoded)))


_OF_REQUEST = ExportTraceServiceRequest.RESOURCE_SPANS_FIELD_NUMBER
_SCOPES_OF_RESOURCE = ResourceSpans.SCOPE_SPANS_FIELD_NUMBER
_SPANS_OF_SCOPE = ScopeSpans.SPANS_FIELD_NUMBER


def _within(field: int, message: bytes) -> bytes:
    """A message as a field of another one: its number and wire type (LEN), its length, and itself."""
    size, length = len(message), bytearray((field << 3 | 2,))
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return bytes(length) + message


def rejected(body: bytes) -> tuple[int, str]:
    """How many spans a collector that answered 200 did not take, and why; of what is no answer of OTLP: none.

    Args:
        body: of the answer.
    """
    try:
        partial = ExportTraceServiceResponse.FromString(body).partial_success
    except DecodeError:
        return 0, ""
    return partial.rejected_spans, partial.error_message


def _encode(span: Span) -> bytes:
    message = SpanMessage(
        trace_id=span.trace_id.to_bytes(16, "big"),
        span_id=span.span_id.to_bytes(8, "big"),
        parent_span_id=span.parent_id.to_bytes(8, "big") if span.parent_id else b"",
        name=span.name,
        kind=_SERVER if span.server else _CLIENT,
        start_time_unix_nano=span.start,
        end_time_unix_nano=max(span.end, span.start),
        # Only what is recorded is sent: it is sampled.
        flags=1 | _REMOTE_KNOWN | (_REMOTE if span.remote else 0),
    )
    if span.failed:
        message.status.code = Status.STATUS_CODE_ERROR
        message.status.message = span.error
    attributes = [_attribute(*each) for each in span.attributes.items() if each[1] != ""]
    return message.SerializeToString() + b"".join(attributes)


@lru_cache(maxsize=_ATTRIBUTES_KEPT)
def _attribute(name: str, value: Value) -> bytes:
    """A span that has this attribute, and nothing else. Most of them are those of other spans too."""
    return SpanMessage(attributes=[_key_value(name, value)]).SerializeToString()


def _key_value(name: str, value: Value) -> KeyValue:
    if isinstance(value, str):
        given = AnyValue(string_value=value)
    elif isinstance(value, int):
        given = AnyValue(int_value=value)
    else:
        given = AnyValue(array_value=ArrayValue(values=[AnyValue(string_value=each) for each in value]))
    return KeyValue(key=name, value=given)
