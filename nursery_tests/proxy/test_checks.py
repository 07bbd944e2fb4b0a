"""Active checks: what each kind finds, and what becomes of it (H3)."""

from __future__ import annotations

import errno
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import meshlocal.proxy.checks
from meshlocal.client.services import ServiceTable
from meshlocal.net.grpc.health import HealthStatus
from meshlocal.net.grpc.server import GrpcServer
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.policy import model
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.config import ProxyConfig, ServiceConfig
from meshlocal.policy.config_health import HealthCheckConfig
from meshlocal.policy.health import State
from meshlocal.policy.locality import Locality
from meshlocal.policy.model import Instance, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.proxy.checkers import CheckFailed, make_check
from meshlocal.proxy.checks import HealthChecks
from meshlocal.wire.pb.health_pb2 import HealthCheckResponse
from nursery_tests.ports import free_port

B = ServiceKey("b")
LIMIT = 20

Talk = Callable[[trio.SocketStream], Awaitable[None]]


async def listen(nursery: trio.Nursery, talk: Talk) -> int:
    """A server that talks in a certain way; its port."""

    async def serve(stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await talk(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    listeners = await nursery.start(trio.serve_tcp, serve, 0)
    return int(listeners[0].socket.getsockname()[1])


def saying(answer: bytes) -> Talk:
    async def talk(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)

    return talk


async def reset(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def silent(stream: trio.SocketStream) -> None:
    await stream.receive_some()
    await trio.sleep_forever()


async def outcome(port: int, **config: Any) -> str | None:
    """How one check fails; None if it passes."""
    with trio.fail_after(LIMIT):
        try:
            await make_check(HealthCheckConfig(**config))("127.0.0.1", port)
        except CheckFailed as failed:
            return str(failed)
    return None


async def test_tcp_passes_where_a_connection_lasts(nursery: trio.Nursery) -> None:
    """H3: whether or not the server speaks first."""
    assert await outcome(await listen(nursery, silent), kind="tcp") is None
    assert await outcome(await listen(nursery, saying(b"hello")), kind="tcp") is None


async def test_tcp_fails_where_connections_are_refused_or_reset(nursery: trio.Nursery) -> None:
    """H3."""
    assert await outcome(free_port(), kind="tcp") == "refused"
    assert await outcome(await listen(nursery, reset), kind="tcp") == "reset"


@pytest.mark.parametrize(
    ("answer", "status", "problem"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", None, None),
        (b"HTTP/1.1 301 Moved\r\nlocation: /x\r\n\r\n", None, None),
        (b"HTTP/1.0 204 None\r\n\r\nrest", 204, None),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", None, None),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", 404, None),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", None, "status 404"),
        (b"HTTP/1.1 503 Busy\r\n\r\n", None, "status 503"),
        (b"HTTP/1.1 200 OK\r\n\r\n", 204, "status 200"),
        (b"SSH-2.0-x\r\n\r\n", None, "bad_status_line"),
        (b"HTTP/1.1 200 OK\r\ncontent", None, "ended its response within the head"),
        (b"", None, "ended without a response"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 200_000, None, "head_too_large"),
    ],
)
async def test_http_goes_by_the_status(
    nursery: trio.Nursery, answer: bytes, status: int | None, problem: str | None
) -> None:
    """H3."""
    port = await listen(nursery, saying(answer))
    assert await outcome(port, kind="http", status=status) == problem


async def test_http_asks_for_what_is_configured(nursery: trio.Nursery) -> None:
    """H3."""
    asked = []

    async def talk(stream: trio.SocketStream) -> None:
        asked.append(await stream.receive_some())
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")

    port = await listen(nursery, talk)
    assert await outcome(port, kind="http", path="/live?x=1", host="b.example") is None
    assert asked == [b"GET /live?x=1 HTTP/1.1\r\nhost: b.example\r\nuser-agent: meshlocal\r\nconnection: close\r\n\r\n"]


async def test_http_fails_where_nothing_can_be_had(nursery: trio.Nursery) -> None:
    """H3."""
    assert await outcome(free_port(), kind="http") == "refused"
    assert await outcome(await listen(nursery, reset), kind="http") == "reset"


async def test_grpc_goes_by_the_health_service(nursery: trio.Nursery) -> None:
    """H3: grpc.health.v1, of the whole server or of one service."""
    health = HealthStatus()
    health.set("", HealthCheckResponse.SERVING)
    health.set("a.B", HealthCheckResponse.NOT_SERVING)
    sockets = open_tcp_listeners("127.0.0.1", 0)
    await nursery.start(GrpcServer(health.handlers()).serve, sockets)
    port = sockets[0].getsockname()[1]
    assert await outcome(port, kind="grpc") is None
    assert await outcome(port, kind="grpc", service="a.B") == "NOT_SERVING"
    assert await outcome(port, kind="grpc", service="a.C") == "no service 'a.C' here"
    assert await outcome(free_port(), kind="grpc") == "refused"
    assert await outcome(await listen(nursery, saying(b"HTTP/1.1 400 Bad\r\n\r\n")), kind="grpc") is not None
    nursery.cancel_scope.cancel()


class Checked:
    """A service whose checks do what the test says, on a clock that jumps."""

    def __init__(self, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        self.nursery = nursery
        self.problem: str | Exception | None = None
        self.times: list[float] = []
        self.targets: set[tuple[str, int]] = set()
        self.paths: set[str | None] = set()
        monkeypatch.setattr(meshlocal.proxy.checks, "make_check", lambda config: self._check)
        self.config = HealthCheckConfig(**{"kind": "http", "interval": 10.0, **config})
        self.table = ServiceTable(self._proxy(self.config), Locality({"node": "n1"}), random.Random(1))
        self.checks = HealthChecks(self.table, random.Random(1))
        self.instance = make_instance("10.0.0.1", 9000, labels={"node": "n1"})

    async def _check(self, address: str, port: int, path: str | None = None) -> None:
        self.times.append(trio.current_time())
        self.targets.add((address, port))
        self.paths.add(path)
        await trio.lowlevel.checkpoint()
        if self.problem == "hangs":
            await trio.sleep_forever()
        if isinstance(self.problem, Exception):
            raise self.problem
        if self.problem is not None:
            raise CheckFailed(self.problem)

    def _proxy(self, check: HealthCheckConfig | None) -> ProxyConfig:
        listen = (ListenAddress.parse("tcp://127.0.0.1:0=b"),)
        return ProxyConfig(listen=listen, services={B: ServiceConfig(health_check=check)}, socket_folder="/run/s")

    def configure(self, check: HealthCheckConfig | None) -> None:
        self.table.reconfigure(self._proxy(check), self.table.locality)

    def publish(self, *instances: Instance) -> None:
        self.table.publish(ServiceSnapshot(B, str(trio.current_time()), model.index(instances)))

    def start(self, *instances: Instance) -> None:
        self.publish(*(instances or [self.instance]))
        self.nursery.start_soon(self.checks.run)

    def state(self) -> State:
        return self.table[B].fitness.health.standing(self.instance.key[:2], trio.current_time()).state

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.table[B].statistics.checks)


@pytest.fixture
def checked(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda **config: Checked(nursery, monkeypatch, **config)


async def test_checks_come_once_an_interval_at_a_moment_of_their_own(checked: Any, autojump_clock: MockClock) -> None:
    """H3: first within the interval, then about once each."""
    made = checked()
    began = trio.current_time()
    made.start()
    await trio.sleep(100)
    assert 8 <= len(made.times) <= 11
    assert began <= made.times[0] <= began + 10.5
    gaps = [after - before for before, after in zip(made.times, made.times[1:], strict=False)]
    assert all(9 <= gap <= 11 for gap in gaps)
    assert len(set(gaps)) > 1
    assert made.counts == {"passed": len(made.times)}


async def test_checks_that_fail_in_a_row_put_the_instance_last_until_one_passes(
    checked: Any, autojump_clock: MockClock
) -> None:
    """H3, O5."""
    made = checked(failures=3)
    made.problem = "status 500"
    made.start()
    await trio.sleep(10.5)
    assert (made.counts, made.state()) == ({"failed": 1}, State.ADMITTED)
    await trio.sleep(25)
    assert made.state() is State.FAILING
    made.problem = None
    await trio.sleep(12)
    assert made.state() is State.ADMITTED


async def test_a_check_that_does_not_end_fails(checked: Any, autojump_clock: MockClock) -> None:
    """H3: its limit."""
    made = checked(failures=1, timeout=2.0)
    made.problem = "hangs"
    made.start()
    await trio.sleep(13)
    assert made.state() is State.FAILING


async def test_a_passed_check_readmits_what_requests_ejected(checked: Any, autojump_clock: MockClock) -> None:
    """H3, H1: the same state."""
    made = checked()
    made.start()
    for _ in range(3):
        made.table[B].fitness.failed(made.instance, "refused")
    assert made.state() is State.EJECTED
    await trio.sleep(11)
    assert made.state() is State.ADMITTED


async def test_that_this_host_ran_out_of_descriptors_is_no_failure(checked: Any, autojump_clock: MockClock) -> None:
    """H3."""
    made = checked(failures=1)
    made.problem = "no_descriptors"
    made.start()
    await trio.sleep(50)
    assert made.state() is State.ADMITTED
    assert made.counts["failed"] >= 4


async def test_a_fault_in_a_check_is_a_failure_and_ends_nothing(checked: Any, autojump_clock: MockClock) -> None:
    """H3: what one instance sends must not harm the others."""
    made = checked(failures=1)
    made.problem = OSError(errno.EIO, "unforeseen")
    made.start()
    await trio.sleep(30)
    assert made.state() is State.FAILING
    made.problem = None
    await trio.sleep(12)
    assert made.state() is State.ADMITTED


async def test_instances_that_come_are_checked_and_those_gone_are_not(checked: Any, autojump_clock: MockClock) -> None:
    """H3, H2."""
    made = checked()
    other = make_instance("10.0.0.2", 9000)
    made.start()
    await trio.sleep(15)
    assert made.targets == {("10.0.0.1", 9000)}
    made.publish(other)
    await trio.sleep(1)
    made.targets.clear()
    await trio.sleep(30)
    assert made.targets == {("10.0.0.2", 9000)}


async def test_another_port_can_be_checked(checked: Any, autojump_clock: MockClock) -> None:
    """H3: port."""
    made = checked(port=8080)
    made.start()
    await trio.sleep(11)
    assert made.targets == {("10.0.0.1", 8080)}


@pytest.mark.parametrize(("port", "path"), [(None, "/run/s/b.sock"), (9001, None)])
async def test_a_check_goes_where_requests_go(
    checked: Any, autojump_clock: MockClock, port: int | None, path: str | None
) -> None:
    """To the instance's Unix socket, if it has one; a port of its own is a port."""
    made = checked(port=port)
    made.start(make_instance("10.0.0.1", 9000, labels={"node": "n1", "socket": "b.sock"}))
    await trio.sleep(15)
    assert made.paths == {path}


async def test_a_reload_without_checks_ends_them_and_their_verdict(checked: Any, autojump_clock: MockClock) -> None:
    """H3, S2."""
    made = checked(failures=1)
    made.problem = "status 500"
    made.start()
    await trio.sleep(11)
    assert made.state() is State.FAILING
    made.configure(None)
    await trio.sleep(1)
    count = len(made.times)
    assert made.state() is State.ADMITTED
    await trio.sleep(50)
    assert len(made.times) == count
    made.configure(made.config)
    await trio.sleep(12)
    assert len(made.times) > count


async def test_only_so_many_checks_at_once(
    checked: Any, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H3: bounded, and each gets its turn."""
    made = checked(timeout=5.0)
    made.problem = "hangs"
    made.start(*(make_instance(f"10.1.{n // 200}.{n % 200 + 1}", 9000) for n in range(300)))
    await trio.sleep(11)
    assert made.checks._turns.borrowed_tokens == meshlocal.proxy.checks.AT_ONCE
    await trio.sleep(60)
    assert len(made.targets) == 300
