"""Requests that are traced, as they end: what their spans are made of (rule R3)."""

from __future__ import annotations

from typing import NamedTuple

from meshlocal.client.ended import Asked, FailedAttempt, kept_attempts
from meshlocal.policy.model import Instance, ServiceKey
from meshlocal.proxy.http.marks import Trace
from meshlocal.proxy.http.record import HttpRecord


class TracedRequest(NamedTuple):
    """What is told of one request that is traced.

    Attributes:
        trace: of which it is.
        service: that it was for; None: nobody knows.
        asked: what it asked for.
        scheme: how it came: `http` or `https`.
        authority: that the client named.
        peer: the client's address, as the socket has it.
        identity: who the client proved to be; empty if it proved nothing.
        started: when it did, by the clock of whoever serves it, in seconds.
        ended: likewise.
        outcome: how it ended, a word of `client.statistics.Outcome`.
        grpc_status: of the call; -1 where it is none.
        is_grpc: it is a gRPC call.
        fault: the answer says that a server failed.
        tier: of the last instance tried; empty for none.
        reason: why that is not of the first tier (R1); empty if it is.
        error: how the last attempt failed, or the request, in a word; empty if neither did.
        attempts: how many instances were tried.
        instance: the last one tried; None: none was.
        began: when that attempt did.
        failures: attempts that failed, in order; of many, the first and the last.
    """

    trace: Trace
    service: ServiceKey | None
    asked: Asked
    scheme: str
    authority: str
    peer: object
    identity: str
    started: float
    ended: float
    outcome: str
    grpc_status: int
    is_grpc: bool
    fault: bool
    tier: str
    reason: str
    error: str
    attempts: int
    instance: Instance | None
    began: float
    failures: tuple[FailedAttempt, ...]


def traced_request(record: HttpRecord, trace: Trace, now: float) -> TracedRequest:
    """What is told of a request that ended at this moment, by the clock of its start."""
    pick = record.pick
    return TracedRequest(
        trace,
        record.state.key if record.state is not None else None,
        record.asked(),
        record.scheme,
        record.head.authority.decode("ascii", "replace"),
        record.peer,
        record.identity,
        record.started,
        now,
        record.outcome,
        record.grpc_status,
        record.is_grpc,
        record.is_server_fault,
        record.tier,
        record.reason,
        record.error,
        record.attempts,
        pick.instance if pick is not None else None,
        record.began,
        kept_attempts(record.failures),
    )
