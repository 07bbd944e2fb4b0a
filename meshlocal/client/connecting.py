"""From a client to a connected instance: wait, pick, attempt, next (behaviour rules A1, A2, A5 to A8, H1, O1).

A tcp attempt is the connect. Nothing was sent to an instance whose connect
failed, so any failure moves on to the next instance of the plan, until one
connects, the plan ends, `max_attempts` are spent or the deadline comes.

A client is watched only while it is kept waiting: for a first snapshot, or for
an instance that is slow to answer. Its bytes are then read into a bounded
buffer, for that is the only way to learn of a reset behind them. A client that
ended its stream has not left: it may have sent all that it wanted to say, and
from the outside a closed socket looks the same. It costs what is left of the
deadline at most.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

import trio

from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import AttemptOutcome, Outcome
from meshlocal.client.tried import attempt_text
from meshlocal.net.dial import Connecting, classify_connect_error
from meshlocal.policy.picker import Pick, Plan

PATIENCE = 0.01
"""Seconds that a connect may take before its client is watched."""

EARLY_LIMIT = 65536
"""Bytes read from a client that waits."""


class Waiting(Protocol):
    """Who an instance is sought for."""

    left: bool
    """It wants none any more."""

    async def watched(self, wait: Callable[[], Awaitable[object]], /) -> None:
        """Wait for something, but no longer than until it has left. `wait` raises nothing but Cancelled."""
        ...


class Client:
    """A client that waits for an instance.

    Attributes:
        socket: its connection.
        early: what it sent while it was watched; it goes to the instance first.
        left: it reset its connection (A8).
    """

    __slots__ = ("early", "left", "socket")

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.early = bytearray()
        self.left = False

    async def watched(self, wait: Callable[[], Awaitable[object]]) -> None:
        """Wait for something, but no longer than until the client has left.

        `wait` raises nothing but Cancelled.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.watch, nursery.cancel_scope)
            await wait()
            nursery.cancel_scope.cancel()

    async def watch(self, waiting: trio.CancelScope) -> None:
        """Read what it sends into `early`, and cancel `waiting` if it leaves."""
        try:
            while len(self.early) < EARLY_LIMIT:
                await trio.lowlevel.wait_readable(self.socket)
                try:
                    received = self.socket.recv(EARLY_LIMIT - len(self.early))
                except BlockingIOError:
                    continue
                if not received:
                    return
                self.early += received
        except (OSError, trio.ClosedResourceError):
            self.left = True
            waiting.cancel()


class FailedAttempt(NamedTuple):
    """One attempt that came to nothing.

    Attributes:
        pick: what was tried.
        tier: its tier's name.
        error: how it failed, in a word.
        errno: the system's number for it; 0 where the system gave none.
    """

    pick: Pick
    tier: str
    error: str
    errno: int

    def __str__(self) -> str:
        return attempt_text(self.pick.instance.key, self.tier, self.error)


class Connected:
    """How the search for an instance ended.

    Attributes:
        upstream: the connected socket, which is the holder's to close; None if there is none.
        outcome: why there is none; None if there is one.
        pick: the instance that connected, or was tried last; None if none was.
        tier: its tier's name; empty if there is none.
        attempts: how many were tried.
        began: when the last attempt did, by trio.current_time().
        error: how the last attempt failed.
        errno: the system's number for it; 0 where the system gave none.
        failures: the attempts that failed, in order.
        plan: what is left to try, should the instance fail later (A5); None before the first attempt.
        deadline: when the search ends at the latest, by trio.current_time(); None before it begins.
    """

    __slots__ = (
        "attempts",
        "began",
        "deadline",
        "errno",
        "error",
        "failures",
        "outcome",
        "pick",
        "plan",
        "tier",
        "upstream",
    )

    def __init__(self) -> None:
        self.upstream: socket.socket | None = None
        self.outcome: Outcome | None = None
        self.pick: Pick | None = None
        self.tier = ""
        self.attempts = 0
        self.began = 0.0
        self.error = ""
        self.errno = 0
        self.failures: list[FailedAttempt] = []
        self.plan: Plan | None = None
        self.deadline: float | None = None


async def connect(client: Waiting, service: ServiceState, result: Connected) -> None:
    """Find an instance for a client, and connect to it. What came of it is in `result`, also after cancellation.

    Called again with the same result, it goes on where it was: with the rest of the plan, and of the time.
    """
    connecting = begin(client, service, result, trio.current_time())
    if result.upstream is None:
        await go_on(client, service, result, connecting)


def begin(client: Waiting, service: ServiceState, result: Connected, now: float) -> Connecting | None:
    """The part of `connect` that waits for nothing: an instance on this host answers at once.

    Returns:
        An attempt that has begun and is for `go_on`, which has to be called unless `result` has an upstream.
    """
    if result.deadline is None:
        result.deadline = now + service.policy.deadline
    if service.picker is None or client.left:
        return None
    return _begin_next(service, result)


async def go_on(client: Waiting, service: ServiceState, result: Connected, connecting: Connecting | None) -> None:
    """The other part of `connect`: all that has to be waited for."""
    assert result.deadline is not None
    with trio.move_on_at(result.deadline) as deadline:
        if service.picker is None:
            with trio.move_on_after(service.policy.first_snapshot_wait):
                await client.watched(service.first_snapshot.wait)
        if not client.left:
            await _attempt_in_turn(client, service, result, connecting)
    if result.upstream is not None:
        return
    if client.left:
        result.outcome = Outcome.CLIENT_LEFT
    elif deadline.cancelled_caught:
        result.outcome = Outcome.DEADLINE
    else:
        result.outcome = Outcome.FAILED if result.attempts else Outcome.NO_INSTANCE


async def _attempt_in_turn(
    client: Waiting, service: ServiceState, result: Connected, connecting: Connecting | None
) -> None:
    """Attempt until one has connected; `connecting` is an attempt that has begun."""
    while True:
        if connecting is None:
            if result.failures:
                # An instance that fails at once must not keep the others' tasks waiting, nor cancellation.
                await trio.lowlevel.checkpoint()
            before = result.attempts
            connecting = _begin_next(service, result)
            if result.upstream is not None or result.attempts == before:
                return
            if connecting is None:
                continue
        pick = result.pick
        assert pick is not None
        error = ""
        try:
            error = await _finish_waiting(client, service, pick, connecting, result)
        finally:
            # One that was cancelled, by the deadline or because its client left, counts too.
            _count(service, pick, result, error)
        if result.upstream is not None or client.left:
            return
        connecting = None


def _begin_next(service: ServiceState, result: Connected) -> Connecting | None:
    """Begin with the next instance of the plan, if one is left.

    Returns:
        What has to be waited for; None if it connected, or failed, at once.
    """
    plan = result.plan = result.plan or service.plan()
    if plan is None:
        return None
    limit = service.policy.max_attempts
    if limit is not None and result.attempts >= limit:
        return None
    pick = plan.next()
    if pick is None:
        return None
    result.pick = pick
    result.attempts += 1
    # The service may have other tiers since the plan began (S2).
    result.tier = tier = plan.tiers[pick.tier]
    service.statistics.picks[tier, pick.reason or ""] += 1
    begun = _begin(pick, result)
    if not isinstance(begun, str):
        return begun
    _count(service, pick, result, begun)
    return None


def _count(service: ServiceState, pick: Pick, result: Connected, error: str) -> None:
    """Count how an attempt ended, and tell what it shows of the instance."""
    attempts, fitness, tier = service.statistics.attempts, service.fitness, result.tier
    if result.upstream is not None:
        result.error = ""
        attempts[tier, AttemptOutcome.CONNECTED] += 1
        fitness.connected(pick.instance, result.began)
    elif error:
        attempts[tier, error] += 1
        result.error = error
        result.failures.append(FailedAttempt(pick, tier, error, result.errno))
        fitness.failed(pick.instance, error, began=result.began)
    else:
        attempts[tier, AttemptOutcome.ABANDONED] += 1
        fitness.abandoned(pick.instance)


async def try_instance(client: Waiting, service: ServiceState, pick: Pick, result: Connected) -> str:
    """Try one instance; the socket goes into `result`. Returns how it failed, in a word."""
    begun = _begin(pick, result)
    return begun if isinstance(begun, str) else await _finish_waiting(client, service, pick, begun, result)


def _begin(pick: Pick, result: Connected) -> Connecting | str:
    """Begin to connect to an instance: how that failed at once, empty if it did not; or what has to be waited for."""
    key = pick.instance.key
    result.errno = 0
    result.began = trio.current_time()
    try:
        connecting = Connecting(key.address, key.port)
    except OSError as error:
        result.errno = error.errno or 0
        return classify_connect_error(error)
    return connecting if connecting.pending else _finish(connecting, result)


def _finish(connecting: Connecting, result: Connected) -> str:
    try:
        connecting.finish()
    except OSError as error:
        connecting.socket.close()
        result.errno = error.errno or 0
        return classify_connect_error(error)
    result.upstream = connecting.socket
    return ""


async def _finish_waiting(
    client: Waiting, service: ServiceState, pick: Pick, connecting: Connecting, result: Connected
) -> str:
    policy = service.policy
    limit = policy.connect_timeout if pick.tier else policy.connect_timeout_local
    connected = False
    try:
        await _wait_connected(client, connecting.socket, limit)
        connected = not client.left
    except TimeoutError:
        return AttemptOutcome.TIMEOUT
    finally:
        if not connected:
            connecting.socket.close()
    return _finish(connecting, result) if connected else ""


async def _wait_connected(client: Waiting, upstream: socket.socket, limit: float) -> None:
    """Wait until a connect has ended, well or badly, or the client has left.

    Raises:
        TimeoutError: neither came within `limit` seconds (A1).
    """

    async def wait() -> None:
        await trio.lowlevel.wait_writable(upstream)

    patience = min(PATIENCE, limit)
    with trio.move_on_after(patience):
        await wait()
        return
    if limit > patience:
        with trio.move_on_after(limit - patience) as scope:
            await client.watched(wait)
        if not scope.cancelled_caught:
            return
    raise TimeoutError
