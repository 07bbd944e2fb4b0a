"""Spans as OTLP has them (OpenTelemetry protocol 1.10): what an exporter sends, and what it is answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from typing import NamedTuple, TypeAlias

from google.protobuf.message import DecodeError

from meshlocal.policy.steps import Steps
from meshlocal.wire.pb.traces_pb2 import (
    AnyValue,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
    KeyValue,
    Status,
)
from meshlocal.wire.pb.traces_pb2 import Span as SpanMessage

CONTENT_TYPE = "application/x-protobuf"

Value: TypeAlias = "str | int | Sequence[str]"

_SERVER, _CLIENT = SpanMessage.SPAN_KIND_SERVER, SpanMessage.SPAN_KIND_CLIENT

_REMOTE_KNOWN, _REMOTE = 0x100, 0x200
"""Flags of a span: it is known whether its parent is in another process, and it is."""

_AT_ONCE = 16
"""Spans that a step encodes."""


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
    """The body of an export, in steps.

    Args:
        resource: attributes of who made the spans.
        scope: the name and version of what did.
        spans: as they are made: none is asked for before its step.
    """
    request = ExportTraceServiceRequest()
    of_resource = request.resource_spans.add()
    _fill(of_resource.resource.attributes, resource)
    of_scope = of_resource.scope_spans.add()
    of_scope.scope.name, of_scope.scope.version = scope
    for number, span in enumerate(spans):
        _add(of_scope.spans.add(), span)
        if number % _AT_ONCE == _AT_ONCE - 1:
            yield
    yield
    return request.SerializeToString()


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


def _add(message: SpanMessage, span: Span) -> None:
    message.trace_id = span.trace_id.to_bytes(16, "big")
    message.span_id = span.span_id.to_bytes(8, "big")
    if span.parent_id:
        message.parent_span_id = span.parent_id.to_bytes(8, "big")
    message.name = span.name
    message.kind = _SERVER if span.server else _CLIENT
    message.start_time_unix_nano = span.start
    message.end_time_unix_nano = max(span.end, span.start)
    # Only what is recorded is sent: it is sampled.
    message.flags = 1 | _REMOTE_KNOWN | (_REMOTE if span.remote else 0)
    _fill(message.attributes, span.attributes)
    if span.failed:
        message.status.code = Status.STATUS_CODE_ERROR
        message.status.message = span.error


def _fill(attributes: MutableSequence[KeyValue], values: Mapping[str, Value]) -> None:
    made = []
    for name, value in values.items():
        if isinstance(value, str):
            if not value:
                continue
            given = AnyValue(string_value=value)
        elif isinstance(value, int):
            given = AnyValue(int_value=value)
        else:
            given = AnyValue()
            given.array_value.values.extend(AnyValue(string_value=each) for each in value)
        made.append(KeyValue(key=name, value=given))
    attributes.extend(made)
