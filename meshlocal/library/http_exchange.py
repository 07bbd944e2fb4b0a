"""One HTTP request: pick, attempts, what follows from each failure (behaviour rules A1 to A6, H1, O1, R1).

What httpx calls its read timeout is of the request, not of each attempt: it bounds the wait for a response's head over
all attempts, and then each read of the body. Its connect timeout is for each instance that is tried, like the policy's,
and its write and pool timeouts are for each write, and for a place among the connections to an instance. The clock of a
response does not run while the application's body is waited for (A1).
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

import anyio
import httpcore
import httpx

from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import AttemptOutcome, Outcome, RequestKey
from meshlocal.library import http_errors as errors
from meshlocal.library.errors import Attempt, ServiceError, tried
from meshlocal.library.http_body import ReplayableBody
from meshlocal.library.http_pool import InstancePool, Record, as_httpx_errors
from meshlocal.library.http_pools import InstancePools
from meshlocal.library.unavailable import why_none
from meshlocal.policy.limits import Limit
from meshlocal.policy.model import Instance
from meshlocal.policy.picker import Pick, Plan, Reason
from meshlocal.policy.retry import IDEMPOTENT_METHODS, Decision, Failure, RetryBudget, decide

ANSWERED = "answered"
"""How an attempt is counted that brought a response."""

_ERRORS: dict[Failure, type[ServiceError]] = {
    Failure.CONNECT: errors.HttpConnectError,
    Failure.STALE: errors.HttpReadError,
    Failure.NO_RESPONSE: errors.HttpReadError,
    Failure.TIMEOUT: errors.HttpTimeoutError,
    Failure.BROKEN: errors.HttpBrokenError,
}


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


class Exchange:
    """One request until its response is closed.

    Args:
        pools: connections to instances.
        state: the service.
        budget: of retries after an answer, of the service.
        request: what to send.
    """

    def __init__(self, pools: InstancePools, state: ServiceState, budget: RetryBudget, request: httpx.Request) -> None:
        self._pools = pools
        self._state = state
        self._budget = budget
        self._request = request
        assert isinstance(request.stream, httpx.AsyncByteStream)
        self._body = ReplayableBody(request.stream, state.policy.replay_buffer)
        self._idempotent = request.method.encode() in IDEMPOTENT_METHODS or "idempotency-key" in request.headers
        given: Mapping[str, float | None] = request.extensions.get("timeout") or {}
        self._given = given
        self._read_left = _or_infinite(given.get("read"))
        self._clocks: list[tuple[anyio.CancelScope, float]] = []
        """Scopes whose time is the instances', and the seconds that they have for it."""
        self._body.on_wait = self._stop_clocks
        self._body.on_piece = self._restart_clocks
        self._attempts = 0
        self._failures: list[Attempt] = []
        self._pick: Pick | None = None
        self._ended = False

    async def run(self) -> httpx.Response:
        """Send it; returns once a response's head has come.

        Raises:
            ServiceError: no instance gave one.
        """
        state = self._state
        if not state.circuit.enter(Limit.REQUESTS):
            state.statistics.requests[RequestKey("", "", Outcome.LIMITED)] += 1
            limits = "as many requests as its limits allow are under way"
            raise errors.HttpLimitedError(f"{state.key}: {limits}", state.key)
        state.in_use += 1
        self._budget.request(anyio.current_time())
        response: httpx.Response | None = None
        outcome = Outcome.CLIENT_LEFT
        try:
            limit = state.policy.response_deadline
            with anyio.move_on_after(limit) as deadline:
                self._clocks.append((deadline, limit))
                response = await self._forward()
            if response is None and deadline.cancelled_caught:
                outcome = Outcome.DEADLINE
                raise self._late()
        except errors.HttpNoInstanceError:
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
                self._end(outcome)
                await self._body.aclose()
        assert response is not None
        return response

    def _stop_clocks(self) -> None:
        for scope, _ in self._clocks:
            scope.deadline = math.inf

    def _restart_clocks(self) -> None:
        now = anyio.current_time()
        for scope, limit in self._clocks:
            scope.deadline = now + limit

    def _end(self, outcome: Outcome) -> None:
        """Count it, once."""
        if not self._ended:
            self._ended = True
            state, pick = self._state, self._pick
            state.in_use -= 1
            state.circuit.leave(Limit.REQUESTS)
            tier = state.tiers[pick.tier] if pick is not None else ""
            reason = (pick.reason or "") if pick is not None else ""
            state.statistics.requests[RequestKey(tier, reason, outcome)] += 1

    async def _forward(self) -> httpx.Response:
        state = self._state
        if state.picker is None:
            state.statistics.connecting += 1
            try:
                with anyio.move_on_after(state.policy.first_snapshot_wait):
                    await state.first_snapshot.wait()
            finally:
                state.statistics.connecting -= 1
        plan = state.plan()
        pick = plan.next() if plan is not None else None
        if plan is None or pick is None:
            raise errors.HttpNoInstanceError(f"{state.key}: {why_none(state)}", state.key)
        while True:
            self._pick = pick
            self._attempts += 1
            tier = state.tiers[pick.tier]
            state.statistics.picks[tier, pick.reason or ""] += 1
            outcome: str = AttemptOutcome.ABANDONED
            try:
                response = await self._try_instance(pick)
                following = self._after_answer(response, plan)
                outcome = ANSWERED if following is None else Failure.STATUS
            except _FailedError as failed:
                outcome = failed.word
                following = self._after_failure(failed, pick, plan)
                response = None
            finally:
                state.statistics.attempts[tier, outcome] += 1
            if response is not None:
                if following is None:
                    assert isinstance(response.stream, _ResponseBody)
                    response.stream.final = True
                    return response
                cause = httpx.HTTPStatusError(
                    f"status {response.status_code}", request=self._request, response=response
                )
                self._failures.append(Attempt(pick.instance, tier, pick.reason, Failure.STATUS, cause))
                await response.aclose()
            assert following is not None
            pick = following

    def _after_answer(self, response: httpx.Response, plan: Plan) -> Pick | None:
        """The instance to try in place of an answer with a status of `retry_on` (A3); None if that is the answer."""
        picker = self._state.picker
        if (
            response.status_code not in self._state.policy.retry_on
            or self._decide(Failure.STATUS, sent=True) is not Decision.NEXT
            or not self._may_go_on()
            or picker is None
            or self._attempts >= len(picker)
            or not self._budget.retry(anyio.current_time())
        ):
            return None
        return plan.next()

    def _after_failure(self, failed: _FailedError, pick: Pick, plan: Plan) -> Pick:
        """The instance to try next.

        Raises:
            ServiceError: there is none, or the request may not be sent again.
        """
        state = self._state
        attempt = Attempt(pick.instance, state.tiers[pick.tier], pick.reason, failed.word, failed.cause)
        self._failures.append(attempt)
        following = None
        if self._decide(failed.failure, sent=failed.sent) is Decision.NEXT and self._may_go_on():
            following = plan.next()
        if following is None:
            error = _ERRORS[failed.failure]
            told = f"{state.key}: no instance answered: {tried(self._failures)}"
            raise error(told, state.key, self._failures) from failed.cause
        return following

    def _decide(self, failure: Failure, *, sent: bool) -> Decision:
        return decide(failure, sent=sent, idempotent=self._idempotent, held=self._body.held)

    def _may_go_on(self) -> bool:
        most = self._state.policy.max_attempts
        return (most is None or self._attempts < most) and self._read_left > 0

    def _late(self) -> ServiceError:
        state, pick = self._state, self._pick
        if pick is not None and len(self._failures) < self._attempts:
            tier = state.tiers[pick.tier]
            self._failures.append(Attempt(pick.instance, tier, pick.reason, AttemptOutcome.ABANDONED, None))
        told = f"{state.key}: no instance answered within {state.policy.response_deadline:g} s"
        if self._failures:
            told += f": {tried(self._failures)}"
        return errors.HttpDeadlineError(told, state.key, self._failures)

    # One attempt.

    async def _try_instance(self, pick: Pick) -> httpx.Response:
        """Send the request to one instance, a second time if its connection turns out to have ended (A4).

        Raises:
            _FailedError: it brought no response.
        """
        pool = self._pools.pool(pick.instance.key)
        fitness = self._state.fitness
        pool.in_use += 1
        fitness.begin(pick.instance)
        began = anyio.current_time()
        record = Record(self._state.circuit)
        try:
            while True:
                try:
                    return self._wrap(await self._send(pick, pool, record, began), pick, pool, record)
                except _FailedError as failed:
                    stale = failed.failure is Failure.STALE
                    if not stale or self._decide(failed.failure, sent=failed.sent) is not Decision.SAME:
                        raise
                # Its other unused connections have most likely ended too.
                await pool.close_idle()
                record = Record(self._state.circuit)
        except BaseException as error:
            if isinstance(error, _FailedError):
                fitness.judge(pick.instance, error.failure, error.word, began)
            else:
                fitness.abandoned(pick.instance)
            self._leave(pick, pool, record)
            raise

    async def _send(self, pick: Pick, pool: InstancePool, record: Record, began: float) -> httpcore.Response:
        policy, fitness = self._state.policy, self._state.fitness
        limit = policy.attempt_timeout if policy.attempt_timeout is not None else math.inf
        message, times = self._message(pick)
        failure: Exception
        with anyio.move_on_after(limit) as scope:
            self._clocks.append((scope, limit))
            try:
                response = await pool.send(message, record)
                # From here on it is about the body, of which each read has the whole time again.
                times["read"] = self._given.get("read")
                if record.fresh:
                    fitness.connected(pick.instance, began)
                fitness.worked(pick.instance, began)
                return response
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError):
                raise
            except httpx.TransportError as error:
                failure = error
                if self._body.failure is not None:
                    raise
            finally:
                self._clocks.pop()
                if record.asked is not None:
                    self._read_left -= anyio.current_time() - record.asked
        if scope.cancelled_caught:
            failure = TimeoutError(f"no response within {limit:g} s")
            kind = Failure.TIMEOUT if record.sent else Failure.CONNECT
            raise _FailedError(kind, "timeout", record.sent, failure)
        raise _classify(failure, record)

    def _message(self, pick: Pick) -> tuple[httpcore.Request, dict[str, float | None]]:
        """The request for one instance: its address, with the Host that the application gave; and its timeouts, which
        may be changed."""
        request, policy, key = self._request, self._state.policy, pick.instance.key
        connect = policy.connect_timeout if pick.tier else policy.connect_timeout_local
        times = dict(self._given)
        times["connect"] = min(connect, _or_infinite(self._given.get("connect")))
        if self._read_left != math.inf:
            times["read"] = self._read_left
        extensions = {**request.extensions, "timeout": times}
        if request.url.scheme == "https":
            extensions.setdefault("sni_hostname", request.url.host)
        url = httpcore.URL(
            scheme=request.url.raw_scheme, host=key.address.encode(), port=key.port, target=request.url.raw_path
        )
        message = httpcore.Request(
            request.method, url, headers=request.headers.raw, content=self._body, extensions=extensions
        )
        return message, times

    def _wrap(self, response: httpcore.Response, pick: Pick, pool: InstancePool, record: Record) -> httpx.Response:
        served = Served(pick.instance, self._state.tiers[pick.tier], pick.reason, self._attempts)
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=_ResponseBody(self, response, pick, pool, record),
            extensions={**response.extensions, "meshlocal": served},
        )

    def _leave(self, pick: Pick, pool: InstancePool, record: Record) -> None:
        """The instance is done with this request."""
        self._state.fitness.end(pick.instance)
        if record.stream is not None:
            record.stream.release()
        pool.in_use -= 1


def _or_infinite(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def _classify(error: Exception, record: Record) -> _FailedError:
    if record.connect_error or not (record.sent or isinstance(error, httpx.ReadError)):
        return _FailedError(Failure.CONNECT, record.connect_error or _word(error), False, error)
    if record.received:
        return _FailedError(Failure.BROKEN, Failure.BROKEN, record.sent, error)
    if isinstance(error, httpx.TimeoutException):
        return _FailedError(Failure.TIMEOUT, Failure.TIMEOUT, record.sent, error)
    kind = Failure.NO_RESPONSE if record.fresh else Failure.STALE
    return _FailedError(kind, kind, record.sent, error)


def _word(error: Exception) -> str:
    """How an attempt failed that was neither a connect's failure nor sent."""
    if isinstance(error, httpx.PoolTimeout):
        return "pool_timeout"
    return "tls" if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) else "other"


class _ResponseBody(httpx.AsyncByteStream):
    """A response's body.

    Attributes:
        final: the response is the application's, and its close the end of the exchange.
    """

    def __init__(
        self, exchange: Exchange, response: httpcore.Response, pick: Pick, pool: InstancePool, record: Record
    ) -> None:
        self._exchange = exchange
        self._response = response
        self._pick = pick
        self._pool = pool
        self._record = record
        self._outcome = Outcome.SERVED
        self._closed = False
        self.final = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with as_httpx_errors():
            try:
                async for piece in self._response.aiter_stream():
                    yield piece
            except Exception:
                self._outcome = Outcome.CUT
                raise

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            await self._response.aclose()
        finally:
            exchange = self._exchange
            exchange._leave(self._pick, self._pool, self._record)
            if self.final:
                exchange._end(self._outcome)
                await exchange._body.aclose()
            await exchange._pools.tidy(self._pool)
