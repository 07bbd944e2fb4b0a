"""The spans of a request: how many, whose parents, and what each says (rule R3)."""

from __future__ import annotations

from typing import Any

import pytest

from meshlocal.app.spans import request_spans, span_count
from meshlocal.client.ended import Asked, FailedAttempt
from meshlocal.policy.model import ServiceKey, make_instance
from meshlocal.policy.picker import Pick, Reason
from meshlocal.proxy.http.marks import Trace
from meshlocal.proxy.http.traced import TracedRequest
from meshlocal.wire.otlp import Span

NEAR = make_instance("10.0.0.1", 9001, labels={"node": "n1"})
FAR = make_instance("10.0.0.2", 9002, labels={"node": "n2"})
FAILED = FailedAttempt(Pick(NEAR, 0, None, False), 1, "node", "refused", 111, 10.1, 0.2)
SERVED = TracedRequest(
    Trace(1, 2, 100, 1),
    ServiceKey("b"),
    Asked("1.1", "GET", "/x", 200, "r1"),
    "http",
    "b.example:8080",
    ("10.0.9.9", 4321),
    "",
    10.0,
    12.0,
    "served",
    -1,
    False,
    False,
    "node",
    "",
    "",
    1,
    NEAR,
    10.5,
    (),
)
MOVED = SERVED._replace(
    tier="other", reason=str(Reason.LOCAL_FAILED), attempts=2, instance=FAR, failures=(FAILED,), began=10.5
)
CALL = SERVED._replace(asked=Asked("2", "POST", "/p.S/M", 200), is_grpc=True, grpc_status=0)


def spans(request: TracedRequest) -> list[Span]:
    found = list(request_spans(request, 1000.0))
    assert len(found) == span_count(request)
    return found


def has(span: Span, **wanted: Any) -> None:
    """Its attributes, a `_` in a name for a dot; None: there is none."""
    for name, value in wanted.items():
        assert span.attributes.get(name.replace("__", "-").replace("_", ".")) == value, name


def test_one_attempt() -> None:
    asked, attempt = spans(SERVED)
    assert (asked.name, asked.server, asked.trace_id, asked.span_id, asked.parent_id) == ("GET", True, 1, 100, 2)
    assert asked.remote
    assert (asked.start, asked.end) == (1_010_000_000_000, 1_012_000_000_000)
    assert (attempt.name, attempt.server, attempt.span_id, attempt.parent_id) == ("GET", False, 101, 100)
    assert not attempt.remote
    assert (attempt.start, attempt.end) == (1_010_500_000_000, 1_012_000_000_000)
    assert not asked.failed
    assert not attempt.failed
    assert asked.attributes["http.request.method"] == "GET"
    assert asked.attributes["http.response.status_code"] == 200
    assert asked.attributes["http.request.header.x-request-id"] == ("r1",)
    has(asked, url_path="/x", url_scheme="http", server_address="b.example", server_port=8080)
    has(asked, client_address="10.0.9.9", meshlocal_service="b", meshlocal_tier="node", meshlocal_outcome="served")
    has(attempt, server_address="10.0.0.1", server_port=9001, network_peer_address="10.0.0.1", meshlocal_node="n1")
    assert "http.request.resend_count" not in attempt.attributes


def test_a_request_that_left_the_node() -> None:
    """One span for each attempt; that which failed says how; where it went, and why (R1)."""
    asked, failed, served = spans(MOVED)
    has(asked, meshlocal_tier="other", meshlocal_reason="local_failed", meshlocal_attempts=2)
    assert not asked.failed
    assert (failed.span_id, failed.failed, failed.error) == (101, True, "refused")
    assert (failed.start, failed.end) == (1_010_100_000_000, 1_010_300_000_000)
    has(failed, error_type="refused", meshlocal_tier="node", meshlocal_reason="", meshlocal_node="n1")
    assert (served.span_id, served.failed) == (102, False)
    has(served, meshlocal_reason="local_failed", meshlocal_node="n2")
    assert served.attributes["http.request.resend_count"] == 1


def test_an_answer_of_the_proxys_own() -> None:
    """All attempts failed: the status is no instance's."""
    request = SERVED._replace(
        asked=Asked("1.1", "GET", "/x", 502), failures=(FAILED,), fault=True, error="failed", outcome="failed"
    )
    asked, failed = spans(request)
    assert (asked.failed, asked.error) == (True, "failed")
    has(asked, error_type="502")
    assert "http.response.status_code" not in failed.attributes


def test_a_deadline() -> None:
    """The last attempt was left in the middle."""
    request = SERVED._replace(
        asked=Asked("1.1", "GET", "/x", 504), fault=True, error="deadline", outcome="deadline", failures=(FAILED,)
    )
    asked, _, left = spans(request._replace(attempts=2))
    assert asked.failed
    assert (left.failed, left.error) == (True, "deadline")
    assert "http.response.status_code" not in left.attributes


def test_an_instance_that_says_that_it_failed() -> None:
    asked, attempt = spans(SERVED._replace(asked=Asked("1.1", "GET", "/x", 500), fault=True))
    assert asked.failed
    assert attempt.failed
    has(attempt, error_type="500")
    assert attempt.attributes["http.response.status_code"] == 500


def test_a_client_that_was_wrong() -> None:
    """By the conventions 404 is an error of who asks, and none of who is asked."""
    asked, attempt = spans(SERVED._replace(asked=Asked("1.1", "GET", "/x", 404)))
    assert not asked.failed
    assert attempt.failed
    has(attempt, error_type="404")


def test_a_client_that_left() -> None:
    asked, attempt = spans(SERVED._replace(asked=Asked("1.1", "GET", "/x", 0), outcome="client_left"))
    assert not asked.failed
    assert not attempt.failed


def test_no_instance() -> None:
    request = SERVED._replace(
        service=None, attempts=0, instance=None, tier="", outcome="no_instance", error="unknown_host", fault=True
    )
    (asked,) = spans(request)
    assert (asked.failed, asked.error) == (True, "unknown_host")
    has(asked, meshlocal_service="")


@pytest.mark.parametrize(("status", "name", "failed"), [(0, "OK", False), (5, "NOT_FOUND", False)])
def test_a_call(status: int, name: str, failed: bool) -> None:
    asked, attempt = spans(CALL._replace(grpc_status=status))
    assert asked.name == attempt.name == "p.S/M"
    for span in (asked, attempt):
        assert span.attributes["rpc.system.name"] == "grpc"
        assert span.attributes["rpc.method"] == "p.S/M"
        assert span.attributes["rpc.response.status_code"] == name
        assert "http.request.method" not in span.attributes
        assert "http.response.status_code" not in span.attributes
        assert span.failed == failed


def test_a_call_that_failed() -> None:
    asked, attempt = spans(CALL._replace(grpc_status=13, fault=True))
    for span in (asked, attempt):
        assert span.failed
        has(span, error_type="INTERNAL")


def test_methods_that_a_client_invents() -> None:
    """A name has few values, whatever clients do."""
    asked, _ = spans(SERVED._replace(asked=Asked("2", "BREW", "/x", 200)))
    assert asked.name == "HTTP"
    assert asked.attributes["http.request.method"] == "_OTHER"
    assert asked.attributes["http.request.method_original"] == "BREW"


@pytest.mark.parametrize(
    ("authority", "host", "port"),
    [("b", "b", None), ("b:80", "b", 80), ("[::1]:80", "::1", 80), ("[::1]", "::1", None), ("", "", None)],
)
def test_who_was_asked(authority: str, host: str, port: int | None) -> None:
    asked, _ = spans(SERVED._replace(authority=authority))
    has(asked, server_address=host, server_port=port)


def test_a_trace_that_begins_here() -> None:
    asked, attempt = spans(SERVED._replace(trace=Trace(1, 0, 2**64 - 1, 1)))
    assert (asked.parent_id, asked.remote) == (0, False)
    assert (attempt.span_id, attempt.parent_id) == (1, 2**64 - 1)


def test_an_answer_that_was_dropped() -> None:
    """The attempt says with what status; the request, what became of it."""
    _, failed, _ = spans(MOVED._replace(failures=(FAILED._replace(error="status", status=503),)))
    assert failed.attributes["http.response.status_code"] == 503
    has(failed, error_type="503")
    call = CALL._replace(attempts=2, failures=(FAILED._replace(error="status", status=14),))
    _, failed, _ = spans(call)
    assert failed.attributes["rpc.response.status_code"] == "UNAVAILABLE"
    has(failed, error_type="UNAVAILABLE")


def test_an_attempt_whose_place_the_proxys_answer_took() -> None:
    """504 is none of the instance's, which said nothing."""
    asked, attempt = spans(
        SERVED._replace(asked=Asked("1.1", "GET", "/x", 504), fault=True, error="deadline", outcome="deadline")
    )
    has(asked, error_type="504")
    has(attempt, error_type="deadline")


def test_what_an_instance_was_asked() -> None:
    _, attempt = spans(SERVED)
    assert attempt.attributes["url.full"] == "http://b.example:8080/x"


def test_calls_that_a_client_invents() -> None:
    asked, _ = spans(CALL._replace(grpc_status=12))
    assert asked.name == "_OTHER"
