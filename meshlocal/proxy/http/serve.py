"""Serves one HTTP request to its end, as a task (behaviour rules A1 to A8).

What is decided stands in `meshlocal.proxy.http.request` and `meshlocal.policy.search`; here it is waited. The lane in
the relay loop serves plain requests without any of this, and hands over at whatever point it cannot go on.
"""

from __future__ import annotations

from typing import NamedTuple

import trio

from meshlocal.client.connecting import connect, dial
from meshlocal.client.statistics import AttemptOutcome, Outcome
from meshlocal.net.sockets import abort, close
from meshlocal.policy.picker import Pick
from meshlocal.policy.retry import Decision, Failure
from meshlocal.policy.search import Why
from meshlocal.proxy.http import answers
from meshlocal.proxy.http.answers import Answer
from meshlocal.proxy.http.ends import ClientLeftError, CutError, End
from meshlocal.proxy.http.h1.pump import drive
from meshlocal.proxy.http.h1.tunnel import run_tunnel
from meshlocal.proxy.http.h1.upstream import H1Upstream
from meshlocal.proxy.http.pool import Upstream
from meshlocal.proxy.http.request import HttpRequest
from meshlocal.proxy.http.service import HttpService
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.messages import RequestBody
from meshlocal.wire.http1.rewrite import generated_answer

_ANSWERS = {
    Failure.CONNECT: answers.FAILED,
    Failure.STALE: answers.NO_RESPONSE,
    Failure.NO_RESPONSE: answers.NO_RESPONSE,
    Failure.TIMEOUT: answers.ATTEMPT_TIMEOUT,
    Failure.BROKEN: answers.BROKEN,
    Failure.REFUSED: answers.NO_RESPONSE,
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


async def serve(request: HttpRequest, upstream: H1Upstream | None = None, raised: Exception | None = None) -> End:
    """Serve a request to its end; its `finish` is the caller's.

    Args:
        request: what the client asked for.
        upstream: the attempt that is under way, if it began without a task.
        raised: what that met, if it can go no further.

    Returns:
        What becomes of the client's connection.

    Raises:
        ClientLeftError: the client reset its connection.
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
        request.outcome = Outcome.CUT
        return End.ABORT
    except ProtocolError as error:
        request.outcome = Outcome.REFUSED
        request.shared.refused[error.reason] += 1
        return await _answer(request, Answer.to(error))
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


async def _forward(request: HttpRequest, service: HttpService, upstream: H1Upstream | None) -> End:
    state = service.state
    if request.pick is None and state.picker is None:
        await _await_snapshot(request, service)
    while True:
        # An attempt may have begun without a task.
        if upstream is None and not request.trying and request.try_next(trio.current_time()) is None:
            return await _refuse(request, _why_none(service))
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
    with trio.move_on_after(min(state.policy.first_snapshot_wait, state.policy.response_deadline)):
        await client.watched(state.first_snapshot.wait)
    request.stop_waiting()
    if client.left:
        raise ClientLeftError


def _why_none(service: HttpService, unknown: Answer = answers.UNKNOWN_SERVICE) -> Answer:
    """What to answer where there is no instance to try (A6)."""
    picker = service.state.picker
    if picker is None:
        return answers.NO_SNAPSHOT
    return unknown if picker.snapshot.unknown else answers.NO_INSTANCE


async def _attempt(request: HttpRequest, service: HttpService, upstream: H1Upstream | None) -> _Failed | None:
    """Try one instance; `upstream` is an attempt that is under way. None: its response went to the client, or there
    is a refusal."""
    pick = request.pick
    assert pick is not None
    if upstream is None:
        kept = service.reuse(pick, sure=not request.idempotent)
        if kept is not None:
            upstream = H1Upstream(request, service, kept)
    if upstream is not None:
        failure = await drive(upstream)
        if failure is None:
            return None
        if failure is not Failure.STALE or request.decide(failure, sent=upstream.sent) is not Decision.SAME:
            return _Failed(failure, failure, upstream.sent)
        service.statistics.retries[failure] += 1
    connected = await _connect(request, service, pick)
    if not isinstance(connected, Upstream):
        return connected
    upstream = H1Upstream(request, service, connected)
    failure = await drive(upstream)
    return None if failure is None else _Failed(failure, failure, upstream.sent)


async def _connect(request: HttpRequest, service: HttpService, pick: Pick) -> Upstream | _Failed | None:
    """A new connection to the instance, or how that failed; None, and a refusal: as many wait as may."""
    client, state = request.client, service.state
    if client.left:
        # Nothing is connected that nobody would close.
        raise ClientLeftError
    if not request.start_waiting():
        # That is so for every instance.
        request.refusal = answers.TOO_MANY_WAITING
        request.abandoned(answers.TOO_MANY_WAITING.reason)
        return None
    request.began = trio.current_time()
    try:
        with trio.CancelScope(deadline=request.deadline) as scope:
            dialled = await dial(client, state.policy, pick)
    finally:
        request.stop_waiting()
    if client.left:
        raise ClientLeftError
    if scope.cancelled_caught:
        return _Failed(Failure.TIMEOUT, AttemptOutcome.TIMEOUT, sent=False)
    if dialled.upstream is None:
        return _Failed(Failure.CONNECT, dialled.error, sent=False)
    service.statistics.connections_made += 1
    request.reached()
    return Upstream(dialled.upstream, (pick.instance.key.address, pick.instance.key.port))


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
        opened = b"HTTP/1.1 200 Connection established\r\n" + request.explanation() + b"\r\n"
        whole = await run_tunnel(request, service.state, found, opened)
    finally:
        request.leave_instance()
        (close if whole else abort)(found)
    return request.client_end


async def _answer_no_tunnel(request: HttpRequest, service: HttpService, outcome: Outcome) -> End:
    if outcome is Outcome.CLIENT_LEFT:
        raise ClientLeftError
    if outcome is Outcome.NO_INSTANCE:
        return await _refuse(request, _why_none(service, unknown=answers.CONNECT_FORBIDDEN))
    return await _fail(request, answers.DEADLINE if outcome is Outcome.DEADLINE else answers.FAILED, outcome)


# Answers


async def _answer_failure(request: HttpRequest, failure: Failure) -> End:
    if request.why(trio.current_time()) is Why.DEADLINE:
        return await _fail(request, answers.DEADLINE, Outcome.DEADLINE)
    return await _fail(request, _ANSWERS[failure], Outcome.FAILED)


async def _refuse(request: HttpRequest, answer: Answer) -> End:
    """Answer a request that no instance is tried for."""
    request.outcome = Outcome.LIMITED if answer in answers.LIMITED else Outcome.NO_INSTANCE
    request.shared.refused[answer.reason] += 1
    if request.service is not None:
        request.shared.report_failure(request, answer)
    return await _answer(request, answer)


async def _fail(request: HttpRequest, answer: Answer, outcome: Outcome) -> End:
    """Answer a request that instances were tried for in vain (A6)."""
    request.outcome = outcome
    request.shared.report_failure(request, answer)
    return await _answer(request, answer)


async def _answer(request: HttpRequest, answer: Answer) -> End:
    """Send an answer of the proxy's own; tells what becomes of the client's connection."""
    client, head = request.client, request.head
    unread = head.has_body and (request.body is None or not request.body.finished)
    close = request.closes_client(unread)
    request.status = answer.status
    request.error = answer.reason
    request.response_begun = True
    await client.send(
        generated_answer(
            *answer,
            extra=request.explanation(),
            close=close,
            announce_keep_alive=not close and head.minor == 0,
            without_body=head.method == b"HEAD",
        )
    )
    if not close:
        return End.KEEP
    request.close_client(unread=unread)
    return request.client_end
