"""What is counted and told of a request at its end (R1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshlocal.client.statistics import Outcome, RequestKey
from meshlocal.net.log import get_log
from meshlocal.net.sockets import format_address
from meshlocal.proxy.http.answers import BODY_TIMEOUT, Answer
from meshlocal.proxy.http.ends import Expiry
from meshlocal.proxy.http.statistics import status_class

if TYPE_CHECKING:
    from meshlocal.proxy.http.connection import ClientConnection
    from meshlocal.proxy.http.exchange import Exchange
    from meshlocal.proxy.http.service import HttpService

_access_log = get_log("meshlocal.access")


def told(exchange: Exchange) -> bytes:
    """The field lines that tell the client how a response came about, if they are wanted."""
    if not exchange.connection.forwarder.settings.config.response_headers:
        return b""
    lines = f"x-meshlocal-attempts: {exchange.attempts}\r\n"
    pick = exchange.pick
    if pick is not None:
        lines += f"x-meshlocal-instance: {pick.instance.key}\r\nx-meshlocal-tier: {exchange.tier}\r\n"
        if pick.reason is not None:
            lines += f"x-meshlocal-reason: {pick.reason}\r\n"
    return lines.encode("latin-1", "replace")


def account(exchange: Exchange, now: float) -> None:
    """Count a request that ended, and log it if that is wanted."""
    connection = exchange.connection
    if connection.expired:
        if connection.begun:
            exchange.outcome = Outcome.CUT
        else:
            exchange.outcome = Outcome.CLIENT_LEFT
            if connection.expiry is Expiry.BODY:
                exchange.status, exchange.error = BODY_TIMEOUT.status, exchange.error or BODY_TIMEOUT.reason
                connection.forwarder.refused[BODY_TIMEOUT.reason] += 1
    pick, service = exchange.pick, exchange.service
    reason = (pick.reason or "") if pick is not None else ""
    if service is not None:
        sent = exchange.body.size if exchange.body is not None else 0
        seconds = now - exchange.started
        outcome, status, received = exchange.outcome, exchange.status, exchange.received
        count_request(service, exchange.tier, reason, outcome, status, sent, received, seconds)
    forwarder = connection.forwarder
    if exchange.outcome is Outcome.DRAINED:
        forwarder.drained += 1
    if forwarder.access_log:
        _log_request(exchange, now)


def count_request(
    service: HttpService,
    tier: str,
    reason: str,
    outcome: Outcome,
    status: int,
    sent: int,
    received: int,
    seconds: float,
) -> None:
    """Count a request that ended: bytes of bodies, and how long it took."""
    counts, statistics = service.state.statistics, service.statistics
    # As RequestKey(...) does, without a call of Python's own.
    counts.requests[tuple.__new__(RequestKey, (tier, reason, outcome))] += 1
    counts.bytes_received += received
    counts.bytes_sent += sent
    statistics.responses[tier, reason, status_class(status)] += 1
    statistics.observe(seconds)


def _log_request(exchange: Exchange, now: float) -> None:
    pick, head, body = exchange.pick, exchange.head, exchange.body
    _access_log.info(
        "request",
        service=exchange.service.state.key if exchange.service is not None else None,
        client=format_address(exchange.connection.peer),
        method=head.method.decode("ascii"),
        host=head.authority.decode("ascii") or None,
        # Queries carry secrets more often than paths do.
        path=head.target.partition(b"?")[0].decode("ascii"),
        status=exchange.status or None,
        instance=str(pick.instance.key) if pick is not None else None,
        node=(pick.instance.node or None) if pick is not None else None,
        tier=exchange.tier or None,
        reason=(pick.reason or None) if pick is not None else None,
        attempts=exchange.attempts,
        outcome=exchange.outcome,
        error=exchange.error or None,
        sent=body.size if body is not None else 0,
        received=exchange.received,
        seconds=round(now - exchange.started, 6),
    )


def log_refused(connection: ClientConnection, answer: Answer) -> None:
    """The line for what is no request, or never became one."""
    _access_log.info("request", client=format_address(connection.peer), status=answer.status, error=answer.reason)
