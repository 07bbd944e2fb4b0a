"""`MeshTransport`: httpx to the instances of this node first, on trio and on asyncio (A1 to A6, H2, O1, R1)."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest
import trustme

import meshlocal
from meshlocal import AttemptPolicy, Outcome, Reason, RequestKey
from meshlocal.httpx import (
    LIMITS,
    HttpBrokenError,
    HttpConnectError,
    HttpDeadlineError,
    HttpNoInstanceError,
    HttpReadError,
    HttpTimeoutError,
    MeshTransport,
    Served,
)
from meshlocal.library.http_body import ReplayableBody
from meshlocal.policy.limits import Limit
from meshlocal.testing import (
    FakeSource,
    HttpRequest,
    HttpResponse,
    Upstream,
    UpstreamConnection,
    answer,
    http,
    open_upstream,
    reset,
    silent,
)

Run = Callable[[Callable[[], Awaitable[None]]], None]
QUICK = AttemptPolicy(connect_timeout_local=0.25, connect_timeout=0.25, attempt_timeout=0.25, response_deadline=10)


class Setup:
    """Two instances, the first of this node, a mesh, and a client."""

    def __init__(
        self, near: Upstream, far: Upstream, source: FakeSource, mesh: meshlocal.Mesh, transport: MeshTransport
    ) -> None:
        self.near = near
        self.far = far
        self.source = source
        self.mesh = mesh
        self.transport = transport
        self.client = httpx.AsyncClient(transport=transport, timeout=10)

    def requests(self) -> dict[RequestKey, int]:
        return dict(self.mesh.statistics().services["b"].requests)

    def attempts(self) -> dict[tuple[str, str], int]:
        return dict(self.mesh.statistics().services["b"].attempts)

    def assert_nothing_left(self) -> None:
        """No request is counted as under way anywhere."""
        for state in self.mesh.core.services:
            assert state.in_use == 0
            assert state.fitness.under_way == {}
            assert set(state.circuit.now.values()) == {0}
        for pool in self.transport._transport.pools._pools.values():
            assert (pool.in_use, pool.waiting, pool._opening) == (0, 0, 0)
            assert pool.idle == len(pool.connections)


@asynccontextmanager
async def setup(
    policy: AttemptPolicy | None = None,
    ejection: meshlocal.EjectionConfig | None = None,
    limits: httpx.Limits = LIMITS,
    service: meshlocal.ServiceConfig | None = None,
) -> AsyncIterator[Setup]:
    source = FakeSource()
    async with (
        open_upstream(node="n1", behaviour=http()) as near,
        open_upstream(node="n2", behaviour=http()) as far,
        meshlocal.open_mesh(
            source, node_name="n1", attempts=policy, ejection=ejection, services={"b": service} if service else None
        ) as mesh,
    ):
        source.set("b", near.instance, far.instance)
        made = Setup(near, far, source, mesh, MeshTransport(mesh, limits=limits))
        async with made.client:
            yield made
            made.assert_nothing_left()


async def open_connections(upstream: Upstream, count: int) -> None:
    with anyio.fail_after(10):
        while upstream.open != count:  # noqa: ASYNC110 - the kernel tells nobody
            await anyio.sleep(0.02)


def test_local_first_failover_and_return(on_loop: Run) -> None:
    """O1, A2, F1, R1: this node's instance, another one within the same request, and back."""

    async def main() -> None:
        async with setup() as its:
            first = await its.client.get("http://b/path?q=1")
            assert (first.status_code, first.text) == (200, "n1")
            assert first.extensions["meshlocal"] == Served(its.near.instance, "node", None, 1)
            (request,) = its.near.requests
            assert (request.method, request.target, request.headers["host"]) == ("GET", "/path?q=1", "b")
            its.near.kill()
            second = await its.client.get("http://b/")
            assert second.text == "n2"
            assert second.extensions["meshlocal"] == Served(its.far.instance, "other", Reason.LOCAL_FAILED, 2)
            its.near.accept()
            assert (await its.client.get("http://b/")).text == "n1"
            assert its.requests() == {
                RequestKey("node", "", Outcome.SERVED): 2,
                RequestKey("other", Reason.LOCAL_FAILED, Outcome.SERVED): 1,
            }
            assert its.attempts() == {("node", "answered"): 2, ("node", "refused"): 1, ("other", "answered"): 1}

    on_loop(main)


def test_hosts_are_services_in_all_their_forms(on_loop: Run) -> None:
    """The host is read as the proxy reads it; a port in the URL means nothing."""

    async def main() -> None:
        async with setup() as its:
            its.source.set("b.shop", its.far.instance)
            for host in ("b.shop", "b.shop.svc", "B.Shop.svc.cluster.local:8080"):
                assert (await its.client.get(f"http://{host}/")).text == "n2"
            with pytest.raises(HttpNoInstanceError, match=r"127\.0\.0\.1: the host names no service"):
                await its.client.get("http://127.0.0.1/")
            with pytest.raises(HttpNoInstanceError, match="nobody: no registry knows it") as caught:
                await its.client.get("http://nobody/")
            assert isinstance(caught.value, meshlocal.NoInstanceError)
            assert isinstance(caught.value, httpx.ConnectError)
            assert caught.value.request.url == "http://nobody/"
            with pytest.raises(httpx.UnsupportedProtocol):
                await its.client.get("ftp://b/")

    on_loop(main)


def test_connections_are_kept_and_replaced_when_they_have_ended(on_loop: Run) -> None:
    """A4: one connection for many requests; one that the instance closed costs no attempt, whatever the method."""

    async def main() -> None:
        async with setup() as its:
            for _ in range(5):
                assert (await its.client.post("http://b/", content=b"x")).text == "n1"
            assert its.near.accepted == 1
            its.near.cut()
            await anyio.sleep(0.02)
            assert (await its.client.post("http://b/", content=b"x")).text == "n1"
            assert its.near.accepted == 2
            assert its.attempts() == {("node", "answered"): 6}

    on_loop(main)


def test_a_kept_connection_that_ends_under_the_request(on_loop: Run) -> None:
    """A4, A3: closed before one byte of response: a fresh one to the same instance, if it may be sent again."""
    seen: list[str] = []

    def once(request: HttpRequest) -> HttpResponse | None:
        seen.append(request.method)
        # The second request on each connection finds it reset.
        return HttpResponse(200, b"n1") if len(seen) % 2 else None

    async def main() -> None:
        seen.clear()
        async with setup() as its:
            its.near.behave(http(once))
            assert (await its.client.get("http://b/")).text == "n1"
            assert (await its.client.get("http://b/")).text == "n1"
            assert its.near.accepted == 2
            assert its.attempts() == {("node", "answered"): 2}
            with pytest.raises(HttpReadError) as caught:
                await its.client.post("http://b/", content=b"x")
            assert caught.value.attempt is not None
            assert caught.value.attempt.error == "stale"
            assert its.far.requests == []

    on_loop(main)


@pytest.mark.parametrize(
    ("behaviour", "error", "word"),
    [
        (reset, HttpReadError, "no_response"),
        (http(lambda request: None), HttpReadError, "no_response"),
        (silent, HttpTimeoutError, "timeout"),
    ],
)
def test_what_was_sent_moves_on_only_if_that_is_safe(
    on_loop: Run, behaviour: Any, error: type[Exception], word: str
) -> None:
    """A3: an idempotent request or one with an Idempotency-Key moves on; any other is never sent twice."""

    async def main() -> None:
        async with setup(QUICK) as its:
            its.near.behave(behaviour)
            assert (await its.client.get("http://b/")).text == "n2"
            answered = await its.client.post("http://b/", content=b"body", headers={"Idempotency-Key": "1"})
            assert answered.text == "n2"
            assert its.far.requests[-1].body == b"body"
            sent = len(its.far.requests)
            with pytest.raises(error) as caught:
                await its.client.post("http://b/", content=b"body")
            assert len(its.far.requests) == sent
            failed = caught.value
            assert isinstance(failed, meshlocal.AttemptsFailedError)
            assert [(each.instance, each.error) for each in failed.attempts] == [(its.near.instance, word)]
            assert failed.__cause__ is failed.attempts[0].cause
            assert its.attempts()["node", word] == 3

    on_loop(main)


def test_a_response_that_makes_no_sense_is_told(on_loop: Run) -> None:
    """A3: once a byte of response came nothing is sent again, however idempotent."""

    async def main() -> None:
        async with setup() as its:
            for junk in (b"HTTP/1.1 200", b"no http at all\r\n\r\n"):
                its.near.behave(answer(junk))
                with pytest.raises(HttpBrokenError) as caught:
                    await its.client.get("http://b/")
                assert isinstance(caught.value, httpx.RemoteProtocolError)
            assert its.far.requests == []

    on_loop(main)


def test_every_instance_failed(on_loop: Run) -> None:
    """A6: one error that is httpx's and meshlocal's, with every attempt on it."""

    async def main() -> None:
        async with setup(QUICK) as its:
            its.near.refuse()
            its.far.hang()
            with pytest.raises(httpx.ConnectError, match="no instance answered") as caught:
                await its.client.post("http://b/", content=b"x")
            assert isinstance(caught.value, HttpConnectError)
            assert [(each.instance, each.tier, each.error) for each in caught.value.attempts] == [
                (its.near.instance, "node", "refused"),
                (its.far.instance, "other", "timeout"),
            ]
            assert its.requests() == {RequestKey("other", Reason.LOCAL_FAILED, Outcome.FAILED): 1}

    on_loop(main)


def test_the_deadline_is_over_all_attempts(on_loop: Run) -> None:
    """A1: the response's deadline ends the search."""

    async def main() -> None:
        async with setup(AttemptPolicy(response_deadline=0.1)) as its:
            its.near.behave(silent)
            with pytest.raises(httpx.TimeoutException) as caught:
                await its.client.get("http://b/")
            assert isinstance(caught.value, HttpDeadlineError)
            assert isinstance(caught.value, TimeoutError)
            assert [each.error for each in caught.value.attempts] == ["abandoned"]
            assert its.requests() == {RequestKey("node", "", Outcome.DEADLINE): 1}

    on_loop(main)


def test_the_clients_own_read_timeout_is_of_the_request(on_loop: Run) -> None:
    """A1: however many instances are slow, the application waits no longer than it said; none is ejected for it (H1).

    To try another one when an instance is slow, the policy has `attempt_timeout`.
    """

    async def main() -> None:
        async with setup(AttemptPolicy(attempt_timeout=None), meshlocal.EjectionConfig(failures=1)) as its:
            its.near.behave(silent)
            its.far.behave(silent)
            for _ in range(2):
                with pytest.raises(httpx.ReadTimeout) as caught:
                    await its.client.get("http://b/", timeout=0.05)
                assert isinstance(caught.value, HttpTimeoutError)
                assert [each.error for each in caught.value.attempts] == ["timeout"]
            with pytest.raises(httpx.ReadTimeout):
                await its.client.post("http://b/", content=b"x", timeout=0.05)
            assert its.far.accepted == 0
            assert not its.mesh.core.services[meshlocal.ServiceKey("b")].fitness.health.unfit
        async with setup(AttemptPolicy(attempt_timeout=0.05)) as its:
            its.near.behave(silent)
            assert (await its.client.get("http://b/", timeout=10)).text == "n2"

    on_loop(main)


def test_the_read_timeout_is_each_reads_again_once_the_head_came(on_loop: Run) -> None:
    """What the wait for the head took is not missing from the body's time."""

    async def slowly(connection: UpstreamConnection) -> None:
        await connection.receive()
        await anyio.sleep(0.3)
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nx")
        await anyio.sleep(0.3)
        await connection.send(b"y")

    async def main() -> None:
        async with setup() as its:
            its.near.behave(slowly)
            assert (await its.client.get("http://b/", timeout=0.5)).text == "xy"

    on_loop(main)


def test_a_pool_that_is_full_says_nothing_of_the_instance(on_loop: Run) -> None:
    """H1: the application allowed itself so many connections."""

    async def begun(connection: UpstreamConnection) -> None:
        await connection.receive()
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nx")
        await connection.receive()

    async def main() -> None:
        async with setup(ejection=meshlocal.EjectionConfig(failures=1), limits=httpx.Limits(max_connections=1)) as its:
            its.far.refuse()
            its.near.behave(begun)
            async with its.client.stream("GET", "http://b/"):
                with pytest.raises(HttpConnectError, match="pool_timeout"):
                    await its.client.post("http://b/", content=b"x", timeout=httpx.Timeout(5, pool=0.01))
            health = its.mesh.core.services[meshlocal.ServiceKey("b")].fitness.health
            assert health.is_admitted(its.near.instance.key[:2])

    on_loop(main)


@pytest.mark.parametrize(
    ("policy", "given"), [(0.1, 30.0), (0.1, None), (30.0, 0.1)], ids=["policy", "policy alone", "client"]
)
def test_a_connect_takes_the_shorter_of_both_limits(on_loop: Run, policy: float, given: float | None) -> None:
    """A1: the policy's `connect_timeout_local`, or httpx's own."""

    async def main() -> None:
        limits = AttemptPolicy(
            connect_timeout_local=policy, connect_timeout=30, attempt_timeout=None, response_deadline=2
        )
        async with setup(limits) as its:
            its.near.hang()
            timeout = httpx.Timeout(10, connect=given)
            assert (await its.client.get("http://b/", timeout=timeout)).text == "n2"
            assert its.attempts() == {("node", "timeout"): 1, ("other", "answered"): 1}

    on_loop(main)


def test_a_trial_that_is_cancelled_is_made_by_the_next_request(on_loop: Run) -> None:
    """H1, A8: it brought no verdict."""

    async def main() -> None:
        policy = AttemptPolicy(connect_timeout_local=30)
        ejection = meshlocal.EjectionConfig(failures=1, time=0.4, max_time=0.4)
        async with setup(policy, ejection) as its:
            its.near.refuse()
            assert (await its.client.get("http://b/")).text == "n2"
            await anyio.sleep(0.5)
            its.near.hang()
            with anyio.move_on_after(0.05) as scope:
                await its.client.get("http://b/")
            assert scope.cancelled_caught
            its.near.accept()
            assert (await its.client.get("http://b/")).text == "n1"
            assert its.attempts() == {
                ("node", "refused"): 1,
                ("other", "answered"): 1,
                ("node", "abandoned"): 1,
                ("node", "answered"): 1,
            }

    on_loop(main)


def test_an_answer_of_503_is_a_failure_while_there_is_another_instance(on_loop: Run) -> None:
    """A3: `retry_on`; the last instance's answer counts, and what may not be repeated gets the first one."""

    async def main() -> None:
        async with setup() as its:
            its.near.behave(http(HttpResponse(503, b"busy")))
            assert (await its.client.get("http://b/")).text == "n2"
            assert its.attempts() == {("node", "status"): 1, ("other", "answered"): 1}
            posted = await its.client.post("http://b/", content=b"x")
            assert (posted.status_code, posted.text) == (503, "busy")
            its.far.behave(http(HttpResponse(503, b"busy too")))
            its.far.cut()
            last = await its.client.get("http://b/")
            assert (last.status_code, last.text) == (503, "busy too")

    on_loop(main)


def test_retries_after_an_answer_have_a_budget(on_loop: Run) -> None:
    """A3: when everything answers 503, retries end at a share of the requests."""

    async def main() -> None:
        async with setup() as its:
            for upstream in (its.near, its.far):
                upstream.behave(http(HttpResponse(503)))
            for _ in range(40):
                assert (await its.client.get("http://b/")).status_code == 503
            assert len(its.far.requests) == 10

    on_loop(main)


def test_bodies_that_stream(on_loop: Run) -> None:
    """A3, replay_buffer: a streamed body is sent again while all that was read of it is held."""

    async def body(size: int) -> AsyncIterator[bytes]:
        for _ in range(size // 1000):
            yield b"x" * 1000

    async def main() -> None:
        async with setup() as its:
            its.near.behave(reset)
            headers = {"Idempotency-Key": "1"}
            sent = await its.client.post("http://b/", content=body(50_000), headers=headers)
            assert sent.text == "n2"
            assert its.far.requests[-1].body == b"x" * 50_000
            its.near.refuse()
            sent = await its.client.post("http://b/", content=body(5_000_000))
            assert sent.text == "n2", "nothing was read of it when the connect failed"
            assert len(its.far.requests[-1].body) == 5_000_000
            its.near.accept()
            its.near.behave(http(lambda request: None))
            with pytest.raises(HttpReadError):
                await its.client.post("http://b/", content=body(500_000), headers=headers)
            whole = await its.client.post("http://b/", content=b"x" * 500_000, headers=headers)
            assert whole.text == "n2", "a body that the application holds needs no buffer"

    on_loop(main)


def test_the_clock_stops_while_the_application_is_asked_for_more(on_loop: Run) -> None:
    """A1: the instances' time is for what they do. An upload may take as long as it likes, as through the proxy."""

    async def body() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 1000
            await anyio.sleep(0.3)

    async def main() -> None:
        async with setup(AttemptPolicy(attempt_timeout=0.2, response_deadline=0.25)) as its:
            headers = {"Connection": "close"}
            assert (await its.client.put("http://b/", content=body(), headers=headers)).text == "n1"
            its.near.behave(silent)
            its.far.behave(silent)
            with pytest.raises(HttpDeadlineError):
                await its.client.put("http://b/", content=body())

    on_loop(main)


def test_a_body_whose_rest_is_lost_is_never_sent_in_part(on_loop: Run) -> None:
    """A3: a generator that was cancelled half-way has nothing more to give, and its beginning is no body."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        await anyio.sleep_forever()

    async def main() -> None:
        stream = httpx.AsyncClient().build_request("PUT", "http://b/", content=pieces()).stream
        assert isinstance(stream, httpx.AsyncByteStream)
        body = ReplayableBody(stream, 65536)
        with anyio.move_on_after(0.01):
            async for _ in body:
                assert body.held
        assert not body.held
        with pytest.raises(RuntimeError, match="cannot be sent again"):
            aiter(body)

    on_loop(main)


def test_a_body_that_fails_fails_its_request_as_it_did(on_loop: Run) -> None:
    """An application's own error is no failure of an instance."""

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        raise LookupError("the application's")

    async def main() -> None:
        async with setup() as its:
            with pytest.raises(LookupError, match="the application's"):
                await its.client.post("http://b/", content=body(), headers={"Idempotency-Key": "1"})
            assert its.far.accepted == 0
            assert its.mesh.core.services.get(meshlocal.ServiceKey("b")) is not None

    on_loop(main)


def test_responses_that_stream(on_loop: Run) -> None:
    """The head is the attempt's end (A1): what breaks later is the application's to handle, and counted as cut."""

    async def cut_short(connection: UpstreamConnection) -> None:
        await connection.receive()
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")

    async def main() -> None:
        async with setup() as its:
            its.near.behave(http(HttpResponse(200, b"y" * 3_000_000)))
            async with its.client.stream("GET", "http://b/") as response:
                size = 0
                async for part in response.aiter_bytes():
                    size += len(part)
                    assert its.mesh.core.services[meshlocal.ServiceKey("b")].in_use == 1
            assert size == 3_000_000
            its.near.cut()
            its.near.behave(cut_short)
            with pytest.raises(httpx.RemoteProtocolError):
                await its.client.get("http://b/")
            assert its.requests() == {
                RequestKey("node", "", Outcome.SERVED): 1,
                RequestKey("node", "", Outcome.CUT): 1,
            }

    on_loop(main)


@pytest.mark.parametrize("after", [0.0, 0.01, 0.03, 0.06, 0.1])
def test_cancellation_leaves_nothing_behind(on_loop: Run, after: float) -> None:
    """A8: whichever await is cancelled, no request is left under way, and later ones are served."""

    async def main() -> None:
        policy = AttemptPolicy(connect_timeout_local=0.02, attempt_timeout=0.05)
        async with setup(policy) as its:
            its.near.hang()
            its.far.behave(silent)
            with anyio.move_on_after(after) as scope:
                with pytest.raises(httpx.TransportError):
                    await its.client.get("http://b/")
            its.assert_nothing_left()
            assert scope.cancelled_caught or after == 0.1
            its.near.accept()
            assert (await its.client.get("http://b/")).text == "n1"

    on_loop(main)


def test_cancelled_within_a_response(on_loop: Run) -> None:
    """A response whose reader is cancelled is closed, and its connection not used again."""

    async def slowly(connection: UpstreamConnection) -> None:
        await connection.receive()
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
        await connection.receive()

    async def main() -> None:
        async with setup() as its:
            its.near.behave(slowly, times=1)
            with anyio.move_on_after(0.1) as scope:
                await its.client.get("http://b/")
            assert scope.cancelled_caught
            its.assert_nothing_left()
            assert (await its.client.get("http://b/")).text == "n1"
            assert its.near.accepted == 2

    on_loop(main)


def test_many_at_once(on_loop: Run) -> None:
    """Concurrent requests while the local instance dies: none fails."""

    async def main() -> None:
        async with setup() as its:
            served: list[str] = []

            async def ask() -> None:
                for _ in range(5):
                    response = await its.client.get("http://b/")
                    served.append(response.text)
                    if len(served) == 30:
                        its.near.kill()

            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(ask)
            assert len(served) == 100
            assert set(served[:30]) == {"n1"}
            assert served[-1] == "n2"

    on_loop(main)


def test_connections_to_an_instance_that_left_are_closed(on_loop: Run) -> None:
    """H2: unused ones at once, the one with a response under way when that has ended."""

    async def main() -> None:
        async with setup() as its:
            its.near.behave(http(HttpResponse(200, b"z" * 2_000_000)))
            async with its.client.stream("GET", "http://b/") as response:
                async with its.client.stream("GET", "http://b/") as other:
                    await other.aread()
                assert its.near.open == 2
                its.source.set("b", its.far.instance)
                await open_connections(its.near, 1)
                assert len(await response.aread()) == 2_000_000
            await open_connections(its.near, 0)
            assert (await its.client.get("http://b/")).text == "n2"

    on_loop(main)


def test_a_response_on_a_kept_connection_outlives_its_instance(on_loop: Run) -> None:
    """H2: the connection was unused before; now it is not, and goes on until the response has ended."""

    async def main() -> None:
        async with setup() as its:
            its.near.behave(http(HttpResponse(200, b"z" * 2_000_000)))
            await its.client.get("http://b/")
            # So many bytes fill the kernel's buffers, and a clock that jumps must not take a wait for room for silence.
            async with its.client.stream("GET", "http://b/", timeout=None) as response:
                assert its.near.accepted == 1
                its.source.set("b", its.far.instance)
                await anyio.wait_all_tasks_blocked()
                assert len(await response.aread()) == 2_000_000
            await open_connections(its.near, 0)

    on_loop(main)


def test_unused_connections_are_closed_in_time(on_loop: Run) -> None:
    """A connection that no request comes for is closed after `keepalive_expiry`."""

    async def main() -> None:
        async with setup() as its:
            transport = MeshTransport(its.mesh, limits=httpx.Limits(keepalive_expiry=0.5))
            async with httpx.AsyncClient(transport=transport) as client:
                await client.get("http://b/")
                assert its.near.open == 1
                await open_connections(its.near, 0)

    on_loop(main)


def test_hosts_that_were_asked_for_once_cost_nothing_for_ever(on_loop: Run) -> None:
    """What is kept for a service goes when nobody follows it any more: connections, and budgets of retries."""

    async def main() -> None:
        async with setup() as its:
            its.source.set("b", its.near.instance)
            its.source.set("c", its.far.instance)
            assert (await its.client.get("http://c/")).text == "n2"
            pools = its.transport._transport.pools
            assert list(pools._pools) == [its.far.instance.key]
            for state in list(its.mesh.core.services):
                del its.mesh.core.services._states[state.key]
            its.mesh.core.services._tell_followed()
            assert (await its.client.get("http://b/")).text == "n1"
            assert set(pools._members) == set(its.transport._transport.budgets) == {"b"}
            assert list(pools._pools) == [its.near.instance.key]
            await open_connections(its.far, 0)

    on_loop(main)


def test_closing_the_client_closes_the_connections(on_loop: Run) -> None:
    async def main() -> None:
        async with setup() as its:
            transport = MeshTransport(its.mesh)
            async with httpx.AsyncClient(transport=transport) as client:
                await client.get("http://b/")
            await open_connections(its.near, 0)
            assert len(transport._transport.pools) == 0
            assert list(its.mesh.core.listeners) == [its.transport._transport.pools._on_snapshot]

    on_loop(main)


def test_limits_on_requests_under_way(on_loop: Run) -> None:
    """A service's limit refuses at once what is one too many."""
    services = {"b": meshlocal.ServiceConfig(limits=meshlocal.LimitsConfig(requests=1))}

    async def main() -> None:
        source = FakeSource()
        async with (
            open_upstream(node="n1", behaviour=http()) as near,
            meshlocal.open_mesh(source, services=services) as mesh,
            httpx.AsyncClient(transport=MeshTransport(mesh)) as client,
        ):
            source.set("b", near.instance)
            async with client.stream("GET", "http://b/"):
                with pytest.raises(meshlocal.LimitedError, match="as many requests"):
                    await client.get("http://b/")
            assert (await client.get("http://b/")).status_code == 200

    on_loop(main)


def test_https(on_loop: Run) -> None:
    """A certificate is checked against the service's name, not the instance's address."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("b").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    async def main() -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = listener.extra(anyio.abc.SocketAttribute.local_port)

        async def serve(raw: anyio.abc.SocketStream) -> None:
            with contextlib.suppress(anyio.BrokenResourceError, anyio.EndOfStream, ssl.SSLError):
                async with raw:
                    stream = await anyio.streams.tls.TLSStream.wrap(
                        raw, server_side=True, ssl_context=server, standard_compatible=False
                    )
                    await stream.receive()
                    await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nsafe")

        source = FakeSource({name: [meshlocal.make_instance("127.0.0.1", port)] for name in ("b", "c")})
        async with listener, anyio.create_task_group() as tasks, meshlocal.open_mesh(source) as mesh:
            tasks.start_soon(listener.serve, serve)
            async with httpx.AsyncClient(transport=MeshTransport(mesh, ssl_context=trusting)) as client:
                assert (await client.get("https://b/")).text == "safe"
                with pytest.raises(HttpConnectError) as caught:
                    await client.get("https://c/")
                assert [each.error for each in caught.value.attempts] == ["tls"]
            tasks.cancel_scope.cancel()

    on_loop(main)


def test_an_instance_that_left_loses_its_connections_to_a_transport_that_came_later(on_loop: Run) -> None:
    """H2: made after the first snapshot, it has to know what was there."""

    async def main() -> None:
        async with setup() as its:
            assert (await its.client.get("http://b/")).text == "n1"
            later = MeshTransport(its.mesh)
            async with httpx.AsyncClient(transport=later) as client:
                its.near.refuse()
                assert (await client.get("http://b/")).text == "n2"
                await open_connections(its.far, 1)
                its.near.accept()
                its.source.set("b", its.near.instance)
                await open_connections(its.far, 0)

    on_loop(main)


def test_requests_beyond_the_limit_of_those_that_wait_are_refused(on_loop: Run) -> None:
    """`limits.waiting`: while an instance is slow to connect. It says nothing of that (H1)."""

    async def main() -> None:
        limited = meshlocal.ServiceConfig(limits=meshlocal.LimitsConfig(waiting=1))
        policy = AttemptPolicy(connect_timeout_local=5, connect_timeout=5)
        async with setup(policy, meshlocal.EjectionConfig(failures=1), service=limited) as its:
            its.near.hang()
            its.source.set("b", its.near.instance)

            def waiting() -> int:
                state = its.mesh.core.services.get(meshlocal.ServiceKey("b"))
                return 0 if state is None else state.circuit.now[Limit.WAITING]

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(its.client.get, "http://b/")
                with anyio.fail_after(10):
                    while not waiting():  # noqa: ASYNC110 - a count tells nobody
                        await anyio.sleep(0.001)
                with pytest.raises(HttpConnectError, match="limit_waiting"):
                    await its.client.get("http://b/")
                tasks.cancel_scope.cancel()
            assert not its.mesh.core.services[meshlocal.ServiceKey("b")].fitness.health.unfit

    on_loop(main)


def test_closing_the_client_under_way_says_nothing_of_instances(on_loop: Run) -> None:
    """H1: what the application does is no failure of theirs, and is not tried elsewhere."""

    async def main() -> None:
        async with setup(ejection=meshlocal.EjectionConfig(failures=1)) as its:
            its.near.behave(silent)
            client = httpx.AsyncClient(transport=MeshTransport(its.mesh), timeout=10)
            failed: list[Exception] = []

            async def ask() -> None:
                try:
                    await client.get("http://b/")
                except httpx.ReadError as error:
                    failed.append(error)

            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(ask)
                await open_connections(its.near, 3)
                await client.aclose()
            assert list(map(str, failed)) == ["the client was closed"] * 3
            health = its.mesh.core.services[meshlocal.ServiceKey("b")].fitness.health
            assert health.is_admitted(its.near.instance.key[:2])
            assert its.far.accepted == 0
            await open_connections(its.near, 0)

    on_loop(main)


@pytest.mark.parametrize("backend", ["trio", "asyncio"])
def test_http_and_https_of_one_instance_are_apart(backend: str) -> None:
    """And so are the names of its certificates: one that proved a name serves no other."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("b").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    def answer_both(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    def answer(raw: socket.socket) -> None:
        with_tls = raw.recv(1, socket.MSG_PEEK) == b"\x16"
        word = b"safe" if with_tls else b"open"
        with contextlib.suppress(OSError), server.wrap_socket(raw, server_side=True) if with_tls else raw as sock:
            while sock.recv(65536):
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + word)

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=answer_both, args=(listener,), daemon=True).start()
            port = listener.getsockname()[1]
            source = FakeSource({name: [meshlocal.make_instance("127.0.0.1", port)] for name in ("b", "c")})
            async with (
                meshlocal.open_mesh(source) as mesh,
                httpx.AsyncClient(transport=MeshTransport(mesh, ssl_context=trusting)) as client,
            ):
                for url, word in (("http://b/", "open"), ("https://b/", "safe"), ("http://b/", "open")):
                    assert (await client.get(url)).text == word
                with pytest.raises(HttpConnectError) as caught:
                    await client.get("https://c/")
                assert [each.error for each in caught.value.attempts] == ["tls"]
            listener.shutdown(socket.SHUT_RDWR)

    # No clock that jumps: it would know nothing of the server's threads.
    anyio.run(main, backend=backend)
