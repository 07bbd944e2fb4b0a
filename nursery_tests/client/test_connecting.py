"""The search for an instance: its attempts one after another, and those that are answered late (A1, A2, A5, A8)."""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from meshlocal.client import connecting
from meshlocal.client.account import Account
from meshlocal.client.connecting import Client
from meshlocal.client.ended import FailedAttempt
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import Outcome
from meshlocal.net.pipe import PlainPipe
from meshlocal.policy import model
from meshlocal.policy.config import AttemptPolicy, ServiceConfig
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import Instance, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.policy.retry import Failure
from nursery_tests.proxy.silent import silent

B = ServiceKey("b")
LIMIT = 10


class Connected:
    """How a search ended: the socket, or why there is none; and its account."""

    def __init__(self) -> None:
        self.account: Account | None = None
        self.upstream: socket.socket | None = None
        self.outcome: Outcome | None = None

    @property
    def attempts(self) -> int:
        assert self.account is not None
        return self.account.attempts

    @property
    def tier(self) -> str:
        assert self.account is not None
        return self.account.tier

    @property
    def error(self) -> str:
        assert self.account is not None
        return self.account.error

    @property
    def failures(self) -> list[FailedAttempt]:
        assert self.account is not None
        return self.account.failures or []


async def connect(client: Client, state: ServiceState, result: Connected) -> None:
    """Search, or go on with a search that gave an instance before."""
    if result.account is None:
        result.account = Account(trio.current_time())
        assert result.account.begin(state, state.policy.deadline) is None
    elif result.outcome is None and result.upstream is None:
        result.account.attempt_failed(Failure.NO_RESPONSE, trio.current_time(), "reset", sent=True)
    found = await connecting.connect(client, result.account)
    if isinstance(found, Outcome):
        result.outcome = found
    else:
        result.upstream = found.plain


def service(*instances: Instance, **policy: Any) -> ServiceState:
    """A service of these instances, sought from node n1."""
    state = ServiceState(B, Selector(Locality({"node": "n1"})), AttemptPolicy(**policy), random.Random(1))
    state.publish(ServiceSnapshot(B, "v", model.index(instances)))
    return state


def at(address: tuple[str, int], node: str = "n1") -> Instance:
    return make_instance(*address, labels={"node": node})


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as exits:
        yield exits


@pytest.fixture
def nobody() -> Iterator[int]:
    """A port on which every address of this host refuses."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        yield sock.getsockname()[1]


@pytest.fixture
def client() -> Iterator[tuple[Client, socket.socket]]:
    """A client, and its own end of the connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield Client(PlainPipe(ours)), theirs


async def test_for_a_client_that_has_left_nothing_is_begun() -> None:
    """A8: an attempt that nobody waits for would leave its socket behind."""
    state = ServiceState(B, Selector(Locality({"node": "n1"})), AttemptPolicy(), random.Random(1))
    state.publish(ServiceSnapshot(B, "v", model.index([make_instance("127.0.0.1", 1, labels={"node": "n1"})])))
    with socket.socket() as sock:
        client = Client(PlainPipe(sock))
        client.left = True
        result = Connected()
        await connect(client, state, result)
    assert (result.outcome, result.attempts, result.upstream) == (Outcome.CLIENT_LEFT, 0, None)
    assert not state.statistics.attempts


async def test_a_plan_goes_on_with_the_tiers_that_it_began_with() -> None:
    """S2, A5: whatever tiers there are by the time that the next instance is tried."""
    with socket.create_server(("127.0.0.1", 0)) as near, socket.create_server(("127.0.0.1", 0)) as far:
        zones = Selector(Locality({"node": "n1"}, prefer=("node", "zone")))
        state = ServiceState(B, zones, AttemptPolicy(), random.Random(1))
        instances = [
            make_instance("127.0.0.1", listener.getsockname()[1], labels={"node": node})
            for listener, node in ((near, "n1"), (far, "n2"))
        ]
        state.publish(ServiceSnapshot(B, "v", model.index(instances)))
        with socket.socket() as sock:
            client, result = Client(PlainPipe(sock)), Connected()
            tiers = []
            for _ in range(2):
                await connect(client, state, result)
                assert result.upstream is not None
                result.upstream.close()
                result.upstream = None
                tiers.append(result.tier)
                state.reselect(Selector(Locality({"node": "n1"})), AttemptPolicy(), EjectionConfig(), ServiceConfig())
    assert tiers == ["node", "other"]
    assert dict(state.statistics.attempts) == {("node", "connected"): 1, ("other", "connected"): 1}


async def test_going_on_has_what_is_left_of_the_time(
    client: tuple[Client, socket.socket], stack: ExitStack, autojump_clock: MockClock
) -> None:
    """A1, A5: one deadline is over all attempts, those after an instance that was connected too."""
    near = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    far = stack.enter_context(silent())
    state = service(
        at(near.getsockname()), at(far.key[:2], "n2"), deadline=10.0, connect_timeout=100.0, connect_timeout_local=100.0
    )
    result, began = Connected(), trio.current_time()
    await connect(client[0], state, result)
    assert result.upstream is not None
    result.upstream.close()
    result.upstream = None
    await trio.sleep(7)
    await connect(client[0], state, result)
    assert (result.outcome, result.tier) == (Outcome.DEADLINE, "other")
    assert trio.current_time() - began == pytest.approx(10.0)


async def test_instances_that_fail_at_once_let_others_run(client: tuple[Client, socket.socket], nobody: int) -> None:
    """A2: a long row of refusals keeps no other task waiting."""
    state = service(*(at((f"127.0.0.{last}", nobody)) for last in range(2, 52)))
    result, turns = Connected(), 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await connect(client[0], state, result)
        nursery.cancel_scope.cancel()
    assert (result.outcome, result.attempts) == (Outcome.FAILED, 50)
    assert turns >= 45


async def test_instances_that_fail_at_once_cannot_keep_a_search_from_its_end(
    client: tuple[Client, socket.socket], nobody: int
) -> None:
    """A2, S1: who cancels it in the midst of a row of refusals need not wait for the last one."""
    state = service(*(at((f"127.0.0.{last}", nobody)) for last in range(2, 52)))
    result = Connected()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect, client[0], state, result)
        for _ in range(5):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert 0 < result.attempts < 10


# Answers that are not there yet when the attempt begins: the usual case between two nodes.


@pytest.fixture(params=[connecting.SLOW, 0.0], ids=["within patience", "beyond it"])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connect has an answer only once it is waited for, as long as a client has patience, or longer."""

    class Unhurried(socket.socket):
        asked = 0

        def connect_ex(self, address: object) -> int:
            self.asked += 1
            return super().connect_ex(address) if self.asked == 1 else errno.EALREADY  # type: ignore[arg-type]  # the stub's type is private

    monkeypatch.setattr(connecting, "SLOW", request.param)
    monkeypatch.setattr(socket, "socket", Unhurried)


@pytest.mark.usefixtures("late")
async def test_a_late_answer_connects(client: tuple[Client, socket.socket], stack: ExitStack) -> None:
    """A1, H1."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    state, result = service(instance := at(listener.getsockname())), Connected()
    state.fitness.failed(instance, "refused")
    await connect(client[0], state, result)
    assert result.upstream is not None
    with result.upstream:
        assert result.upstream.getpeername() == listener.getsockname()
    assert (result.outcome, result.error, result.failures) == (None, "", [])
    assert state.statistics.attempts == {("node", "connected"): 1}
    assert state.fitness.health.quiet


@pytest.mark.usefixtures("late")
async def test_a_late_refusal_moves_on(client: tuple[Client, socket.socket], stack: ExitStack, nobody: int) -> None:
    """A2, H1: to the next instance; what failed is told, closed, and counts against its instance."""
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    state = service(refusing := at(("127.0.0.1", nobody)), at(listener.getsockname(), "n2"))
    open_before = len(os.listdir("/proc/self/fd"))
    for number in range(1, 4):
        result = Connected()
        await connect(client[0], state, result)
        assert result.upstream is not None
        result.upstream.close()
        assert (result.tier, result.attempts, result.error) == ("other", 2, "")
        (failure,) = result.failures
        assert (failure.pick.instance, failure.error, failure.errno) == (refusing, "refused", errno.ECONNREFUSED)
        assert state.fitness.health.is_admitted(refusing.key[:2]) == (number < 3)
    assert state.statistics.attempts == {("node", "refused"): 3, ("other", "connected"): 3}
    assert len(os.listdir("/proc/self/fd")) == open_before


@pytest.mark.usefixtures("late")
async def test_when_the_last_refusal_is_late_the_search_has_failed(
    client: tuple[Client, socket.socket], nobody: int
) -> None:
    """A2, A6."""
    state, result = service(at(("127.0.0.1", nobody))), Connected()
    await connect(client[0], state, result)
    assert (result.outcome, result.upstream) == (Outcome.FAILED, None)
    assert (result.error, result.failures[-1].errno) == ("refused", errno.ECONNREFUSED)


@contextmanager
def at_leisure() -> Iterator[tuple[Instance, socket.socket]]:
    """An instance that answers nobody until its socket connects to who waits (simultaneous open, RFC 9293, 3.5)."""
    with ExitStack() as stack:
        listener, answering = (stack.enter_context(socket.socket()) for _ in range(2))
        for sock in (listener, answering):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        # Its queue is full from the start.
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        answering.bind(listener.getsockname())
        answering.settimeout(LIMIT)
        yield at(listener.getsockname()), answering


def ports_waiting(for_port: int) -> set[int]:
    """The local ports of connects to a port that have no answer."""
    rows = (line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:])
    syn_sent = "02"
    return {
        int(local.partition(":")[2], 16)
        for _, local, remote, state, *_ in rows
        if state == syn_sent and int(remote.partition(":")[2], 16) == for_port
    }


async def test_what_a_client_says_while_an_answer_is_late_is_kept(client: tuple[Client, socket.socket]) -> None:
    """A1: the client is watched meanwhile, and still there when the instance answers at last."""
    waiting, far_end = client
    far_end.send(b"hello")
    with at_leisure() as (instance, answering):
        port = instance.key.port
        fillers = ports_waiting(port)
        state, result = service(instance, connect_timeout_local=LIMIT, deadline=LIMIT), Connected()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect, waiting, state, result)
            with trio.fail_after(LIMIT):
                while not waiting.early:  # noqa: ASYNC110 - plain bytes, with no event to wait for
                    await trio.sleep(0.001)
            (local,) = ports_waiting(port) - fillers
            answering.connect(("127.0.0.1", local))
        assert result.upstream is not None
        with result.upstream:
            result.upstream.send(waiting.early)
            assert answering.recv(64) == b"hello"
    assert not waiting.left
    assert state.statistics.attempts == {("node", "connected"): 1}
