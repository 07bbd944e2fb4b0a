"""What follows from a failure: every method, failure and state (A2, A3, A4), the budget, deadlines, limits (A1, A6)."""

from __future__ import annotations

import itertools
import logging
import socket

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from meshlocal.client.statistics import Outcome, RequestKey, ServiceStatistics
from meshlocal.policy.config_health import EjectionConfig, LimitsConfig
from meshlocal.policy.limits import Limit
from meshlocal.policy.model import make_instance
from nursery_tests.logged import entry
from nursery_tests.proxy.http.conftest import (
    B,
    Behaviour,
    Proxy,
    Served,
    Upstream,
    Upstreams,
    closes,
    forward,
    ok,
    resets,
    response,
    says,
    stalls,
    until,
)
from nursery_tests.proxy.silent import silent

SAFE = ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"]
UNSAFE = ["POST", "PATCH"]
KEYED = "POST with Idempotency-Key"
FAR = RequestKey("other", "local_failed", Outcome.SERVED)

HALF_HEAD = b"HTTP/1.1 200 OK\r\ncontent-le"
FAILURES: dict[str, Behaviour] = {
    "closes": closes,
    "resets": resets,
    "stalls": stalls,
    "503": says(response(b"busy", "503 Busy")),
    "half a head": says(HALF_HEAD, closing=True),
    "no HTTP": says(b"SSH-2.0-x\r\n"),
    "lies in its head": says(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n"),
}

CAUSES = {
    "refuses": "connect",
    "closes": "no_response",
    "resets": "no_response",
    "stalls": "timeout",
    "503": "status",
}
"""As retries are counted."""

MOVED, SAME, CUT = "moved on", "same instance", "cut"
BROKEN = (502, "broken_response")
NONE = (502, "no_response")
LATE = (504, "attempt_timeout")
BUSY = (503, None)

# What becomes of a request: of one that may be repeated, and of one that may not. On a connection that had a
# response before, and on a fresh one.
TABLE: dict[str, dict[str, tuple[object, object]]] = {
    "fresh": {
        "refuses": (MOVED, MOVED),
        "closes": (MOVED, NONE),
        "resets": (MOVED, NONE),
        "stalls": (MOVED, LATE),
        "503": (MOVED, BUSY),
        "half a head": (BROKEN, BROKEN),
        "no HTTP": (BROKEN, BROKEN),
        "lies in its head": (BROKEN, BROKEN),
    },
    "kept": {
        "closes": (SAME, NONE),
        "resets": (SAME, NONE),
        "stalls": (MOVED, LATE),
        "503": (MOVED, BUSY),
        "half a head": (BROKEN, BROKEN),
        "no HTTP": (BROKEN, BROKEN),
        "lies in its head": (BROKEN, BROKEN),
    },
}
ROWS = [
    pytest.param(state, failure, method, unsafe if method in UNSAFE else safe, id=f"{state}-{failure}-{method}")
    for state, failures in TABLE.items()
    for failure, (safe, unsafe) in failures.items()
    for method in (*SAFE, *UNSAFE, KEYED)
]
BODIES = {"PUT": b"x" * 1000, "POST": b"y" * 1000, "PATCH": b"", KEYED: b"z" * 1000}


@pytest.mark.parametrize(("state", "failure", "method", "expected"), ROWS)
async def test_table(
    proxy: Proxy,
    pair: tuple[Upstream, Upstream],
    caplog: pytest.LogCaptureFixture,
    state: str,
    failure: str,
    method: str,
    expected: object,
) -> None:
    """A2, A3, A4: the table of methods, failures and states. The access log says of the end what the client is told."""
    local, far = pair
    caplog.set_level(logging.INFO, "meshlocal.access")
    proxy.configure(
        attempts={"attempt_timeout": 0.05 if failure == "stalls" else None},
        http={"response_headers": True},
        access_log=True,
    )
    async with await proxy.connect() as client:
        if state == "kept":
            assert (await client.get()).body == b"local"
        if failure == "refuses":
            local.refuse()
        else:
            local.behaviour = FAILURES[failure]
            if expected == SAME:
                # The kept connection turns out closed; a fresh one to the same instance works.
                local.behaviour = lambda upstream, served: (FAILURES[failure] if served.number > 1 else ok)(
                    upstream, served
                )
        heard = len(local.heads)
        fields = {"idempotency_key": '"1"'} if method == KEYED else {}
        answer = await client.ask(method.partition(" ")[0], "/x", BODIES.get(method), **fields)
    await proxy.idle()
    assert entry(caplog.records[-1]).fields["error"] == answer.error
    attempts = answer.fields["x-meshlocal-attempts"]
    if expected == MOVED:
        assert answer.status == 200
        assert answer.body == (b"" if method == "HEAD" else b"far")
        assert (attempts, answer.fields["x-meshlocal-reason"]) == ("2", "local_failed")
        assert far.bodies == [BODIES.get(method) or b""]
        assert proxy.requests()[FAR] == 1
        # Of a connection that was kept, the fresh one that took its place failed as well.
        stale = {"stale": 1} if state == "kept" and failure in ("closes", "resets") else {}
        assert proxy.retries == {CAUSES[failure]: 1, **stale}
    elif expected == SAME:
        assert answer.status == 200
        assert answer.body == (b"" if method == "HEAD" else b"local")
        assert attempts == "1"
        assert local.bodies[-2:] == [BODIES.get(method) or b""] * 2
        assert not far.heads
        assert proxy.retries == {"stale": 1}
    else:
        assert answer.told == expected
        assert attempts == "1"
        # Never sent twice.
        assert len(local.heads) == heard + 1
        assert not far.accepted


@pytest.mark.parametrize(("failure", "told"), [("closes", NONE), ("resets", NONE), ("stalls", LATE), ("503", BUSY)])
@pytest.mark.parametrize("state", ["fresh", "kept"])
@pytest.mark.parametrize("method", ["PUT", KEYED])
async def test_a_body_that_is_not_held_is_never_sent_again(
    proxy: Proxy, pair: tuple[Upstream, Upstream], method: str, state: str, failure: str, told: tuple[int, str]
) -> None:
    """A3: longer than `replay_buffer`, it streams."""
    local, far = pair
    proxy.configure(attempts={"replay_buffer": 100, "attempt_timeout": 0.05 if failure == "stalls" else None})
    async with await proxy.connect() as client:
        if state == "kept":
            await client.get()
        local.behaviour = FAILURES[failure]
        fields = {"idempotency_key": '"1"'} if method == KEYED else {}
        assert (await client.ask(method.partition(" ")[0], "/", b"x" * 101, **fields)).told == told
    assert not far.accepted


@pytest.mark.parametrize("kept", [False, True])
async def test_a_body_of_which_nothing_was_sent_goes_elsewhere_however_long(
    proxy: Proxy, pair: tuple[Upstream, Upstream], kept: bool
) -> None:
    """A2: an instance that did not connect got nothing of it."""
    local, far = pair
    proxy.configure(attempts={"replay_buffer": 100})
    local.refuse()
    body = b"x" * 300_000
    assert (await proxy.ask("POST", "/", body)).body == b"far"
    assert far.bodies == [body]


async def test_chunks_up_to_the_replay_buffer_are_held(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    local, far = pair
    local.behaviour = closes
    body = b"5\r\nhello\r\n0\r\n\r\n"
    async with await proxy.connect() as client:
        await client.send(b"PUT / HTTP/1.1\r\nhost: b\r\ntransfer-encoding: chunked\r\n\r\n" + body)
        assert (await client.response()).body == b"far"
    assert (local.bodies, far.bodies) == ([body], [body])


@pytest.mark.parametrize("state", ["fresh", "kept"])
@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_a_head_that_stops_half_way_is_not_repeated(
    clock: MockClock, proxy: Proxy, pair: tuple[Upstream, Upstream], method: str, state: str
) -> None:
    """A3: a byte of a response has come, so that the end of `attempt_timeout` moves the request nowhere."""
    local, far = pair
    proxy.configure(attempts={"attempt_timeout": 5.0})
    begun = trio.Event()

    async def stops(upstream: Upstream, served: Served) -> bool:
        await served.send(HALF_HEAD)
        begun.set()
        return await stalls(upstream, served)

    async with await proxy.connect() as client:
        if state == "kept":
            await client.get()
        local.behaviour = stops
        heard = len(local.heads)
        await client.send(f"{method} / HTTP/1.1\r\nhost: b\r\ncontent-length: 0\r\n\r\n".encode())
        await begun.wait()
        # So that it waits with a watch on the time.
        await forward(clock, 0.1, steps=5)
        await forward(clock, 10.0)
        assert (await client.response()).told == BROKEN
    assert len(local.heads) == heard + 1
    assert not far.accepted


@pytest.mark.parametrize("where", ["length", "chunk", "nonsense", "close"])
async def test_a_response_that_breaks_off_is_cut_and_not_repeated(
    proxy: Proxy, pair: tuple[Upstream, Upstream], where: str
) -> None:
    """What the client got of it must not look whole."""
    local, far = pair

    async def breaks(upstream: Upstream, served: Served) -> bool | None:
        if where == "length":
            await served.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello")
            return False
        if where == "chunk":
            await served.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
            return False
        if where == "nonsense":
            await served.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
            await until(lambda: came)
            await served.send(b"world\r\n0\r\n\r\n")
            return True
        await served.send(b"HTTP/1.1 200 OK\r\n\r\nhello")
        await until(lambda: came)
        served.reset()
        return None

    came = False
    local.behaviour = breaks
    async with await proxy.connect() as client:
        await client.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
        assert b"hello" in await client.until(b"hello")
        came = True
        with pytest.raises(Exception, match=r".*") as caught:
            await client.response()
        assert type(caught.value).__name__ == "BrokenResourceError"
    await proxy.idle()
    assert proxy.requests() == {RequestKey("node", "", Outcome.CUT): 1}
    assert not far.accepted
    assert proxy.pooled == 0


@pytest.mark.parametrize("extra", [b"!", b"HTTP/1.1 200 OK\r\n\r\n"])
async def test_more_than_the_length_says_is_not_passed_on_nor_kept(proxy: Proxy, local: Upstream, extra: bytes) -> None:
    """A lie about length costs the connection, not the next request."""
    local.behaviour = says(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello" + extra)
    async with await proxy.connect() as client:
        assert (await client.get()).body == b"hello"
        assert (await client.get()).body == b"hello"
    assert local.accepted == 2


async def test_a_word_that_nobody_asked_for_costs_no_request(proxy: Proxy, local: Upstream) -> None:
    """A server's 408 on a connection that it is about to close must answer nobody's request."""
    async with await proxy.connect() as client:
        await client.get()
        await local.open[0].send(response(b"", "408 Request Timeout", connection="close"))
        await until(lambda: _readable_or_gone(proxy))
        assert (await client.get()).body == b"local"
    assert local.accepted == 2


def _readable_or_gone(proxy: Proxy) -> bool:
    idle = [upstream for places in proxy.forwarder.services[B].pool._idle.values() for upstream in places]
    return all(not upstream.is_silent() for upstream in idle)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("how", ["end", "reset"])
async def test_a_connection_that_was_closed_costs_no_request(
    proxy: Proxy, local: Upstream, method: str, how: str
) -> None:
    """A4: where its end had come before the request, even one that may not be repeated."""
    async with await proxy.connect() as client:
        for number in range(1, 6):
            answer = await client.ask(method, "/", b"x" if method == "POST" else None)
            assert (answer.body, local.accepted) == (b"local", number)
            served = local.open[0]
            if how == "reset":
                served.reset()
            else:
                await served.send_eof()
            await until(lambda: _readable_or_gone(proxy))
    assert proxy.requests() == {RequestKey("node", "", Outcome.SERVED): 5}


async def test_every_instance_is_tried_and_none_twice(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    """A6, O1, O5."""
    local, far = pair
    local.behaviour = far.behaviour = closes
    answer = await proxy.ask()
    assert answer.told == NONE
    assert (len(local.heads), len(far.heads)) == (1, 1)
    local.refuse()
    far.refuse()
    assert (await proxy.ask()).told == (502, "failed")
    assert [key.outcome for key in proxy.requests()] == [Outcome.FAILED]


async def test_instances_that_fail_at_once_keep_nobody_waiting(proxy: Proxy) -> None:
    """Other tasks have their turn between two attempts, however many instances refuse."""
    seen = [0]

    async def look(service: ServiceStatistics) -> None:
        while True:
            seen.append(service.attempts[("node", "refused")])
            await trio.lowlevel.checkpoint()

    # A port of 127.0.0.0/8 that is bound, and nobody listens there.
    with socket.socket() as nobody:
        nobody.bind(("0.0.0.0", 0))
        port = nobody.getsockname()[1]
        proxy.publish(*(make_instance(f"127.0.0.{host}", port, labels={"node": "n1"}) for host in range(1, 31)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look, proxy.table[B].statistics)
            assert (await proxy.ask()).told == (502, "failed")
            nursery.cancel_scope.cancel()
    # Of tasks that are ready together the order is random.
    assert max(after - before for before, after in itertools.pairwise([*seen, 30])) <= 2


async def test_max_attempts(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    """O5."""
    local, far = pair
    local.behaviour = closes
    proxy.configure(attempts={"max_attempts": 1})
    assert (await proxy.ask()).told == NONE
    assert not far.accepted


async def test_the_last_busy_answer_is_passed_on(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    """A3: a 503 that there is no other instance for is the instance's own, with its body."""
    local, far = pair
    local.behaviour = far.behaviour = says(response(b"busy", "503 Busy", retry_after="1"))
    answer = await proxy.ask()
    assert (answer.told, answer.body, answer.fields["retry-after"]) == ((503, None), b"busy", "1")
    assert (len(local.heads), len(far.heads)) == (1, 1)


async def test_retry_on(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    local, _far = pair
    local.behaviour = says(response(b"teapot", "418 Teapot"))
    assert (await proxy.ask()).body == b"teapot"
    proxy.configure(attempts={"retry_on": (418,)})
    assert (await proxy.ask()).body == b"far"
    local.behaviour = says(response(b"busy", "503 Busy"))
    assert (await proxy.ask()).body == b"busy"


async def test_the_budget_bounds_retries_after_an_answer(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    """A3: so that an overload is not multiplied. Retries of what no instance answered have no such bound."""
    local, _far = pair
    proxy.configure(http={"retry_percent": 20, "retry_floor": 2})
    local.behaviour = says(response(b"busy", "503 Busy"))
    async with await proxy.connect() as client:
        bodies = [(await client.get()).body for _ in range(20)]
        assert bodies.count(b"far") == 4
        # A floor of 2, then one for each five requests.
        assert bodies[:3] == [b"far", b"far", b"busy"]
        assert proxy.retries == {"status": 4}
        assert proxy.forwarder.services[B].budget.refused == 16
        local.behaviour = closes
        assert [(await client.get()).body for _ in range(20)] == [b"far"] * 20


async def test_the_budget_is_not_for_what_was_never_sent(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    """A2, A3."""
    local, _far = pair
    # Without ejection, which would pass over an instance that refuses.
    proxy.configure(http={"retry_percent": 0, "retry_floor": 0}, ejection=EjectionConfig(failures=None))
    local.refuse()
    async with await proxy.connect() as client:
        assert [(await client.get()).body for _ in range(20)] == [b"far"] * 20
    assert proxy.retries == {"connect": 20}
    assert proxy.forwarder.services[B].budget.refused == 0


async def test_the_deadline_bounds_all_attempts(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    """A1, A6: 504."""
    for each in pair:
        each.behaviour = stalls
    proxy.configure(attempts={"response_deadline": 0.05})
    answer = await proxy.ask()
    assert answer.told == (504, "deadline")
    assert [key.outcome for key in proxy.requests()] == [Outcome.DEADLINE]
    await until(lambda: not any(each.open for each in pair))


@pytest.mark.parametrize(
    ("limit", "error"), [("response_deadline", "deadline"), ("attempt_timeout", "attempt_timeout")]
)
@pytest.mark.parametrize("state", ["fresh", "kept"])
async def test_an_instance_has_no_more_time_after_a_quiet_while(
    clock: MockClock, proxy: Proxy, local: Upstream, state: str, limit: str, error: str
) -> None:
    """A1, A6: when no request came for seconds, the time of the next one is kept all the same."""
    proxy.configure(attempts={limit: 5.0})
    async with await proxy.connect() as client:
        if state == "kept":
            assert (await client.get()).body == b"local"
        heard = len(local.heads)
        await forward(clock, 5.0, steps=500)
        local.behaviour = stalls
        await client.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
        await until(lambda: len(local.heads) > heard)
        await forward(clock, 0.1, steps=5)
        await forward(clock, 10.0)
        # Its connection to the instance has ended by now.
        assert not local.open
        assert (await client.response()).told == (504, error)


async def test_the_deadline_bounds_a_connect(proxy: Proxy, local: Upstream) -> None:
    """A1, A6: an instance that does not answer a connect may have less time than `connect_timeout`."""
    proxy.configure(attempts={"response_deadline": 0.05, "connect_timeout": 1000.0, "connect_timeout_local": 1000.0})
    with silent() as instance:
        proxy.publish(instance)
        assert (await proxy.ask()).told == (504, "deadline")
    assert [key.outcome for key in proxy.requests()] == [Outcome.DEADLINE]


async def test_a_connect_timeout_may_be_as_short_as_one_likes(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    """A1: also shorter than the time after which a client that waits is watched."""
    _local, far = pair
    proxy.configure(attempts={"connect_timeout_local": 0.001})
    with silent() as instance:
        proxy.publish(instance, far)
        assert (await proxy.ask()).body == b"far"


@pytest.mark.parametrize("limit", ["response_deadline", "attempt_timeout"])
async def test_a_body_on_its_way_takes_nothing_from_the_time_of_the_response(
    proxy: Proxy, local: Upstream, limit: str
) -> None:
    """A1: a body may take longer than an instance may take to answer; the time counts from its last piece."""
    proxy.configure(attempts={"replay_buffer": 0, limit: 0.3})
    async with await proxy.connect() as client:
        await client.send(b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 2\r\n\r\nx")
        await trio.sleep(0.5)
        await client.send(b"x")
        assert (await client.response()).body == b"local"
    assert local.bodies == [b"xx"]


async def test_the_deadline_counts_from_the_end_of_a_body_that_was_held(proxy: Proxy, local: Upstream) -> None:
    """A1: and bounds the response to it."""

    async def thinks(upstream: Upstream, served: Served) -> None:
        await trio.sleep(0.05)
        await ok(upstream, served)

    local.behaviour = thinks
    proxy.configure(attempts={"response_deadline": 0.3})
    async with await proxy.connect() as client:
        await client.send(b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 2\r\n\r\nx")
        await trio.sleep(0.5)
        await client.send(b"x")
        assert (await client.response()).body == b"local"
        local.behaviour = stalls
        await client.send(b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 2\r\n\r\nx")
        await client.send(b"x")
        assert (await client.response()).told == (504, "deadline")


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("kept", [False, True])
async def test_no_instance(proxy: Proxy, local: Upstream, method: str, kept: bool) -> None:
    """A6: 503; the client's connection stays."""
    async with await proxy.connect() as client:
        if kept:
            assert (await client.get()).body == b"local"
        proxy.publish()
        for _ in range(2):
            assert (await client.ask(method)).told == (503, "no_instance")
    assert proxy.requests()[RequestKey("", "", Outcome.NO_INSTANCE)] == 2


async def test_the_first_snapshot_is_waited_for(proxy: Proxy, upstream: Upstreams) -> None:
    """A7."""
    late = await upstream("late", "n1")
    async with await proxy.connect() as client:
        await client.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
        await until(lambda: proxy.table[B].statistics.connecting == 1)
        proxy.publish(late)
        assert (await client.response()).body == b"late"


async def test_the_first_snapshot_does_not_come(proxy: Proxy) -> None:
    """A7, A6."""
    proxy.configure(attempts={"first_snapshot_wait": 0.02})
    assert (await proxy.ask()).told == (503, "no_snapshot")


LONG = EjectionConfig(failures=3, time=10, max_time=10)
EJECTED = RequestKey("other", "local_ejected", Outcome.SERVED)


async def eject(proxy: Proxy, local: Upstream) -> None:
    """Let requests fail on it, without a word, until it is ejected."""
    proxy.configure(ejection=LONG)
    local.behaviour = closes
    for _ in range(3):
        assert (await proxy.ask()).body == b"far"


async def test_failures_to_answer_eject(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    """H1: connections that end without a word count as those that are not made."""
    local, _far = pair
    await eject(proxy, local)
    for _ in range(2):
        assert (await proxy.ask()).body == b"far"
    assert len(local.heads) == 3
    assert proxy.requests() == {FAR: 3, EJECTED: 2}


@pytest.mark.parametrize(("answer", "first"), [("200 OK", b"local"), ("500 Fault", b"local"), ("503 Busy", b"far")])
@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_any_answer_readmits(
    clock: MockClock, proxy: Proxy, pair: tuple[Upstream, Upstream], method: str, answer: str, first: bytes
) -> None:
    """H1: of an instance that failed after its connect only an answer shows that it is back; a busy one does, too."""
    local, _far = pair
    await eject(proxy, local)
    await forward(clock, 1.2 * LONG.time)
    local.behaviour = says(response(b"local", answer))
    assert (await proxy.ask(method)).body == first
    # Not one request in so many seconds, but all of them.
    local.behaviour = ok
    for _ in range(3):
        assert (await proxy.ask(method)).body == b"local"
    assert EJECTED not in proxy.requests()


@pytest.mark.parametrize("answer", ["200 OK", "503 Busy"])
async def test_an_answer_between_failures_ejects_nobody(
    proxy: Proxy, pair: tuple[Upstream, Upstream], answer: str
) -> None:
    """H1: only failures in a row count."""
    local, _far = pair
    proxy.configure(ejection=LONG)
    for _ in range(3):
        local.behaviour = closes
        for _ in range(2):
            assert (await proxy.ask()).body == b"far"
        local.behaviour = says(response(b"local", answer, connection="close"), closing=True)
        await proxy.ask()
    assert len(local.heads) == 9
    assert EJECTED not in proxy.requests()


@pytest.mark.parametrize(
    ("failure", "told"), [("stalls", (200, None)), ("half a head", BROKEN), ("limit", (503, "limit_waiting"))]
)
async def test_a_trial_without_a_verdict_is_given_back(
    clock: MockClock, proxy: Proxy, pair: tuple[Upstream, Upstream], failure: str, told: object
) -> None:
    """H1: what is no failure of the connection, nor an answer, lets the next request try."""
    local, _far = pair
    await eject(proxy, local)
    await forward(clock, 1.2 * LONG.time)
    if failure == "limit":
        proxy.configure(ejection=LONG, service={"limits": LimitsConfig(waiting=1)})
        proxy.table[B].circuit.enter(Limit.WAITING)
        assert (await proxy.ask()).told == told
        proxy.table[B].circuit.leave(Limit.WAITING)
    else:
        proxy.configure(ejection=LONG, attempts={"attempt_timeout": 0.05 if failure == "stalls" else None})
        local.behaviour = FAILURES[failure]
        assert (await proxy.ask()).told == told
    proxy.configure(ejection=LONG)
    local.behaviour = ok
    assert (await proxy.ask()).body == b"local"
    assert EJECTED not in proxy.requests()


async def test_a_trial_that_the_deadline_ends_is_given_back(
    clock: MockClock, proxy: Proxy, upstream: Upstreams, pair: tuple[Upstream, Upstream]
) -> None:
    """H1: it brought no verdict, so that the next request tries."""
    _local, far = pair
    with silent() as instance:
        proxy.publish(instance, far)
        # An instance that answers no connect is ejected, and its time goes by.
        proxy.configure(attempts={"connect_timeout_local": 0.02}, ejection=LONG)
        for _ in range(3):
            assert (await proxy.ask()).body == b"far"
        assert (await proxy.ask()).body == b"far"
        assert proxy.requests() == {FAR: 3, EJECTED: 1}
        await forward(clock, 1.2 * LONG.time)
        proxy.configure(attempts={"connect_timeout_local": 1000.0, "response_deadline": 0.05}, ejection=LONG)
        assert (await proxy.ask()).told == (504, "deadline")
        proxy.configure(attempts={"connect_timeout_local": 0.02}, ejection=LONG)
        assert (await proxy.ask()).body == b"far"
        assert proxy.requests()[FAR] == 4


@pytest.mark.parametrize("failure", ["503", "stalls"])
async def test_answers_and_slowness_eject_nobody(proxy: Proxy, pair: tuple[Upstream, Upstream], failure: str) -> None:
    """H1 is about connections."""
    local, _far = pair
    proxy.configure(attempts={"attempt_timeout": 0.02 if failure == "stalls" else None})
    local.behaviour = FAILURES[failure]
    for _ in range(5):
        assert (await proxy.ask()).body == b"far"
    assert len(local.heads) == 5


@pytest.mark.parametrize("limit", list(Limit))
async def test_limits(proxy: Proxy, pair: tuple[Upstream, Upstream], limit: Limit) -> None:
    """What comes beyond a limit is refused at once, with 503; what ends makes room."""
    local, far = pair
    listener = 1 if limit is Limit.CONNECTIONS else 0
    if limit is Limit.WAITING:
        # Both wait for a snapshot, which takes no place; then one waits for a connection.
        proxy.configure(service={"limits": LimitsConfig(**{limit.value: 1})})
        proxy.table[B].circuit.enter(Limit.WAITING)
        answer = await proxy.ask()
        assert answer.told == (503, f"limit_{limit}")
        assert not local.accepted
        assert not far.accepted
        proxy.table[B].circuit.leave(Limit.WAITING)
        assert (await proxy.ask()).body == b"local"
    else:
        proxy.configure(service={"limits": LimitsConfig(**{limit.value: 1})})
        local.behaviour = stalls
        async with await proxy.connect(listener) as first:
            await first.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
            await until(lambda: local.heads)
            async with await proxy.connect(listener) as second:
                assert (await second.get()).told == (503, f"limit_{limit}")
            first.reset()
        await proxy.idle()
        local.behaviour = ok
        async with await proxy.connect(listener) as third:
            assert (await third.get()).body == b"local"
        assert proxy.table[B].circuit.refused[limit] == 1


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_spill(proxy: Proxy, pair: tuple[Upstream, Upstream], method: str) -> None:
    """F3, R1: a full local instance is passed over; one that has room again is not (F1)."""
    local, _far = pair
    proxy.configure(service={"spill": 1}, http={"response_headers": True})
    local.behaviour = stalls
    body = b"x" if method == "POST" else None
    async with await proxy.connect() as first:
        await first.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
        await until(lambda: local.heads)
        answer = await proxy.ask(method, "/", body)
        assert (answer.body, answer.fields["x-meshlocal-reason"]) == (b"far", "spill")
        first.reset()
    await proxy.idle()
    local.behaviour = ok
    assert (await proxy.ask(method, "/", body)).body == b"local"


async def test_new_requests_return_at_once(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    """F1, F2: on the same connection of the client, whatever served it before."""
    local, far = pair
    async with await proxy.connect() as client:
        proxy.publish(far)
        assert (await client.get()).body == b"far"
        proxy.publish(local, far)
        assert (await client.get()).body == b"local"


def test_the_table_has_every_method_and_state() -> None:
    assert len(ROWS) == len(set(itertools.chain.from_iterable([row.id] for row in ROWS))) == 15 * 9
