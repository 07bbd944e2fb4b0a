"""Spans as a collector reads them, by OpenTelemetry's own messages (rule R3)."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as theirs
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from meshlocal.policy.steps import finish
from meshlocal.wire.otlp import Span, encode_spans, rejected
from meshlocal.wire.pb import traces_pb2 as ours

SPAN = Span(
    "GET",
    True,
    0x0AF7651916CD43DD8448EB211C80319C,
    0xB7AD6B7169203331,
    7,
    True,
    1_000_000_001,
    2_000_000_002,
    {"text": "a", "number": 3, "list": ("x", "y"), "left.out": ""},
    "refused",
    True,
)

MESSAGES: dict[str, Any] = {
    "ExportTraceServiceRequest": theirs.ExportTraceServiceRequest,
    "ExportTraceServiceResponse": theirs.ExportTraceServiceResponse,
    "ExportTracePartialSuccess": theirs.ExportTracePartialSuccess,
    "ResourceSpans": trace_pb2.ResourceSpans,
    "Resource": resource_pb2.Resource,
    "ScopeSpans": trace_pb2.ScopeSpans,
    "InstrumentationScope": common_pb2.InstrumentationScope,
    "Span": trace_pb2.Span,
    "Status": trace_pb2.Status,
    "KeyValue": common_pb2.KeyValue,
    "AnyValue": common_pb2.AnyValue,
    "ArrayValue": common_pb2.ArrayValue,
}


def test_every_message_is_compared() -> None:
    assert set(ours.DESCRIPTOR.message_types_by_name) == MESSAGES.keys()


@pytest.mark.parametrize("name", MESSAGES)
def test_names_and_numbers_are_theirs(name: str) -> None:
    """Each field of ours is one of OpenTelemetry's: so are the bytes."""
    mine, published = getattr(ours, name).DESCRIPTOR, MESSAGES[name].DESCRIPTOR
    for field in mine.fields:
        other = published.fields_by_name[field.name]
        assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated)
        if field.message_type is not None:
            assert field.message_type.name == other.message_type.name
    for enum in mine.enum_types:
        values = {value.name: value.number for value in published.enum_types_by_name[enum.name].values}
        assert {value.name: value.number for value in enum.values}.items() <= values.items()


def test_a_span() -> None:
    body = finish(encode_spans({"service.name": "s"}, ("meshlocal", "1"), [SPAN]))
    [of_resource] = theirs.ExportTraceServiceRequest.FromString(body).resource_spans
    assert [(each.key, each.value.string_value) for each in of_resource.resource.attributes] == [("service.name", "s")]
    [of_scope] = of_resource.scope_spans
    assert (of_scope.scope.name, of_scope.scope.version) == ("meshlocal", "1")
    [span] = of_scope.spans
    assert span.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert span.span_id.hex() == "b7ad6b7169203331"
    assert span.parent_span_id.hex() == "0000000000000007"
    assert (span.name, span.kind) == ("GET", trace_pb2.Span.SPAN_KIND_SERVER)
    assert (span.start_time_unix_nano, span.end_time_unix_nano) == (1_000_000_001, 2_000_000_002)
    assert span.flags == (
        0x01 | trace_pb2.SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK | trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK
    )
    assert (span.status.code, span.status.message) == (trace_pb2.Status.STATUS_CODE_ERROR, "refused")
    found = {each.key: each.value for each in span.attributes}
    assert found.keys() == {"text", "number", "list"}
    assert (found["text"].string_value, found["number"].int_value) == ("a", 3)
    assert [each.string_value for each in found["list"].array_value.values] == ["x", "y"]


def test_a_root_that_went_well() -> None:
    """No parent, no status; an end is never before its beginning, whatever the clock did."""
    plain = SPAN._replace(parent_id=0, remote=False, server=False, error="", failed=False, end=5)
    body = finish(encode_spans({}, ("meshlocal", "1"), [plain]))
    [span] = theirs.ExportTraceServiceRequest.FromString(body).resource_spans[0].scope_spans[0].spans
    assert span.parent_span_id == b""
    assert span.kind == trace_pb2.Span.SPAN_KIND_CLIENT
    assert not span.HasField("status")
    assert span.end_time_unix_nano == span.start_time_unix_nano
    assert not span.flags & trace_pb2.SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK


def test_many_are_encoded_in_steps() -> None:
    """P1: others have their turn in between."""
    steps = encode_spans({}, ("meshlocal", "1"), [SPAN] * 100)
    assert sum(1 for _ in steps) == 100 // 8 + 1


@pytest.mark.parametrize(
    ("answer", "count", "why"),
    [
        (theirs.ExportTraceServiceResponse().SerializeToString(), 0, ""),
        (b"", 0, ""),
        (b"{}", 0, ""),
        (
            theirs.ExportTraceServiceResponse(
                partial_success=theirs.ExportTracePartialSuccess(rejected_spans=3, error_message="too old")
            ).SerializeToString(),
            3,
            "too old",
        ),
    ],
)
def test_what_a_collector_did_not_take(answer: bytes, count: int, why: str) -> None:
    assert rejected(answer) == (count, why)
