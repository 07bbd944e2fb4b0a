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
from meshlocal.policy.limits import Limit
from meshlocal.proxy.http import answers
from meshlocal.proxy.http.account import told
from meshlocal.proxy.http.ends import ClientLeftError, End
from meshlocal.proxy.http.service import HttpService

if TYPE_CHECKING:
    from meshlocal.proxy.http.exchange import Exchange


async def run_tunnel(exchange: Exchange, state: ServiceState, upstream: socket.socket, first: bytes) -> bool:
    """Send `first` to the client, then move bytes until both sides ended; tells whether that was in good order.

    The upstream stays the caller's. The exchange's outcome and end are set.
    """
    connection = exchange.connection
    # Should its time run out, it is reset like any response that stands still.
    connection.await_transfer()
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


async def connect_tunnel(exchange: Exchange, service: HttpService) -> End:
    """Serve a CONNECT: a tcp request by the same rules, to a service that this proxy knows."""
    connection, state = exchange.connection, service.state
    result = Connected()
    if not state.circuit.enter(Limit.WAITING):
        return await exchange.refuse(answers.TOO_MANY_WAITING)
    state.statistics.connecting += 1
    try:
        await connect(connection, state, result)
    finally:
        state.statistics.connecting -= 1
        state.circuit.leave(Limit.WAITING)
        exchange.pick, exchange.tier, exchange.attempts = result.pick, result.tier, result.attempts
        exchange.error = result.error
    upstream, pick = result.upstream, result.pick
    if upstream is None or pick is None:
        return await _no_tunnel(exchange, state, result)
    exchange.status = 200
    exchange.outcome = Outcome.CUT
    connection.begun = True
    whole = False
    state.fitness.begin(pick.instance)
    try:
        opened = b"HTTP/1.1 200 Connection established\r\n" + told(exchange) + b"\r\n"
        whole = await run_tunnel(exchange, state, upstream, opened)
    finally:
        state.fitness.end(pick.instance)
        (close if whole else abort)(upstream)
    return exchange.end


async def _no_tunnel(exchange: Exchange, state: ServiceState, result: Connected) -> End:
    if result.outcome is Outcome.CLIENT_LEFT:
        raise ClientLeftError
    if result.outcome is Outcome.NO_INSTANCE:
        picker = state.picker
        if picker is None:
            return await exchange.refuse(answers.NO_SNAPSHOT)
        return await exchange.refuse(answers.CONNECT_FORBIDDEN if picker.snapshot.unknown else answers.NO_INSTANCE)
    outcome = result.outcome or Outcome.FAILED
    return await exchange.fail(answers.DEADLINE if outcome is Outcome.DEADLINE else answers.FAILED, outcome)
