"""From a mesh to a connected trio stream: the proxy's attempts, on behalf of a caller in this process."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Awaitable, Callable, Sequence

import trio

from meshlocal.client.account import Account
from meshlocal.client.connecting import connect
from meshlocal.client.ended import FailedAttempt
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import AttemptOutcome, Outcome
from meshlocal.library.core import MeshCore
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


class _Caller:
    """Who leaves by cancelling, so that nobody has to watch it (A8)."""

    left = False

    async def watched(self, wait: Callable[[], Awaitable[object]], /) -> None:
        await wait()


_CALLER = _Caller()

_FULL = {
    Limit.CONNECTIONS: "as many streams are open as its limits allow",
    Limit.REQUESTS: "as many requests are under way as its limits allow",
    Limit.WAITING: "as many requests wait for an instance as its limits allow",
}


async def open_tcp_stream(core: MeshCore, key: ServiceKey) -> trio.SocketStream:
    """See `Mesh.open_tcp_stream`."""
    if not trio.lowlevel.in_trio_run():
        raise NotTrioError("open_tcp_stream gives a trio stream, and this loop is not trio's")
    await trio.lowlevel.checkpoint()
    state = core.demand(key)
    account = _StreamAccount(trio.current_time())
    outcome = Outcome.LIMITED
    upstream: socket.socket | None = None
    stream: trio.SocketStream | None = None
    try:
        full = account.begin(state, state.policy.deadline, Limit.CONNECTIONS, Limit.REQUESTS)
        if full is None and not account.start_waiting():
            full = Limit.WAITING
        if full is not None:
            raise LimitedError(f"{key}: {_FULL[full]}", key)
        outcome = Outcome.CLIENT_LEFT
        found = await connect(_CALLER, account)
        account.stop_waiting()
        if isinstance(found, Outcome):
            outcome = found
        else:
            upstream = found.plain
            assert upstream is not None
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(upstream))
            outcome = Outcome.SERVED
    except LimitedError:
        raise
    except Exception:
        outcome = Outcome.ERROR
        raise
    finally:
        account.end(outcome, hold=True)
        if stream is None:
            account.end(outcome)
            if upstream is not None:
                upstream.close()
    if stream is None:
        error = _failure(state, account, outcome)
        raise error from (error.attempt.cause if error.attempt is not None else None)
    account.hold_until_closed(stream)
    return stream


class _StreamAccount(Account):
    """The account of one stream: what it counts in, from before its connect until it is closed (F3, limits)."""

    __slots__ = ("_open",)

    def __init__(self, started: float) -> None:
        super().__init__(started)
        self._open = False

    def hold_until_closed(self, stream: trio.SocketStream) -> None:
        """Hold it until the stream's socket is closed, in whatever way; or the stream is forgotten, open as it is."""
        state = self.state
        assert state is not None
        self.enter_instance()
        self._open = True
        state.statistics.open += 1
        close = stream.socket.close

        def close_and_release() -> None:
            try:
                close()
            finally:
                self.release()

        # Trio's streams can be neither derived from nor told what to do then; but all ways to close one end here.
        stream.socket.close = close_and_release  # type: ignore[method-assign]  # on purpose: see above
        weakref.finalize(stream, self.release)

    def release(self) -> None:
        """Give back what it held; more than once is harmless."""
        if self._open and self.state is not None:
            self._open = False
            self.state.statistics.open -= 1
        self.end(Outcome.SERVED)


def _failure(state: ServiceState, account: Account, outcome: Outcome) -> ServiceError:
    attempts = attempts_of(account.failures or ())
    if outcome is Outcome.DEADLINE and account.pick is not None and len(attempts) < account.attempts:
        pick = account.pick
        given_up = Attempt(pick.instance, account.tier, pick.reason, AttemptOutcome.ABANDONED, None)
        attempts = [*attempts, given_up]
    if outcome is Outcome.DEADLINE:
        limit = f"{state.key}: no instance connected within {state.policy.deadline:g} s"
        return DeadlineError(f"{limit}: {tried(attempts)}" if attempts else limit, state.key, attempts)
    if outcome is Outcome.NO_INSTANCE:
        return NoInstanceError(f"{state.key}: {why_none(state)}", state.key)
    return AttemptsFailedError(f"{state.key}: no instance connected: {tried(attempts)}", state.key, attempts)


def attempts_of(failures: Sequence[FailedAttempt]) -> list[Attempt]:
    """Failed attempts as errors tell of them."""
    return [Attempt(each.pick.instance, each.tier, each.pick.reason, each.error, _cause(each)) for each in failures]


def _cause(failed: FailedAttempt) -> Exception:
    """The system's error anew: one with a traceback, kept for each attempt, would keep its frames alive."""
    if failed.errno:
        return OSError(failed.errno, os.strerror(failed.errno))
    return TimeoutError("no answer in time") if failed.error == AttemptOutcome.TIMEOUT else OSError(failed.error)
