"""TCP connections from accept to end (behaviour rules A1 to A8, H1, R1, S1).

One task serves one connection: it connects an instance, relays until both sides
have ended, and counts. Whatever ends it in another way, a failure on either
side, an idle limit, a drain that ran out of time, resets the client's
connection rather than closing it: a stream that was cut must not look complete.

An instance that was connected and reset the connection before it said a word has
failed as much as one that could not be connected, and is ejected for it (H1).
That a connect succeeded says nothing of such an instance then: its next
connections are watched until they have lived for a while.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator

import trio

from meshlocal.client.connecting import Client, Connected, FailedAttempt, connect
from meshlocal.client.fitness import Fitness
from meshlocal.client.services import ServiceState, ServiceTable
from meshlocal.client.statistics import Outcome, RequestKey
from meshlocal.net.log import RateLimited, get_log
from meshlocal.net.relay import RelayCounters, RelayResult, copy_back, relay
from meshlocal.net.sockets import abort, close, format_address
from meshlocal.policy.health import Cause
from meshlocal.policy.limits import Limit
from meshlocal.policy.model import Instance
from meshlocal.proxy.replay import Overture, Verdict

_log = get_log(__name__)
_access_log = get_log("meshlocal.access")

_SWEEP_LONGEST = 30.0
_SWEEP_SHORTEST = 0.1
_WARNING_INTERVAL = 5.0

SETTLED = 1.0
"""Seconds that a connection must live to show that its instance works, if nothing else shows it."""


RETURNED = "returned"
"""Why a connection was cut whose client is to come back to the local tier (F2)."""


class Connection:
    """One client's connection while it lives.

    Attributes:
        service: what it is for.
        peer: the client's address.
        result: the instance that serves it, and how it was found.
        counters: bytes moved; None until an instance is connected.
        cut: why the proxy ended it, if it did.
    """

    __slots__ = ("counters", "cut", "peer", "result", "scope", "service", "started")

    def __init__(self, service: ServiceState, peer: object, started: float) -> None:
        self.service = service
        self.peer = peer
        self.started = started
        self.scope = trio.CancelScope()
        self.result = Connected()
        self.counters: RelayCounters | None = None
        self.cut = ""


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
        self._failed = RateLimited(
            _log, logging.WARNING, "request failed: no instance connected", interval=_WARNING_INTERVAL
        )

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._connections)

    async def serve(self, service: ServiceState, sock: socket.socket, peer: object) -> None:
        """Serve one accepted connection to its end; the socket is closed or reset then."""
        connection = Connection(service, peer, trio.current_time())
        self._connections[connection] = None
        outcome = Outcome.DRAINED
        try:
            with connection.scope:
                outcome = await self._forward(connection, sock)
            if connection.scope.cancelled_caught:
                outcome = Outcome.RETURNED if connection.cut == RETURNED else Outcome.CUT
        except Exception:  # noqa: BLE001 - a fault of ours in one connection must not take the others with it
            outcome = Outcome.ERROR
            _log.exception("connection failed by a fault in the proxy", service=service.key)
        finally:
            del self._connections[connection]
            upstream = connection.result.upstream
            end = close if outcome is Outcome.SERVED else abort
            # Nobody but this task ever waits for them.
            end(sock, awaited=False)
            if upstream is not None:
                end(upstream, awaited=False)
            self._account(connection, outcome)

    async def _forward(self, connection: Connection, sock: socket.socket) -> Outcome:
        circuit = connection.service.circuit
        if not circuit.enter(Limit.CONNECTIONS):
            return self._refuse(connection, Limit.CONNECTIONS)
        try:
            if not circuit.enter(Limit.REQUESTS):
                return self._refuse(connection, Limit.REQUESTS)
            try:
                return await self._serve_request(connection, sock)
            finally:
                circuit.leave(Limit.REQUESTS)
        finally:
            circuit.leave(Limit.CONNECTIONS)

    def _refuse(self, connection: Connection, limit: Limit) -> Outcome:
        connection.result.error = f"limit_{limit}"
        return Outcome.LIMITED

    async def _serve_request(self, connection: Connection, sock: socket.socket) -> Outcome:
        service, result = connection.service, connection.result
        client = Client(sock)
        overture = Overture(client, service.policy) if service.policy.replay else None
        while True:
            if not service.circuit.enter(Limit.WAITING):
                return self._refuse(connection, Limit.WAITING)
            service.statistics.connecting += 1
            try:
                await connect(client, service, result)
            finally:
                service.statistics.connecting -= 1
                service.circuit.leave(Limit.WAITING)
            if result.upstream is None:
                assert result.outcome is not None
                return result.outcome
            assert result.pick is not None
            instance = result.pick.instance
            connection.counters = RelayCounters(trio.current_time())
            service.statistics.open += 1
            service.fitness.begin(instance)
            try:
                if overture is None:
                    ended = await self._relay(connection, sock, result.upstream, client.early)
                    break
                verdict = await self._play(connection, overture)
                if client.left:
                    return Outcome.CLIENT_LEFT
                if verdict.moves:
                    continue
                if verdict.ended:
                    ended = await copy_back(sock, result.upstream, connection.counters)
                else:
                    ended = await self._relay(connection, sock, result.upstream, client.early[verdict.sent :])
                break
            finally:
                service.fitness.end(instance)
                service.statistics.open -= 1
        if ended.failed is not None:
            connection.cut = f"{ended.failed} {ended.reason}"
            return Outcome.CUT
        return Outcome.SERVED

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
            if verdict is not None and verdict.spoke:
                service.fitness.worked(instance)
            elif verdict is not None and verdict.moves:
                service.fitness.failed(instance, verdict.moves, Cause.RESET)
            elif verdict is None or not verdict.ended:
                service.fitness.abandoned(instance)
            else:
                service.fitness.worked(instance)
        counters.client_to_upstream += verdict.sent
        if verdict.moves:
            service.statistics.replays[verdict.moves] += 1
            result.error = verdict.moves
            result.failures.append(FailedAttempt(result.pick, verdict.moves, 0))
            abort(result.upstream)
            result.upstream = None
        return verdict

    async def _relay(
        self, connection: Connection, sock: socket.socket, upstream: socket.socket, early: bytes | bytearray
    ) -> RelayResult:
        """Relay, and tell what the connection shows of its instance (H1)."""
        fitness, counters, pick = connection.service.fitness, connection.counters, connection.result.pick
        assert counters is not None
        assert pick is not None
        began = trio.current_time()
        ended: RelayResult | None = None
        try:
            if fitness.is_doubted(pick.instance):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._settle, fitness, pick.instance)
                    ended = await relay(sock, upstream, counters, early=early)
                    nursery.cancel_scope.cancel()
            else:
                ended = await relay(sock, upstream, counters, early=early)
        finally:
            silent = not counters.upstream_to_client
            if ended is None or (silent and ended.failed == "client"):
                fitness.abandoned(pick.instance)
            elif not silent or ended.failed is None or ended.first_end is not None:
                fitness.worked(pick.instance)
            elif trio.current_time() - began < SETTLED:
                fitness.failed(pick.instance, ended.reason, Cause.RESET)
        assert ended is not None
        return ended

    async def _settle(self, fitness: Fitness, instance: Instance) -> None:
        await trio.sleep(SETTLED)
        fitness.worked(instance)

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
        now = trio.current_time()
        if outcome in (Outcome.FAILED, Outcome.NO_INSTANCE, Outcome.DEADLINE):
            self._failed(
                now, service=service.key, outcome=outcome, attempts=result.attempts, last_error=result.error or None
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
                seconds=round(now - connection.started, 6),
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
