"""One request: pick, attempts, and what follows from each failure (behaviour rules A1 to A8, H1, O1).

What needs no wait is in functions that are not async, so that a request whose instance answers at once can be served
without its connection's task (`meshlocal.proxy.http.lane`): `begin` and `first_attempt` there, `run` takes over at any
point.
"""

from __future__ import annotations

import math
import socket
from typing import TYPE_CHECKING

import trio

from meshlocal.client.connecting import Connected, try_instance
from meshlocal.client.statistics import AttemptOutcome, Outcome
from meshlocal.client.tried import attempt_text
from meshlocal.policy.limits import Limit
from meshlocal.policy.picker import Pick, Plan
from meshlocal.policy.retry import IDEMPOTENT_METHODS, Decision, Failure, decide
from meshlocal.proxy.http import answers
from meshlocal.proxy.http.account import account, told
from meshlocal.proxy.http.answers import Answer
from meshlocal.proxy.http.attempt import Attempt
from meshlocal.proxy.http.ends import ClientLeftError, CutError, End
from meshlocal.proxy.http.pool import Upstream
from meshlocal.proxy.http.service import HttpService
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.messages import RequestBody
from meshlocal.wire.http1.request import RequestHead
from meshlocal.wire.http1.rewrite import generated_answer

if TYPE_CHECKING:
    from meshlocal.proxy.http.connection import ClientConnection

ANSWERED = "answered"
"""How an attempt is counted that brought a response."""

_ANSWERS = {
    Failure.CONNECT: answers.FAILED,
    Failure.STALE: answers.NO_RESPONSE,
    Failure.NO_RESPONSE: answers.NO_RESPONSE,
    Failure.TIMEOUT: answers.ATTEMPT_TIMEOUT,
    Failure.BROKEN: answers.BROKEN,
    Failure.REFUSED: answers.NO_RESPONSE,
    Failure.STATUS: answers.FAILED,
}


class Exchange:
    """One request while it lives.

    Attributes:
        connection: the client's.
        head: of the request.
        body: of the request; None if it has none.
        service: what it is for; None until that is known.
        refusal: what to answer if there is none, or it takes no more requests.
        deadline: when all attempts together must have brought a response's head.
        pick: the instance that answers, or was tried last.
        tier: its tier's name.
        following: the instance to try next, if an attempt asked for it already.
        attempts: how many instances were tried.
        status: of the response; 0 while there is none.
        error: how the last attempt failed, or the request, in a word.
        failures: the attempts that failed, each as `attempt_text`; None: none did.
        problem: what is wrong with the instance's response.
        received: bytes of the response's body.
        end: what becomes of the client's connection after the response.
        outcome: how it is counted.
    """

    __slots__ = (
        "_plan",
        "attempts",
        "body",
        "connection",
        "deadline",
        "end",
        "error",
        "failures",
        "following",
        "head",
        "idempotent",
        "outcome",
        "pick",
        "problem",
        "received",
        "refusal",
        "service",
        "started",
        "status",
        "tier",
    )

    def __init__(
        self, connection: ClientConnection, head: RequestHead, started: float, body: RequestBody | None = None
    ) -> None:
        self.connection = connection
        self.head = head
        self.started = started
        self.body = body
        self.idempotent = head.method in IDEMPOTENT_METHODS or head.idempotency_key
        self.service: HttpService | None = None
        self.refusal: Answer | None = None
        self.deadline = math.inf
        self.pick: Pick | None = None
        self.following: Pick | None = None
        self.tier = ""
        self.attempts = 0
        self.status = 0
        self.error = ""
        self.failures: list[str] | None = None
        self.problem: ProtocolError | None = None
        self.received = 0
        self.end = End.ABORT
        self.outcome = Outcome.DRAINED
        self._plan: Plan | None = None

    # Without a wait.

    def begin(self) -> None:
        """Find its service, or set `refusal`. `finish` undoes what this counts."""
        connection = self.connection
        forwarder = connection.forwarder
        if self.head.method == b"CONNECT":
            service = forwarder.find_tunnel(connection.service, self.head, self.started)
        else:
            service = forwarder.find(connection.service, self.head, self.started)
        if isinstance(service, Answer):
            self.refusal = service
        else:
            self.begin_with(service)

    def begin_with(self, service: HttpService) -> bool:
        """Begin, for this service; False, and `refusal` is set, if it is full."""
        state = service.state
        if not state.circuit.enter(Limit.REQUESTS):
            self.refusal = answers.TOO_MANY_REQUESTS
            return False
        state.in_use += 1
        self.service = service
        self.deadline = self.started + state.policy.response_deadline
        service.budget.request(self.started)
        return True

    def resume(self, service: HttpService, plan: Plan | None, pick: Pick | None, tier: str) -> None:
        """Go on where a `Quick` was: all that it began with is counted already."""
        self.service = service
        self.deadline = self.started + service.state.policy.response_deadline
        self._plan = plan
        self.pick = pick
        if pick is not None:
            self.attempts = 1
            self.tier = tier

    def first_attempt(self) -> Attempt | None:
        """Begin with the first instance, on a connection that waits for a request; None if a task has to do it."""
        service = self.service
        assert service is not None
        plan = self._plan = service.state.plan()
        pick = plan.next() if plan is not None else None
        if pick is None:
            return None
        self._take(service, pick)
        # Who sends on it looks at it then, if it has to be sure.
        upstream = service.pool.take(pick.instance.key[:2], sure=False)
        if upstream is None:
            return None
        service.statistics.connections_reused += 1
        return Attempt(self, service, upstream)

    def answered(self) -> None:
        """The response of an attempt without a task went to the client."""
        assert self.service is not None
        self.service.state.statistics.attempts[self.tier, ANSWERED] += 1

    def abandon(self, attempt: Attempt | None, now: float) -> None:
        """The end of an attempt without a task that none goes on with, as `_forward` would have it."""
        if attempt is not None:
            attempt.release(now)
        if self.pick is not None:
            assert self.service is not None
            state = self.service.state
            outcome = ANSWERED if self.connection.begun else AttemptOutcome.ABANDONED
            state.statistics.attempts[self.tier, outcome] += 1
            state.fitness.abandoned(self.pick.instance)

    def finish(self, now: float) -> None:
        """Its end, however it came. Called once."""
        service = self.service
        if service is not None:
            service.state.in_use -= 1
            service.state.circuit.leave(Limit.REQUESTS)
        account(self, now)

    def _take(self, service: HttpService, pick: Pick) -> None:
        state = service.state
        self.pick = pick
        self.following = None
        self.attempts += 1
        assert self._plan is not None
        # The service may have other tiers since the plan began (S2).
        self.tier = tier = self._plan.tiers[pick.tier]
        state.statistics.picks[tier, pick.reason or ""] += 1

    def _reuse(self, service: HttpService, pick: Pick) -> Attempt | None:
        """An attempt on a connection that waits for a request."""
        upstream = service.pool.take(pick.instance.key[:2], sure=not self.idempotent)
        if upstream is None:
            return None
        service.statistics.connections_reused += 1
        return Attempt(self, service, upstream)

    def payload(self) -> bytes:
        """The head for an instance, with what is there of the body."""
        assert self.service is not None
        head = self.connection.request_head(self.head, self.service)
        body = self.body
        return head + b"".join(body.held) if body is not None and body.held else head

    # With waits.

    async def run(self, attempt: Attempt | None = None, raised: Exception | None = None) -> End:
        """Serve it to its end.

        Args:
            attempt: the one that is under way, if it began without a task.
            raised: what that met, if it can go no further.

        Returns:
            What becomes of the client's connection.

        Raises:
            ClientLeftError: the client reset its connection.
        """
        try:
            if raised is not None:
                self.abandon(attempt, trio.current_time())
                raise raised
            if self.service is None and self.refusal is None:
                self.begin()
            if self.refusal is not None:
                return await self.refuse(self.refusal)
            service = self.service
            assert service is not None
            if self.head.method == b"CONNECT":
                # Imported here: few proxies are asked to.
                from meshlocal.proxy.http.tunnel import connect_tunnel

                return await connect_tunnel(self, service)
            if self.body is None and self.head.has_body:
                await self._begin_body(service)
            return await self._forward(service, attempt)
        except ClientLeftError:
            self.outcome = Outcome.CUT if self.connection.begun else Outcome.CLIENT_LEFT
            raise
        except CutError:
            self.outcome = Outcome.CUT
            return End.ABORT
        except ProtocolError as error:
            self.outcome = Outcome.REFUSED
            self.connection.forwarder.refused[error.reason] += 1
            return await self._answer(Answer.to(error))
        except Exception:
            self.outcome = Outcome.ERROR
            raise
        except BaseException:
            # Cancelled, within a nursery as a group. What ran out of time is told apart by who accounts for it.
            self.outcome = Outcome.DRAINED
            raise

    async def _begin_body(self, service: HttpService) -> None:
        """Take what is there of the body; wait for all of it if it is short.

        A short one is sent when it is whole, so that no instance waits for a slow client, and it can be sent again.
        One that is long, or of unknown length, or that the client holds back until an instance asks for it, streams.
        """
        connection = self.connection
        # Nothing can be switched while a body is under way.
        head = self.head = self.head.without_upgrade()
        policy = service.state.policy
        hold = policy.replay_buffer
        limit = connection.forwarder.settings.config.max_body
        body = self.body = RequestBody(head, limit=limit, hold=hold)
        whole = head.content_length is not None and head.content_length <= hold and not head.expect_continue
        while not body.finished and (whole or 0 < len(connection.early) <= hold - body.size):
            await self.read_body()
        self.deadline = trio.current_time() + policy.response_deadline

    async def read_body(self) -> bytes:
        """The next piece of the body; may be empty.

        Raises:
            ProtocolError: it is malformed, too long, or ended early.
            ClientLeftError: the client reset its connection.
        """
        connection, body = self.connection, self.body
        assert body is not None
        if connection.early:
            data = bytes(connection.early)
            connection.early.clear()
        else:
            data = await connection.receive_body()
            if not data:
                raise ProtocolError(*answers.BODY_INCOMPLETE)
        piece, used = body.feed(data)
        if used < len(data):
            connection.early += data[used:]
        return piece

    async def _forward(self, service: HttpService, attempt: Attempt | None) -> End:
        state = service.state
        if self._plan is None:
            if state.picker is None:
                await self._await_snapshot(service)
            plan = self._plan = state.plan()
            if plan is None:
                return await self.refuse(answers.NO_SNAPSHOT)
            self.following = plan.next()
        while True:
            # An attempt that began without a task may have asked for the one after it already.
            if attempt is None and self.following is not None:
                self._take(service, self.following)
            pick = self.pick
            if pick is None:
                unknown = state.picker is not None and state.picker.snapshot.unknown
                return await self.refuse(answers.UNKNOWN_SERVICE if unknown else answers.NO_INSTANCE)
            outcome: str = AttemptOutcome.ABANDONED
            began = trio.current_time() if attempt is None else attempt.began
            try:
                failure, sent = await self._attempt(service, pick, attempt)
                outcome = ANSWERED if failure is None else self._word(failure)
            finally:
                state.statistics.attempts[self.tier, ANSWERED if self.connection.begun else outcome] += 1
                if outcome is AttemptOutcome.ABANDONED:
                    state.fitness.abandoned(pick.instance)
            if failure is None:
                return self.end
            if self.refusal is not None:
                return await self.refuse(self.refusal)
            if self.failures is None:
                self.failures = []
            self.failures.append(attempt_text(pick.instance.key, self.tier, outcome))
            if failure is not Failure.CONNECT:
                # What became of a connect was told already.
                state.fitness.judge(pick.instance, failure, failure, began)
            if not self._find_next(service, failure, sent):
                return await self._answer_failure(failure)
            service.statistics.retries[failure] += 1
            attempt = None
            # An instance that fails at once must not keep other tasks waiting, nor cancellation.
            await trio.lowlevel.checkpoint()

    def _word(self, failure: Failure) -> str:
        return self.error if failure is Failure.CONNECT else failure

    async def _await_snapshot(self, service: HttpService) -> None:
        """Wait for the service's first snapshot (A7)."""
        state, connection = service.state, self.connection
        state.statistics.connecting += 1
        try:
            with trio.move_on_after(min(state.policy.first_snapshot_wait, state.policy.response_deadline)):
                await connection.watched(state.first_snapshot.wait)
        finally:
            state.statistics.connecting -= 1
        if connection.left:
            raise ClientLeftError

    async def _attempt(self, service: HttpService, pick: Pick, attempt: Attempt | None) -> tuple[Failure | None, bool]:
        """Try one instance; returns how that failed, and whether some of the request may have reached it."""
        if attempt is None:
            attempt = self._reuse(service, pick)
        if attempt is not None:
            failure = await attempt.run()
            if failure is not Failure.STALE or self._decide(failure, attempt.sent) is not Decision.SAME:
                return failure, attempt.sent
            service.statistics.retries[failure] += 1
        sock = await self._connect(service, pick)
        if sock is None:
            return Failure.CONNECT, False
        key = pick.instance.key
        attempt = Attempt(self, service, Upstream(sock, (key.address, key.port)))
        return await attempt.run(), attempt.sent

    async def _connect(self, service: HttpService, pick: Pick) -> socket.socket | None:
        connection, result, state = self.connection, Connected(), service.state
        if not state.circuit.enter(Limit.WAITING):
            # That is so for every instance.
            self.refusal = answers.TOO_MANY_WAITING
            self.error = self.refusal.reason
            state.fitness.abandoned(pick.instance)
            return None
        state.statistics.connecting += 1
        try:
            with trio.CancelScope(deadline=self.deadline) as scope:
                self.error = await try_instance(connection, state, pick, result)
        finally:
            state.statistics.connecting -= 1
            state.circuit.leave(Limit.WAITING)
        if connection.left:
            raise ClientLeftError
        if result.upstream is not None:
            service.statistics.connections_made += 1
            state.fitness.connected(pick.instance, result.began)
        elif scope.cancelled_caught:
            self.error = AttemptOutcome.TIMEOUT
            state.fitness.abandoned(pick.instance)
        else:
            state.fitness.failed(pick.instance, self.error, began=result.began)
        return result.upstream

    # What follows from a failure.

    def _decide(self, failure: Failure, sent: bool) -> Decision:
        body = self.body
        held = body is None or body.held is not None
        return decide(failure, sent=sent, idempotent=self.idempotent, held=held)

    def _find_next(self, service: HttpService, failure: Failure, sent: bool) -> bool:
        """Find the instance to try after a failure; false if there is to be no other attempt."""
        if (
            self.following is None
            and self._decide(failure, sent) is Decision.NEXT
            and self._may_go_on(service)
            and self._plan is not None
        ):
            self.following = self._plan.next()
        return self.following is not None

    def _may_go_on(self, service: HttpService) -> bool:
        most = service.state.policy.max_attempts
        return (most is None or self.attempts < most) and trio.current_time() < self.deadline

    def retries_answer(self, service: HttpService, sent: bool) -> bool:
        """Whether to drop a response with a status of `retry_on`, and try the next instance, which is taken then."""
        picker = service.state.picker
        if (
            self._decide(Failure.STATUS, sent) is not Decision.NEXT
            or not self._may_go_on(service)
            or picker is None
            or self.attempts >= len(picker)
        ):
            return False
        if not service.budget.retry(trio.current_time()):
            service.statistics.retries_refused += 1
            return False
        assert self._plan is not None
        self.following = self._plan.next()
        return self.following is not None

    # Answers.

    async def _answer_failure(self, failure: Failure) -> End:
        if trio.current_time() >= self.deadline:
            return await self.fail(answers.DEADLINE, Outcome.DEADLINE)
        return await self.fail(_ANSWERS[failure], Outcome.FAILED)

    async def refuse(self, answer: Answer) -> End:
        """Answer a request that no instance is tried for."""
        self.outcome = Outcome.LIMITED if answer in answers.LIMITED else Outcome.NO_INSTANCE
        self.connection.forwarder.refused[answer.reason] += 1
        if self.service is not None:
            self.connection.forwarder.report_failure(self, answer)
        return await self._answer(answer)

    async def fail(self, answer: Answer, outcome: Outcome) -> End:
        """Answer a request that instances were tried for in vain (A6)."""
        self.outcome = outcome
        self.connection.forwarder.report_failure(self, answer)
        return await self._answer(answer)

    async def _answer(self, answer: Answer) -> End:
        connection, head = self.connection, self.head
        unread = head.has_body and (self.body is None or not self.body.finished)
        close = unread or not head.keep_alive or connection.forwarder.draining
        self.status = answer.status
        self.error = self.error or answer.reason
        connection.begun = True
        await connection.send(
            generated_answer(
                *answer,
                extra=told(self),
                close=close,
                announce_keep_alive=not close and head.minor == 0,
                without_body=head.method == b"HEAD",
            )
        )
        if not close:
            return End.KEEP
        # A client that did not ask for it may be sending its next request.
        return End.LINGER if unread or head.keep_alive or connection.has_input() else End.CLOSE
