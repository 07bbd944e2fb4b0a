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
from contextlib import suppress

import trio
from trio.lowlevel import checkpoint

from meshlocal.net.pipe import Pipe, PlainPipe, finish_writing
from meshlocal.net.relay_loop import current_loop
from meshlocal.net.relay_state import RelayCounters, RelayResult, RelayState, Side

CHUNK = 65536
"""The most bytes that one read of `copy` gives, and so the most that one direction of it holds."""

TURN = 16
"""Full chunks that one direction moves in a row before other tasks get their turn."""


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
    """`relay` for what may be no plain sockets, as with TLS: by tasks, unless both are."""
    if client.plain is not None and upstream.plain is not None:
        return await relay(client.plain, upstream.plain, counters, early)
    return await copy(client, upstream, counters, early)


async def copy(client: Pipe, upstream: Pipe, counters: RelayCounters, early: bytes | bytearray = b"") -> RelayResult:
    """`relay` with a task for each direction: plain Trio, where there is no relay loop, or no plain socket."""
    state = RelayState(counters)
    async with trio.open_nursery() as nursery:
        scope = nursery.cancel_scope
        nursery.start_soon(_pump, client, upstream, "client", state, early, scope)
        await _pump(upstream, client, "upstream", state, b"", scope)
    return state.result()


async def copy_back(client: Pipe, upstream: Pipe, counters: RelayCounters) -> RelayResult:
    """What is left of `relay` for a client that has ended its stream, which the upstream was told: the way back."""
    state = RelayState(counters)
    state.first_end = "client"
    async with trio.open_nursery() as nursery:
        await _pump(upstream, client, "upstream", state, b"", nursery.cancel_scope)
    return state.result()


async def _pump(
    source: Pipe,
    sink: Pipe,
    side: Side,
    state: RelayState,
    early: bytes | bytearray,
    scope: trio.CancelScope,
) -> None:
    """One direction: from `side` to the other."""
    other: Side = "upstream" if side == "client" else "client"
    full_chunks = 0
    if early and not await _write(sink, bytes(early), side, other, state):
        return
    try:
        while True:
            data = source.read(CHUNK)
            if data is None:
                await source.wait_readable()
                continue
            if not data:
                break
            if not await _write(sink, data, side, other, state):
                return
            if len(data) < CHUNK and source.plain is not None:
                # The source is most likely empty now: waiting at once spares a read that would say so.
                full_chunks = 0
                await source.wait_readable()
            elif (full_chunks := full_chunks + 1) >= TURN:
                full_chunks = 0
                await checkpoint()
    except (OSError, trio.ClosedResourceError) as error:
        state.fail(side, _number(error))
        scope.cancel()
        return
    if state.failed is not None:
        # The source died while the other direction wrote to it: this is where its last bytes end, not its stream.
        return
    state.first_end = state.first_end or side
    try:
        await finish_writing(sink)
    except (OSError, trio.ClosedResourceError) as error:
        _fail_sink(sink, other, state, error)


async def _write(sink: Pipe, data: bytes, side: Side, other: Side, state: RelayState) -> bool:
    """Write all of it; False if the sink is dead."""
    try:
        sent = sink.write(data)
        _count(state.counters, side, sent)
        rest = memoryview(data)[sent:]
        while rest:
            if not sent:
                await sink.wait_writable()
            sent = sink.write(rest)
            rest = rest[sent:]
            _count(state.counters, side, sent)
    except (OSError, trio.ClosedResourceError) as error:
        _fail_sink(sink, other, state, error)
        return False
    return True


def _fail_sink(sink: Pipe, side: Side, state: RelayState, error: OSError | trio.ClosedResourceError) -> None:
    state.fail(side, _number(error))
    # A dead socket gives what it received and then its end. Should this one be alive after all (the system
    # had no memory for it), it is made to do the same.
    with suppress(OSError):
        sink.stop_reading()


def _number(error: OSError | trio.ClosedResourceError) -> int:
    return errno.EBADF if isinstance(error, trio.ClosedResourceError) else error.errno or errno.EIO


def _count(counters: RelayCounters, side: Side, sent: int) -> None:
    if sent:
        if side == "client":
            counters.client_to_upstream += sent
        else:
            counters.upstream_to_client += sent
        counters.last_activity = trio.current_time()
