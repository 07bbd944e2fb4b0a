"""The access log's lines of HTTP requests."""

from __future__ import annotations

from meshlocal.proxy.access_log import log_refused, log_request
from meshlocal.proxy.http.answers import Answer
from meshlocal.proxy.http.record import HttpRecord
from meshlocal.proxy.http.statistics import STATUS_NAMES


class HttpAccessLog:
    """An `Observer` that writes a line for each request."""

    def ended(self, record: HttpRecord, now: float) -> None:
        """See `Observer.ended`."""
        head = record.head
        log_request(
            record,
            record.outcome,
            now,
            peer=record.peer,
            identity=record.identity,
            ids={"request_id": record.request_id or None, "trace_id": record.trace_id or None},
            asked={
                "method": head.method.decode("ascii"),
                "host": head.authority.decode("ascii") or None,
                # Queries carry secrets more often than paths do.
                "path": head.target.partition(b"?")[0].decode("ascii"),
                "status": record.status or None,
                "protocol": head.protocol,
                "grpc": STATUS_NAMES[record.grpc_status] if record.grpc_status >= 0 else None,
            },
            problem={"error": record.error or None},
            sent=record.sent,
            received=record.received,
        )

    def refused(self, peer: object, answer: Answer) -> None:
        """See `Observer.refused`."""
        log_refused(peer, answer.status, answer.reason)
