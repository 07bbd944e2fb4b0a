"""One HTTP request: what is decided of it, and what is counted (behaviour rules A1 to A8, H1, R1).

Nothing here waits but for the request's own body. Who serves it, the lane in the relay loop or a task
(`meshlocal.proxy.http.serve`), calls the same functions in the same order.
"""

from __future__ import annotations

import trio

from meshlocal.client.latency import Exemplar
from meshlocal.client.statistics import Outcome
from meshlocal.policy.limits import Limit
from meshlocal.policy.retry import IDEMPOTENT_METHODS, Decision, Failure, decide
from meshlocal.proxy.http import answers
from meshlocal.proxy.http.answers import BODY_TIMEOUT, Answer
from meshlocal.proxy.http.ends import End, Expiry
from meshlocal.proxy.http.record import HttpRecord
from meshlocal.proxy.http.service import HttpService
from meshlocal.proxy.http.shared import HttpShared
from meshlocal.proxy.http.statistics import STATUS_NAMES
from meshlocal.proxy.http.streams import ClientStream
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.fields import NO_FIELDS, OwnFields
from meshlocal.wire.http1.messages import RequestBody
from meshlocal.wire.http1.request import NO_HEAD, RequestHead

# Looked up once: an attribute of an enum costs as much as a call, and every request passes here.
_REQUESTS, _DRAINED, _CUT, _ABORT = Limit.REQUESTS, Outcome.DRAINED, Outcome.CUT, End.ABORT


class HttpRequest(HttpRecord):
    """One request while it lives.

    Args:
        client: whose it is.
        head: of the request.
        started: when that was read, by trio.current_time().
        body: of the request, if all of it is there.

    Attributes:
        client: the client's end.
        shared: what all http listeners share.
        service: what it is for; None until that is known.
        refusal: what to answer if there is none, or it takes no more requests; None if it does.
        response_begun: some of a final response went to the client, or is about to.
        client_end: what becomes of the client's connection after the response.
    """

    __slots__ = ("client", "client_end", "refusal", "response_begun", "service", "shared")

    def __init__(
        self, client: ClientStream, head: RequestHead, started: float, body: RequestBody | None = None
    ) -> None:
        super().__init__(client.peer, head, started, body)
        self.client = client
        self.shared: HttpShared = client.shared
        if self.shared.marker.needed:
            self.mark = self.shared.marker.mark(head)
        self.service: HttpService | None = None
        self.refusal: Answer | None = None
        self.response_begun = False
        self.client_end = End.ABORT

    @property
    def identity(self) -> str:
        """See `HttpRecord.identity`."""
        return self.client.identity

    @property
    def scheme(self) -> str:
        """See `HttpRecord.scheme`."""
        return self.client.scheme

    def rest(self) -> None:
        """Let go of what an idle client must not hold: the request is over, and kept for its client's next one."""
        self.plan = self.pick = self.body = self.state = self.service = self.mark = None
        self.head = NO_HEAD

    def renew(self, head: RequestHead, started: float, body: RequestBody | None) -> None:
        """Become the next request of the same client. For one that the lane served whole, and that rests since: so what
        is set here is all that such a request changes, but for what `admit` sets."""
        self.head = head
        self.started = started
        self.body = body
        self.idempotent = head.method in IDEMPOTENT_METHODS or head.idempotency_key
        self.tier = ""
        self.attempts = 0
        self.status = 0
        self.received = 0
        self.grpc_status = -1
        self.outcome = _DRAINED
        self.response_begun = self._counted = self._released = False
        self.client_end = _ABORT
        # A request that rests has none.
        if self.shared.marker.needed:
            self.mark = self.shared.marker.mark(head)

    @property
    def idle_limit(self) -> float:
        """Seconds that its response, or a tunnel, may stand still (A1)."""
        limit = self.service.state.policy.idle_timeout if self.service is not None else None
        return float("inf") if limit is None else limit

    # Its service and its instances.

    def find_service(self) -> None:
        """Find what it is for and be admitted, or set `refusal`."""
        found = self.shared.find(self.client.service, self.head, self.started)
        if isinstance(found, Answer):
            self.refusal = found
        else:
            self.admit(found)

    def admit(self, service: HttpService) -> bool:
        """Begin, for this service; False, and `refusal` is set, if that is full."""
        self.service = service
        state = service.state
        timeout = self.head.timeout  # a call's own (C3)
        if self.begin(state, state.policy.response_deadline if timeout is None else timeout, _REQUESTS) is not None:
            self.refusal = answers.TOO_MANY_REQUESTS
            return False
        service.budget.request(self.started)
        return True

    def payload(self) -> bytes:
        """The head for an instance that speaks HTTP/1.1, with what is there of the body."""
        assert self.service is not None
        return self.client.payload(self.head, self.service.state.key, self.body, self.own_fields())

    def own_fields(self) -> OwnFields:
        """What the instance that is tried gets that others with this head do not."""
        mark = self.mark
        if mark is None:
            return NO_FIELDS
        return mark if mark.trace is None else mark.at(self.attempts)

    def identify(self) -> bytes:
        """What it is called, for who tells its client of a failure: an id is made if it has none."""
        if not self.raw_id:
            self.mark = self.shared.marker.identify(self.mark)
        return self.raw_id

    async def read_body(self) -> bytes:
        """The next piece of the body; see `ClientStream.read_body`."""
        assert self.body is not None
        return await self.client.read_body(self.body)

    # What follows from what an instance did.

    @property
    def _is_held(self) -> bool:
        return self.body is None or self.body.is_held

    def decide(self, failure: Failure, *, sent: bool) -> Decision:
        """What follows from a failure, as far as the request is concerned (A2 to A4)."""
        return decide(failure, sent=sent, idempotent=self.idempotent, held=self._is_held)

    def fail_attempt(self, failure: Failure, word: str, *, sent: bool) -> Decision:
        """The attempt failed; what follows.

        Args:
            failure: how.
            word: the same as the system has it.
            sent: some of the request may have reached the instance.
        """
        now = trio.current_time()
        return self.attempt_failed(failure, now, word, sent=sent, idempotent=self.idempotent, held=self._is_held)

    def may_drop(self, status: int) -> bool:
        """Whether an answer with this status is not simply passed on."""
        assert self.service is not None
        return status in self.service.state.policy.retry_on

    def drops_answer(self, status: int, *, sent: bool) -> bool:
        """Whether an answer with this status is dropped, and the next instance tried; the attempt is settled then."""
        service = self.service
        assert service is not None
        return self.may_drop(status) and self.drop_answer(
            trio.current_time(), service.budget, status, sent=sent, idempotent=self.idempotent, held=self._is_held
        )

    def drops_call(self, grpc_status: int) -> bool:
        """Whether a call's answer without a message is dropped for its status, and the next instance tried; the attempt
        is settled then. To list a status declares that such calls may be repeated (C3)."""
        service = self.service
        assert service is not None
        listed = service.state.policy.grpc_retry_on
        return (
            bool(listed)
            and STATUS_NAMES[grpc_status] in listed
            and self.drop_answer(
                trio.current_time(), service.budget, grpc_status, sent=True, idempotent=True, held=self._is_held
            )
        )

    def begin_response(self, status: int) -> None:
        """A final head goes to the client, so that all but its response's end is a cut from here on."""
        self.status = status
        self.outcome = _CUT
        self.response_begun = True

    def closes_client(self, unread: bool = False) -> bool:
        """Whether the client's connection ends with the response that begins now.

        Args:
            unread: some of the request's body may be left on it.
        """
        return unread or not self.head.keep_alive or self.shared.draining

    def close_client(self, *, unread: bool) -> None:
        """The response went out whole, and said that the client's connection ends: note how.

        Args:
            unread: some of the request's body may be left on it.
        """
        # A client that did not ask for it may be sending its next request.
        lingers = unread or self.head.keep_alive or self.client.has_input()
        self.client_end = End.LINGER if lingers else End.CLOSE

    def explanation(self) -> bytes:
        """The field lines that tell the client how a response came about, if they are wanted (R1)."""
        if not self.shared.settings.config.response_headers:
            return b""
        return b"".join(b"%b: %b\r\n" % field for field in self.explanation_fields())

    def explanation_fields(self) -> tuple[tuple[bytes, bytes], ...]:
        """The same, name by name."""
        if not self.shared.settings.config.response_headers:
            return ()
        fields = [("attempts", str(self.attempts))]
        pick = self.pick
        if pick is not None:
            fields += [("instance", str(pick.instance.key)), ("tier", self.tier)]
            if pick.reason is not None:
                fields.append(("reason", pick.reason))
        return tuple((b"x-meshlocal-" + name.encode(), value.encode("latin-1", "replace")) for name, value in fields)

    # Answers of the proxy's own: what they count as.

    def refuse(self, answer: Answer) -> None:
        """No instance is tried for it."""
        self.outcome = Outcome.LIMITED if answer in answers.LIMITED else Outcome.NO_INSTANCE
        self.shared.refused[answer.reason] += 1
        if self.service is not None:
            self.identify()
            self.shared.report_failure(self, answer)

    def reject(self, error: ProtocolError) -> Answer:
        """It is malformed, or too large; gives what to answer."""
        self.outcome = Outcome.REFUSED
        self.shared.refused[error.reason] += 1
        return Answer.to(error)

    def fail(self, answer: Answer, outcome: Outcome) -> None:
        """Instances were tried in vain (A6)."""
        self.outcome = outcome
        self.identify()
        self.shared.report_failure(self, answer)

    def why_none(self, unknown: Answer = answers.UNKNOWN_SERVICE) -> Answer:
        """What to answer where there is no instance to try (A6)."""
        picker = self.service.state.picker if self.service is not None else None
        if picker is None:
            return answers.NO_SNAPSHOT
        return unknown if picker.snapshot.unknown else answers.NO_INSTANCE

    # Its end.

    def finish(self, now: float) -> None:
        """End the request, however it came: count it, and tell the observers, once."""
        if self.client.expired:
            self._expire()
        if not self.end(self.outcome, now):
            return
        service = self.service
        if service is not None:
            counts, statistics = service.state.statistics, service.statistics
            counts.bytes_received += self.received
            if self.body is not None:
                counts.bytes_sent += self.body.size
            pick = self.pick
            reason = (pick.reason or "") if pick is not None else ""
            statistics.ended[self.tier, reason, self.status_class, self.head.protocol] += 1
            if self.grpc_status >= 0:
                statistics.calls[self.tier, reason, self.grpc_status] += 1
            self.took(now - self.started)
        if self.outcome is _DRAINED:
            self.shared.drained += 1
        trace = self.mark.trace if self.mark is not None else None
        if trace is not None and self.shared.traced is not None:
            self.shared.traced(self, now)
            if service is not None:
                seconds = now - self.started
                service.state.statistics.responses[self.tier].show(Exemplar(self.trace_id, seconds, now))
        for observer in self.shared.observers:
            observer.ended(self, now)

    def _expire(self) -> None:
        """Settle what a client whose time ran out gets, if anything, and what its request counts as."""
        if self.response_begun:
            self.outcome = Outcome.CUT
            return
        self.outcome = Outcome.CLIENT_LEFT
        if self.client.expiry is Expiry.BODY:
            self.status, self.error = BODY_TIMEOUT.status, BODY_TIMEOUT.reason
            self.shared.refused[BODY_TIMEOUT.reason] += 1
