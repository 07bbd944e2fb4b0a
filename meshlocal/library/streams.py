"""From a mesh to a connected trio stream: the proxy's attempts, on behalf of a caller in this process."""

from __future__ import annotations

import os
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import trio

from meshlocal.client.connecting import Connected, FailedAttempt, connect
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import AttemptOutcome, Outcome, RequestKey
from meshlocal.library.errors import (
    Attempt,
    AttemptsFailedError,
    DeadlineError,
    LimitedError,
    NoInstanceError,
    NotTrioError,
    ServiceError,
    tried,
)
from meshlocal.library.unavailable import why_none
from meshlocal.policy.limits import Limit
from meshlocal.policy.model import Instance, ServiceKey

if TYPE_CHECKING:
    from meshlocal.library.mesh import Mesh


class _Caller:
    """Who leaves by cancelling, so that nobody has to watch it (A8)."""

    left = False

    async def watched(self, wait: Callable[[], Awaitable[object]], /) -> None:
        await wait()


_CALLER = _Caller()


async def open_tcp_stream(mesh: Mesh, key: ServiceKey) -> trio.SocketStream:
    """See `Mesh.open_tcp_stream`."""
    if not trio.lowlevel.in_trio_run():
        raise NotTrioError("open_tcp_stream gives a trio stream, and this loop is not trio's")
    await trio.lowlevel.checkpoint()
    state = mesh._demand(key)
    statistics, circuit = state.statistics, state.circuit
    result = Connected()
    held = _Held(state)
    for limit in (Limit.CONNECTIONS, Limit.REQUESTS):
        if not held.enter(limit):
            held.let_go()
            statistics.requests[RequestKey("", "", Outcome.LIMITED)] += 1
            what = "streams are open" if limit is Limit.CONNECTIONS else "requests are under way"
            raise LimitedError(f"{key}: as many {what} as its limits allow", key)
    if not circuit.enter(Limit.WAITING):
        held.let_go()
        statistics.requests[RequestKey("", "", Outcome.LIMITED)] += 1
        raise LimitedError(f"{key}: as many requests wait for an instance as its limits allow", key)
    outcome = Outcome.CLIENT_LEFT
    statistics.connecting += 1
    stream: trio.SocketStream | None = None
    try:
        await connect(_CALLER, state, result)
        outcome = result.outcome if result.outcome is not None else Outcome.SERVED
        if result.upstream is not None and outcome is Outcome.SERVED:
            assert result.pick is not None
            held.begin(result.pick.instance)
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(result.upstream))
            held.until_closed(stream)
    except Exception:
        outcome = Outcome.ERROR
        raise
    finally:
        circuit.leave(Limit.WAITING)
        statistics.connecting -= 1
        if stream is None:
            held.let_go()
            if result.upstream is not None:
                result.upstream.close()
        reason = (result.pick.reason or "") if result.pick is not None else ""
        statistics.requests[RequestKey(result.tier, reason, outcome)] += 1
    if stream is None:
        error = _failure(state, result, outcome)
        raise error from (error.attempt.cause if error.attempt is not None else None)
    return stream


class _Held:
    """What one stream counts in, from before its connect until it is closed: limits, and its instance's requests under
    way (F3)."""

    def __init__(self, state: ServiceState) -> None:
        self._state = state
        self._entered: list[Limit] = []
        self._instance: Instance | None = None
        state.in_use += 1
        self._over = False

    def enter(self, limit: Limit) -> bool:
        """Count in a limit; false if there is no room."""
        if not self._state.circuit.enter(limit):
            return False
        self._entered.append(limit)
        return True

    def begin(self, instance: Instance) -> None:
        """It is under way on an instance."""
        self._instance = instance
        self._state.fitness.begin(instance)
        self._state.statistics.open += 1

    def let_go(self) -> None:
        """It counts no longer; more than once is harmless."""
        if self._over:
            return
        self._over = True
        state = self._state
        state.in_use -= 1
        for limit in self._entered:
            state.circuit.leave(limit)
        if self._instance is not None:
            state.fitness.end(self._instance)
            state.statistics.open -= 1

    def until_closed(self, stream: trio.SocketStream) -> None:
        """Let go once the stream's socket is closed, in whatever way; or the stream is forgotten, open as it is."""
        close = stream.socket.close

        def close_and_let_go() -> None:
            try:
                close()
            finally:
                self.let_go()

        # Trio's streams can be neither derived from nor told what to do then; but all ways to close one end here.
        stream.socket.close = close_and_let_go  # type: ignore[method-assign]
        weakref.finalize(stream, self.let_go)


def _failure(state: ServiceState, result: Connected, outcome: Outcome) -> ServiceError:
    attempts = attempts_of(state, result.failures)
    if outcome is Outcome.DEADLINE and result.pick is not None and len(attempts) < result.attempts:
        pick = result.pick
        given_up = Attempt(pick.instance, result.tier, pick.reason, AttemptOutcome.ABANDONED, None)
        attempts = [*attempts, given_up]
    if outcome is Outcome.DEADLINE:
        limit = f"{state.key}: no instance connected within {state.policy.deadline:g} s"
        return DeadlineError(f"{limit}: {tried(attempts)}" if attempts else limit, state.key, attempts)
    if outcome is Outcome.NO_INSTANCE:
        return NoInstanceError(f"{state.key}: {why_none(state)}", state.key)
    return AttemptsFailedError(f"{state.key}: no instance connected: {tried(attempts)}", state.key, attempts)


def attempts_of(state: ServiceState, failures: Sequence[FailedAttempt]) -> list[Attempt]:
    """Failed attempts as errors tell of them."""
    return [Attempt(each.pick.instance, each.tier, each.pick.reason, each.error, _cause(each)) for each in failures]


def _cause(failed: FailedAttempt) -> Exception:
    """The system's error anew: one with a traceback, kept for each attempt, would keep its frames alive."""
    if failed.errno:
        return OSError(failed.errno, os.strerror(failed.errno))
    return TimeoutError("no answer in time") if failed.error == AttemptOutcome.TIMEOUT else OSError(failed.error)
