"""app/workers: one configuration in all workers, whole or not at all (S2); and what each of them has to itself (D2).

The workers here are tasks that speak as worker processes do. Those of `e2e/test_workers.py` are real ones.
"""

from __future__ import annotations

import os
import random
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar, TypeVarTuple, Unpack

import pytest
import trio
from trio.testing import MockClock

from meshlocal.app.config_loader import load_config
from meshlocal.app.operator import Operator
from meshlocal.app.worker_channel import Answer, Beat, Call, Channel, Configure, Ready, Start, StopOrder
from meshlocal.app.worker_pages import worker_routes
from meshlocal.app.workers import BEAT_INTERVAL, BEAT_LIMIT, Supervisor
from meshlocal.net.blocking import Blocking
from meshlocal.policy.config import Config
from nursery_tests.logged import entry
from nursery_tests.ports import free_port

FIXED = {"proxy.discovery.urls": ("grpc://127.0.0.1:1",), "proxy.admin": "none"}
LIMIT = 20


async def applies(config: Config) -> list[str]:
    await trio.lowlevel.checkpoint()
    return []


class FakeWorker:
    """A worker, and its process.

    Attributes:
        config: what it goes by: what it was started with, or applied last.
        applied: all that it was told to apply.
        on_configure: what it answers then; nothing prevents it by default.
        hangs: its event loop stands still, so that it does not answer whether it runs.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.channel = Channel(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
        self.number = 0
        self.config = Config()
        self.applied: list[Config] = []
        self.on_configure: Callable[[Config], Awaitable[object]] = applies
        self.returncode: int | None = None
        self.hangs = False
        self._ended = trio.Event()
        self._alive = trio.CancelScope()

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        self.end(-9)

    def end(self, status: int) -> None:
        if self.returncode is None:
            self.returncode = status
            self._ended.set()
            self._alive.cancel()

    async def run(self) -> None:
        try:
            with self._alive:
                while (message := await self.channel.receive()) is not None:
                    await self._hear(message)
            self.end(1)
        finally:
            with trio.CancelScope(shield=True):
                await self.channel.aclose()

    async def _hear(self, message: object) -> None:
        if isinstance(message, Start):
            self.number, self.config = message.number, message.config
            await self.channel.send(Ready([f"worker {message.number} of {message.of}"], []))
        elif isinstance(message, StopOrder):
            self.end(0)
        else:
            assert isinstance(message, Call)
            if isinstance(message.message, Beat):
                if not self.hangs:
                    await self.channel.send(Answer(message.number, True))
                return
            assert isinstance(message.message, Configure)
            config = message.message.config
            self.applied.append(config)
            answer = await self.on_configure(config)
            if answer == []:
                self.config = config
            await self.channel.send(Answer(message.number, answer))


T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class AtOnce(Blocking):
    """Does in the loop what blocks."""

    async def run(self, function: Callable[[Unpack[Ts]], T], *args: *Ts, waits: float = 0.0) -> T:
        await trio.lowlevel.checkpoint()
        return function(*args)


class Workers:
    """A supervisor of fake workers, over a configuration that the test changes."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.started: list[FakeWorker] = []
        self.changed: dict[str, object] = {}
        self.supervisor: Supervisor
        self._status: int | None = None

    async def open_process(self, command: Sequence[str], *, pass_fds: Sequence[int], **how: object) -> FakeWorker:
        """Instead of Trio's."""
        await trio.lowlevel.checkpoint()
        (descriptor,) = pass_fds
        made = FakeWorker(socket.socket(fileno=os.dup(descriptor)))
        self.started.append(made)
        self._nursery.start_soon(made.run)
        return made

    def _load(self) -> Config:
        return load_config(None, {**FIXED, **self.changed}, {}, "proxy")

    async def start(self, count: int = 3, **changed: Any) -> None:
        self.set(workers=count, **changed)
        self.supervisor = Supervisor(self._load, self._load(), random.Random(0), Operator({}), worker_routes)
        # While a thread works, a clock that jumps takes everybody for idle, and jumps to the next deadline.
        self.supervisor._files = AtOnce()
        self._nursery.start_soon(self._run)
        await self.until_ready()

    async def _run(self) -> None:
        self._status = await self.supervisor.run()

    async def stop(self) -> int | None:
        """Drain; returns the exit status."""
        self.supervisor.stop.request()
        with trio.fail_after(LIMIT):
            while self._status is None:  # noqa: ASYNC110 - another task's doing
                await trio.sleep(0.001)
        return self._status

    async def until_ready(self) -> None:
        with trio.fail_after(LIMIT):
            while not self.supervisor.readiness.ready:  # noqa: ASYNC110 - it has no event
                await trio.sleep(0.001)

    async def until_another(self, than: FakeWorker) -> None:
        """Wait for the one in a worker's place."""
        with trio.fail_after(LIMIT):
            while self[than.number] is than:  # noqa: ASYNC110 - the supervisor's doing
                await trio.sleep(0.001)

    def set(self, **changed: object) -> None:
        """Change keys of `proxy` in the configuration, for the next `reload`."""
        self.changed |= {f"proxy.{key}": value for key, value in changed.items()}

    def __getitem__(self, number: int) -> FakeWorker:
        """The worker that was given this number last."""
        return [worker for worker in self.started if worker.number == number][-1]

    def listen(self) -> list[list[int]]:
        """The ports that each worker's configuration has now."""
        return [
            [each.port for each in self[number].config.proxy.listen] for number in range(1, self.supervisor.count + 1)
        ]


@pytest.fixture
async def workers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Workers]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with trio.open_nursery() as nursery:
        made = Workers(nursery)
        monkeypatch.setattr("trio.lowlevel.open_process", made.open_process)
        yield made
        nursery.cancel_scope.cancel()
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def listener(port: int) -> str:
    return f"tcp://127.0.0.1:{port}=b"


def is_bound(port: int) -> bool:
    """Whether anybody holds the port, if only without listening."""
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return True
        return False


def refused(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [str(each.fields["problem"]) for each in map(entry, caplog.records) if each.event == "config not applied"]


async def test_each_worker_has_a_cache_file_of_its_own(workers: Workers) -> None:
    """D2: one file for all would be as young as the worker that wrote it last, whatever the others know."""
    cached: dict[str, Any] = {"discovery.cache_file": "/somewhere/snapshots"}
    await workers.start(listen=(listener(0),), **cached)
    files = [workers[number].config.proxy.discovery.cache_file for number in (1, 2, 3)]
    assert files == ["/somewhere/snapshots", "/somewhere/snapshots.2", "/somewhere/snapshots.3"]
    workers.set(node_name="n2")
    await workers.supervisor.reload()
    assert [workers[number].config.proxy.node_name for number in (1, 2, 3)] == ["n2"] * 3
    assert [workers[number].config.proxy.discovery.cache_file for number in (1, 2, 3)] == files
    assert await workers.stop() == 0


async def test_without_a_cache_file_no_worker_has_one(workers: Workers) -> None:
    await workers.start(listen=(listener(0),))
    assert [workers[number].config.proxy.discovery.cache_file for number in (1, 2, 3)] == [None] * 3
    assert await workers.stop() == 0


async def test_what_all_workers_apply_holds(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    """S2: in each of them, in those that are started later, and an address that nothing listens on any more is free."""
    stays, goes, comes = free_port(), free_port(), free_port()
    await workers.start(listen=(listener(stays), listener(goes)))
    assert workers.listen() == [[stays, goes]] * 3
    workers.set(listen=(listener(stays), listener(comes)))
    await workers.supervisor.reload()
    assert refused(caplog) == []
    assert workers.listen() == [[stays, comes]] * 3
    assert [is_bound(port) for port in (stays, goes, comes)] == [True, False, True]
    first = workers[2]
    first.end(-9)
    await workers.until_another(first)
    assert workers.listen() == [[stays, comes]] * 3
    await workers.until_ready()
    assert await workers.stop() == 0


@pytest.mark.parametrize(("answer", "said"), [(["no room"], "no room"), (None, "worker {} does not answer")])
async def test_what_the_last_worker_refuses_holds_in_none(
    workers: Workers, caplog: pytest.LogCaptureFixture, answer: object, said: str
) -> None:
    """S2: those that had applied it go back, it is said why, and the addresses that it would have taken are free."""
    stays, comes = free_port(), free_port()
    await workers.start(listen=(listener(stays),), node_name="n1")
    asked: list[int] = []

    async def apply(number: int, config: Config) -> object:
        await trio.lowlevel.checkpoint()
        asked.append(number)
        return answer if len(asked) == 3 else []

    for number in (1, 2, 3):
        workers[number].on_configure = partial(apply, number)
    workers.set(listen=(listener(stays), listener(comes)), node_name="n2")
    await workers.supervisor.reload()
    assert sorted(asked[:3]) == [1, 2, 3]
    assert refused(caplog) == [f"worker {asked[2]}: {said.format(asked[2])}"]
    assert workers.listen() == [[stays]] * 3
    assert [workers[number].config.proxy.node_name for number in (1, 2, 3)] == ["n1"] * 3
    assert workers[asked[2]].applied[-1].proxy.node_name == "n1", "what it did of it, if anything, is taken back too"
    assert workers.supervisor.config.proxy.node_name == "n1"
    assert (is_bound(stays), is_bound(comes)) == (True, False)
    # Mended, it is applied.
    await workers.supervisor.reload()
    assert workers.listen() == [[stays, comes]] * 3
    assert is_bound(comes)
    assert await workers.stop() == 0


async def test_what_the_first_worker_refuses_no_other_is_told(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    """S2."""
    await workers.start(listen=(listener(0),), node_name="n1")
    asked: list[int] = []

    async def refuse(number: int, config: Config) -> list[str]:
        await trio.lowlevel.checkpoint()
        asked.append(number)
        return ["no room", "no time"]

    for number in (1, 2, 3):
        workers[number].on_configure = partial(refuse, number)
    workers.set(node_name="n2")
    await workers.supervisor.reload()
    assert set(asked) == {asked[0]}
    assert refused(caplog) == [f"worker {asked[0]}: no room", f"worker {asked[0]}: no time"]
    assert [workers[number].config.proxy.node_name for number in (1, 2, 3)] == ["n1"] * 3
    assert await workers.stop() == 0


async def test_an_address_that_is_taken_changes_nothing_and_keeps_no_other(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    """S2: no worker is told of a configuration whose addresses cannot all be had."""
    stays, comes = free_port(), free_port()
    await workers.start(listen=(listener(stays),))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        workers.set(listen=(listener(comes), listener(taken.getsockname()[1]), listener(stays)))
        await workers.supervisor.reload()
    (said,) = refused(caplog)
    assert said.startswith("proxy.listen: ")
    assert "in use" in said
    assert [worker.applied for worker in workers.started] == [[], [], []]
    assert (is_bound(stays), is_bound(comes)) == (True, False)
    assert await workers.stop() == 0


async def test_a_worker_that_ends_while_it_is_asked_prevents_no_configuration(
    workers: Workers, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """S2: the one in its place begins with what holds then."""
    await workers.start(listen=(listener(0),), node_name="n1")
    first = workers[2]

    async def end(config: Config) -> list[str]:
        first.end(-9)
        await trio.lowlevel.checkpoint()
        return ["what nobody hears"]

    first.on_configure = end
    workers.set(node_name="n2")
    await workers.supervisor.reload()
    assert refused(caplog) == []
    await workers.until_another(first)
    assert [workers[number].config.proxy.node_name for number in (1, 2, 3)] == ["n2"] * 3
    await workers.until_ready()
    assert await workers.stop() == 0


async def test_a_worker_that_has_ended_before_it_is_asked_prevents_no_configuration(
    workers: Workers, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """S2: nor does it end the proxy."""
    await workers.start(listen=(listener(0),), node_name="n1")
    living = [workers[number] for number in (1, 2, 3)]
    supervisor = workers.supervisor

    async def end_the_others(number: int, config: Config) -> list[str]:
        for worker in living:
            if worker.number != number:
                worker.end(-9)
        while len(supervisor.workers) > 1:  # noqa: ASYNC110 - another task's doing
            await trio.sleep(0.001)
        return []

    for worker in living:
        worker.on_configure = partial(end_the_others, worker.number)
    workers.set(node_name="n2")
    with trio.fail_after(LIMIT):
        await supervisor.reload()
    assert refused(caplog) == []
    (first,) = [worker for worker in living if worker.returncode is None]
    for worker in living:
        if worker is not first:
            await workers.until_another(worker)
    assert [workers[number].config.proxy.node_name for number in (1, 2, 3)] == ["n2"] * 3
    await workers.until_ready()
    assert await workers.stop() == 0


async def test_a_worker_that_hangs_is_replaced(
    workers: Workers, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    """P1: it would go on to be given connections, and serve none of them. Those that answer are left alone."""
    await workers.start(listen=(listener(0),))
    living = [workers[number] for number in (1, 2, 3)]
    await trio.sleep(10 * BEAT_LIMIT)
    assert [worker.returncode for worker in living] == [None] * 3
    living[1].hangs = True
    began = trio.current_time()
    await workers.until_another(living[1])
    assert living[1].returncode == -9
    assert BEAT_LIMIT <= trio.current_time() - began <= BEAT_LIMIT + 2 * BEAT_INTERVAL + 1
    assert [living[number].returncode for number in (0, 2)] == [None, None]
    assert "worker hangs, and is killed" in caplog.text
