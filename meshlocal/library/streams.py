"""From a mesh to a connected trio stream: the proxy's attempts, on behalf of a caller in this process."""

from __future__ import annotations

import os
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
from meshlocal.policy.model import ServiceKey

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
    statistics = state.statistics
    result = Connected()
    if not state.circuit.enter(Limit.REQUESTS):
        statistics.requests[RequestKey("", "", Outcome.LIMITED)] += 1
        raise LimitedError(f"{key}: as many requests as its limits allow are under way", key)
    outcome = Outcome.CLIENT_LEFT
    state.in_use += 1
    statistics.connecting += 1
    try:
        await connect(_CALLER, state, result)
        outcome = result.outcome if result.outcome is not None else Outcome.SERVED
    except Exception:
        outcome = Outcome.ERROR
        raise
    finally:
        state.circuit.leave(Limit.REQUESTS)
        state.in_use -= 1
        statistics.connecting -= 1
        if outcome is not Outcome.SERVED and result.upstream is not None:
            result.upstream.close()
        reason = (result.pick.reason or "") if result.pick is not None else ""
        statistics.requests[RequestKey(result.tier, reason, outcome)] += 1
    if result.upstream is None:
        error = _failure(state, result, outcome)
        raise error from (error.attempt.cause if error.attempt is not None else None)
    return trio.SocketStream(trio.socket.from_stdlib_socket(result.upstream))


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
    return [
        Attempt(each.pick.instance, state.tiers[each.pick.tier], each.pick.reason, each.error, _cause(each))
        for each in failures
    ]


def _cause(failed: FailedAttempt) -> Exception:
    """The system's error anew: one with a traceback, kept for each attempt, would keep its frames alive."""
    if failed.errno:
        return OSError(failed.errno, os.strerror(failed.errno))
    return TimeoutError("no answer in time") if failed.error == AttemptOutcome.TIMEOUT else OSError(failed.error)
