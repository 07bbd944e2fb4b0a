"""Answers of the proxy's own (A6): a status, a reason that programs can go by, and a line for people."""

from __future__ import annotations

from typing import NamedTuple

from meshlocal.wire.http1.errors import ProtocolError


class Answer(NamedTuple):
    """What the client is told instead of an instance's response.

    Attributes:
        status: of the answer.
        reason: goes into `x-meshlocal-error`, and into the counts of refused requests.
        text: one line.
    """

    status: int
    reason: str
    text: str

    @classmethod
    def to(cls, error: ProtocolError) -> Answer:
        """The answer to a request that is refused."""
        return cls(error.status, error.reason, str(error))

    def of(self, request_id: bytes) -> tuple[str, tuple[bytes, bytes]]:
        """The line for people to whom a request has an id, and the field that tells programs."""
        return f"{self.text} (request {request_id.decode('ascii', 'replace')})", (b"x-request-id", request_id)


def grpc_status(answer: Answer) -> int:
    """The gRPC status of an answer (C3): 4 DEADLINE_EXCEEDED, 8 RESOURCE_EXHAUSTED, 12 UNIMPLEMENTED, 14 UNAVAILABLE;
    3 INVALID_ARGUMENT for what is wrong with the request."""
    if answer == DEADLINE:
        return 4
    if answer in LIMITED or answer.status in (413, 431) or answer == TOO_MANY_SERVICES:
        return 8
    if answer in (UNKNOWN_SERVICE, UNKNOWN_HOST):
        return 12
    return 3 if answer.status < 500 and answer.status != 408 else 14


UNKNOWN_HOST = Answer(503, "unknown_host", "the host names no service, and no route has it")
UNKNOWN_SERVICE = Answer(503, "unknown_service", "no registry knows the service")
TOO_MANY_SERVICES = Answer(503, "too_many_services", "more services are in use than this proxy may follow")
NO_SNAPSHOT = Answer(503, "no_snapshot", "discovery has not said yet where the service runs")
NO_INSTANCE = Answer(503, "no_instance", "the service has no usable instance")
CONNECT_FORBIDDEN = Answer(403, "connect_forbidden", "CONNECT is for services that this proxy knows")

TOO_MANY_REQUESTS = Answer(503, "limit_requests", "as many requests are under way as there may be")
TOO_MANY_CONNECTIONS = Answer(503, "limit_connections", "as many connections are open as there may be")
TOO_MANY_WAITING = Answer(503, "limit_waiting", "as many requests wait for an instance as may")
LIMITED = (TOO_MANY_REQUESTS, TOO_MANY_CONNECTIONS, TOO_MANY_WAITING)

FAILED = Answer(502, "failed", "no instance could be connected")
NO_RESPONSE = Answer(502, "no_response", "the instance ended the connection without a response")
REFUSED = Answer(502, "refused", "the instance refused the request")
RESET = Answer(502, "reset", "the instance reset the request")
BROKEN = Answer(502, "broken_response", "the instance's response broke off, or is malformed")
DEADLINE = Answer(504, "deadline", "no instance answered in time")
ATTEMPT_TIMEOUT = Answer(504, "attempt_timeout", "the instance did not answer in time")

HEAD_TIMEOUT = Answer(408, "head_timeout", "the request's head did not come in time")
BODY_TIMEOUT = Answer(408, "body_timeout", "the request's body did not come in time")
BODY_INCOMPLETE = Answer(400, "body_incomplete", "the request's body ended early")
