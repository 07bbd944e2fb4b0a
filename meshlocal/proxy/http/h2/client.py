"""A client's connection in HTTP/2, and the client's end of each of its requests."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import ClassVar, Protocol

import trio

from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import Outcome
from meshlocal.net.pipe import Pipe
from meshlocal.net.relay_loop import RelayLoop
from meshlocal.net.relay_state import RelayCounters
from meshlocal.net.wakeup import Wakeup
from meshlocal.policy.model import ServiceKey
from meshlocal.policy.rates import TokenBucket
from meshlocal.proxy.http import answers
from meshlocal.proxy.http.answers import Answer
from meshlocal.proxy.http.ends import ClientLeftError, End, Expiry
from meshlocal.proxy.http.h2.body import Http2Body
from meshlocal.proxy.http.link import STOPPED, Link
from meshlocal.proxy.http.request import HttpRequest
from meshlocal.proxy.http.shared import HttpShared
from meshlocal.proxy.http.streams import ServedRequest
from meshlocal.wire.grpc.metadata import encode_grpc_message, is_grpc
from meshlocal.wire.grpc.status import StatusCode
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.fields import CLIENT_CERT, NO_FIELDS, OwnFields
from meshlocal.wire.http1.messages import RequestBody, ResponseFlow
from meshlocal.wire.http1.request import RequestHead
from meshlocal.wire.http1.response import ResponseHead
from meshlocal.wire.http1.rewrite import upstream_head
from meshlocal.wire.http2 import (
    MAX_STREAM_ID,
    DataReceived,
    ErrorCode,
    GoAwayReceived,
    Headers,
    Http2Error,
    Http2Limits,
    Http2Protocol,
    PingAcknowledged,
    PingReceived,
    RequestReceived,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
)
from meshlocal.wire.http2_heads import (
    Http2RequestHead,
    onward_request,
    request_to_http1,
    request_trailers,
    response_from_http1,
    trailers_from_http1,
    trailers_to_http1,
    with_own,
)

WAITING = 65_536
"""Bytes of a response that may wait for the client, from which on its task reads no more of it."""

RETURNED = "returned"
"""Why a stream ended whose client is to come back to the local tier (F2)."""

SPARE = 8
"""Streams that rest with their connection, at most."""

DRAIN_WAIT = 1.0
"""Seconds that a client has, when a drain begins, to show that it knows: what it sent before is served."""

_DRAIN = b"mldrain."
_CUT, _LEFT = Outcome.CUT, Outcome.CLIENT_LEFT
_INF = math.inf
_ANY = (2**32, 2**32)
"""What a client resets is counted here, where it is known what it costs."""


class InstanceEnd(Protocol):
    """The instance's end of a request, when both speak HTTP/2.

    Attributes:
        started: the request was sent.
        moved: when something last happened on it, by trio.current_time().
    """

    started: bool
    moved: float

    def send(self, piece: bytes, *, end: bool) -> None:
        """Send a piece of the request's body, which may be empty; `end`: it is the last, and trailers may follow."""
        ...

    def credit(self, taken: int) -> None:
        """The client took so many bytes of the response's body, from its beginning on."""
        ...

    def abandon(self) -> None:
        """Leave it: nobody wants the response any more."""
        ...


class H2Client:
    """The client's end of one request: the `ClientStream` of a stream.

    Attributes:
        link: its connection.
        id: the stream's number.
        request: what it asked for.
        body: of the request; None if it has none.
        upstream: the instance's end, while one is being tried in the same version of HTTP.
        answered: this side of the stream ended.
        queued: bytes of the response's body that were queued.
        served: its request needs no more than that the client takes the rest.
    """

    __slots__ = (
        "_final",
        "_half_closed",
        "_leaving",
        "_reading",
        "_scope",
        "_stopped",
        "_writing",
        "answered",
        "body",
        "counters",
        "deadline",
        "early",
        "expired",
        "expiry",
        "id",
        "left",
        "link",
        "queued",
        "request",
        "served",
        "upstream",
    )

    http2 = True

    def __init__(self, link: H2ClientLink, stream_id: int) -> None:
        self.link = link
        self.id = stream_id
        self.request: HttpRequest | None = None
        self.body: Http2Body | None = None
        self.upstream: InstanceEnd | None = None
        self.counters: RelayCounters | None = None
        self.left = False
        self.early = _NOTHING
        self.expiry = Expiry.TRANSFER
        self.expired = False
        self.deadline = _INF
        self.answered = False
        self.queued = 0
        self.served = False
        self._stopped = False
        self._half_closed = False
        self._final: Outcome | None = None
        self._reading: Wakeup | None = None
        self._writing: Wakeup | None = None
        self._leaving: trio.CancelScope | None = None
        self._scope: trio.CancelScope | None = None
        """Of its task; None while it has none."""

    @property
    def shared(self) -> HttpShared:
        """See `ClientStream`."""
        return self.link.shared

    @property
    def service(self) -> ServiceKey | None:
        """See `ClientStream`."""
        return self.link.service

    @property
    def peer(self) -> object:
        """See `ClientStream`."""
        return self.link.peer

    @property
    def identity(self) -> str:
        """See `ClientStream`."""
        return self.link.pipe.identity

    @property
    def scheme(self) -> str:
        """See `ClientStream`."""
        return self.link.scheme

    @property
    def pipe(self) -> Pipe:
        """A stream has none of its own."""
        raise NotImplementedError

    @property
    def is_live(self) -> bool:
        """Whether something can still come of it."""
        return self.link.streams.get(self.id) is self

    @property
    def _is_tunnel(self) -> bool:
        """Whether its two halves end each by itself."""
        return self.request is not None and self.request.head.method == b"CONNECT"

    @property
    def _is_going_out(self) -> bool:
        """Whether some of the response has yet to go out."""
        return self.served and self.is_live and not self._half_closed

    # What the connection calls.

    def data(self, piece: bytes, *, end: bool) -> None:
        """A piece of the request's body came; `end`: the last one."""
        body = self.body
        if body is None or (self.answered and not self._is_tunnel):
            self.link.give(self.id, len(piece))
            return
        try:
            body.put(piece)
        except ProtocolError as error:
            self._refuse_body(error)
            return
        body.ended = end
        upstream = self.upstream
        if upstream is not None:
            body.taken = True
            body.finished = end
            upstream.send(piece, end=end)
            return
        body.fresh.append(piece)
        self._wake()

    def trailers(self, fields: tuple[tuple[bytes, bytes], ...]) -> None:
        """The request's body ended, with trailers."""
        body = self.body
        if body is not None:
            body.ended = True
            body.trailers = fields
            if self.upstream is not None:
                body.finished = True
                self.upstream.send(b"", end=True)
            else:
                self._wake()

    def _refuse_body(self, error: ProtocolError) -> None:
        request = self.request
        if request is None:
            return
        if not request.response_begun:
            self.conclude_with(request.reject(error))
            return
        request.error = error.reason
        self._drop_upstream()
        self.cut(ErrorCode.CANCEL)
        self.over()

    def conclude_with(self, answer: Answer) -> None:
        """Answer, whatever is under way for the request, and end it."""
        request = self.request
        if request is None or self.answered:
            return
        self._drop_upstream()
        self.answer_now(request, answer)
        self.over()

    def reset(self, *, stopped: bool = False) -> None:
        """The client reset the stream (A8); `stopped`: or the proxy ends."""
        self.left = True
        self._stopped = stopped
        request = self.request
        if request is not None and (not self.served or self in self.link.owing):
            request.outcome = Outcome.DRAINED if stopped else _CUT if request.response_begun else _LEFT
        self.link.owing.pop(self, None)
        self._drop_upstream()
        self.over()

    def _drop_upstream(self) -> None:
        upstream, self.upstream = self.upstream, None
        if upstream is not None:
            upstream.abandon()

    def over(self) -> None:
        """Nothing more comes of the stream: end its task, if it has one, or its request."""
        self.link.streams.pop(self.id, None)
        if self.body is not None:
            self.credit(self.body.size)
        if self.left and self._leaving is not None:
            # Not at once: Trio may be about to sleep, and would not look again before it does.
            trio.lowlevel.current_trio_token().run_sync_soon(self._leaving.cancel)
        elif self._scope is not None:
            trio.lowlevel.current_trio_token().run_sync_soon(self._scope.cancel)
        elif self.request is not None:
            self.request.finish(self.link.now())
        self._wake()
        self.link.on_stream_over()

    def accepted(self, left: int) -> None:
        """All but `left` bytes of the response went out to the client."""
        upstream = self.upstream
        if upstream is not None:
            upstream.credit(self.queued - left)
        if left:
            return
        if self.served:
            self._conclude()
        else:
            self._wake()

    def _conclude(self) -> None:
        """The response went out whole: a client that is still sending need not go on (RFC 9113, 8.1)."""
        request, link, body = self.request, self.link, self.body
        if request is not None and self._is_tunnel:
            # The other half may go on: its task ends it.
            self._half_closed = True
            self._final = request.outcome
            self._wake()
            return
        if body is not None and not body.ended:
            self.credit(body.size)
            link.protocol.reset(self.id, ErrorCode.NO_ERROR)
            link.touch()
        link.streams.pop(self.id, None)
        if request is not None:
            self._final = request.outcome
            if self._scope is None:
                upstream = self.upstream
                if upstream is None:
                    request.finish(link.now())
                else:
                    request.finish(upstream.moved)
                    self._rest(request)
            else:
                self._wake()
        if not link.streams:
            link.on_stream_over()

    def _rest(self, request: HttpRequest) -> None:
        """The request was served whole, without a task: to begin the next one anew costs more than to go on as that."""
        if not self.expired and len(self.link.spare) < SPARE:
            self.upstream = self.body = None
            request.rest()
            self.link.spare.append(self)

    def renew(self, stream_id: int, head: Http2RequestHead, now: float) -> HttpRequest:
        """Become another stream, of the same client; for one that rests."""
        request = self.request
        assert request is not None
        self.id = stream_id
        self.answered = self.served = False
        self.queued = 0
        self._final = None
        request.renew(head, now, None)
        return request

    def _wake(self) -> None:
        if self._reading is not None:
            self._reading.set()
        if self._writing is not None:
            self._writing.set()

    async def _wait_input(self) -> None:
        """Wait for more of the request's body. For one task.

        Raises:
            ClientLeftError: the client reset the stream.
        """
        if self._reading is None:
            self._reading = self.link.wakeup()
        await self._reading.wait()
        if self.left:
            raise ClientLeftError

    async def _wait_output(self) -> None:
        """Wait for some of the response to go out. For one task.

        Raises:
            ClientLeftError: the client reset the stream.
        """
        if self._writing is None:
            self._writing = self.link.wakeup()
        await self._writing.wait()
        if self.left:
            raise ClientLeftError

    # What its request's task calls; see `ClientStream`.

    async def watched(self, wait: Callable[[], Awaitable[object]]) -> None:
        """See `ClientStream.watched`."""
        try:
            with trio.CancelScope() as self._leaving:
                await wait()
        finally:
            self._leaving = None

    async def watch(self, waiting: trio.CancelScope) -> None:
        """See `ClientStream.watch`."""
        try:
            while not self.left:
                await self._wait_input()
        except ClientLeftError:
            pass
        waiting.cancel()

    def await_transfer(self) -> None:
        """See `ClientStream.await_transfer`."""
        self.expiry = Expiry.TRANSFER
        limit = self.request.idle_limit if self.request is not None else _INF
        self.deadline = trio.current_time() + limit

    async def read_body(self, body: RequestBody) -> bytes:
        """See `ClientStream.read_body`: the next piece as HTTP/1.1 has it, to the last chunk."""
        assert isinstance(body, Http2Body)
        if not (body.fresh or body.ended):
            self.expiry = Expiry.BODY
            self.deadline = trio.current_time() + self.shared.settings.config.body_timeout
        piece = await self.next_piece(body)
        self.deadline = _INF
        return self._framed(body, piece)

    async def next_piece(self, body: Http2Body) -> bytes:
        """Wait for a piece of the request's body; empty only at its end.

        Raises:
            ClientLeftError: the client reset the stream.
        """
        while not (body.fresh or body.ended):
            await self._wait_input()
        return self._take(body, body.fresh)

    def _take(self, body: Http2Body, pieces: list[bytes]) -> bytes:
        """All that is there, for an instance."""
        taken = b"".join(pieces)
        body.fresh = []
        body.taken = True
        body.finished = body.ended
        self.credit(body.size)
        return taken

    def _framed(self, body: Http2Body, piece: bytes) -> bytes:
        """A piece of the body in the framing of the request's HTTP/1.1 head."""
        if self.request is None or self.request.head.content_length is not None:
            return piece
        framed = b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b""
        return framed + trailers_to_http1(body.trailers) if body.finished else framed

    def credit(self, taken: int) -> None:
        """So much of the request's body, from its beginning on, was taken by an instance, or let go."""
        body = self.body
        if body is not None and taken > body.given:
            self.link.give(self.id, taken - body.given)
            body.given = taken

    def has_input(self) -> bool:
        """See `ClientStream.has_input`."""
        return False

    def payload(self, head: RequestHead, service: ServiceKey, body: RequestBody | None, own: OwnFields) -> bytes:
        """See `ClientStream.payload`."""
        assert isinstance(head, Http2RequestHead)
        settings = self.shared.settings
        as_http1 = settings.heads.request(request_to_http1(head) if head.has_host else _with_host(head, service))
        extra = settings.via
        if settings.append_forwarded:
            extra += b"".join(b"%b: %b\r\n" % field for field in self.link.forwarded(head))
        if told := self.link.pipe.told:
            extra += b"%b: %b\r\n" % (CLIENT_CERT, told)
        raw = upstream_head(as_http1, extra, strip_forwarded=settings.strip_forwarded, own=own)
        if not isinstance(body, Http2Body) or body.held is None:
            return raw
        return raw + self._framed(body, self._take(body, body.held))

    def fields(self, head: Http2RequestHead, service: ServiceKey, own: OwnFields) -> Headers:
        """The request's fields for an instance that speaks HTTP/2; `own` is what it alone gets."""
        fields = self._fields(head, service)
        return fields if own is NO_FIELDS else with_own(fields, head, own)

    def _fields(self, head: Http2RequestHead, service: ServiceKey) -> Headers:
        settings = self.link.shared.settings
        told = self.link.pipe.told
        if settings.plain and head.has_host and not head.hop_fields and not told:
            return head.fields
        extra = settings.via_fields
        if told:
            extra = (*extra, (CLIENT_CERT, told))
        if settings.append_forwarded:
            extra = (*extra, *self.link.forwarded(head))
        return onward_request(head, extra, authority=service.encode(), strip_forwarded=settings.strip_forwarded)

    def interim(self, head: ResponseHead) -> bytes:
        """See `ClientStream.interim`."""
        self.inform(response_from_http1(head, has_body=False))
        return b""

    def begin_response(
        self, request: ServedRequest, head: ResponseHead, flow: ResponseFlow, extra: bytes, *, unread: bool
    ) -> tuple[bytes, bool]:
        """See `ClientStream.begin_response`."""
        rest = flow.begin_decoded(head)
        has_body = request.head.method != b"HEAD"
        self.begin(response_from_http1(head, has_body=has_body, extra=extra), end=False)
        return rest, False

    async def send(self, data: bytes) -> None:
        """See `ClientStream.send`: a piece of a response's body, decoded."""
        if self.left:
            raise ClientLeftError
        self.pass_on(data, end=False)
        while self.link.protocol.waiting(self.id) > WAITING:
            self.await_transfer()
            await self._wait_output()
        self.deadline = _INF

    def end_response(self, flow: ResponseFlow) -> None:
        """See `ClientStream.end_response`."""
        trailers = trailers_from_http1(flow.trailers)
        if trailers:
            self.end_with(trailers)
        else:
            self.pass_on(b"", end=True)

    async def run(self, serve: Callable[[], Awaitable[End]]) -> None:
        """Be served by a task, until all of the response went out, or the client has left, or its time is over."""
        request = self.request
        assert request is not None
        try:
            with trio.CancelScope() as self._scope:
                if self.is_live:
                    end = await serve()
                    if end is End.ABORT:
                        self.cut(ErrorCode.INTERNAL_ERROR)
                    while self._is_going_out:
                        self.await_transfer()
                        await self._wait_output()
        except ClientLeftError:
            pass
        finally:
            self._scope = None
            if self._final is not None:
                # Whatever became of the task: the client has all of it.
                request.outcome = self._final
            elif self.left and request.outcome is Outcome.DRAINED and not self._stopped:
                request.outcome = _CUT if request.response_begun else _LEFT
            request.finish(trio.current_time())
            if not self.answered:
                self.cut(ErrorCode.INTERNAL_ERROR)
            if self.link.streams.pop(self.id, None) is not None:
                self.link.on_stream_over()

    async def answer(self, request: ServedRequest, answer: Answer) -> bool:
        """See `ClientStream.answer`."""
        if self.left:
            raise ClientLeftError
        self.answer_now(request, answer)
        return False

    def answer_now(self, request: ServedRequest, answer: Answer) -> None:
        """Queue an answer of the proxy's own: in gRPC, of trailers only (C3)."""
        head = request.head
        text, named = answer.of(request.identify())
        told = (named, *request.explanation_fields())
        if request.is_grpc:
            request.grpc_status = answers.grpc_status(answer)
            fields: Headers = [*_trailers_only(answer, text), *told]
            request.status = 200
            body = b""
        else:
            fields, whole = _plain(answer, text)
            fields = [*fields, *told]
            request.status = answer.status
            body = b"" if head.method == b"HEAD" else whole
        request.error = answer.reason
        request.response_begun = True
        self.begin(fields, end=not body)
        if body:
            self.pass_on(body, end=True)

    def refuse(self, answer: Answer, asked: Headers) -> None:
        """Answer to what is no request; `asked`: its fields."""
        named = dict(asked)
        self.deadline = self.link.now() + self.shared.settings.config.body_timeout
        if is_grpc(named.get(b"content-type") or b""):
            self.begin(_trailers_only(answer, answer.text), end=True)
            return
        fields, text = _plain(answer, answer.text)
        without_body = named.get(b":method") == b"HEAD"
        self.begin(fields, end=without_body)
        if not without_body:
            self.pass_on(text, end=True)

    # What goes to the client. It is queued; the connection sends it at the end of the turn.

    def inform(self, fields: Headers) -> None:
        """An interim response."""
        try:
            self.link.protocol.send_informational(self.id, fields)
        except Http2Error:
            return  # the stream is gone, and whoever sends is told
        self.link.touch()

    def begin(self, fields: Headers, *, end: bool) -> None:
        """The response's head."""
        link = self.link
        try:
            link.protocol.send_response(self.id, fields, end_stream=end)
        except Http2Error:
            return
        if end:
            self._ended()
        link.touch()

    def pass_on(self, data: bytes, *, end: bool) -> None:
        """A piece of the response's body."""
        link = self.link
        try:
            link.protocol.send_data(self.id, data, end_stream=end)
        except Http2Error:
            return
        self.queued += len(data)
        if end:
            self._ended()
        else:
            link.owing[self] = None
        link.touch()

    def end_with(self, trailers: Headers) -> None:
        """The response's trailers, which end it."""
        try:
            self.link.protocol.send_trailers(self.id, trailers)
        except Http2Error:
            return
        self._ended()
        self.link.touch()

    def _ended(self) -> None:
        """This side of the stream ended, behind what is queued."""
        self.answered = self.served = True
        self.link.owing[self] = None

    def cut(self, code: int) -> None:
        """The response broke off: so does the stream."""
        if not self.answered:
            self.answered = True
            self.link.protocol.reset(self.id, code)
            self.link.touch()

    # Its return (F2): see `meshlocal.proxy.returning.Lasting`.

    def away_since(self, service: ServiceState) -> float | None:
        """Since when it was silent on another tier; None if it is not there, or not of the service, or ends already."""
        request, upstream = self.request, self.upstream
        if request is None or upstream is None or self.answered or not request.response_begun:
            return None
        pick = request.pick
        if pick is None or not pick.tier or request.service is None or request.service.state is not service:
            return None
        return upstream.moved

    def send_home(self) -> None:
        """End it, so that its client calls again: in gRPC with UNAVAILABLE, for its clients do so then."""
        request = self.request
        if request is None:
            return
        self._drop_upstream()
        request.outcome = self._final = Outcome.RETURNED
        request.error = RETURNED
        if request.is_grpc:
            request.grpc_status = StatusCode.UNAVAILABLE
            said = b"meshlocal: the call returns to its own node"
            self.end_with([(b"grpc-status", b"%d" % StatusCode.UNAVAILABLE), (b"grpc-message", said)])
        else:
            if self in self.link.owing:
                # What is queued goes nowhere, and keeps its place among the client's streams.
                self.answered = False
                del self.link.owing[self]
            self.cut(ErrorCode.CANCEL)
        self.over()

    # Time.

    def look(self, now: float) -> None:
        """End it if it stood still for too long."""
        request = self.request
        upstream = self.upstream
        deadline = self.deadline
        if request is not None and upstream is not None and upstream.started:
            limit = request.idle_limit
            waits = self.body is not None and not self.body.ended
            if waits and not request.response_begun and not request.is_grpc:
                limit = min(limit, self.shared.settings.config.body_timeout)
                self.expiry = Expiry.BODY
            else:
                self.expiry = Expiry.TRANSFER
            deadline = upstream.moved + limit
        if deadline <= now:
            self.expire()

    def expire(self) -> None:
        """What it waits for did not come in time."""
        request = self.request
        self.expired = True
        self._drop_upstream()
        if self.expiry is Expiry.BODY and request is not None and not request.response_begun:
            # Settled first: what it counts as depends on what it was told before.
            request.finish(self.link.now())
            self.answer_now(request, answers.BODY_TIMEOUT)
        else:
            self.cut(ErrorCode.CANCEL)
        self.over()


def _plain(answer: Answer, line: str) -> tuple[Headers, bytes]:
    """An answer of the proxy's own where it is not gRPC: its fields, and its body (A6)."""
    text = f"meshlocal: {line}\n".encode()
    fields = [
        (b":status", b"%d" % answer.status),
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", b"%d" % len(text)),
        (b"x-meshlocal-error", answer.reason.encode()),
    ]
    return fields, text


def _trailers_only(answer: Answer, line: str) -> Headers:
    """An answer of the proxy's own in gRPC (C3)."""
    return [
        (b":status", b"200"),
        (b"content-type", b"application/grpc"),
        (b"grpc-status", b"%d" % answers.grpc_status(answer)),
        (b"grpc-message", encode_grpc_message(f"meshlocal: {line}")),
        (b"x-meshlocal-error", answer.reason.encode()),
    ]


_NOTHING = bytearray()
"""What came of a stream's body is in its request's body."""


def _with_host(head: Http2RequestHead, service: ServiceKey) -> bytes:
    raw = request_to_http1(head)
    return raw.replace(b"\r\nhost: \r\n", b"\r\nhost: " + service.encode() + b"\r\n", 1)


class Requests(Protocol):
    """Who serves the requests of HTTP/2 clients."""

    def begin(self, stream: H2Client, request: HttpRequest) -> None:
        """Serve a request, at once or in a task. May not wait."""
        ...

    def resume(self, stream: H2Client, request: HttpRequest, upstream: InstanceEnd) -> None:
        """Go on in a task with a request, whose attempt without one failed. May not wait."""
        ...


class H2ClientLink(Link):
    """One client's connection in HTTP/2.

    Args:
        pipe: its bytes.
        shared: what all http listeners share.
        service: what all its requests are for; None if each one says its own.
        peer: the client's address.
        loop: the relay's loop; None if there is none.
        requests: serves them.

    Attributes:
        streams: those that live, by number.
        spare: those that rest, and become others.
        requests: as given.
    """

    __slots__ = (
        "_controls",
        "_drain_ends",
        "_fixed",
        "_forwarded",
        "_idle_since",
        "_max_streams",
        "_resets",
        "peer",
        "requests",
        "service",
        "shared",
        "spare",
        "streams",
    )

    def __init__(
        self,
        pipe: Pipe,
        shared: HttpShared,
        service: ServiceKey | None,
        peer: object,
        loop: RelayLoop | None,
        requests: Requests,
    ) -> None:
        config = shared.settings.config
        http2 = config.http2
        limits = Http2Limits(
            max_streams=http2.max_streams,
            max_header_list_size=config.max_head,
            window=http2.window,
            continuations=http2.continuations,
            resets=_ANY,
        )
        super().__init__(pipe, Http2Protocol(client=False, limits=limits), loop, http2.window)
        self.shared = shared
        self.service = service
        self.peer = peer
        self.streams: dict[int, H2Client] = {}
        self._max_streams = http2.max_streams
        self.spare: list[H2Client] = []
        self.requests = requests
        self._drain_ends = _INF
        self._fixed = False
        self._idle_since = self.heard
        self._resets = TokenBucket(http2.resets_per_second, http2.resets, self.heard)
        self._controls = TokenBucket(http2.control_frames_per_second, http2.control_frames, self.heard)
        self._forwarded: tuple[tuple[bytes, bytes], ...] = ()

    def now(self) -> float:
        """By trio.current_time()."""
        return self._time()

    def wakeup(self) -> Wakeup:
        """For a task of a stream's."""
        return Wakeup(self._wakes)

    @property
    def scheme(self) -> str:
        """See `ClientStream`."""
        return "http" if self.pipe.plain is not None else "https"

    def forwarded(self, head: RequestHead) -> tuple[tuple[bytes, bytes], ...]:
        """The X-Forwarded-For and -Proto fields to append to a request."""
        if not self._forwarded:
            host = self.peer[0] if isinstance(self.peer, tuple) else "unknown"
            self._forwarded = ((b"x-forwarded-for", host.encode()), (b"x-forwarded-proto", self.scheme.encode()))
        if isinstance(head, Http2RequestHead) and any(name == b"x-forwarded-proto" for name, _ in head.fields):
            return self._forwarded[:1]
        return self._forwarded

    # What came.

    def _on_data(self, event: DataReceived) -> None:
        data = event.data
        if not data and not event.end_stream:
            self._count_control("empty DATA")
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            stream.data(data, end=event.end_stream)
        else:
            self.give(event.stream_id, len(data))

    def _on_closed(self, event: StreamClosed) -> None:
        if event.error_code:
            # The engine's own doing: what came on it broke the rules.
            stream = self.streams.get(event.stream_id)
            if stream is not None:
                stream.reset()

    def _on_trailers(self, event: TrailersReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            stream.trailers(request_trailers(event.headers))

    def _on_ping_acknowledged(self, event: PingAcknowledged) -> None:
        if event.opaque_data == _DRAIN:
            self._fix_last_stream()

    def _on_goaway(self, event: GoAwayReceived) -> None:
        """It opens no more streams; those that it has go on (RFC 9113, 6.8)."""
        self._fixed = True
        self.on_stream_over()

    def _on_request(self, event: RequestReceived) -> None:
        stream_id = event.stream_id
        try:
            head = self.shared.settings.calls.request(event.headers, ends=event.end_stream)
        except ProtocolError as error:
            stream = self.streams[stream_id] = H2Client(self, stream_id)
            self.shared.refuse(self.peer, Answer.to(error))
            stream.refuse(Answer.to(error), event.headers)
            return
        if len(self.streams) >= self._max_streams:
            # The engine counts those as over whose response waits here.
            self.protocol.reset(stream_id, ErrorCode.REFUSED_STREAM)
            self.touch()
            return
        if self.spare:
            stream = self.spare.pop()
            request = stream.renew(stream_id, head, self.heard)
        else:
            stream = H2Client(self, stream_id)
            request = stream.request = HttpRequest(stream, head, self.heard)
        self.streams[stream_id] = stream
        self.requests.begin(stream, request)

    def _on_reset(self, event: StreamReset) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            stream.reset()
        if not self._resets.take(self.now()):
            self._calm("too many streams were reset")

    def _count_control(self, what: str) -> None:
        if not self._controls.take(self.now()):
            self._calm(f"too many frames of {what}")

    def _calm(self, problem: str) -> None:
        """The client asks for more than it may: it costs the others their time (CVE-2023-44487 and its kin)."""
        self.shared.refused["http2_flood"] += 1
        self.finish(problem, ErrorCode.ENHANCE_YOUR_CALM, self.protocol.highest_inbound_stream_id)

    handlers: ClassVar = {
        RequestReceived: _on_request,
        DataReceived: _on_data,
        TrailersReceived: _on_trailers,
        StreamReset: _on_reset,
        StreamClosed: _on_closed,
        PingReceived: lambda self, _: self._count_control("PING"),
        SettingsReceived: lambda self, _: self._count_control("SETTINGS"),
        PingAcknowledged: _on_ping_acknowledged,
        GoAwayReceived: _on_goaway,
    }

    batch: ClassVar = 128

    # Its end.

    @property
    def is_idle(self) -> bool:
        """Whether it has no streams, and what came opens none."""
        return not self.streams and not self.late

    def on_caught_up(self) -> None:
        """See `Link.on_caught_up`."""
        self.on_stream_over()

    def on_stream_over(self) -> None:
        """A stream ended."""
        if self.is_idle:
            self._idle_since = self.now()
            if self._fixed and not self.over:
                self.finish(last_stream_id=self.protocol.highest_inbound_stream_id)

    def on_over(self) -> None:
        """See `Link.on_over`."""
        stopped = self.problem == STOPPED
        # A client that leaves without a word between two requests has done no harm.
        if self.problem and not stopped and (self.streams or not self.lost):
            self.shared.report_broken(self.peer, self.problem)
        for stream in list(self.streams.values()):
            stream.reset(stopped=stopped)
        self.spare.clear()

    def drain(self) -> None:
        """Announce the end; the PING's answer shows that the client knows, and then the last stream is fixed (S1)."""
        if self._drain_ends == _INF and not self.over:
            self._drain_ends = self.now() + DRAIN_WAIT
            self.protocol.send_goaway(MAX_STREAM_ID, debug_data=b"draining")
            self.protocol.ping(_DRAIN)
            self.touch()

    def _fix_last_stream(self) -> None:
        if self._fixed:
            return
        self._fixed = True
        if self.is_idle:
            self.on_stream_over()
        else:
            self.protocol.send_goaway(self.protocol.highest_inbound_stream_id, debug_data=b"draining")
            self.touch()

    # Time.

    def shed(self, oldest: float) -> bool:
        """End it if it has had no streams since then: its descriptor is wanted. Tells whether it did."""
        if self.over or not self.is_idle or self._idle_since > oldest:
            return False
        self.finish(last_stream_id=self.protocol.highest_inbound_stream_id)
        return True

    def look(self, now: float) -> None:
        """End what stood still for too long."""
        config = self.shared.settings.config
        if self.over:
            return
        if self._drain_ends <= now:
            self._fix_last_stream()
        if self.is_idle:
            limit = config.keep_alive_timeout if self.protocol.highest_inbound_stream_id else config.header_timeout
            if self._idle_since + limit <= now:
                self.finish(last_stream_id=self.protocol.highest_inbound_stream_id)
            return
        for stream in list(self.streams.values()):
            stream.look(now)
        self.keep_alive(now, config.http2.keepalive_interval, config.http2.keepalive_timeout)
