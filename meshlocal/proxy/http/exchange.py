"""One request: pick, attempts, what follows from each failure, and the account (behaviour rules A1 to A8, O1, R1)."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import trio

from meshlocal.client.connecting import Connected, try_instance
from meshlocal.client.statistics import AttemptOutcome, Outcome, RequestKey
from meshlocal.policy.picker import Pick, Plan
from meshlocal.policy.retry import IDEMPOTENT_METHODS, Decision, Failure, decide
from meshlocal.proxy.http import answers
from meshlocal.proxy.http.answers import Answer
from meshlocal.proxy.http.attempt import Attempt
from meshlocal.proxy.http.ends import ClientLeftError, CutError, End
from meshlocal.proxy.http.pool import Upstream
from meshlocal.proxy.http.service import HttpService
from meshlocal.proxy.http.statistics import status_class
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.messages import RequestBody
from meshlocal.wire.http1.request import RequestHead
from meshlocal.wire.http1.rewrite import generated_answer, upstream_head

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
        deadline: when all attempts together must have brought a response's head.
        pick: the instance that answers, or was tried last.
        following: the instance to try next, if an attempt asked for it already.
        attempts: how many instances were tried.
        status: of the response; 0 while there is none.
        problem: what is wrong with the instance's response.
        end: what becomes of the client's connection after the response.
        outcome: how it is counted.
        received: bytes of the response's body.
    """

    __slots__ = (
        "_plan",
        "attempts",
        "body",
        "connection",
        "deadline",
        "end",
        "error",
        "following",
        "head",
        "idempotent",
        "outcome",
        "pick",
        "problem",
        "received",
        "service",
        "started",
        "status",
        "tier",
    )

    def __init__(self, connection: ClientConnection, head: RequestHead, started: float) -> None:
        self.connection = connection
        self.head = head
        self.started = started
        self.body: RequestBody | None = None
        self.service: HttpService | None = None
        self.deadline = 0.0
        self.pick: Pick | None = None
        self.following: Pick | None = None
        self.tier = ""
        self.attempts = 0
        self.status = 0
        self.error = ""
        self.problem: ProtocolError | None = None
        self.received = 0
        self.end = End.ABORT
        self.outcome = Outcome.DRAINED
        self.idempotent = head.method in IDEMPOTENT_METHODS or head.idempotency_key
        self._plan: Plan | None = None

    async def run(self) -> End:
        """Serve it; returns what becomes of the client's connection.

        Raises:
            ClientLeftError: the client reset its connection.
        """
        try:
            return await self._run()
        except ClientLeftError:
            self.outcome = Outcome.CUT if self.connection.begun else Outcome.CLIENT_LEFT
            raise
        except CutError:
            self.outcome = Outcome.CUT
            return End.ABORT
        except ProtocolError as error:
            self.outcome = Outcome.CLIENT_LEFT
            self.connection.forwarder.refused[error.reason] += 1
            return await self._answer(Answer.to(error))
        except Exception:
            self.outcome = Outcome.ERROR
            raise

    async def _run(self) -> End:
        connection, head = self.connection, self.head
        forwarder = connection.forwarder
        if head.method == b"CONNECT":
            # Imported here: few proxies are asked to.
            from meshlocal.proxy.http.tunnel import connect_tunnel

            return await connect_tunnel(self)
        service = forwarder.find(connection.service, head, self.started)
        if isinstance(service, Answer):
            return await self.refuse(service)
        self.service = service
        state = service.state
        policy = state.policy
        connection.idle_limit = policy.idle_timeout if policy.idle_timeout is not None else float("inf")
        state.in_use += 1
        try:
            if head.content_length or head.chunked:
                await self._begin_body(policy.replay_buffer)
            service.budget.request(self.started)
            self.deadline = (trio.current_time() if self.body is not None else self.started) + policy.response_deadline
            return await self._forward(service)
        finally:
            state.in_use -= 1

    # The body.

    async def _begin_body(self, hold: int) -> None:
        """Take what is there of the body; wait for all of it if it is short.

        A short one is sent when it is whole, so that no instance waits for a slow client, and it can be sent again.
        One that is long, or of unknown length, or that the client holds back until an instance asks for it, streams.
        """
        connection, head = self.connection, self.head
        head.upgrade = b""
        body = self.body = RequestBody(head, limit=connection.forwarder.settings.config.max_body, hold=hold)
        whole = head.content_length is not None and head.content_length <= hold and not head.expect_continue
        while not body.finished and (whole or 0 < len(connection.early) <= hold - body.size):
            await self.read_body()

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

    def payload(self) -> bytes:
        """The head for an instance, with what is there of the body."""
        connection, settings = self.connection, self.connection.forwarder.settings
        extra = settings.via
        if settings.append_forwarded:
            extra += connection.forwarded_lines(self.head)
        head = upstream_head(
            self.head,
            extra,
            host=self.service.state.key.encode() if self.service is not None else b"",
            strip_forwarded=settings.strip_forwarded,
        )
        body = self.body
        return head + b"".join(body.held) if body is not None and body.held else head

    # Attempts.

    async def _forward(self, service: HttpService) -> End:
        state = service.state
        if state.picker is None:
            await self._await_snapshot(service)
        plan = self._plan = state.plan()
        if plan is None:
            return await self.refuse(answers.NO_SNAPSHOT)
        pick = plan.next()
        if pick is None:
            unknown = state.picker is not None and state.picker.snapshot.unknown
            return await self.refuse(answers.UNKNOWN_SERVICE if unknown else answers.NO_INSTANCE)
        while True:
            self.pick = pick
            self.following = None
            self.attempts += 1
            self.tier = tier = state.tiers[pick.tier]
            state.statistics.picks[tier, pick.reason or ""] += 1
            outcome: str = AttemptOutcome.ABANDONED
            try:
                failure, sent = await self._attempt(service, pick)
                outcome = ANSWERED if failure is None else self._word(failure)
            finally:
                state.statistics.attempts[tier, outcome] += 1
            if failure is None:
                return self.end
            following = self._next(service, failure, sent)
            if following is None:
                return await self._answer_failure(failure)
            service.statistics.retries[failure] += 1
            pick = following
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

    async def _attempt(self, service: HttpService, pick: Pick) -> tuple[Failure | None, bool]:
        """Try one instance; returns how that failed, and whether some of the request may have reached it."""
        key = pick.instance.key
        place = (key.address, key.port)
        upstream = service.pool.take(place)
        while upstream is not None and not self.idempotent and not upstream.is_silent():
            upstream.close()
            upstream = service.pool.take(place)
        if upstream is not None:
            service.statistics.connections_reused += 1
            attempt = Attempt(self, service, upstream)
            failure = await attempt.run()
            if failure is not Failure.STALE or self._decide(failure, attempt.sent) is not Decision.SAME:
                return failure, attempt.sent
            service.statistics.retries[failure] += 1
        sock = await self._connect(service, pick)
        if sock is None:
            return Failure.CONNECT, False
        service.statistics.connections_made += 1
        attempt = Attempt(self, service, Upstream(sock, place))
        return await attempt.run(), attempt.sent

    async def _connect(self, service: HttpService, pick: Pick) -> socket.socket | None:
        connection, result = self.connection, Connected()
        with trio.CancelScope(deadline=self.deadline) as scope:
            self.error = await try_instance(connection, service.state, pick, result)
        if connection.left:
            raise ClientLeftError
        if scope.cancelled_caught:
            self.error = AttemptOutcome.TIMEOUT
        return result.upstream

    def _decide(self, failure: Failure, sent: bool) -> Decision:
        body = self.body
        held = body is None or body.held is not None
        return decide(failure, sent=sent, idempotent=self.idempotent, held=held)

    def _next(self, service: HttpService, failure: Failure, sent: bool) -> Pick | None:
        """The instance to try after a failure; None if there is to be no other attempt."""
        if self.following is not None:
            return self.following
        if self._decide(failure, sent) is not Decision.NEXT or not self._may_go_on(service):
            return None
        assert self._plan is not None
        return self._plan.next()

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
        self.outcome = Outcome.NO_INSTANCE
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
                extra=self.told(),
                close=close,
                announce_keep_alive=not close and head.minor == 0,
                without_body=head.method == b"HEAD",
            )
        )
        return End.LINGER if unread or (close and connection.early) else End.CLOSE if close else End.KEEP

    def told(self) -> bytes:
        """The field lines that tell how a response came about, if they are wanted (R1)."""
        if not self.connection.forwarder.settings.config.response_headers:
            return b""
        lines = [f"x-meshlocal-attempts: {self.attempts}\r\n"]
        if self.pick is not None:
            lines.append(f"x-meshlocal-instance: {self.pick.instance.key}\r\nx-meshlocal-tier: {self.tier}\r\n")
            if self.pick.reason is not None:
                lines.append(f"x-meshlocal-reason: {self.pick.reason}\r\n")
        return "".join(lines).encode()

    def account(self) -> None:
        """Count it, and log it if that is wanted. Called once, at its end."""
        now = trio.current_time()
        connection = self.connection
        if connection.expired and not connection.begun:
            self.status, self.outcome = answers.BODY_TIMEOUT.status, Outcome.CLIENT_LEFT
        elif connection.expired:
            self.outcome = Outcome.CUT
        pick, service = self.pick, self.service
        reason = (pick.reason or "") if pick is not None else ""
        if service is not None:
            counts = service.state.statistics
            counts.requests[RequestKey(self.tier, reason, self.outcome)] += 1
            counts.bytes_received += self.received
            if self.body is not None:
                counts.bytes_sent += self.body.size
            service.statistics.responses[self.tier, reason, status_class(self.status)] += 1
            service.statistics.observe(now - self.started)
        forwarder = connection.forwarder
        if self.outcome is Outcome.DRAINED:
            forwarder.drained += 1
        if forwarder.access_log:
            forwarder.log_access(self, now)
