"""CONNECT and Upgrade: an HTTP connection that becomes a stream of bytes both ways."""

from __future__ import annotations

import trio

from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import Outcome
from meshlocal.net.pipe import Pipe
from meshlocal.net.relay import relay_pipes
from meshlocal.net.relay_state import RelayCounters
from meshlocal.proxy.http.ends import End
from meshlocal.proxy.http.request import HttpRequest


async def run_tunnel(request: HttpRequest, state: ServiceState, upstream: Pipe, first: bytes) -> bool:
    """Send `first` to the client, then move bytes until both sides ended; tells whether that was in good order.

    The upstream stays the caller's. The request's outcome and end are set.
    """
    client = request.client
    request.end_search()
    # Should its time run out, it is reset like any response that stands still.
    client.await_transfer()
    await client.send(first)
    early = bytes(client.early)
    client.early.clear()
    counters = client.counters = RelayCounters(trio.current_time())
    state.statistics.open += 1
    try:
        ended = await relay_pipes(client.pipe, upstream, counters, early=early)
    finally:
        state.statistics.open -= 1
        client.counters = None
        state.statistics.bytes_sent += counters.client_to_upstream
        request.received += counters.upstream_to_client
    if ended.failed is not None:
        request.error = f"{ended.failed} {ended.reason}"
        request.outcome = Outcome.CUT
        request.client_end = End.ABORT
        return False
    request.outcome = Outcome.SERVED
    request.client_end = End.CLOSE
    return True
