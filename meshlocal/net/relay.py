"""Moving bytes both ways between two connected sockets.

Theory of operation. Each direction reads from its *source* and writes to its *sink*, and ends in one of three ways:

    the source's end (recv gives b"")   passed on as a half-close of the sink; the other direction goes on
    recv fails                          the source is dead both ways, so the other direction has nobody to write to: cut
    send fails                          the sink is dead, but what it sent before may still wait in the kernel, for
                                        example an early error response: the other direction goes on until it has
                                        read that, and then ends too, without passing on an end

A relay that ended in one of the latter two is *failed*. Its caller resets the other connection (`sockets.abort`)
instead of closing it, so that a truncated stream never looks like one that ended.

Backpressure: a direction holds at most what one read gave, and reads again only when all of it is written. Memory:
nothing is held per direction while it waits for data.
"""

from __future__ import annotations

import errno
import socket

import trio
from trio.lowlevel import checkpoint

from meshlocal.net.pipe import Pipe, PlainPipe
from meshlocal.net.relay_loop import current_loop
from meshlocal.net.relay_state import RelayCounters, RelayResult, RelayState
from meshlocal.net.ways import Need, Way


async def relay(
    client: socket.socket, upstream: socket.socket, counters: RelayCounters, early: bytes | bytearray = b""
) -> RelayResult:
    """Move bytes both ways until both streams ended or one connection failed.

    `early` was read from the client already, at most `CHUNK` bytes; it goes to the upstream first.

    The sockets are connected, non-blocking stream sockets. They stay the caller's, who closes both on a clean
    end and aborts the other side, or both, on a failure or cancellation. A task that closes one of them meanwhile does
    it through `sockets.close` or `abort`, and fails the relay with `closed`.
    """
    loop = current_loop.get()
    if loop is not None:
        return await loop.relay(client, upstream, counters, early)
    return await copy(PlainPipe(client), PlainPipe(upstream), counters, early)


async def relay_pipes(
    client: Pipe, upstream: Pipe, counters: RelayCounters, early: bytes | bytearray = b""
) -> RelayResult:
    """`relay` for what may be no plain sockets, as with TLS."""
    if client.plain is not None and upstream.plain is not None:
        return await relay(client.plain, upstream.plain, counters, early)
    loop = current_loop.get()
    if loop is None or -1 in (client.fileno(), upstream.fileno()):
        return await copy(client, upstream, counters, early)
    # Imported in time by who speaks TLS (`meshlocal.proxy.tls`).
    from meshlocal.net.pipe_pair import PipePair

    await trio.lowlevel.checkpoint_if_cancelled()
    return await PipePair(loop, client, upstream, counters, early).run()


async def copy(client: Pipe, upstream: Pipe, counters: RelayCounters, early: bytes | bytearray = b"") -> RelayResult:
    """`relay` with a task for each direction: plain Trio, where there is no relay loop, or nothing for it to watch."""
    state = RelayState(counters)
    there = Way(client, upstream, "client", state, trio.current_time, early)
    back = Way(upstream, client, "upstream", state, trio.current_time)
    async with trio.open_nursery() as nursery:
        scope = nursery.cancel_scope
        nursery.start_soon(_drive, there, client, upstream, scope)
        await _drive(back, upstream, client, scope)
    return state.result()


async def copy_back(client: Pipe, upstream: Pipe, counters: RelayCounters) -> RelayResult:
    """What is left of `relay` for a client that has ended its stream, which the upstream was told: the way back."""
    state = RelayState(counters)
    state.first_end = "client"
    with trio.CancelScope() as scope:
        await _drive(Way(upstream, client, "upstream", state, trio.current_time), upstream, client, scope)
    return state.result()


async def _drive(way: Way, source: Pipe, sink: Pipe, scope: trio.CancelScope) -> None:
    """Let one direction go on until it is over; if its source failed, both are."""
    while (need := way.move()) is not Need.NOTHING:
        try:
            if need is Need.INPUT:
                await source.wait_readable()
            elif need is Need.ROOM:
                await sink.wait_writable()
            else:
                await checkpoint()
        except trio.ClosedResourceError:
            (way.source_failed if need is Need.INPUT else way.sink_failed)(errno.EBADF)
            break
    if way.cut:
        scope.cancel()
