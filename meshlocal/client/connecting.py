"""From a client to a connected instance: wait, pick, attempt, next (behaviour rules A1, A2, A5 to A8, H1, O1).

A tcp attempt is the connect. Nothing was sent to an instance whose connect failed, so any failure moves on to the next
instance, for as long as the search has one (`meshlocal.policy.search`).

A client is watched only while it is kept waiting: for a first snapshot, or for an instance that is slow to answer. Its
bytes are then read into a bounded buffer, for that is the only way to learn of a reset behind them. A client that ended
its stream has not left: it may have sent all that it wanted to say, and from the outside a closed socket looks the
same. It costs what is left of the deadline at most.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

import trio

from meshlocal.client.account import Account
from meshlocal.client.security import Security, reach
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import AttemptOutcome, Outcome
from meshlocal.net.dial import Connecting, classify_connect_error, connect_socket
from meshlocal.net.pipe import Pipe, PlainPipe
from meshlocal.net.tls_error import TlsError
from meshlocal.policy.picker import Pick
from meshlocal.policy.retry import Decision, Failure

SLOW = 0.01
"""Seconds for which an instance is waited for before its client is watched, and the clock. Most answer sooner, and to
watch costs more than all else that a small request takes."""

EARLY_LIMIT = 65536
"""Bytes read from a client that waits."""


class Waiting(Protocol):
    """Who an instance is sought for."""

    left: bool
    """Whether who waited for the connection wants none any more."""

    async def watched(self, wait: Callable[[], Awaitable[object]], /) -> None:
        """Wait for something, but no longer than until it has left. `wait` raises nothing but Cancelled."""
        ...


class Client:
    """A client that waits for an instance.

    Args:
        pipe: the bytes of its connection.

    Attributes:
        pipe: as given.
        early: what it sent while it was watched; it goes to the instance first.
        left: it reset its connection (A8).
    """

    __slots__ = ("early", "left", "pipe")

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
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
                await self.pipe.wait_readable()
                received = self.pipe.read(EARLY_LIMIT - len(self.early))
                if received is None:
                    continue
                if not received:
                    return
                self.early += received
        except (OSError, trio.ClosedResourceError):
            self.left = True
            waiting.cancel()


class Dialled(NamedTuple):
    """How one attempt to connect ended.

    Attributes:
        upstream: the connection, which is the holder's to close; None if there is none.
        error: how it failed, in a word; empty if it did not, or the client has left.
        errno: the system's number for the failure; 0 where the system gave none.
        by_socket: the connection was made by the instance's Unix socket.
    """

    upstream: Pipe | None
    error: str
    errno: int
    by_socket: bool = False


async def connect(client: Waiting, account: Account) -> Pipe | Outcome:
    """Find an instance for a client, and connect to it.

    Called again for the same account, it goes on where it was: with the rest of the plan, and of the time.

    Returns:
        The connection, which is the caller's to close; or why there is none.
    """
    begun = connect_at_once(client, account)
    if begun is None or isinstance(begun, Connecting):
        return await connect_waiting(client, account, begun)
    return begun


def connect_at_once(client: Waiting, account: Account) -> Connecting[Security] | Pipe | None:
    """The part of `connect` that waits for nothing: an instance on this host answers at once.

    Returns:
        The connection; or an attempt that has begun, if there is one, which is for `connect_waiting`.
    """
    assert account.state is not None
    if account.state.picker is None or client.left:
        return None
    return _begin_next(account)


async def connect_waiting(client: Waiting, account: Account, connecting: Connecting[Security] | None) -> Pipe | Outcome:
    """The other part of `connect`: all that has to be waited for."""
    state = account.state
    assert state is not None
    upstream: Pipe | None = None
    with trio.move_on_at(account.deadline) as deadline:
        if state.picker is None:
            with trio.move_on_after(state.policy.first_snapshot_wait):
                await client.watched(state.first_snapshot.wait)
        if not client.left:
            upstream = await _attempt_in_turn(client, account, connecting)
    if upstream is not None:
        return upstream
    if client.left:
        return Outcome.CLIENT_LEFT
    return Outcome.DEADLINE if deadline.cancelled_caught else Outcome(account.why(trio.current_time()))


async def _attempt_in_turn(client: Waiting, account: Account, connecting: Connecting[Security] | None) -> Pipe | None:
    """Attempt until one has connected; `connecting` is an attempt that has begun."""
    state = account.state
    assert state is not None
    while True:
        if connecting is None:
            if account.failures:
                # An instance that fails at once must not keep the others' tasks waiting, nor cancellation.
                await trio.lowlevel.checkpoint()
            before = account.attempts
            begun = _begin_next(account)
            if begun is not None and not isinstance(begun, Connecting):
                return begun
            if account.attempts == before:
                return None
            if begun is None:
                continue
            connecting = begun
        pick = account.pick
        assert pick is not None
        dialled: Dialled | None = None
        try:
            dialled = await finish_dial(client, state, pick, connecting)
        finally:
            # One that was cancelled, by the deadline or because its client left, counts too.
            _settle(account, dialled)
        if dialled.upstream is not None or client.left:
            return dialled.upstream
        connecting = None


def _begin_next(account: Account) -> Connecting[Security] | Pipe | None:
    """Begin with the next instance, if there is to be one.

    Returns:
        The connection, or what has to be waited for; None if it failed at once.
    """
    pick = account.try_next(trio.current_time())
    if pick is None:
        return None
    state = account.state
    assert state is not None
    begun = begin_dial(state, pick, state.security)
    if not isinstance(begun, Dialled):
        return begun
    _settle(account, begun)
    return begun.upstream


def _settle(account: Account, dialled: Dialled | None) -> None:
    """Count how an attempt ended, and tell what it shows of the instance."""
    if dialled is None or (dialled.upstream is None and not dialled.error):
        account.abandoned()
    elif dialled.upstream is not None:
        account.connected(trio.current_time(), by_socket=dialled.by_socket)
    else:
        decision = account.attempt_failed(Failure.CONNECT, trio.current_time(), dialled.error, errno=dialled.errno)
        assert decision is not Decision.SAME


async def dial(
    client: Waiting, state: ServiceState, pick: Pick, security: Security | None, protocol: str | None
) -> Dialled:
    """Connect to one instance, within its time (A1), and no longer than until the client has left.

    Args:
        client: who wants it.
        state: the service.
        pick: the instance.
        security: of the service, as the caller knows it.
        protocol: what will be spoken, as ALPN calls it (RFC 7301).
    """
    begun = begin_dial(state, pick, security)
    if isinstance(begun, Dialled):
        return begun
    return await finish_dial(client, state, pick, begun, protocol)


def begin_dial(state: ServiceState, pick: Pick, security: Security | None) -> Connecting[Security] | Dialled:
    """Begin to connect to an instance: what came of it at once; or what has to be waited for."""
    key = pick.instance.key
    port = key.port
    if security is not None or state.sockets is not None:
        given = security
        port, path, security = reach(pick.instance, pick.tier, security, state.sockets)
        state.statistics.tls_skipped += given is not security
        found: Connecting[Security] | None = connect_socket(path)
        if found is not None:
            return _finish(found)._replace(by_socket=True)
    try:
        connecting: Connecting[Security] = Connecting(key.address, port)
    except OSError as error:
        return Dialled(None, classify_connect_error(error), error.errno or 0)
    connecting.security = security
    return connecting if connecting.pending or security is not None else _finish(connecting)


def _finish(connecting: Connecting[Security]) -> Dialled:
    try:
        connecting.finish()
    except OSError as error:
        connecting.socket.close()
        return Dialled(None, classify_connect_error(error), error.errno or 0)
    return Dialled(PlainPipe(connecting.socket), "", 0)


async def finish_dial(
    client: Waiting, state: ServiceState, pick: Pick, connecting: Connecting[Security], protocol: str | None = None
) -> Dialled:
    """The rest of `dial`, for what `begin_dial` gave."""
    policy = state.policy
    limit = policy.connect_timeout if pick.tier else policy.connect_timeout_local
    began = trio.current_time()
    connected = False
    try:
        if connecting.pending:
            await _wait_connected(client, connecting.socket, limit)
        connected = not client.left
    except TimeoutError:
        return Dialled(None, AttemptOutcome.TIMEOUT, 0)
    finally:
        if not connected:
            connecting.socket.close()
    dialled = _finish(connecting) if connected else Dialled(None, "", 0)
    if connecting.security is None or dialled.upstream is None:
        return dialled
    return await _secure(client, pick, connecting, protocol, began + limit)


async def _secure(
    client: Waiting, pick: Pick, connected: Connecting[Security], protocol: str | None, deadline: float
) -> Dialled:
    """Shake hands, within what is left of the attempt's time (T1)."""
    security = connected.security
    assert security is not None
    made: Dialled | None = None

    async def secure() -> None:
        nonlocal made
        try:
            made = Dialled(await security.secure(connected.socket, pick, protocol), "", 0)
        except TlsError as error:
            made = Dialled(None, AttemptOutcome.TLS, error.errno or 0)
        except OSError as error:
            made = Dialled(None, classify_connect_error(error), error.errno or 0)

    wanted = False
    try:
        with trio.move_on_at(deadline) as scope:
            await client.watched(secure)
        wanted = not client.left
    finally:
        if not wanted and made is not None and made.upstream is not None:
            made.upstream.abort()
    if wanted and made is not None:
        return made
    return Dialled(None, AttemptOutcome.TIMEOUT if scope.cancelled_caught else "", 0)


async def _wait_connected(client: Waiting, upstream: socket.socket, limit: float) -> None:
    """Wait until a connect has ended, well or badly, or the client has left.

    Raises:
        TimeoutError: neither came within `limit` seconds (A1).
    """

    async def wait() -> None:
        await trio.lowlevel.wait_writable(upstream)

    at_first = min(SLOW, limit)
    with trio.move_on_after(at_first):
        await wait()
        return
    if limit > at_first:
        with trio.move_on_after(limit - at_first) as scope:
            await client.watched(wait)
        if not scope.cancelled_caught:
            return
    raise TimeoutError
