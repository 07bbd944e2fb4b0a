"""One HTTP request: pick, attempts, what follows from each failure (behaviour rules A1 to A6, H1, O1, R1).

What httpx calls its read timeout is of the request, not of each attempt: it bounds the wait for a response's head over
all attempts, and then each read of the body. Its connect timeout is for each instance that is tried, like the policy's,
and its write and pool timeouts are for each write, and for a place among the connections to an instance. The clock of a
response does not run while the application's body is waited for (A1).
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

from meshlocal.client.account import Account
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import AttemptOutcome, Outcome
from meshlocal.library.errors import Attempt, NoInstanceError, ServiceError, tried
from meshlocal.library.http_body import ReplayableBody
from meshlocal.library.http_kind import HttpKind
from meshlocal.library.http_pool import Connection, InstancePool
from meshlocal.library.http_pools import InstancePools
from meshlocal.library.http_wire import Record
from meshlocal.library.unavailable import why_none
from meshlocal.policy.limits import Limit
from meshlocal.policy.model import Instance
from meshlocal.policy.picker import Pick, Reason
from meshlocal.policy.retry import IDEMPOTENT_METHODS, Decision, Failure, RetryBudget, decide

if TYPE_CHECKING:
    import httpcore
    import httpx

_ERRORS = {
    Failure.CONNECT: "connect",
    Failure.STALE: "read",
    Failure.NO_RESPONSE: "read",
    Failure.TIMEOUT: "timeout",
    Failure.BROKEN: "broken",
}
"""Which of `HttpErrors` is raised for what the last attempt failed by."""


class Served(NamedTuple):
    """How a response came about: `response.extensions["meshlocal"]`.

    Attributes:
        instance: that answered.
        tier: its tier's name.
        reason: why the request had left the first tier; None if it had not (R1).
        attempts: how many instances were tried, this one among them.
    """

    instance: Instance
    tier: str
    reason: Reason | None
    attempts: int


class _FailedError(Exception):
    """An attempt that brought no response."""

    def __init__(self, failure: Failure, word: str, sent: bool, cause: Exception) -> None:
        super().__init__(word)
        self.failure = failure
        self.word = word
        self.sent = sent
        self.cause = cause


class MeshRequest(Account):
    """One request until its response is closed.

    Args:
        pools: connections to instances.
        state: the service.
        budget: of retries after an answer, of the service.
        request: what to send.

    Attributes:
        kind: httpx, or httpx2.
    """

    __slots__ = (
        "_body",
        "_budget",
        "_clocks",
        "_failed_attempts",
        "_given",
        "_idempotent",
        "_pools",
        "_read_left",
        "_request",
        "kind",
    )

    def __init__(self, pools: InstancePools, state: ServiceState, budget: RetryBudget, request: httpx.Request) -> None:
        super().__init__(anyio.current_time())
        self.state = state
        self.kind = kind = pools.kind
        self._pools = pools
        self._budget = budget
        self._request = request
        stream = request.stream
        assert isinstance(stream, kind.httpx.AsyncByteStream)
        whole = isinstance(stream, kind.httpx.ByteStream)
        self._body = ReplayableBody(stream, state.policy.replay_buffer, whole=whole)
        self._idempotent = request.method.encode() in IDEMPOTENT_METHODS or "idempotency-key" in request.headers
        given: Mapping[str, float | None] = request.extensions.get("timeout") or {}
        self._given = given
        self._read_left = _or_infinite(given.get("read"))
        self._clocks: list[tuple[anyio.CancelScope, float]] = []
        """Scopes whose time is the instances', and the seconds that they have for it."""
        self._body.on_wait = self._stop_clocks
        self._body.on_piece = self._restart_clocks
        self._failed_attempts: list[Attempt] = []

    async def run(self) -> httpx.Response:
        """Send it; returns once a response's head has come.

        Raises:
            ServiceError: no instance gave one.
        """
        state = self._service
        limit = state.policy.response_deadline
        if self.begin(state, limit, Limit.REQUESTS) is not None:
            self.end(Outcome.LIMITED)
            limits = "as many requests as its limits allow are under way"
            raise self.kind.errors.limited(f"{state.key}: {limits}", state.key)
        self._budget.request(self.started)
        response: httpx.Response | None = None
        outcome = Outcome.CLIENT_LEFT
        try:
            with anyio.move_on_after(limit) as deadline:
                self._clocks.append((deadline, limit))
                response = await self._forward()
            if response is None and deadline.cancelled_caught:
                outcome = Outcome.DEADLINE
                raise self._late()
        except NoInstanceError:
            outcome = Outcome.NO_INSTANCE
            raise
        except ServiceError:
            outcome = Outcome.DEADLINE if outcome is Outcome.DEADLINE else Outcome.FAILED
            raise
        except Exception:
            outcome = Outcome.ERROR
            raise
        finally:
            if response is None:
                self.end(outcome)
                await self._body.aclose()
        assert response is not None
        return response

    @property
    def _service(self) -> ServiceState:
        assert self.state is not None
        return self.state

    def _stop_clocks(self) -> None:
        for scope, _ in self._clocks:
            scope.deadline = math.inf
        self.deadline = math.inf

    def _restart_clocks(self) -> None:
        now = anyio.current_time()
        for scope, limit in self._clocks:
            scope.deadline = now + limit
        self.deadline = now + self._service.policy.response_deadline

    async def _forward(self) -> httpx.Response:
        state = self._service
        if state.picker is None:
            self.start_waiting(limited=False)
            with anyio.move_on_after(state.policy.first_snapshot_wait):
                await state.first_snapshot.wait()
            self.stop_waiting()
        while True:
            pick = self.try_next(anyio.current_time())
            if pick is None:
                break
            try:
                response = await self._try_instance(pick)
            except _FailedError as error:
                # The loop's next turn would end the frame that keeps it alive.
                failed = error
            else:
                if not self._is_replaced(response, pick):
                    assert isinstance(response.stream, ResponseBody)
                    response.stream.final = True
                    self.end_search()
                    return response
                await response.aclose()
                continue
            self._failed_attempts.append(Attempt(pick.instance, self.tier, pick.reason, failed.word, failed.cause))
            now = anyio.current_time()
            self._end_at_read_timeout(now)
            decision = self.attempt_failed(
                failed.failure,
                now,
                failed.word,
                sent=failed.sent,
                idempotent=self._idempotent,
                held=self._body.held,
            )
            if decision is not Decision.NEXT:
                told = f"{state.key}: no instance answered: {tried(self._failed_attempts)}"
                kind: type[ServiceError] = getattr(self.kind.errors, _ERRORS[failed.failure])
                raise kind(told, state.key, self._failed_attempts) from failed.cause
        raise self.kind.errors.no_instance(f"{state.key}: {why_none(state)}", state.key)

    def _is_replaced(self, response: httpx.Response, pick: Pick) -> bool:
        """Whether another instance is to be tried in place of this answer; otherwise it is the answer."""
        now = anyio.current_time()
        self._end_at_read_timeout(now)
        tier = self.tier
        if response.status_code not in self._service.policy.retry_on or not self.drop_answer(
            now, self._budget, response.status_code, sent=True, idempotent=self._idempotent, held=self._body.held
        ):
            self.answered()
            return False
        cause = self.kind.httpx.HTTPStatusError(
            f"status {response.status_code}", request=self._request, response=response
        )
        self._failed_attempts.append(Attempt(pick.instance, tier, pick.reason, Failure.STATUS, cause))
        return True

    def _end_at_read_timeout(self, now: float) -> None:
        """httpx's read timeout is over all attempts: once it is spent, the request's deadline has come."""
        if self._read_left <= 0:
            self.deadline = now

    def _late(self) -> ServiceError:
        state, pick = self._service, self.pick
        if pick is not None and len(self._failed_attempts) < self.attempts:
            self._failed_attempts.append(Attempt(pick.instance, self.tier, pick.reason, AttemptOutcome.ABANDONED, None))
        told = f"{state.key}: no instance answered within {state.policy.response_deadline:g} s"
        if self._failed_attempts:
            told += f": {tried(self._failed_attempts)}"
        return self.kind.errors.deadline(told, state.key, self._failed_attempts)

    # One attempt.

    async def _try_instance(self, pick: Pick) -> httpx.Response:
        """Send the request to one instance, a second time if its connection turns out to have ended (A4).

        Raises:
            _FailedError: it brought no response.
        """
        sockets = self._service.sockets
        path = sockets.of(pick.instance) if sockets is not None else None
        pool = self._pools.pool(pick.instance.key, path)
        pool.in_use += 1
        self.enter_instance()
        try:
            while True:
                try:
                    response, connection = await self._send(pick, pool)
                    return self._wrap(response, pick, pool, connection)
                except _FailedError as failed:
                    if failed.failure is not Failure.STALE or not self._repeats(failed):
                        raise
                # Its other unused connections have most likely ended too.
                await pool.close_idle()
        except BaseException:
            self.leave(pool)
            raise

    def _repeats(self, failed: _FailedError) -> bool:
        return (
            decide(failed.failure, sent=failed.sent, idempotent=self._idempotent, held=self._body.held) is Decision.SAME
        )

    async def _send(self, pick: Pick, pool: InstancePool) -> tuple[httpcore.Response, Connection]:
        limit = self._service.policy.attempt_timeout
        if limit is None:
            return await self._send_once(pick, pool, Record())
        record = Record()
        with anyio.move_on_after(limit) as scope:
            self._clocks.append((scope, limit))
            try:
                return await self._send_once(pick, pool, record)
            finally:
                self._clocks.pop()
        kind = Failure.TIMEOUT if record.sent else Failure.CONNECT
        raise _FailedError(kind, "timeout", record.sent, TimeoutError(f"no response within {limit:g} s"))

    async def _send_once(self, pick: Pick, pool: InstancePool, record: Record) -> tuple[httpcore.Response, Connection]:
        message, times = self._message(pick)
        try:
            answer = await pool.send(message, record, self._service.circuit)
        except (self.kind.httpx.UnsupportedProtocol, self.kind.httpx.LocalProtocolError):
            raise
        except self.kind.httpx.TransportError as error:
            if self._body.failure is not None:
                raise
            if self._pools.closed:
                # By the application: that says nothing of the instance, and no other one is wanted.
                raise self.kind.httpx.ReadError("the client was closed") from error
            raise _classify(self.kind, error, record) from None
        finally:
            if record.asked is not None:
                self._read_left -= anyio.current_time() - record.asked
        # From here on it is about the body, of which each read has the whole time again.
        times["read"] = self._given.get("read")
        if record.fresh:
            # When it was connected is not known: the response is there by now.
            self.reached(None, by_socket=record.by_socket)
        return answer

    def _message(self, pick: Pick) -> tuple[httpcore.Request, dict[str, float | None]]:
        """The request for one instance: its address, with the Host that the application gave; and its timeouts, which
        may be changed."""
        request, policy, key = self._request, self._service.policy, pick.instance.key
        connect = policy.connect_timeout if pick.tier else policy.connect_timeout_local
        times = dict(self._given)
        times["connect"] = min(connect, _or_infinite(self._given.get("connect")))
        if self._read_left != math.inf:
            times["read"] = self._read_left
        extensions = {**request.extensions, "timeout": times}
        if request.url.scheme == "https":
            extensions.setdefault("sni_hostname", request.url.host)
        core = self.kind.httpcore
        url = core.URL(
            scheme=request.url.raw_scheme, host=key.address.encode(), port=key.port, target=request.url.raw_path
        )
        message: httpcore.Request = core.Request(
            request.method, url, headers=request.headers.raw, content=self._body, extensions=extensions
        )
        return message, times

    def _wrap(
        self, response: httpcore.Response, pick: Pick, pool: InstancePool, connection: Connection
    ) -> httpx.Response:
        served = Served(pick.instance, self.tier, pick.reason, self.attempts)
        made: httpx.Response = self.kind.httpx.Response(
            response.status,
            headers=response.headers,
            stream=self._pools.body(self, response, pool, connection),
            extensions={**response.extensions, "meshlocal": served},
        )
        return made

    def leave(self, pool: InstancePool) -> None:
        """The instance is done with this request."""
        self.leave_instance()
        pool.in_use -= 1

    async def closed(self, pool: InstancePool, connection: Connection, outcome: Outcome | None) -> None:
        """A response of it was closed; with an outcome, that was the application's."""
        self.leave(pool)
        try:
            if outcome is not None:
                self.end(outcome)
                await self._body.aclose()
        finally:
            await pool.put(connection)
            await self._pools.tidy(pool)


def _or_infinite(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def _classify(kind: HttpKind, error: Exception, record: Record) -> _FailedError:
    httpx = kind.httpx
    if record.connect_error or not (record.sent or isinstance(error, httpx.ReadError)):
        return _FailedError(Failure.CONNECT, record.connect_error or _word(kind, error), False, error)
    if record.received:
        return _FailedError(Failure.BROKEN, Failure.BROKEN, record.sent, error)
    if isinstance(error, httpx.TimeoutException):
        return _FailedError(Failure.TIMEOUT, Failure.TIMEOUT, record.sent, error)
    failure = Failure.NO_RESPONSE if record.fresh else Failure.STALE
    return _FailedError(failure, failure, record.sent, error)


def _word(kind: HttpKind, error: Exception) -> str:
    """How an attempt failed that was neither a connect's failure nor sent."""
    httpx = kind.httpx
    if isinstance(error, httpx.PoolTimeout):
        return "pool_timeout"
    return "tls" if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) else "other"


class ResponseBody:
    """A response's body: httpx's `AsyncByteStream`, once it is joined with that (`body_of`).

    Attributes:
        final: the response is the application's, and its close the end of the request.
    """

    def __init__(
        self, request: MeshRequest, response: httpcore.Response, pool: InstancePool, connection: Connection
    ) -> None:
        self._request = request
        self._response = response
        self._pool = pool
        self._connection = connection
        self._outcome = Outcome.SERVED
        self._closed = False
        self.final = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with self._request.kind.as_httpx_errors():
            try:
                async for piece in self._response.aiter_stream():
                    yield piece
            except Exception:
                self._outcome = Outcome.CUT
                raise

    async def aclose(self) -> None:
        """Let go of what the response has."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._response.aclose()
        finally:
            await self._request.closed(self._pool, self._connection, self._outcome if self.final else None)


def body_of(kind: HttpKind) -> type[Any]:
    """`ResponseBody` as one of the two libraries wants it."""
    return type("ResponseBody", (ResponseBody, kind.httpx.AsyncByteStream), {})
