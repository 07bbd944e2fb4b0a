"""Serves one HTTP request to its end, as a task (behaviour rules A1 to A8).

What is decided stands in `meshlocal.proxy.http.request` and `meshlocal.policy.search`; here it is waited. The lane in
the relay loop serves plain requests without any of this, and hands over at whatever point it cannot go on.
"""

from __future__ import annotations

from typing import NamedTuple

import trio

from meshlocal.client.connecting import connect, dial
from meshlocal.client.statistics import AttemptOutcome, Outcome
from meshlocal.policy.model import HostPort
from meshlocal.policy.picker import Pick
from meshlocal.policy.protocols import speaks_http2
from meshlocal.policy.retry import Decision, Failure
from meshlocal.policy.search import Why
from meshlocal.proxy.http import answers
from meshlocal.proxy.http.answers import Answer
from meshlocal.proxy.http.ends import ClientLeftError, CutError, End
from meshlocal.proxy.http.h1.pump import drive
from meshlocal.proxy.http.h1.tunnel import run_tunnel
from meshlocal.proxy.http.h1.upstream import H1Upstream
from meshlocal.proxy.http.h2.as_http1 import SharedUpstream
from meshlocal.proxy.http.h2.client import H2Client
from meshlocal.proxy.http.h2.tunnel import run_stream_tunnel
from meshlocal.proxy.http.h2.upstream import H2Upstream
from meshlocal.proxy.http.links import UpstreamLink
from meshlocal.proxy.http.pool import Upstream
from meshlocal.proxy.http.request import HttpRequest
from meshlocal.proxy.http.service import HttpService
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.messages import RequestBody

_ANSWERS = {
    Failure.CONNECT: answers.FAILED,
    Failure.STALE: answers.NO_RESPONSE,
    Failure.NO_RESPONSE: answers.NO_RESPONSE,
    Failure.TIMEOUT: answers.ATTEMPT_TIMEOUT,
    Failure.BROKEN: answers.BROKEN,
    Failure.REFUSED: answers.REFUSED,
    Failure.RESET: answers.RESET,
    Failure.STATUS: answers.FAILED,
}


class _Failed(NamedTuple):
    """How an attempt failed.

    Attributes:
        failure: how.
        word: the same as the system has it.
        sent: some of the request may have reached the instance.
    """

    failure: Failure
    word: str
    sent: bool


async def serve(
    request: HttpRequest, upstream: H1Upstream | H2Upstream | None = None, raised: Exception | None = None
) -> End:
    """Serve a request to its end; its `finish` is the caller's.

    Args:
        request: what the client asked for.
        upstream: the attempt that is under way, if it began without a task.
        raised: what that met, if it can go no further.

    Returns:
        What becomes of the client's connection.

    Raises:
        ClientLeftError: the client reset its connection, or its stream.
    """
    try:
        if raised is not None:
            if upstream is not None:
                upstream.release(trio.current_time())
            raise raised
        if request.service is None and request.refusal is None:
            request.find_service()
        service = request.service
        if request.refusal is not None or service is None:
            return await _refuse(request, request.refusal or answers.UNKNOWN_HOST)
        if request.head.method == b"CONNECT":
            return await _serve_connect(request, service)
        if request.body is None and request.head.has_body:
            await _begin_body(request, service)
        return await _forward(request, service, upstream)
    except ClientLeftError:
        request.outcome = Outcome.CUT if request.response_begun else Outcome.CLIENT_LEFT
        raise
    except CutError:
        if request.outcome is not Outcome.DEADLINE:
            request.outcome = Outcome.CUT
        return End.ABORT
    except ProtocolError as error:
        return await _answer(request, request.reject(error))
    except Exception:
        request.outcome = Outcome.ERROR
        raise
    except BaseException:
        # Cancelled, within a nursery as a group. What ran out of time is told apart by `finish`.
        request.outcome = Outcome.DRAINED
        raise


async def _begin_body(request: HttpRequest, service: HttpService) -> None:
    """Take what is there of the body; wait for all of it if it is short.

    A short one is sent when it is whole, so that no instance waits for a slow client, and it can be sent again. One
    that is long, or of unknown length, or that the client holds back until an instance asks for it, streams.
    """
    # Nothing can be switched while a body is under way.
    head = request.head = request.head.without_upgrade()
    policy = service.state.policy
    hold = policy.replay_buffer
    body = request.body = RequestBody(head, limit=request.shared.settings.config.max_body, hold=hold)
    whole = head.content_length is not None and head.content_length <= hold and not head.expect_continue
    while not body.finished and (whole or 0 < len(request.client.early) <= hold - body.size):
        await request.read_body()
    request.deadline = trio.current_time() + policy.response_deadline


async def _forward(request: HttpRequest, service: HttpService, upstream: H1Upstream | H2Upstream | None) -> End:
    state = service.state
    if request.pick is None and state.picker is None:
        await _await_snapshot(request, service)
    while True:
        # An attempt may have begun without a task.
        if upstream is None and not request.trying and request.try_next(trio.current_time()) is None:
            if request.head.timeout is not None and request.why(trio.current_time()) is Why.DEADLINE:
                return await _fail(request, answers.DEADLINE, Outcome.DEADLINE)
            return await _refuse(request, request.why_none())
        failed = await _attempt(request, service, upstream)
        upstream = None
        if request.refusal is not None:
            return await _refuse(request, request.refusal)
        if failed is None:
            return request.client_end
        if failed.failure is not Failure.STATUS:
            decision = request.fail_attempt(failed.failure, failed.word, sent=failed.sent)
            if decision is not Decision.NEXT:
                return await _answer_failure(request, failed.failure)
        service.statistics.retries[failed.failure] += 1
        # An instance that fails at once must not keep other tasks waiting, nor cancellation.
        await trio.lowlevel.checkpoint()


async def _await_snapshot(request: HttpRequest, service: HttpService) -> None:
    """Wait for the service's first snapshot (A7)."""
    state, client = service.state, request.client
    request.start_waiting(limited=False)
    with trio.move_on_at(min(trio.current_time() + state.policy.first_snapshot_wait, request.deadline)):
        await client.watched(state.first_snapshot.wait)
    request.stop_waiting()
    if client.left:
        raise ClientLeftError


async def _attempt(
    request: HttpRequest, service: HttpService, upstream: H1Upstream | H2Upstream | None
) -> _Failed | None:
    """Try one instance; `upstream` is an attempt that is under way. None: its response went to the client, or there
    is a refusal."""
    pick = request.pick
    assert pick is not None
    if upstream is None:
        upstream = begin_on_kept(request, service, pick)
    if upstream is not None:
        failure = await _drive(upstream)
        if failure is None:
            return None
        if failure is not Failure.STALE or request.decide(failure, sent=upstream.sent) is not Decision.SAME:
            return _Failed(failure, failure, upstream.sent)
        service.statistics.retries[failure] += 1
    connected = await _connect(request, service, pick)
    if connected is None or isinstance(connected, _Failed):
        return connected
    failure = await _drive(connected)
    return None if failure is None else _Failed(failure, failure, connected.sent)


async def _drive(upstream: H1Upstream | H2Upstream) -> Failure | None:
    return await (drive(upstream) if isinstance(upstream, H1Upstream) else upstream.drive())


def begin_on_kept(request: HttpRequest, service: HttpService, pick: Pick) -> H1Upstream | H2Upstream | None:
    """An attempt on a connection to the instance that is there already; None if there is none.

    Args:
        request: what is tried.
        service: what it is for.
        pick: the instance.
    """
    if not in_http2(request, service, pick):
        kept = service.reuse(pick, sure=not request.idempotent)
        return H1Upstream(request, service, kept) if kept is not None else None
    link = service.links.take(pick.instance.key[:2])
    if link is None:
        return None
    service.statistics.connections_reused += 1
    return _on_link(request, service, link)


def in_http2(request: HttpRequest, service: HttpService, pick: Pick) -> bool:
    """Whether the instance is spoken to in HTTP/2."""
    if request.head.upgrade:
        # There is none in HTTP/2.
        return False
    return speaks_http2(pick.instance, service.state.protocol, client=request.client.http2)


def _on_link(request: HttpRequest, service: HttpService, link: UpstreamLink) -> H1Upstream | H2Upstream:
    client = request.client
    if isinstance(client, H2Client):
        return H2Upstream(client, request, service, link)
    return H1Upstream(request, service, SharedUpstream(link, client.shared.settings.heads))


async def _connect(request: HttpRequest, service: HttpService, pick: Pick) -> H1Upstream | H2Upstream | _Failed | None:
    """An attempt on a new connection to the instance, or how that failed; None, and a refusal: as many wait as may."""
    client = request.client
    if client.left:
        # Nothing is connected that nobody would close.
        raise ClientLeftError
    if not request.start_waiting():
        # That is so for every instance.
        request.refusal = answers.TOO_MANY_WAITING
        request.abandoned(answers.TOO_MANY_WAITING.reason)
        return None
    request.began = trio.current_time()
    made: H1Upstream | H2Upstream | _Failed | None = None
    try:
        with trio.CancelScope(deadline=request.deadline) as scope:
            if in_http2(request, service, pick):
                made = await _connect_shared(request, service, pick)
            else:
                made = await _dial(request, service, pick)
    finally:
        request.stop_waiting()
    if client.left:
        if isinstance(made, H1Upstream | H2Upstream):
            made.release(trio.current_time())
        raise ClientLeftError
    if scope.cancelled_caught:
        return _Failed(Failure.TIMEOUT, AttemptOutcome.TIMEOUT, sent=False)
    return made


async def _dial(request: HttpRequest, service: HttpService, pick: Pick) -> H1Upstream | _Failed | None:
    security, path = service.state.security, service.path(pick)
    dialled = await dial(request.client, service.state, pick, security, "http/1.1")
    if dialled.upstream is None:
        return None if request.client.left else _Failed(Failure.CONNECT, dialled.error, sent=False)
    service.statistics.connections_made += 1
    request.reached(trio.current_time(), by_socket=dialled.by_socket)
    return H1Upstream(request, service, Upstream(dialled.upstream, pick.instance.key[:2], security, path))


async def _connect_shared(
    request: HttpRequest, service: HttpService, pick: Pick
) -> H1Upstream | H2Upstream | _Failed | None:
    """As `_dial`, for a connection that others use as well: of those who want one, one makes it, and the others wait.

    How that failed is the failure of those who waited, too: to ask again, one after the other, would take each one's
    time anew.
    """
    links, client, place = service.links, request.client, pick.instance.key[:2]
    while not _has_left(request):
        link = links.take(place)
        if link is not None:
            return _on_link(request, service, link)
        if not links.may_connect(place, service.config.http2.connections):
            error = await _wait_for_others(request, service, place)
            if error:
                return _Failed(Failure.CONNECT, error, sent=False)
            continue
        error = AttemptOutcome.ABANDONED
        links.begin_connect(place)
        try:
            security, path = service.state.security, service.path(pick)
            dialled = await dial(client, service.state, pick, security, "h2")
            error = dialled.error
            if dialled.upstream is None:
                return None if _has_left(request) else _Failed(Failure.CONNECT, error, sent=False)
            service.statistics.connections_made += 1
            request.reached(trio.current_time(), by_socket=dialled.by_socket)
            return _on_link(request, service, links.adopt(dialled.upstream, place, service.config, security, path))
        finally:
            # One that was given up says nothing: another one tries.
            links.end_connect(place, "" if error == AttemptOutcome.ABANDONED else error)
    return None


def _has_left(request: HttpRequest) -> bool:
    return request.client.left


async def _wait_for_others(request: HttpRequest, service: HttpService, place: HostPort) -> str:
    """Wait for a stream that is free, or a connection that another makes; gives how that failed, empty if it worked."""
    error = ""

    async def wait() -> None:
        nonlocal error
        error = await service.links.wait_changed(place)

    await request.client.watched(wait)
    return error


# CONNECT


async def _serve_connect(request: HttpRequest, service: HttpService) -> End:
    """Serve a CONNECT: a tcp request by the same rules, to a service that this proxy knows."""
    if not request.start_waiting():
        return await _refuse(request, answers.TOO_MANY_WAITING)
    request.deadline = trio.current_time() + service.state.policy.deadline
    try:
        found = await connect(request.client, request)
    finally:
        request.stop_waiting()
    if isinstance(found, Outcome):
        return await _answer_no_tunnel(request, service, found)
    request.begin_response(200)
    request.end_search()
    whole = False
    request.enter_instance()
    try:
        client = request.client
        if isinstance(client, H2Client):
            whole = await run_stream_tunnel(client, request, service.state, found)
        else:
            opened = b"HTTP/1.1 200 Connection established\r\n" + request.explanation() + b"\r\n"
            whole = await run_tunnel(request, service.state, found, opened)
    finally:
        request.leave_instance()
        if whole:
            found.close()
        else:
            found.abort()
    return request.client_end


async def _answer_no_tunnel(request: HttpRequest, service: HttpService, outcome: Outcome) -> End:
    if outcome is Outcome.CLIENT_LEFT:
        raise ClientLeftError
    if outcome is Outcome.NO_INSTANCE:
        return await _refuse(request, request.why_none(answers.CONNECT_FORBIDDEN))
    return await _fail(request, answers.DEADLINE if outcome is Outcome.DEADLINE else answers.FAILED, outcome)


# Answers


async def _answer_failure(request: HttpRequest, failure: Failure) -> End:
    if request.why(trio.current_time()) is Why.DEADLINE:
        return await _fail(request, answers.DEADLINE, Outcome.DEADLINE)
    return await _fail(request, _ANSWERS[failure], Outcome.FAILED)


async def _refuse(request: HttpRequest, answer: Answer) -> End:
    """Answer a request that no instance is tried for."""
    request.refuse(answer)
    return await _answer(request, answer)


async def _fail(request: HttpRequest, answer: Answer, outcome: Outcome) -> End:
    """Answer a request that instances were tried for in vain (A6)."""
    request.fail(answer, outcome)
    return await _answer(request, answer)


async def _answer(request: HttpRequest, answer: Answer) -> End:
    """Send an answer of the proxy's own; tells what becomes of the client's connection."""
    head = request.head
    unread = head.has_body and (request.body is None or not request.body.finished)
    if not await request.client.answer(request, answer):
        return End.KEEP
    request.close_client(unread=unread)
    return request.client_end
