"""The instance's end of one request, for a client that speaks HTTP/2: a stream on a shared connection."""

from __future__ import annotations

import math

import trio

from meshlocal.client.statistics import Outcome
from meshlocal.net.wakeup import Wakeup
from meshlocal.policy.retry import Failure
from meshlocal.proxy.http.ends import ClientLeftError, CutError, Expiry
from meshlocal.proxy.http.h2.client import H2Client
from meshlocal.proxy.http.links import UpstreamLink
from meshlocal.proxy.http.request import HttpRequest
from meshlocal.proxy.http.service import HttpService
from meshlocal.proxy.http.waiting import Reminder
from meshlocal.wire.grpc.metadata import format_timeout
from meshlocal.wire.http2 import ErrorCode, Headers
from meshlocal.wire.http2_heads import Http2RequestHead, grpc_status_of, status_of, with_timeout

_INF = math.inf


class H2Upstream:
    """One try of a request on a connection to an instance. It needs no task: see the package.

    Args:
        client: the client's end of the request.
        request: what is sent.
        service: what it is for.
        link: the connection.

    Attributes:
        id: the stream's number.
        started: the request was sent, or it was tried to.
        failure: how it failed; None if it did not.
        head_came: the final head did.
        moved: when something last happened on it, by trio.current_time().
        deadline: when the instance must have answered; with grpc-timeout, when the call is over.
    """

    __slots__ = (
        "_any_byte",
        "_cut",
        "_done",
        "_given",
        "_link",
        "_opened",
        "_queued",
        "_received",
        "_released",
        "_reminder",
        "_request_ended",
        "_wakeup",
        "client",
        "deadline",
        "failure",
        "head_came",
        "id",
        "moved",
        "request",
        "service",
        "started",
    )

    def __init__(
        self,
        client: H2Client,
        request: HttpRequest,
        service: HttpService,
        link: UpstreamLink,
    ) -> None:
        self.client = client
        self.request = request
        self.service = service
        self.id = 0
        self.started = False
        self.failure: Failure | None = None
        self.head_came = False
        self.moved = 0.0
        self.deadline = _INF
        self._link = link
        self._queued = 0
        self._received = 0
        self._given = 0
        self._opened = -1
        self._any_byte = False
        self._request_ended = False
        self._released = False
        self._done = False
        self._cut = False
        self._reminder: Reminder | None = None
        self._wakeup: Wakeup | None = None

    @property
    def sent(self) -> bool:
        """Whether some of the request may have reached the instance."""
        return 0 <= self._opened < self._link.writes

    # Sending.

    def start(self, now: float) -> None:
        """Send the request, as far as it is there. Sets `failure` if the connection takes none any more."""
        request, link = self.request, self._link
        head, body = request.head, self.client.body
        assert isinstance(head, Http2RequestHead)
        self.started = True
        self.client.upstream = self
        request.began = self.moved = now
        request.enter_instance()
        fields = self.client.fields(head, self.service.state.key, request.own_fields())
        if head.timeout is not None:
            fields = with_timeout(fields, format_timeout(max(request.deadline - now, 0.0)))
        end = body is None or (body.ended and not body.size and not body.trailers)
        # Before: outside of the loop's turn it is sent at once.
        self._opened = link.writes
        if not link.open(self, fields, end=end):
            self._opened = -1
            self._fail(Failure.STALE)
            return
        self._request_ended = end
        limit = self.service.state.policy.attempt_timeout
        # A quiet stream sends no head before its first message: without a grpc-timeout the call is not bounded (C3).
        self.deadline = request.deadline if head.timeout is not None or not head.grpc else _INF
        if limit is not None:
            self.deadline = min(self.deadline, now + limit)
        if body is not None and not end:
            pieces = body.held if body.held is not None else body.fresh
            piece = b"".join(pieces) if len(pieces) > 1 else pieces[0] if pieces else b""
            body.fresh = []
            body.taken = True
            body.finished = body.ended
            if piece or body.ended:
                self.send(piece, end=body.ended)
        request.shared.patience.add(self, now)

    def send(self, piece: bytes, *, end: bool) -> None:
        """See `InstanceEnd.send`."""
        link, body = self._link, self.client.body
        trailers = body.trailers if end and body is not None else ()
        self._queued += len(piece)
        if piece or not trailers:
            link.send(self, piece, end=end and not trailers)
        if trailers:
            link.end_with(self, trailers)
        self._request_ended = end
        self.moved = self.client.link.heard

    def accepted(self, left: int) -> None:
        """See `UpstreamStream.accepted`."""
        self.client.credit(self._queued - left)

    # What the instance says.

    def on_interim(self, fields: Headers) -> None:
        """See `UpstreamStream.on_interim`."""
        self.moved = self._link.heard
        self._any_byte = True
        self.client.inform(fields)

    def on_head(self, fields: Headers, *, end: bool) -> None:
        """See `UpstreamStream.on_head`."""
        request, client = self.request, self.client
        self.moved = self._link.heard
        status = status_of(fields)
        grpc = grpc_status_of(fields) if request.is_grpc and end else None
        if (grpc is not None and request.drops_call(grpc)) or request.drops_answer(status, sent=self.sent):
            self._fail(Failure.STATUS)
            return
        self.head_came = True
        request.shared.patience.waiting.pop(self, None)
        if self.deadline != _INF:
            self._rewind()
        request.answered()
        request.begin_response(status)
        # The response may last for hours.
        request.end_search()
        if grpc is not None:
            request.grpc_status = grpc
        settings = request.shared.settings
        extra = settings.via_fields
        if settings.config.response_headers:
            extra = (*extra, *request.explanation_fields())
        if end:
            self._complete()
        client.begin([*fields, *extra] if extra else fields, end=end)

    def on_data(self, data: bytes, *, end: bool) -> None:
        """See `UpstreamStream.on_data`."""
        self.moved = self._link.heard
        self._received += len(data)
        if end:
            self._complete()
        self.client.pass_on(data, end=end)

    def on_trailers(self, fields: Headers) -> None:
        """See `UpstreamStream.on_trailers`."""
        if self.request.is_grpc:
            self.request.grpc_status = grpc_status_of(fields)
        self._complete()
        self.client.end_with(fields)

    def on_reset(self, code: int) -> None:
        """See `UpstreamStream.on_reset`."""
        self._link.leave(self)
        if self.head_came:
            self.request.error = f"reset by the instance with {ErrorCode.name_of(code)}"
            self._break(code)
        elif self._any_byte:
            self._fail(Failure.BROKEN)
        elif code == ErrorCode.REFUSED_STREAM:
            self._fail(Failure.REFUSED)
        else:
            self._fail(Failure.RESET)

    def on_lost(self, failure: Failure) -> None:
        """See `UpstreamStream.on_lost`."""
        if self.head_came:
            self.request.error = self._link.problem or "the instance ended the connection"
            self._break(ErrorCode.CANCEL if self.request.is_grpc else ErrorCode.INTERNAL_ERROR)
        else:
            self._fail(Failure.BROKEN if self._any_byte else failure)

    # Credit.

    def credit(self, taken: int) -> None:
        """See `InstanceEnd.credit`: the client takes a response's body from its beginning on."""
        owed = taken - self._given
        if owed > 0:
            self._given = taken
            self.request.received += owed
            self._link.give(self.id, owed)

    def _refund(self) -> None:
        """Nobody takes the rest of what came: that is no reason for the instance to hold others' back."""
        owed, self._given = self._received - self._given, self._received
        if owed > 0:
            self._link.give(self.id, owed)

    # Ends.

    def _complete(self) -> None:
        """All of the response came. Said before the client is given its end: outside of the loop's turn it has that at
        once, and its stream is over then."""
        self.request.outcome = Outcome.SERVED
        self._finish(None if self._request_ended else ErrorCode.NO_ERROR)

    def _fail(self, failure: Failure) -> None:
        if not self._done:
            self.failure = failure
            self._finish(ErrorCode.CANCEL)

    def _break(self, code: int, outcome: Outcome = Outcome.CUT, leave: int | None = None) -> None:
        """The response broke off: so does the client's; `leave`: the instance's stream is reset with that."""
        if not self._done:
            self._cut = True
            self.request.outcome = outcome
            self.client.cut(code)
            self._finish(leave)
            self._refund()

    def _finish(self, code: int | None) -> None:
        self._done = True
        self.release(self._link.now(), code)
        if self._wakeup is not None:
            self._wakeup.set()
        elif self.failure is not None:
            # A task decides what follows.
            self.client.link.requests.resume(self.client, self.request, self)
        elif self._cut:
            self.client.over()

    def abandon(self) -> None:
        """See `InstanceEnd.abandon`: the client left, or was answered otherwise."""
        self._refund()
        if not self._done:
            self._done = True
            self.release(self._link.now(), ErrorCode.CANCEL)
            if self._wakeup is not None:
                self._wakeup.set()

    def release(self, now: float, code: int | None = ErrorCode.CANCEL) -> None:
        """Leave the stream. The first call counts."""
        if self._released:
            return
        self._released = True
        request = self.request
        request.shared.patience.waiting.pop(self, None)
        if self._reminder is not None:
            self._reminder.call_off()
            self._reminder = None
        request.leave_instance()
        if self.failure is not None:
            self.client.upstream = None
        self._link.leave(self, code)

    # Time.

    def on_slow(self) -> None:
        """See `Waiter.on_slow`."""
        if self.deadline != _INF and not self._done:
            self._reminder = self.request.shared.patience.ask(self.deadline, self)

    def on_deadline(self) -> None:
        """See `Waiter.on_deadline`."""
        self._reminder = None
        if self._done:
            return
        if not self.head_came:
            self._fail(Failure.TIMEOUT)
            return
        self.request.error = "deadline"
        self._break(ErrorCode.CANCEL, Outcome.DEADLINE, leave=ErrorCode.CANCEL)

    def _rewind(self) -> None:
        """The head came: only a call's own deadline goes on (C3)."""
        reminder, self._reminder = self._reminder, None
        if reminder is not None:
            reminder.call_off()
        request = self.request
        if request.head.timeout is not None:
            self.deadline = request.deadline
            self._reminder = request.shared.patience.ask(self.deadline, self)

    # With a task.

    async def drive(self) -> Failure | None:
        """Send the request, unless it was, and wait until its response is queued for the client.

        Returns:
            How it failed; None if the response is on its way to the client.

        Raises:
            ClientLeftError: the client reset its stream.
            CutError: the response broke off.
        """
        self._wakeup = self.client.link.wakeup()
        try:
            if not self.started and self.failure is None:
                self.start(trio.current_time())
            self.client.expiry = Expiry.TRANSFER
            while not self._done:
                await self._wakeup.wait()
        finally:
            self._done = True
            self.release(trio.current_time())
        if self.client.left:
            raise ClientLeftError
        if self._cut:
            raise CutError
        return self.failure
