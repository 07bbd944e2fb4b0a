"""The spans of a request that was traced (rule R3).

Names and attributes are those of OpenTelemetry's semantic conventions for HTTP (1.37) and gRPC, and beside them
`meshlocal.*`: what no convention has a word for. A request is a span of the kind server, as its client asked the proxy;
each of its attempts is one of the kind client below that, as the proxy asked an instance.
"""

from __future__ import annotations

from collections.abc import Iterator

from meshlocal.client.ended import FailedAttempt
from meshlocal.policy.model import Instance
from meshlocal.proxy.http.statistics import STATUS_NAMES
from meshlocal.proxy.http.traced import TracedRequest
from meshlocal.wire.otlp import Span, Value

_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
"""Methods that stand for themselves; a client may invent any number of others."""


_UNIMPLEMENTED = STATUS_NAMES.index("UNIMPLEMENTED")


def request_spans(request: TracedRequest, offset: float) -> Iterator[Span]:
    """The request's span, and one for each attempt that is known of.

    Args:
        request: as it ended.
        offset: from its clock to seconds since 1970.
    """
    yield _request_span(request, offset)
    for failed in request.failures:
        yield _failed_span(request, failed, offset)
    if _ended_with_an_attempt(request) and request.instance is not None:
        yield _last_span(request, request.instance, offset)


def span_count(request: TracedRequest) -> int:
    """How many spans `request_spans` gives."""
    return 1 + len(request.failures) + _ended_with_an_attempt(request)


def _ended_with_an_attempt(request: TracedRequest) -> bool:
    """Whether its last attempt did not fail before it ended."""
    last = request.failures[-1].number if request.failures else 0
    return request.instance is not None and request.attempts > last


def _request_span(request: TracedRequest, offset: float) -> Span:
    host, port = _split(request.authority)
    attributes: dict[str, Value] = {
        **_asked(request),
        "url.scheme": request.scheme,
        "url.path": request.asked.path,
        "server.address": host,
        "client.address": str(request.peer[0]) if isinstance(request.peer, tuple) else "",
        "network.protocol.name": "http",
        "network.protocol.version": request.asked.protocol,
        "meshlocal.service": request.service or "",
        "meshlocal.outcome": request.outcome,
        "meshlocal.tier": request.tier,
        "meshlocal.reason": request.reason,
        "meshlocal.attempts": request.attempts,
        "meshlocal.client.identity": request.identity,
    }
    if port:
        attributes["server.port"] = port
    if request.asked.request_id:
        attributes["http.request.header.x-request-id"] = (request.asked.request_id,)
    failed = _failed(request)
    attributes.update(_answer(request))
    if failed:
        attributes["error.type"] = _error_type(request)
    trace = request.trace
    return Span(
        _name(request),
        True,
        trace.trace_id,
        trace.span_id,
        trace.parent_id,
        bool(trace.parent_id),
        _nanoseconds(request.started + offset),
        _nanoseconds(request.ended + offset),
        attributes,
        _words(request) if failed else "",
        failed,
    )


def _failed_span(request: TracedRequest, failed: FailedAttempt, offset: float) -> Span:
    attributes = _attempt(request, failed.pick.instance, failed.number, failed.tier, failed.pick.reason or "")
    attributes["error.type"] = failed.error
    if failed.status:
        answered = request._replace(grpc_status=failed.status, asked=request.asked._replace(status=failed.status))
        attributes.update(_answer(answered))
        attributes["error.type"] = STATUS_NAMES[failed.status] if request.is_grpc else str(failed.status)
    return _attempt_span(
        request,
        failed.number,
        failed.began + offset,
        failed.began + failed.seconds + offset,
        attributes,
        failed.error,
        True,
    )


def _last_span(request: TracedRequest, instance: Instance, offset: float) -> Span:
    """The attempt that its request ended with."""
    attributes = _attempt(request, instance, request.attempts, request.tier, request.reason)
    answered = request.outcome in ("served", "cut")
    if answered:
        attributes.update(_answer(request))
    failed = _failed(request) or (answered and request.asked.status >= 400)
    if failed:
        # What the proxy answered in its place is none of the instance's.
        attributes["error.type"] = _error_type(request) if answered else request.error or request.outcome
    words = _words(request) if failed else ""
    began, ended = request.began + offset, request.ended + offset
    return _attempt_span(request, request.attempts, began, ended, attributes, words, failed)


def _attempt_span(
    request: TracedRequest,
    number: int,
    start: float,
    end: float,
    attributes: dict[str, Value],
    error: str,
    failed: bool,
) -> Span:
    trace = request.trace
    return Span(
        _name(request),
        False,
        trace.trace_id,
        trace.attempt_id(number),
        trace.span_id,
        False,
        _nanoseconds(start),
        _nanoseconds(end),
        attributes,
        error,
        failed,
    )


def _attempt(request: TracedRequest, instance: Instance, number: int, tier: str, reason: str) -> dict[str, Value]:
    attributes: dict[str, Value] = {
        **_asked(request),
        "server.address": instance.key.address,
        "server.port": instance.key.port,
        "network.peer.address": instance.key.address,
        "network.peer.port": instance.key.port,
        "url.full": "" if request.is_grpc else f"{request.scheme}://{request.authority}{request.asked.path}",
        "meshlocal.service": request.service or "",
        "meshlocal.node": instance.node or "",
        "meshlocal.tier": tier,
        "meshlocal.reason": reason,
    }
    if number > 1:
        attributes["http.request.resend_count"] = number - 1
    return attributes


def _asked(request: TracedRequest) -> dict[str, Value]:
    if request.is_grpc:
        return {"rpc.system.name": "grpc", "rpc.method": request.asked.path.lstrip("/")}
    method = request.asked.method
    if method not in _METHODS:
        return {"http.request.method": "_OTHER", "http.request.method_original": method}
    return {"http.request.method": method}


def _answer(request: TracedRequest) -> dict[str, Value]:
    if request.is_grpc:
        return {"rpc.response.status_code": STATUS_NAMES[request.grpc_status]} if request.grpc_status >= 0 else {}
    return {"http.response.status_code": request.asked.status} if request.asked.status else {}


def _name(request: TracedRequest) -> str:
    """Of few values: a path has too many."""
    if request.is_grpc:
        # What no instance knows, a client may have invented.
        return request.asked.path.lstrip("/") if request.grpc_status != _UNIMPLEMENTED else "_OTHER"
    return request.asked.method if request.asked.method in _METHODS else "HTTP"


def _failed(request: TracedRequest) -> bool:
    return request.fault or request.outcome not in ("served", "client_left", "returned", "refused")


def _error_type(request: TracedRequest) -> str:
    """What the conventions want: the status where there is one, else a word."""
    if request.is_grpc and request.grpc_status > 0:
        return STATUS_NAMES[request.grpc_status]
    if request.asked.status >= 400 and not request.is_grpc:
        return str(request.asked.status)
    return request.error or request.outcome


def _words(request: TracedRequest) -> str:
    return request.error or (request.outcome if request.outcome != "served" else "")


def _split(authority: str) -> tuple[str, int]:
    host, colon, port = authority.rpartition(":")
    if not colon or not port.isdigit():
        return authority.strip("[]"), 0
    return host.strip("[]"), int(port)


def _nanoseconds(seconds: float) -> int:
    return max(int(seconds * 1e9), 0)
