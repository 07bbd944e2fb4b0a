"""A request while nothing about it is unusual: the least that has to be kept of it.

Most requests have no body, are repeatable, find a connection that waits, and are answered at once, whole, by an
instance that nothing is wrong with. For these an `Exchange` and its `Attempt` would be made, asked a few questions and
thrown away, at the cost of all else together. So the lane keeps a `Quick` instead, and `unfold`s it at the first thing
that is otherwise, into what they would be by then if they had been there from the start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshlocal.client.statistics import Outcome
from meshlocal.net.sockets import close
from meshlocal.policy.limits import Limit
from meshlocal.policy.picker import Pick, Plan
from meshlocal.policy.retry import IDEMPOTENT_METHODS
from meshlocal.proxy.http.account import count_request
from meshlocal.proxy.http.attempt import Attempt
from meshlocal.proxy.http.exchange import ANSWERED, Exchange
from meshlocal.proxy.http.pool import Upstream
from meshlocal.proxy.http.service import HttpService
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.request import RequestHead
from meshlocal.wire.http1.response import Framing
from meshlocal.wire.http1.rewrite import client_head

if TYPE_CHECKING:
    from meshlocal.proxy.http.connection import ClientConnection

_METHODS = IDEMPOTENT_METHODS - {b"HEAD"}


def is_usual(connection: ClientConnection, head: RequestHead, service: HttpService) -> bool:
    """Whether a request that has no body may be kept as a `Quick`."""
    fitness = service.state.fitness
    return (
        head.method in _METHODS
        and head.minor == 1
        and head.keep_alive
        and not connection.forwarder.tells
        # Else plans ask a gate, and instances are told of each request (F3, H1).
        and fitness.spill is None
        and not fitness.health.unfit
    )


class Quick:
    """One such request. Its service's circuit has let it in.

    Attributes:
        upstream: the connection that it takes; None if there is none, so that it must be unfolded.
        sent: it was.
        out: what goes to the client; empty until the response came.
    """

    __slots__ = (
        "_connection",
        "_data",
        "_head",
        "_pick",
        "_plan",
        "_reusable",
        "_service",
        "_size",
        "_started",
        "_status",
        "_tier",
        "out",
        "sent",
        "upstream",
    )

    def __init__(self, connection: ClientConnection, head: RequestHead, service: HttpService, now: float) -> None:
        state = service.state
        self._connection = connection
        self._head = head
        self._service = service
        self._started = now
        self._plan: Plan | None = state.plan()
        self._pick: Pick | None = self._plan.next() if self._plan is not None else None
        self.upstream: Upstream | None = None
        self.sent = False
        self.out = b""
        state.in_use += 1
        service.budget.request(now)
        pick = self._pick
        self._tier = ""
        if pick is not None:
            # By the time that it ends there may be other tiers (S2).
            self._tier = tier = state.tiers[pick.tier]
            state.statistics.picks[tier, pick.reason or ""] += 1
            self.upstream = service.pool.take(pick.instance.key[:2], sure=False)
            if self.upstream is not None:
                service.statistics.connections_reused += 1
                state.fitness.begin(pick.instance)

    def payload(self) -> bytes:
        """The head for the instance."""
        return self._connection.request_head(self._head, self._service)

    def answer(self, data: bytes) -> bool:
        """Take the instance's first bytes; false if they are no whole response of the usual kind: nothing was taken."""
        forwarder = self._connection.forwarder
        settings = forwarder.settings
        end = data.find(b"\r\n\r\n") + 4
        if end < 4 or end > settings.limits.head or forwarder.draining or forwarder.tells:
            return False
        try:
            head = settings.heads.response(data[:end])
        except ProtocolError:
            return False
        status, size = head.status, len(data) - end
        if status < 200 or status in self._service.state.policy.retry_on:
            return False
        if head.usual is Framing.LENGTH:
            if size != head.content_length:
                return False
        elif size or head.usual is not Framing.NONE:
            return False
        self._data, self._status, self._size, self._reusable = data, status, size, head.keep_alive
        onward = client_head(head, head.usual, extra=settings.via)
        self.out = onward + data[end:] if size else onward
        return True

    def finish(self, now: float) -> None:
        """The response went to the client."""
        service, pick, upstream = self._service, self._pick, self.upstream
        assert pick is not None
        assert upstream is not None
        state = service.state
        state.in_use -= 1
        state.circuit.leave(Limit.REQUESTS)
        state.fitness.end(pick.instance)
        state.fitness.worked(pick.instance, self._started)
        if self._reusable and not upstream.ending:
            service.pool.put(upstream, now, self._connection.forwarder.settings.config.pool_size, watched=True)
        else:
            close(upstream.sock)
        tier = self._tier
        state.statistics.attempts[tier, ANSWERED] += 1
        count_request(
            service, tier, pick.reason or "", Outcome.SERVED, self._status, 0, self._size, now - self._started
        )

    def unfold(self) -> tuple[Exchange, Attempt | None]:
        """The same as what tasks know; an attempt if there is a connection for it. This is of no use after it."""
        exchange = Exchange(self._connection, self._head, self._started)
        exchange.resume(self._service, self._plan, self._pick, self._tier)
        if self.upstream is None:
            return exchange, None
        attempt = Attempt(exchange, self._service, self.upstream)
        attempt.take_over_count()
        if self.sent:
            attempt.resume()
        if self.out:
            attempt.out = attempt.take(self._data)
        return exchange, attempt
