"""CONNECT and Upgrade: an HTTP connection that becomes a stream of bytes both ways."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import trio

from meshlocal.client.connecting import Connected, connect
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import Outcome
from meshlocal.net.relay import RelayCounters, relay
from meshlocal.net.sockets import abort, close
from meshlocal.proxy.http import answers
from meshlocal.proxy.http.answers import Answer
from meshlocal.proxy.http.ends import ClientLeftError, End

if TYPE_CHECKING:
    from meshlocal.proxy.http.exchange import Exchange


async def run_tunnel(exchange: Exchange, state: ServiceState, upstream: socket.socket, first: bytes) -> bool:
    """Send `first` to the client, then move bytes until both sides ended; tells whether that was in good order.

    The upstream stays the caller's. The exchange's outcome and end are set.
    """
    connection = exchange.connection
    await connection.send(first)
    early = bytes(connection.early)
    connection.early.clear()
    counters = connection.counters = RelayCounters(trio.current_time())
    state.statistics.open += 1
    try:
        ended = await relay(connection.socket, upstream, counters, early=early)
    finally:
        state.statistics.open -= 1
        connection.counters = None
        state.statistics.bytes_sent += counters.client_to_upstream
        exchange.received += counters.upstream_to_client
    if ended.failed is not None:
        exchange.error = f"{ended.failed} {ended.reason}"
        exchange.outcome = Outcome.CUT
        exchange.end = End.ABORT
        return False
    exchange.outcome = Outcome.SERVED
    exchange.end = End.CLOSE
    return True


async def connect_tunnel(exchange: Exchange) -> End:
    """Serve a CONNECT: a tcp request to a service that this proxy knows, anything else is refused."""
    connection = exchange.connection
    service = connection.forwarder.find_tunnel(connection.service, exchange.head, exchange.started)
    if isinstance(service, Answer):
        return await exchange.refuse(service)
    state = service.state
    exchange.service = service
    connection.idle_limit = state.policy.idle_timeout if state.policy.idle_timeout is not None else float("inf")
    result = Connected()
    state.in_use += 1
    state.statistics.connecting += 1
    try:
        try:
            await connect(connection, state, result)
        finally:
            state.statistics.connecting -= 1
            exchange.pick, exchange.tier, exchange.attempts = result.pick, result.tier, result.attempts
            exchange.error = result.error
        if result.upstream is None:
            return await _no_tunnel(exchange, state, result)
        exchange.status = 200
        connection.begun = True
        whole = False
        try:
            opened = b"HTTP/1.1 200 Connection established\r\n" + exchange.told() + b"\r\n"
            whole = await run_tunnel(exchange, state, result.upstream, opened)
        finally:
            (close if whole else abort)(result.upstream)
        return exchange.end
    finally:
        state.in_use -= 1


async def _no_tunnel(exchange: Exchange, state: ServiceState, result: Connected) -> End:
    if result.outcome is Outcome.CLIENT_LEFT:
        raise ClientLeftError
    picker = state.picker
    if result.outcome is Outcome.NO_INSTANCE:
        if picker is None:
            return await exchange.refuse(answers.NO_SNAPSHOT)
        if picker.snapshot.unknown:
            return await exchange.refuse(answers.CONNECT_FORBIDDEN)
        return await exchange.refuse(answers.NO_INSTANCE)
    assert result.outcome is not None
    return await exchange.fail(
        answers.DEADLINE if result.outcome is Outcome.DEADLINE else answers.FAILED, result.outcome
    )
