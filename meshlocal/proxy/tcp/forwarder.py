"""Serves the connections of all tcp listeners, from accept to end (behaviour rules A1, R1, S1).

One task serves one connection. Whatever ends it in another way than both sides' ends, a failure on either side, an idle
limit, a drain that ran out of time, resets the client's connection rather than closing it: a stream that was cut must
not look complete.

Where there is a relay loop, a connection is accepted in it and its task is started; and before that task has made a
step, an instance on this host is connected and the client's first bytes are on their way (`TcpForwarder.take`). All of
it belongs to the task from the start, which goes on from what was begun. A connection that is over by then is closed
and counted by the loop; and tasks are kept, so that one may serve many connections, one after another.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial

import trio

from meshlocal.client.services import ServiceTable
from meshlocal.client.statistics import Outcome
from meshlocal.client.tried import in_a_row
from meshlocal.net.listen import Started
from meshlocal.net.log import RateLimited, get_log
from meshlocal.net.pipe import Pipe, PlainPipe
from meshlocal.net.relay_loop import current_loop
from meshlocal.net.sockets import abort
from meshlocal.net.task_pool import TaskPool
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.access_log import log_request
from meshlocal.proxy.tcp.connection import RETURNED, TcpConnection

_log = get_log(__name__)

_SWEEP_LONGEST = 30.0
"""Seconds between two looks for idle connections at most."""

_SWEEP_SHORTEST = 0.1
"""Seconds between two such looks at least."""

_WARNING_INTERVAL = 5.0
"""Seconds between two warnings of requests that failed, at least."""

KEPT_TASKS = 64
"""Tasks that wait for a connection at most. More are started for as many connections, and end with them."""


class TcpForwarder:
    """Serves the connections of all TCP listeners.

    Args:
        services: the services that listeners name.
        access_log: one log line for each connection, at its end.

    Attributes:
        access_log: may be changed at any time.
        drained: connections that a drain cut (S1).
    """

    def __init__(self, services: ServiceTable, *, access_log: bool = False) -> None:
        self._services = services
        self.access_log = access_log
        self.drained = 0
        self._connections: dict[TcpConnection, None] = {}
        self._tasks: TaskPool[TcpConnection] = TaskPool(self._serve, KEPT_TASKS)
        self._failed = RateLimited(
            _log, logging.WARNING, "request failed: no instance connected", interval=_WARNING_INTERVAL
        )

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[TcpConnection]:
        return iter(self._connections)

    @property
    def kept_tasks(self) -> int:
        """How many tasks wait for a connection."""
        return len(self._tasks)

    def accepting(self) -> AbstractContextManager[None]:
        """See `Server.accepting`: tasks wait for further connections meanwhile."""
        return self._tasks.keeping()

    def shed(self) -> None:
        """See `Server.shed`: a tcp connection that is idle may mean it."""

    def take(self, nursery: trio.Nursery, key: ServiceKey | None, sock: socket.socket, peer: object) -> Started:
        """See `Server.take`."""
        service = self._services.get(key) if key is not None else None
        if service is None:
            # The config lost the service, and its listeners are about to go.
            abort(sock)
            return Started.NOTHING
        loop = current_loop.get()
        now = trio.current_time() if loop is None else loop.time()
        connection = TcpConnection(service, PlainPipe(sock), peer, now)
        if loop is None:
            nursery.start_soon(self._serve, connection)
            self._connections[connection] = None
            return Started.NOW
        kept = connection.kept = self._tasks.take(connection)
        if kept is None:
            self._tasks.start(nursery, connection)
        self._connections[connection] = None
        if not connection.start_relay(loop):
            if kept is None:
                return Started.NOW
            loop.finish(kept)
            return Started.NOTHING
        assert connection.relay is not None
        connection.relay.on_end = partial(self._conclude, connection)
        if kept is None:
            return Started.LATER
        loop.defer(kept)
        return Started.NOTHING

    async def serve(self, key: ServiceKey | None, pipe: Pipe, peer: object) -> None:
        """See `PipeServer.serve`."""
        service = self._services.get(key) if key is not None else None
        if service is None:
            pipe.abort()
            return
        connection = TcpConnection(service, pipe, peer, trio.current_time())
        self._connections[connection] = None
        await self._serve(connection)

    def _conclude(self, connection: TcpConnection) -> None:
        """A relay ended before the connection's task has made a step, which it need not make then."""
        outcome = Outcome.ERROR
        try:
            outcome = connection.conclude()
        except Exception:  # noqa: BLE001 - see `_serve`
            self._log_fault(connection)
        finally:
            self._finish(connection, outcome)
            if connection.kept is not None:
                self._tasks.give_back(connection.kept)

    async def _serve(self, connection: TcpConnection) -> None:
        if connection not in self._connections:
            return  # it was over before this task could make a step
        connection.kept = None
        outcome = Outcome.DRAINED
        try:
            with connection.scope:
                outcome = await connection.forward()
            if connection.scope.cancelled_caught:
                outcome = Outcome.RETURNED if connection.cut == RETURNED else Outcome.CUT
        except Exception:  # noqa: BLE001 - a fault of ours in one connection must not take the others with it
            outcome = Outcome.ERROR
            self._log_fault(connection)
        finally:
            self._finish(connection, outcome)

    def _log_fault(self, connection: TcpConnection) -> None:
        _log.exception("connection failed by a fault in the proxy", service=connection.service.key)

    def _finish(self, connection: TcpConnection, outcome: Outcome) -> None:
        """Let go of all that a connection has, count it, and tell of it."""
        del self._connections[connection]
        now = trio.current_time()
        connection.finish(outcome, now)
        self.drained += outcome is Outcome.DRAINED
        if outcome in (Outcome.FAILED, Outcome.NO_INSTANCE, Outcome.DEADLINE):
            self._failed(
                now,
                service=connection.service.key,
                outcome=outcome,
                attempts=connection.attempts,
                tried=in_a_row(list(map(str, connection.failures or ()))) or None,
                last_error=connection.error or None,
            )
        if self.access_log:
            counters = connection.counters
            log_request(
                connection,
                outcome,
                now,
                peer=connection.peer,
                identity=connection.client.pipe.identity,
                sent=counters.client_to_upstream if counters is not None else 0,
                received=counters.upstream_to_client if counters is not None else 0,
                problem={"cut": connection.cut or None},
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
