"""What is known of one HTTP request, for those who count it or tell of it (R1)."""

from __future__ import annotations

from typing import Protocol

from meshlocal.client.account import Account
from meshlocal.client.ended import Asked
from meshlocal.client.statistics import Outcome
from meshlocal.policy.retry import IDEMPOTENT_METHODS
from meshlocal.proxy.http.answers import Answer
from meshlocal.proxy.http.marks import ID_TOLD, Mark
from meshlocal.proxy.http.statistics import SERVER_FAULTS
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.messages import RequestBody
from meshlocal.wire.http1.request import RequestHead
from meshlocal.wire.http2_heads import Http2RequestHead
from meshlocal.wire.trace_context import parse_traceparent

PATH_TOLD = 200
"""Bytes of a path that are told of a request: what is kept of many is bounded."""


class HttpRecord(Account):
    """What is known of one HTTP request while it lives, and at its end.

    Args:
        peer: the client's address.
        head: of the request.
        started: when its head was read, by trio.current_time().
        body: of the request; None if it has none, or none that was begun with.

    Attributes:
        peer: the client's address.
        head: of the request.
        body: of the request.
        idempotent: it may be repeated, by its method or its Idempotency-Key (A3).
        status: of the response; 0 while there is none.
        received: bytes of the response's body.
        outcome: how it is counted, should it end now.
        grpc_status: of the call; -1 while there is none, and where it is none.
        problem: what is wrong with the instance's response; None if nothing is.
        mark: its id and its trace, as far as they are made here; None if neither is.
    """

    __slots__ = (
        "body",
        "grpc_status",
        "head",
        "idempotent",
        "mark",
        "outcome",
        "peer",
        "problem",
        "received",
        "status",
    )

    def __init__(self, peer: object, head: RequestHead, started: float, body: RequestBody | None) -> None:
        super().__init__(started)
        self.peer = peer
        self.head = head
        self.body = body
        self.idempotent = head.method in IDEMPOTENT_METHODS or head.idempotency_key
        self.status = 0
        self.received = 0
        self.grpc_status = -1
        self.outcome = Outcome.DRAINED
        self.problem: ProtocolError | None = None
        self.mark: Mark | None = None

    def asked(self) -> Asked:
        """See `Account.asked`."""
        head = self.head
        path = head.target.partition(b"?")[0][:PATH_TOLD].decode("ascii", "replace")
        method = head.method.decode("ascii", "replace")
        return Asked(head.protocol, method, path, self.status, self.request_id, self.trace_id)

    @property
    def raw_id(self) -> bytes:
        """What it is called, as it came, or was made; empty: nothing."""
        given = self.head.request_id[:ID_TOLD].rstrip(b" \t")
        return given or (self.mark.request_id if self.mark is not None else b"")

    @property
    def request_id(self) -> str:
        """The same for people."""
        return self.raw_id.decode("ascii", "replace")

    @property
    def trace_id(self) -> str:
        """Its trace in 32 digits, whether it is recorded here or not; empty: it has none."""
        trace = self.mark.trace if self.mark is not None else None
        found = trace or (parse_traceparent(self.head.trace_parent) if self.head.trace_parent else None)
        return f"{found.trace_id:032x}" if found is not None else ""

    @property
    def status_class(self) -> int:
        """The hundreds of the response's status, 0 for none; of a call that failed, those of the status that would say
        so: its failure hides behind 200."""
        hundreds = self.status // 100
        if self.grpc_status > 0 and hundreds == 2:
            return 5 if self.grpc_status in SERVER_FAULTS else 4
        return hundreds

    @property
    def is_server_fault(self) -> bool:
        """See `Account.is_server_fault`."""
        return self.status_class >= 5

    @property
    def identity(self) -> str:
        """Who the client proved to be; empty if it proved nothing."""
        return ""

    @property
    def scheme(self) -> str:
        """How it came: `http`, or `https` over TLS."""
        return "http"

    @property
    def is_grpc(self) -> bool:
        """Whether it is a gRPC call, whose status counts."""
        head = self.head
        return isinstance(head, Http2RequestHead) and head.grpc

    @property
    def sent(self) -> int:
        """Bytes of its body that came from the client."""
        return self.body.size if self.body is not None else 0


class Observer(Protocol):
    """Who is told of requests: the access log, for one. None of these may raise or wait."""

    def ended(self, record: HttpRecord, now: float) -> None:
        """A request ended, by trio.current_time()."""
        ...

    def refused(self, peer: object, answer: Answer) -> None:
        """This was answered to what is no request, or never became one."""
        ...
