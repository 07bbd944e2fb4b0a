"""TCP connections from accept to end (behaviour rules A1 to A8, H1, R1, S1).

One task serves one connection: it connects an instance, relays until both sides
have ended, and counts. Whatever ends it in another way, a failure on either
side, an idle limit, a drain that ran out of time, resets the client's
connection rather than closing it: a stream that was cut must not look complete.

What need not be waited for is not waited for. Where there is a relay loop, a
connection is accepted in it and its task is started; and before that task has
made a step, an instance on this host is connected and the client's first bytes
are on their way (`TcpForwarder.take`). All of it belongs to the task from the
start, which goes on from what was begun. A connection that is over by then is
closed and counted by the loop; and tasks are kept, so that one may serve many
connections, one after another.

An instance that was connected and reset the connection before it said a word has
failed as much as one that could not be connected, and is ejected for it (H1).
That a connect succeeded says nothing of such an instance then: its next
connections are watched until they have lived for a while.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import trio

from meshlocal.client.connecting import Client, Connected, FailedAttempt, begin, go_on
from meshlocal.client.services import ServiceState, ServiceTable
from meshlocal.client.statistics import Outcome, RequestKey
from meshlocal.client.tried import in_a_row
from meshlocal.net.listen import Started
from meshlocal.net.log import RateLimited, get_log
from meshlocal.net.relay import RelayCounters, RelayResult, copy_back, current_loop, relay
from meshlocal.net.sockets import abort, close, format_address
from meshlocal.net.task_pool import KeptTask, TaskPool
from meshlocal.policy.health import Cause
from meshlocal.policy.limits import Limit
from meshlocal.proxy.replay import Overture, Verdict

if TYPE_CHECKING:
    from meshlocal.net.dial import Connecting
    from meshlocal.net.flows import Pair
    from meshlocal.net.relay_loop import RelayLoop

_log = get_log(__name__)
_access_log = get_log("meshlocal.access")

_SWEEP_LONGEST = 30.0
_SWEEP_SHORTEST = 0.1
_WARNING_INTERVAL = 5.0

SETTLED = 1.0
"""Seconds that a connection must live to show that its instance works, if nothing else shows it."""


RETURNED = "returned"
"""Why a connection was cut whose client is to come back to the local tier (F2)."""

KEPT_TASKS = 64
"""Tasks that wait for a connection at most. More are started for as many connections, and end with them."""


class Connection:
    """One client's connection while it lives.

    Attributes:
        service: what it is for.
        client: who made it, and the socket.
        peer: the client's address.
        started: when it was accepted, by trio.current_time().
        result: the instance that serves it, and how it was found.
        counters: bytes moved; None until an instance is connected.
        cut: why the proxy ended it, if it did.
        entered: the limits that it counts in.
        begun: the search for an instance was.
        seeking: and goes on.
        connecting: the attempt that it waits for, if there is one.
        connected: when it got its instance; None while it has none.
        relay: is under way with that, or was.
        kept: its task, if that was kept from another one and has not begun yet.
        fault: of ours, met before its task had made a step.
    """

    __slots__ = (
        "_scope",
        "begun",
        "client",
        "connected",
        "connecting",
        "counters",
        "cut",
        "entered",
        "fault",
        "kept",
        "peer",
        "relay",
        "result",
        "seeking",
        "service",
        "started",
    )

    def __init__(self, service: ServiceState, sock: socket.socket, peer: object, started: float) -> None:
        self.service = service
        self.client = Client(sock)
        self.peer = peer
        self.started = started
        self._scope: trio.CancelScope | None = None
        self.result = Connected()
        self.counters: RelayCounters | None = None
        self.cut = ""
        self.entered: list[Limit] = []
        self.begun = False
        self.seeking = False
        self.connecting: Connecting | None = None
        self.connected: float | None = None
        self.relay: Pair | None = None
        self.kept: KeptTask[Connection] | None = None
        self.fault: Exception | None = None

    @property
    def scope(self) -> trio.CancelScope:
        """Its cancellation ends the connection. Most of those that are short are over without one."""
        if self._scope is None:
            self._scope = trio.CancelScope()
        return self._scope


class TcpForwarder:
    """Serves the connections of all TCP listeners.

    Args:
        services: the services that listeners name.
        access_log: one log line for each connection, at its end.

    Attributes:
        drained: connections that a drain cut (S1).
    """

    def __init__(self, services: ServiceTable, *, access_log: bool = False) -> None:
        self._services = services
        self.access_log = access_log
        self.drained = 0
        self._connections: dict[Connection, None] = {}
        self._tasks: TaskPool[Connection] = TaskPool(self._serve, KEPT_TASKS)
        self._failed = RateLimited(
            _log, logging.WARNING, "request failed: no instance connected", interval=_WARNING_INTERVAL
        )

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._connections)

    @property
    def kept_tasks(self) -> int:
        """How many tasks wait for a connection."""
        return len(self._tasks)

    def keeping_tasks(self) -> AbstractContextManager[None]:
        """While this is entered, tasks wait for further connections: for as long as there may be some."""
        return self._tasks.keeping()

    def take(self, nursery: trio.Nursery, service: ServiceState, sock: socket.socket, peer: object) -> Started:
        """Serve an accepted connection to its end, by which its socket is closed or reset.

        Returns:
            What Trio has to do for it now.
        """
        loop = current_loop.get()
        connection = Connection(service, sock, peer, trio.current_time() if loop is None else loop.time())
        if loop is None:
            nursery.start_soon(self._serve, connection)
            self._connections[connection] = None
            return Started.NOW
        kept = connection.kept = self._tasks.take(connection)
        if kept is None:
            self._tasks.start(nursery, connection)
        self._connections[connection] = None
        if not self._begin_relay(connection, loop):
            if kept is None:
                return Started.NOW
            loop.finish(kept)
        elif kept is None:
            return Started.LATER
        else:
            loop.defer(kept)
        return Started.NOTHING

    def _begin_relay(self, connection: Connection, loop: RelayLoop) -> bool:
        """Begin with a connection before its task does; false if the task has something to do now."""
        service = connection.service
        try:
            self._begin(connection, connection.started)
            upstream = connection.result.upstream
            if upstream is None or service.policy.replay or self._is_doubted(connection):
                return False
            assert connection.counters is not None
            relay = connection.relay = loop.begin(connection.client.socket, upstream, connection.counters)
        except Exception as error:  # noqa: BLE001 - here is no place to raise; the task does
            connection.fault = error
            return False
        if relay.done:
            return False
        relay.on_end = partial(self._conclude, connection)
        return True

    def _conclude(self, connection: Connection) -> None:
        """A relay ended before the connection's task has made a step, which it need not make then."""
        relay = connection.relay
        assert relay is not None
        relay.on_end = None
        outcome = Outcome.ERROR
        try:
            ended = relay.state.result()
            self._judge(connection, ended)
            outcome = _outcome(connection, ended)
        except Exception:  # noqa: BLE001 - see `_serve`
            self._log_fault(connection)
        finally:
            self._finish(connection, outcome)
            if connection.kept is not None:
                self._tasks.give_back(connection.kept)

    async def _serve(self, connection: Connection) -> None:
        if connection not in self._connections:
            return  # it was over before this task could make a step
        connection.kept = None
        outcome = Outcome.DRAINED
        try:
            with connection.scope:
                outcome = await self._forward(connection)
            if connection.scope.cancelled_caught:
                outcome = Outcome.RETURNED if connection.cut == RETURNED else Outcome.CUT
        except Exception:  # noqa: BLE001 - a fault of ours in one connection must not take the others with it
            outcome = Outcome.ERROR
            self._log_fault(connection)
        finally:
            self._finish(connection, outcome)

    def _log_fault(self, connection: Connection) -> None:
        _log.exception("connection failed by a fault in the proxy", service=connection.service.key)

    def _finish(self, connection: Connection, outcome: Outcome) -> None:
        """Let go of all that a connection has, and count it."""
        del self._connections[connection]
        if connection.connecting is not None:
            # A fault of ours came before its task could wait for it.
            close(connection.connecting.socket, awaited=False)
        if connection.seeking:
            self._end_search(connection)
        if connection.connected is not None:
            self._disconnect(connection)
        for limit in connection.entered:
            connection.service.circuit.leave(limit)
        upstream = connection.result.upstream
        end = close if outcome is Outcome.SERVED else abort
        # Nobody waits for them any more.
        end(connection.client.socket, awaited=False)
        if upstream is not None:
            end(upstream, awaited=False)
        self._account(connection, outcome)

    def _begin(self, connection: Connection, now: float) -> None:
        """Count it, and look for an instance as far as that waits for nothing."""
        connection.begun = True
        if self._enter(connection, Limit.CONNECTIONS) and self._enter(connection, Limit.REQUESTS):
            self._seek(connection, now)

    def _enter(self, connection: Connection, limit: Limit) -> bool:
        if connection.service.circuit.enter(limit):
            connection.entered.append(limit)
            return True
        return self._refuse(connection, limit)

    def _refuse(self, connection: Connection, limit: Limit) -> bool:
        connection.result.error = f"limit_{limit}"
        connection.result.outcome = Outcome.LIMITED
        return False

    def _seek(self, connection: Connection, now: float) -> None:
        """Look for an instance, or for the next; if that has to be waited for, `_connect` does."""
        service, result = connection.service, connection.result
        if not service.circuit.has_room(Limit.WAITING):
            self._refuse(connection, Limit.WAITING)
            return
        connection.connecting = begin(connection.client, service, result, now)
        if result.upstream is not None:
            # After what its connect showed, so that what becomes of it counts as well (H1).
            self._connected(connection, trio.current_time())
            return
        service.circuit.enter(Limit.WAITING)
        service.statistics.connecting += 1
        connection.seeking = True

    def _end_search(self, connection: Connection) -> None:
        connection.seeking = False
        connection.service.statistics.connecting -= 1
        connection.service.circuit.leave(Limit.WAITING)

    async def _connect(self, connection: Connection) -> bool:
        """Wait for an instance; False if there is none, for the reason in the result's `outcome`."""
        result = connection.result
        if connection.seeking:
            connecting, connection.connecting = connection.connecting, None
            try:
                await go_on(connection.client, connection.service, result, connecting)
            finally:
                self._end_search(connection)
            if result.upstream is not None:
                self._connected(connection, trio.current_time())
        return result.upstream is not None

    def _connected(self, connection: Connection, now: float) -> None:
        """It has an instance from now on; each wants a `_disconnect`."""
        service, pick = connection.service, connection.result.pick
        assert pick is not None
        connection.counters = RelayCounters(now)
        connection.connected = now
        service.statistics.open += 1
        service.fitness.begin(pick.instance)

    def _disconnect(self, connection: Connection) -> None:
        service, pick = connection.service, connection.result.pick
        assert pick is not None
        connection.connected = None
        service.statistics.open -= 1
        service.fitness.end(pick.instance)

    async def _forward(self, connection: Connection) -> Outcome:
        """All that is left to do, to its end."""
        result, client = connection.result, connection.client
        if connection.fault is not None:
            raise connection.fault
        if not connection.begun:
            self._begin(connection, trio.current_time())
        overture: Overture | None = None
        ended: RelayResult | None = None
        while ended is None:
            if not await self._connect(connection):
                assert result.outcome is not None
                return result.outcome
            upstream, counters = result.upstream, connection.counters
            assert upstream is not None
            assert counters is not None
            if connection.relay is not None or not (overture or connection.service.policy.replay):
                ended = await self._relay(connection, client.early)
                break
            overture = overture or Overture(client, connection.service.policy)
            verdict = await self._play(connection, overture)
            if client.left:
                return Outcome.CLIENT_LEFT
            if verdict.moves:
                self._disconnect(connection)
                self._seek(connection, trio.current_time())
            elif verdict.ended:
                ended = await copy_back(client.socket, upstream, counters)
            else:
                ended = await self._relay(connection, client.early[verdict.sent :])
        return _outcome(connection, ended)

    async def _play(self, connection: Connection, overture: Overture) -> Verdict:
        """Wait for the instance's first byte.

        An instance that is left is ejected like one that could not be connected (H1).
        """
        service, result, counters = connection.service, connection.result, connection.counters
        assert result.upstream is not None
        assert result.pick is not None
        assert counters is not None
        instance = result.pick.instance
        verdict: Verdict | None = None
        try:
            verdict = await overture.play(result.upstream)
        finally:
            if verdict is not None and verdict.moves:
                service.fitness.failed(instance, verdict.moves, Cause.RESET, connection.connected)
            elif verdict is not None and (verdict.spoke or verdict.ended):
                service.fitness.worked(instance, connection.connected)
            else:
                service.fitness.abandoned(instance)
        counters.client_to_upstream += verdict.sent
        if verdict.moves:
            service.statistics.replays[verdict.moves] += 1
            result.error = verdict.moves
            result.failures.append(FailedAttempt(result.pick, result.tier, verdict.moves, 0))
            abort(result.upstream)
            result.upstream = None
        return verdict

    async def _relay(self, connection: Connection, early: bytes | bytearray) -> RelayResult:
        """Relay, and tell what the connection shows of its instance (H1)."""
        sock, upstream, counters = connection.client.socket, connection.result.upstream, connection.counters
        assert upstream is not None
        assert counters is not None
        ended: RelayResult | None = None
        try:
            if connection.relay is not None:
                ended = await connection.relay.join()
            elif self._is_doubted(connection):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._settle, connection)
                    ended = await relay(sock, upstream, counters, early=early)
                    nursery.cancel_scope.cancel()
            else:
                ended = await relay(sock, upstream, counters, early=early)
        finally:
            self._judge(connection, ended)
        assert ended is not None
        return ended

    def _judge(self, connection: Connection, ended: RelayResult | None) -> None:
        fitness, pick, counters = connection.service.fitness, connection.result.pick, connection.counters
        assert pick is not None
        assert counters is not None
        assert connection.connected is not None
        silent = not counters.upstream_to_client
        if ended is None or (silent and ended.failed == "client"):
            fitness.abandoned(pick.instance)
        elif not silent or ended.failed is None or ended.first_end is not None:
            fitness.worked(pick.instance, connection.connected)
        elif trio.current_time() - connection.connected < SETTLED:
            fitness.failed(pick.instance, ended.reason, Cause.RESET, connection.connected)

    def _is_doubted(self, connection: Connection) -> bool:
        """Whether it has to live for a while to show that its instance works."""
        pick = connection.result.pick
        assert pick is not None
        return connection.service.fitness.is_doubted(pick.instance)

    async def _settle(self, connection: Connection) -> None:
        pick = connection.result.pick
        assert pick is not None
        await trio.sleep(SETTLED)
        connection.service.fitness.worked(pick.instance, connection.connected)

    def _account(self, connection: Connection, outcome: Outcome) -> None:
        service, result = connection.service, connection.result
        statistics = service.statistics
        tier, reason = result.tier, (result.pick.reason or "") if result.pick is not None else ""
        statistics.requests[RequestKey(tier, reason, outcome)] += 1
        self.drained += outcome is Outcome.DRAINED
        counters = connection.counters
        if counters is not None:
            statistics.bytes_sent += counters.client_to_upstream
            statistics.bytes_received += counters.upstream_to_client
        if outcome in (Outcome.FAILED, Outcome.NO_INSTANCE, Outcome.DEADLINE):
            now = trio.current_time()
            self._failed(
                now,
                service=service.key,
                outcome=outcome,
                attempts=result.attempts,
                tried=in_a_row([str(each) for each in result.failures]) or None,
                last_error=result.error or None,
            )
        if self.access_log:
            _access_log.info(
                "request",
                service=service.key,
                client=format_address(connection.peer),
                instance=str(result.pick.instance.key) if result.pick is not None else None,
                node=(result.pick.instance.node or None) if result.pick is not None else None,
                tier=tier or None,
                reason=reason or None,
                attempts=result.attempts,
                outcome=outcome,
                cut=connection.cut or None,
                sent=counters.client_to_upstream if counters is not None else 0,
                received=counters.upstream_to_client if counters is not None else 0,
                seconds=round(trio.current_time() - connection.started, 6),
            )

    async def sweep_idle(self) -> None:
        """Cut connections on which nothing moved for their service's `idle_timeout`, for ever (A1).

        One task looks at all connections, so that a byte that moves costs a connection no timer.
        """
        while True:  # noqa: ASYNC110 - what it waits for is the passing of time itself
            # Not for each by itself: many that expire one by one would each cost a look at all.
            await trio.sleep(max(self._cut_idle(trio.current_time()), _SWEEP_SHORTEST))

    def _cut_idle(self, now: float) -> float:
        """Cut what is idle; returns the seconds until one more can be."""
        limits = [limit for service in self._services if (limit := service.policy.idle_timeout) is not None]
        wait = min(_SWEEP_LONGEST, *limits) if limits else _SWEEP_LONGEST
        for connection in self._connections:
            limit, counters = connection.service.policy.idle_timeout, connection.counters
            if limit is None or counters is None:
                continue
            left = counters.last_activity + limit - now
            if left <= 0:
                connection.cut = "idle"
                connection.scope.cancel()
            else:
                wait = min(wait, left)
        return wait


def _outcome(connection: Connection, ended: RelayResult) -> Outcome:
    if ended.failed is None:
        return Outcome.SERVED
    connection.cut = f"{ended.failed} {ended.reason}"
    return Outcome.CUT
