"""net/listen: what is bound, what is refused, and an accept loop that nothing but a broken listener ends."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import trio
import trio.testing

from meshlocal.net import listen
from meshlocal.net.listen import (
    ACCEPT_BATCH,
    ListenError,
    Started,
    accept_each,
    accept_loop,
    accept_queued,
    open_tcp_listeners,
)
from meshlocal.net.relay_loop import RelayLoop, open_relay_loop
from nursery_tests.ports import free_port


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6 loopback")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as exits:
        yield exits


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_ipv4_listener_is_non_blocking_and_reusable(stack: ExitStack) -> None:
    [listener] = map(stack.enter_context, open_tcp_listeners("127.0.0.1", 0))
    assert listener.getsockname()[0] == "127.0.0.1"
    assert listener.getsockname()[1] != 0
    assert listener.gettimeout() == 0
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 1
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


@needs_ipv6
@pytest.mark.parametrize("host", ["localhost", ""])
def test_both_families_share_one_port(stack: ExitStack, host: str) -> None:
    first, second = map(stack.enter_context, open_tcp_listeners(host, 0))
    assert (first.family, second.family) == (socket.AF_INET, socket.AF_INET6)
    assert first.getsockname()[1] == second.getsockname()[1]


@needs_ipv6
def test_both_wildcards_can_be_bound_one_after_the_other(stack: ExitStack) -> None:
    # One that the system chooses for the one family may be taken in the other, by any connection.
    [six] = map(stack.enter_context, open_tcp_listeners("::", free_port("::", "0.0.0.0")))
    [four] = map(stack.enter_context, open_tcp_listeners("0.0.0.0", six.getsockname()[1]))
    assert four.getsockname()[1] == six.getsockname()[1]


@needs_ipv6
def test_a_chosen_port_that_the_other_family_lacks_is_chosen_again(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[tuple[object, ...]] = []

    class Contended(socket.socket):
        def bind(self, address: tuple[object, ...]) -> None:  # type: ignore[override]  # narrower than the stub's
            bound.append(address)
            if len(bound) == 2:
                raise OSError(errno.EADDRINUSE, "taken")
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Contended)
    first, second = map(stack.enter_context, open_tcp_listeners("localhost", 0))
    assert len(bound) == 4
    assert bound[2][1] == 0
    assert first.getsockname()[1] == second.getsockname()[1]


@pytest.mark.parametrize("missing", [socket.AF_INET, socket.AF_INET6])
def test_localhost_does_with_the_one_family_that_there_is(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    if missing == socket.AF_INET and not has_ipv6():
        pytest.skip("this host has no IPv6 loopback")

    class Single(socket.socket):
        def __init__(self, family: int = -1, *rest: int) -> None:
            if family == missing:
                raise OSError(errno.EAFNOSUPPORT, "no such family")
            super().__init__(family, *rest)

    monkeypatch.setattr(socket, "socket", Single)
    [listener] = map(stack.enter_context, open_tcp_listeners("localhost", 0))
    assert listener.family != missing


def test_a_host_without_any_family_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, "no such family")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(ListenError, match=r"\[::1\]:0: Address family not supported"):
        open_tcp_listeners("localhost", 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_in_use_is_named_and_nothing_stays_open(stack: ExitStack, host: str) -> None:
    [taken] = map(stack.enter_context, open_tcp_listeners("127.0.0.1", 0))
    port = taken.getsockname()[1]
    before = open_files()
    with pytest.raises(ListenError) as caught:
        open_tcp_listeners(host, port)
    assert str(caught.value) == f"cannot listen on 127.0.0.1:{port}: Address already in use"
    assert caught.value.errno == errno.EADDRINUSE
    assert open_files() == before


@needs_ipv6
def test_a_fixed_port_taken_in_the_second_family_closes_the_first(stack: ExitStack) -> None:
    [six] = map(stack.enter_context, open_tcp_listeners("::1", 0))
    port = six.getsockname()[1]
    before = open_files()
    with pytest.raises(ListenError, match=rf"\[::1\]:{port}: Address already in use"):
        open_tcp_listeners("localhost", port)
    assert open_files() == before


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("example.org", 80, "cannot listen on example.org:80: the host is neither an IP address nor localhost"),
        ("1.2.3", 80, "neither an IP address"),
        ("127.0.0.1", 65536, "the port is not within 0 to 65535"),
        ("127.0.0.1", -1, "the port is not within 0 to 65535"),
        ("203.0.113.7", 0, "203.0.113.7:0: Cannot assign requested address"),
        ("fe80::1%nowhere", 0, r"\[fe80::1%nowhere\]:0: "),
    ],
)
def test_bad_addresses_say_which_and_why(host: str, port: int, message: str) -> None:
    before = open_files()
    with pytest.raises(ListenError, match=message):
        open_tcp_listeners(host, port)
    assert open_files() == before


def no_error(error: OSError) -> None:
    raise AssertionError(error)


@pytest.fixture(params=["loop", "tasks"])
async def accepting(request: pytest.FixtureRequest) -> AsyncIterator[RelayLoop | None]:
    """With a relay loop, in which connections are accepted then, and without."""
    with open_relay_loop() if request.param == "loop" else nullcontext() as loop:
        yield loop


@pytest.mark.usefixtures("accepting")
async def test_accepted_sockets_are_non_blocking_with_nodelay(stack: ExitStack) -> None:
    [listener] = map(stack.enter_context, open_tcp_listeners("127.0.0.1", 0))
    seen: list[object] = []
    done = trio.Event()

    async def handle(client: socket.socket, peer: object) -> None:
        with client:
            nodelay = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            seen.extend([client.gettimeout(), bool(nodelay), peer])
        done.set()

    with socket.create_connection(listener.getsockname()) as dialled:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: accept_loop(listener, nursery, handle, on_error=no_error))
            await done.wait()
            nursery.cancel_scope.cancel()
        assert seen == [0, True, dialled.getsockname()]
    assert listener.fileno() != -1  # the caller's to close


@pytest.mark.usefixtures("accepting")
async def test_unix_listeners_are_served_too(stack: ExitStack) -> None:
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(b"")  # the kernel chooses an abstract name
    listener.listen()
    listener.setblocking(False)
    families: list[int] = []

    async def handle(client: socket.socket, _: object) -> None:
        families.append(client.family)
        client.send(b"served")
        client.close()

    dialled = stack.enter_context(socket.socket(socket.AF_UNIX))
    dialled.connect(listener.getsockname())
    dialled.setblocking(False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: accept_loop(listener, nursery, handle, on_error=no_error))
        await until(lambda: families)
        nursery.cancel_scope.cancel()
    assert families == [socket.AF_UNIX]
    assert (dialled.recv(9), dialled.recv(9)) == (b"served", b"")


class Scripted:
    """A listener whose accept() goes through a script; at its end it stops the test by cancelling."""

    def __init__(self, *script: int | str) -> None:
        self.script = list(script)
        self.scope = trio.CancelScope()
        self.opened: list[socket.socket] = []
        self.others: list[socket.socket] = []
        self._idle, self._far = socket.socketpair()

    def accept(self) -> tuple[socket.socket, object]:
        if not self.script:
            self.scope.cancel()
            raise BlockingIOError
        step = self.script.pop(0)
        if isinstance(step, int):
            raise OSError(step, os.strerror(step))
        near, far = socket.socketpair()
        self.opened.append(near)
        self.others.append(far)
        return near, step

    def fileno(self) -> int:
        return self._idle.fileno()

    def close(self) -> None:
        for each in (*self.opened, *self.others, self._idle, self._far):
            each.close()


async def run(scripted: Scripted) -> tuple[list[object], list[OSError]]:
    peers: list[object] = []
    errors: list[OSError] = []

    async def handle(client: socket.socket, peer: object) -> None:
        client.close()
        peers.append(peer)

    async with trio.open_nursery() as nursery:
        with scripted.scope:
            # What accept_loop uses of a socket is accept() and, for trio's waits, fileno().
            await accept_loop(scripted, nursery, handle, on_error=errors.append)  # type: ignore[arg-type]  # a scripted listener
    return peers, errors


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_exhaustion_is_reported_waited_out_and_never_fatal(
    autojump_clock: trio.testing.MockClock, stack: ExitStack, number: int
) -> None:
    scripted = Scripted(number, number, "a", number, "b")
    stack.callback(scripted.close)
    start = trio.current_time()
    peers, errors = await run(scripted)
    assert sorted(map(str, peers)) == ["a", "b"]
    assert [error.errno for error in errors] == [number] * 3
    assert trio.current_time() - start == pytest.approx(0.3)


async def test_nothing_is_accepted_while_no_descriptor_below_the_ceiling_is_free(
    autojump_clock: trio.testing.MockClock, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was accepted gets its turn; the next waits until a descriptor below the ceiling is free."""
    # Which descriptors are free is a matter of the whole process: see the next test.
    monkeypatch.setattr(listen, "_is_free_below", lambda ceiling, _: bool(freed))
    scripted = Scripted("a", "b")
    stack.callback(scripted.close)
    errors: list[Any] = []
    served: list[Any] = []
    freed: list[object] = []

    async def handle(client: socket.socket, peer: object) -> None:
        served.append((trio.current_time() - start, peer))
        await trio.sleep(0.25)
        client.close()
        freed.append(peer)

    def failed(error: OSError) -> None:
        errors.append((trio.current_time() - start, error.errno))

    async with trio.open_nursery() as nursery:
        start = trio.current_time()
        with scripted.scope:
            await accept_loop(scripted, nursery, handle, on_error=failed, ceiling=1)  # type: ignore[arg-type]  # a scripted listener
    assert errors == [(pytest.approx(at), errno.EMFILE) for at in (0, 0.1, 0.2)]
    assert served == [(0, "a"), (pytest.approx(0.3), "b")]


_FEW_DESCRIPTORS = """
import os, resource, socket, sys, trio
from contextlib import nullcontext
from meshlocal.net.listen import accept_loop, open_tcp_listeners
from meshlocal.net.relay_loop import open_relay_loop
LIMIT, CEILING = 100, 70
resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT))

def free():
    found = []
    try:
        while True:
            found.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return len(found)
    finally:
        for number in found:
            os.close(number)

def failed(error):
    global told
    if not told:
        told = True
        print(error.errno, open_now, free(), flush=True)

async def handle(client, peer):
    global open_now
    open_now += 1
    await trio.lowlevel.wait_readable(client)
    client.close()
    open_now -= 1

async def main():
    [listener] = open_tcp_listeners("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    with open_relay_loop() if sys.argv[1] == "loop" else nullcontext():
        async with trio.open_nursery() as nursery:
            await accept_loop(listener, nursery, handle, on_error=failed, ceiling=CEILING)

open_now, told = 0, False
trio.run(main)
"""


@pytest.mark.parametrize("path", ["loop", "tasks"])
def test_descriptors_from_the_ceiling_on_are_left_to_others(stack: ExitStack, path: str) -> None:
    """More clients than descriptors: some wait in the queue, those above the ceiling stay free, and none is lost."""
    command = [sys.executable, "-c", _FEW_DESCRIPTORS, path]
    server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    stack.callback(server.kill)
    assert server.stdout is not None
    port = int(server.stdout.readline())
    clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)) for _ in range(200)]
    number, served, free = map(int, server.stdout.readline().split())
    assert number == errno.EMFILE
    assert 0 < served < 70
    # One descriptor may have been given beyond the ceiling before the loop looked.
    assert free >= 29
    for client in clients:
        client.shutdown(socket.SHUT_WR)
    for client in clients:
        assert client.recv(1) == b""


@pytest.mark.parametrize(
    "number",
    [
        errno.ECONNABORTED,
        errno.EPERM,
        errno.EPROTO,
        errno.ENETDOWN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ENONET,
    ],
)
async def test_connections_that_failed_early_are_passed_over_at_once(
    autojump_clock: trio.testing.MockClock, stack: ExitStack, number: int
) -> None:
    scripted = Scripted(number, "a", number)
    stack.callback(scripted.close)
    start = trio.current_time()
    assert await run(scripted) == (["a"], [])
    assert trio.current_time() == start


async def test_only_early_failures_still_let_others_run(stack: ExitStack) -> None:
    scripted = Scripted(*[errno.ECONNABORTED] * (ACCEPT_BATCH * 3))
    stack.callback(scripted.close)
    left: list[int] = []

    async def watch() -> None:
        while scripted.script:
            left.append(len(scripted.script))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await run(scripted)
    assert set(left) & {ACCEPT_BATCH, ACCEPT_BATCH * 2}


async def test_another_error_propagates(stack: ExitStack) -> None:
    scripted = Scripted(errno.EINVAL)
    stack.callback(scripted.close)
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="Invalid argument")):
        await run(scripted)


async def test_batches_are_bounded(stack: ExitStack) -> None:
    scripted = Scripted(*["x"] * (ACCEPT_BATCH * 2 + 1))
    stack.callback(scripted.close)
    left: list[int] = []

    async def watch() -> None:
        while scripted.script:
            left.append(len(scripted.script))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        peers, _ = await run(scripted)
    assert len(peers) == ACCEPT_BATCH * 2 + 1
    # Another task ran between the batches, and never within one.
    assert {ACCEPT_BATCH + 1, 1} & set(left)
    assert set(left) <= {ACCEPT_BATCH * 2 + 1, ACCEPT_BATCH + 1, 1}


async def test_a_socket_whose_handler_cannot_start_is_closed(stack: ExitStack) -> None:
    scripted = Scripted("a")
    stack.callback(scripted.close)
    async with trio.open_nursery() as closed:
        pass

    async def never(client: socket.socket, peer: object) -> None:
        raise AssertionError

    with pytest.raises(RuntimeError, match="Nursery is closed"):
        await accept_loop(scripted, closed, never, on_error=no_error)  # type: ignore[arg-type]  # see run()
    assert scripted.opened[0].fileno() == -1


async def test_cancelled_while_waiting_and_while_pausing(
    autojump_clock: trio.testing.MockClock, stack: ExitStack
) -> None:
    [listener] = map(stack.enter_context, open_tcp_listeners("127.0.0.1", 0))
    paused = Scripted(*[errno.EMFILE] * 100)
    stack.callback(paused.close)

    async def never(client: socket.socket, peer: object) -> None:
        raise AssertionError

    async with trio.open_nursery() as nursery:
        for each in (listener, paused):
            with trio.move_on_after(0.25) as scope:
                await accept_loop(each, nursery, never, on_error=lambda _: None)  # type: ignore[arg-type]  # see run()
            assert scope.cancelled_caught
    assert listener.fileno() != -1
    assert len(paused.script) == 97


def dial(stack: ExitStack, listener: socket.socket, count: int) -> list[socket.socket]:
    """Connections that wait in the listener's queue: nothing has run that could have accepted them."""
    return [stack.enter_context(socket.create_connection(listener.getsockname(), timeout=30)) for _ in range(count)]


async def until(holds: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not holds():  # noqa: ASYNC110 - what the kernel brings about sets no event
            await trio.sleep(0.001)


class Taken:
    """Takes connections without a task for each; holds them until the end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.peers: list[object] = []

    def __call__(self, client: socket.socket, peer: object) -> Started:
        self._stack.enter_context(client)
        self.peers.append(peer)
        return Started.NOTHING


async def test_every_connection_is_taken_once_also_across_a_stop(stack: ExitStack, accepting: RelayLoop | None) -> None:
    """S1: what was not accepted when the acceptor was cancelled is for `accept_queued`, and nothing for both."""
    [listener] = map(stack.enter_context, open_tcp_listeners("127.0.0.1", 0))
    taken = Taken(stack)
    names: list[object] = []
    for some in (1, 2, 3):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: accept_each(listener, taken, on_error=no_error))
            names += [each.getsockname() for each in dial(stack, listener, 3 * ACCEPT_BATCH)]
            await until(lambda some=some: len(taken.peers) >= some * ACCEPT_BATCH)  # type: ignore[misc]  # binds this round's
            names += [each.getsockname() for each in dial(stack, listener, 1)]
            nursery.cancel_scope.cancel()
        if accepting is not None:
            assert not accepting.handlers
        accept_queued(listener, taken)
        assert sorted(map(str, taken.peers)) == sorted(map(str, names))


async def test_a_stopped_acceptor_leaves_connections_in_the_queue(
    stack: ExitStack, accepting: RelayLoop | None
) -> None:
    """A listener is heard by nobody while nobody accepts, and by the next who does."""
    [listener] = map(stack.enter_context, open_tcp_listeners("127.0.0.1", 0))
    first, second = Taken(stack), Taken(stack)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: accept_each(listener, first, on_error=no_error))
        dial(stack, listener, 1)
        await until(lambda: len(first.peers) == 1)
        nursery.cancel_scope.cancel()
    dial(stack, listener, 1)
    await trio.testing.wait_all_tasks_blocked()
    assert len(first.peers) == 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: accept_each(listener, second, on_error=no_error))
        await until(lambda: len(second.peers) == 1)
        nursery.cancel_scope.cancel()
    assert len(first.peers) == 1


class Flaky:
    """A real listener that first fails some of its accepts."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.family, self.type, self.proto = listener.family, listener.type, listener.proto
        self.errors: list[int] = []

    def accept(self) -> tuple[socket.socket, object]:
        self._fail()
        return self._listener.accept()

    def _accept(self) -> Any:
        self._fail()
        listener: Any = self._listener
        return listener._accept()

    def _fail(self) -> None:
        if self.errors:
            number = self.errors.pop(0)
            raise OSError(number, os.strerror(number))

    def fileno(self) -> int:
        return self._listener.fileno()


async def test_exhaustion_met_in_the_loop_is_waited_out(
    stack: ExitStack, autojump_clock: trio.testing.MockClock
) -> None:
    """The task hears of it, pauses, and the loop goes on."""
    with open_relay_loop():
        [listener] = map(stack.enter_context, open_tcp_listeners("127.0.0.1", 0))
        flaky, taken = Flaky(listener), Taken(stack)
        errors: list[tuple[float, int | None]] = []

        def failed(error: OSError) -> None:
            errors.append((trio.current_time(), error.errno))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: accept_each(flaky, taken, on_error=failed))  # type: ignore[arg-type]  # a scripted listener
            await trio.testing.wait_all_tasks_blocked()
            start = trio.current_time()
            # The first is met in the loop, the next two by the task.
            flaky.errors = [errno.EMFILE] * 3
            dial(stack, listener, 2)
            await until(lambda: len(taken.peers) == 2)
            # What failed before it was accepted ends nothing.
            flaky.errors = [errno.ECONNABORTED, errno.EPROTO]
            dial(stack, listener, 1)
            await until(lambda: len(taken.peers) == 3)
            nursery.cancel_scope.cancel()
    assert [number for _, number in errors] == [errno.EMFILE] * 2
    assert errors[1][0] - errors[0][0] == pytest.approx(0.1)
    assert errors[0][0] == pytest.approx(start, abs=0.05)


async def test_waiting_for_a_descriptor_takes_no_turns(stack: ExitStack) -> None:
    """At the ceiling, clients wait in the listener's queue, and cost nothing there."""
    with open_relay_loop() as loop:
        assert loop is not None
        [listener] = map(stack.enter_context, open_tcp_listeners("127.0.0.1", 0))
        idle, _ = map(stack.enter_context, socket.socketpair())
        loop.watch(idle)
        loop.handlers[idle.fileno()] = lambda _: None  # something that the loop sleeps for
        taken = Taken(stack)
        turns: list[int] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                lambda: accept_each(listener, taken, on_error=lambda _: turns.append(loop.turns), ceiling=0)
            )
            await trio.testing.wait_all_tasks_blocked()
            dial(stack, listener, 2)
            await until(lambda: len(turns) == 3)
            nursery.cancel_scope.cancel()
        assert turns[2] - turns[1] < 2000
        assert len(taken.peers) == 1
        del loop.handlers[idle.fileno()]


async def test_a_broken_listener_met_in_the_loop_is_an_error(stack: ExitStack) -> None:
    with open_relay_loop() as loop:
        assert loop is not None
        [listener] = map(stack.enter_context, open_tcp_listeners("127.0.0.1", 0))
        flaky = Flaky(listener)
        with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="Invalid argument")):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    lambda: accept_each(flaky, Taken(stack), on_error=no_error)  # type: ignore[arg-type]  # a scripted listener
                )
                await trio.testing.wait_all_tasks_blocked()
                flaky.errors = [errno.EINVAL] * 2
                dial(stack, listener, 1)
        assert not loop.handlers


async def test_a_connection_that_cannot_be_taken_in_the_loop_is_closed(stack: ExitStack) -> None:
    """What raised there is raised by the task, and the socket does not stay behind."""
    with open_relay_loop():
        [listener] = map(stack.enter_context, open_tcp_listeners("127.0.0.1", 0))
        given: list[socket.socket] = []

        def refuse(client: socket.socket, _: object) -> Started:
            given.append(client)
            raise RuntimeError("no more")

        with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="no more")):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: accept_each(listener, refuse, on_error=no_error))
                await trio.testing.wait_all_tasks_blocked()
                dial(stack, listener, 1)
        assert [each.fileno() for each in given] == [-1]


@pytest.mark.parametrize("when", [Started.NOW, Started.LATER])
async def test_tasks_started_in_the_loop_run_without_anything_else_to_wake_trio(
    stack: ExitStack, when: Started
) -> None:
    """Whether they have to at once, or may wait a little."""
    [listener] = map(stack.enter_context, open_tcp_listeners("127.0.0.1", 0))
    served = trio.Event()

    async def serve(client: socket.socket) -> None:
        client.send(b"served")
        client.close()
        served.set()

    with open_relay_loop():
        async with trio.open_nursery() as nursery:

            def take(client: socket.socket, _: object) -> Started:
                nursery.start_soon(serve, client)
                return when

            nursery.start_soon(lambda: accept_each(listener, take, on_error=no_error))
            await trio.testing.wait_all_tasks_blocked()
            [dialled] = dial(stack, listener, 1)
            # Nothing but the deadline, far away, would wake Trio.
            with trio.move_on_after(10) as scope:
                await served.wait()
            assert not scope.cancelled_caught
            nursery.cancel_scope.cancel()
    assert (dialled.recv(9), dialled.recv(9)) == (b"served", b"")


@pytest.mark.parametrize(("others", "expected"), [(0, [1] * 10), (15, [3, 3, 3, 1]), (80, [10])])
async def test_more_are_accepted_in_a_turn_that_serves_many(stack: ExitStack, others: int, expected: list[int]) -> None:
    """A turn takes as long as all that is served in it: with one connection in each, clients would wait for long."""
    [listener] = map(stack.enter_context, open_tcp_listeners("127.0.0.1", 0))
    taken: dict[int, int] = {}
    served: set[int] = set()
    with open_relay_loop() as loop, trio.fail_after(30):
        assert loop is not None

        def take(client: socket.socket, _: object) -> Started:
            stack.enter_context(client)
            taken[loop.turns] = taken.get(loop.turns, 0) + 1
            return Started.NOTHING

        def busy(turns: int) -> None:
            """Another socket, which has an event in each of so many turns."""
            ours, theirs = (stack.enter_context(sock) for sock in socket.socketpair())

            def handler(_: int) -> None:
                nonlocal turns
                served.add(loop.turns)
                turns -= 1
                if turns:
                    ours.send(b"x")

            loop.watch(theirs)
            loop.handlers[theirs.fileno()] = handler
            ours.send(b"x")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: accept_each(listener, take, on_error=no_error))
            await trio.testing.wait_all_tasks_blocked()
            dial(stack, listener, 10)
            for _ in range(others):
                busy(3)
            await until(lambda: sum(taken.values()) == 10)
            nursery.cancel_scope.cancel()
    assert list(taken.values()) == expected
    assert len(served) == (3 if others else 0)


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("localhost", marks=needs_ipv6)])
def test_an_address_that_is_kept_is_shared_by_those_who_mean_to(stack: ExitStack, host: str) -> None:
    """Bound without listening: nobody is served, two can listen, and whoever does not share is refused."""
    kept = open_tcp_listeners(host, 0, None)
    port = kept[0].getsockname()[1]
    for each in kept:
        stack.enter_context(each)
        assert not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    for _ in range(2):
        for each in open_tcp_listeners(host, port, shared=True):
            stack.enter_context(each)
            assert each.getsockname()[1] == port
            assert each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    before = open_files()
    for backlog in (None, 10):
        with pytest.raises(ListenError, match="Address already in use"):
            open_tcp_listeners(host, port, backlog)
    assert open_files() == before


def test_an_address_that_somebody_listens_on_cannot_be_kept_or_shared(stack: ExitStack) -> None:
    [taken] = map(stack.enter_context, open_tcp_listeners("127.0.0.1", 0))
    port = taken.getsockname()[1]
    with pytest.raises(ListenError, match="Address already in use"):
        open_tcp_listeners("127.0.0.1", port, None)
    with pytest.raises(ListenError, match="Address already in use"):
        open_tcp_listeners("127.0.0.1", port, shared=True)
