"""net/relay_loop: Trio keeps its time and its events while bytes move, and every schedule ends as on the plain path."""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from typing import Self

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshlocal.net import flows, relay_loop
from meshlocal.net.relay import relay
from meshlocal.net.relay_loop import RelayLoop, current_loop, open_relay_loop
from meshlocal.net.relay_state import RelayCounters, RelayResult
from meshlocal.net.sockets import abort, close
from meshlocal.net.ways import CHUNK
from nursery_tests.pairs import tcp_pair


class Line:
    """app <-> client, upstream <-> server, and the relay between the middle two."""

    def __init__(self) -> None:
        self.app, self.client = tcp_pair()
        self.upstream, self.server = tcp_pair()
        self.counters = RelayCounters(trio.current_time())

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self.app, self.client, self.upstream, self.server):
            sock.close()

    async def relay(self) -> RelayResult:
        return await relay(self.client, self.upstream, self.counters)


def opened(stack: ExitStack) -> RelayLoop:
    loop = stack.enter_context(open_relay_loop())
    assert loop is not None
    return loop


def watched(stack: ExitStack, loop: RelayLoop) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection; the loop watches the second."""
    ours, theirs = tcp_pair()
    stack.enter_context(ours)
    stack.enter_context(theirs)
    loop.watch(theirs)
    return ours, theirs


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what other threads and the kernel bring about."""
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - nothing here could set an event
            await trio.sleep(0.001)


class Echo:
    """A thread on the far ends of a line: sends, waits for the answer, sends again."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._stop = threading.Event()
        self.rounds = 0
        self._threads = [threading.Thread(target=self._answer), threading.Thread(target=self._ask)]

    async def __aenter__(self) -> Echo:
        for sock in (self._line.app, self._line.server):
            sock.setblocking(True)
            sock.settimeout(5)
        for thread in self._threads:
            thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        with trio.CancelScope(shield=True):  # the threads' sockets have limits of their own
            for thread in self._threads:
                await trio.to_thread.run_sync(thread.join)

    def _ask(self) -> None:
        while not self._stop.is_set():
            self._line.app.sendall(b"x")
            assert self._line.app.recv(1) == b"x"
            self.rounds += 1
        self._line.app.shutdown(socket.SHUT_WR)

    def _answer(self) -> None:
        while data := self._line.server.recv(1):
            self._line.server.sendall(data)
        self._line.server.shutdown(socket.SHUT_WR)


async def test_deadlines_and_events_of_trio_are_kept_while_bytes_move() -> None:
    with ExitStack() as stack:
        opened(stack)
        line = stack.enter_context(Line())
        ours, theirs = map(stack.enter_context, socket.socketpair())
        ours.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            async with Echo(line) as echo:
                for number in range(20):
                    before = trio.current_time()
                    await trio.sleep(0.005)
                    assert trio.current_time() - before >= 0.005  # it comes back at all, and not early
                    theirs.send(bytes([number]))
                    await trio.lowlevel.wait_readable(ours)
                    assert ours.recv(1) == bytes([number])
                    await trio.to_thread.run_sync(os.getpid)  # another thread wakes Trio
            assert echo.rounds > 0


async def test_a_deadline_comes_while_no_byte_moves() -> None:
    with ExitStack() as stack:
        opened(stack)
        line = stack.enter_context(Line())
        with trio.move_on_after(0.02) as scope:
            await line.relay()
        assert scope.cancelled_caught


async def test_a_direction_without_end_lets_others_run() -> None:
    with ExitStack() as stack:
        loop = opened(stack)
        busy, other = stack.enter_context(Line()), stack.enter_context(Line())
        stop = threading.Event()

        def flood() -> None:
            busy.app.setblocking(True)
            busy.app.settimeout(5)
            while not stop.is_set():
                busy.app.sendall(bytes(CHUNK * 4))

        def drain() -> None:
            busy.server.setblocking(True)
            busy.server.settimeout(5)
            with suppress(ConnectionResetError):
                while busy.server.recv(CHUNK * 4):
                    pass

        threads = [threading.Thread(target=flood), threading.Thread(target=drain)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(busy.relay)
            nursery.start_soon(other.relay)
            await trio.testing.wait_all_tasks_blocked()
            assert len(loop) == 2
            for thread in threads:
                thread.start()
            async with Echo(other) as echo:
                await until(lambda: echo.rounds >= 50 and busy.counters.client_to_upstream >= 50 * CHUNK)
            stop.set()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(threads[0].join)
            nursery.cancel_scope.cancel()
        assert len(loop) == 0
        abort(busy.upstream)
        threads[1].join()


async def test_sockets_that_come_again_with_the_same_numbers_are_new_ones() -> None:
    with ExitStack() as stack:
        loop = opened(stack)
        for number in range(20):
            with Line() as line:
                line.app.send(bytes([number]))
                line.app.shutdown(socket.SHUT_WR)
                line.server.shutdown(socket.SHUT_WR)
                assert (await line.relay()).reason == "eof"
                assert line.server.recv(10) == bytes([number])
        assert len(loop) == 0


async def test_a_socket_may_be_relayed_twice() -> None:
    with ExitStack() as stack:
        opened(stack)
        line = stack.enter_context(Line())
        with trio.move_on_after(0.01):
            await line.relay()
        line.app.send(b"later")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            await until(lambda: line.counters.client_to_upstream == 5)
            nursery.cancel_scope.cancel()
        assert line.server.recv(10) == b"later"


class Faulty(RelayCounters):
    """Fails when the second byte of a client is counted."""

    __slots__ = ()

    def __setattr__(self, name: str, value: float) -> None:
        if name == "client_to_upstream" and value == 2:
            raise AssertionError("a fault")
        super().__setattr__(name, value)


@pytest.mark.parametrize("ends", [False, True])
async def test_a_fault_in_one_relay_leaves_the_others(*, ends: bool, caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        loop = opened(stack)
        faulty, sound = stack.enter_context(Line()), stack.enter_context(Line())
        faulty.counters = Faulty(trio.current_time())
        results: list[RelayResult] = []

        async def run() -> None:
            results.append(await faulty.relay())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            nursery.start_soon(sound.relay)
            faulty.app.send(b"1")
            await until(lambda: faulty.counters.client_to_upstream == 1)
            faulty.app.send(b"2")
            if ends:  # an event that is not served like most
                faulty.app.shutdown(socket.SHUT_WR)
            await until(lambda: bool(results))
            assert (results[0].failed, results[0].reason) == ("client", "other")
            assert "relay failed by a fault in the proxy" in caplog.text
            async with Echo(sound) as echo:
                await until(lambda: echo.rounds >= 3)
        assert len(loop) == 0


class Fickle(socket.socket):
    """A socket that takes what it likes, and notes how much it is asked for.

    Attributes:
        takes: how many bytes its next sends take at most; -1 is a refusal. After those it takes all.
        asked: the most that each of its reads could have given.
    """

    takes: list[int]
    asked: list[int]

    @classmethod
    def instead_of(cls, sock: socket.socket, takes: list[int]) -> Self:
        made = cls(fileno=sock.detach())
        made.takes, made.asked = list(takes), []
        return made

    def recv_into(self, buffer: memoryview, *_: int) -> int:  # type: ignore[override]  # narrower
        self.asked.append(len(buffer))
        return super().recv_into(buffer)

    def send(self, data: bytes | memoryview, *_: int) -> int:  # type: ignore[override]  # narrower
        most = self.takes.pop(0) if self.takes else len(data)
        if most < 0:
            raise BlockingIOError
        return super().send(data[:most])


def reads(monkeypatch: pytest.MonkeyPatch, first: int, largest: int) -> None:
    """Relay loops that are opened from now on read no more than that at a time."""
    monkeypatch.setattr(flows, "FIRST", first)
    monkeypatch.setattr(flows, "LARGEST", largest)


async def test_reads_grow_while_their_sink_takes_them_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    reads(monkeypatch, 1000, 5000)
    with ExitStack() as stack:
        opened(stack)
        line = stack.enter_context(Line())
        line.client = client = Fickle.instead_of(line.client, [])
        # It takes all of six reads, nothing of the seventh, and a part of that when it is offered again.
        line.upstream = Fickle.instead_of(line.upstream, [5000] * 6 + [-1, 100])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            await trio.testing.wait_all_tasks_blocked()
            client.asked.clear()
            line.app.send(bytes(30000))
            await until(lambda: line.counters.client_to_upstream == 30000)
            nursery.cancel_scope.cancel()
        assert client.asked[:8] == [1000, 2000, 4000, 5000, 5000, 5000, 5000, 1000]


@pytest.mark.parametrize("taken", [[-1], [3], [-1, 3, -1]])
async def test_what_was_read_before_goes_first(taken: list[int]) -> None:
    with ExitStack() as stack:
        opened(stack)
        line = stack.enter_context(Line())
        line.upstream = Fickle.instead_of(line.upstream, taken)
        line.app.send(b" and the rest")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay, line.client, line.upstream, line.counters, b"the beginning")
            await until(lambda: line.counters.client_to_upstream == 26)
            nursery.cancel_scope.cancel()
        assert line.server.recv(100) == b"the beginning and the rest"


async def test_between_two_full_reads_all_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    reads(monkeypatch, 1000, 1000)
    with ExitStack() as stack:
        opened(stack)
        long, short = stack.enter_context(Line()), stack.enter_context(Line())
        moved = 0

        class Noting(RelayCounters):
            def __setattr__(self, name: str, value: float) -> None:
                nonlocal moved
                if name == "client_to_upstream" and value:
                    moved = long.counters.client_to_upstream
                super().__setattr__(name, value)

        short.counters = Noting(trio.current_time())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(long.relay)
            nursery.start_soon(short.relay)
            await trio.testing.wait_all_tasks_blocked()
            long.app.send(bytes(50000))
            short.app.send(b"x")
            await until(lambda: long.counters.client_to_upstream == 50000 and moved > 0)
            nursery.cancel_scope.cancel()
        assert moved <= 2000


async def test_a_direction_that_is_filled_as_fast_as_it_reads_has_one_read_a_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its bytes make an event each turn, though it is to go on without one already."""
    reads(monkeypatch, 1000, 1000)
    with ExitStack() as stack:
        opened(stack)
        line = stack.enter_context(Line())

        class Filled(Fickle):
            def recv_into(self, buffer: memoryview, *_: int) -> int:  # type: ignore[override]  # narrower
                size = super().recv_into(buffer)
                if len(self.asked) < 50:
                    line.app.send(bytes(1500))
                return size

        line.client = client = Filled.instead_of(line.client, [])
        turns: list[int] = []
        turn = RelayLoop._turn

        def noted(self: RelayLoop, timeout: float) -> bool:
            before = len(client.asked)
            ready = turn(self, timeout)
            turns.append(len(client.asked) - before)
            return ready

        monkeypatch.setattr(RelayLoop, "_turn", noted)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            await trio.testing.wait_all_tasks_blocked()
            line.app.send(bytes(1500))
            await until(lambda: len(client.asked) > 60)
            nursery.cancel_scope.cancel()
        assert max(turns) == 1


async def test_bytes_after_urgent_data_are_not_left_behind() -> None:
    """A read ends before urgent data (tcp(7)), though there is more to read."""
    with ExitStack() as stack:
        opened(stack)
        line = stack.enter_context(Line())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(2):
                line.app.send(b"before")
                line.app.send(b"!", socket.MSG_OOB)
                line.app.send(b"after")
                before = line.counters.client_to_upstream
                await until(lambda before=before: line.counters.client_to_upstream == before + 11)  # type: ignore[misc]  # binds this round's
            nursery.cancel_scope.cancel()
        assert line.server.recv(100) == b"beforeafter" * 2


def test_the_buffer_lies_in_the_middle_of_a_page() -> None:
    view = flows._buffer(1000)
    assert len(view) == 1000
    assert ctypes.addressof(ctypes.c_char.from_buffer(view)) % mmap.PAGESIZE == mmap.PAGESIZE // 2


async def test_without_trios_epoll_the_plain_path_serves_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(relay_loop, "epoll_fileno", lambda: None)
    with open_relay_loop() as loop, Line() as line:
        assert loop is None
        assert "relays take the slow path" in caplog.text
        line.app.send(b"x")
        line.app.shutdown(socket.SHUT_WR)
        line.server.shutdown(socket.SHUT_WR)
        assert (await line.relay()).reason == "eof"
        assert line.server.recv(10) == b"x"


async def test_after_it_is_closed_nothing_of_it_is_left() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with open_relay_loop():
        pass
    assert current_loop.get() is None
    assert len(os.listdir("/proc/self/fd")) == before
    with Line() as line, trio.move_on_after(0.01):
        await line.relay()


# A schedule, step by step, each after the bytes of the one before have arrived: what the ends see, and how the relay
# ends, must not depend on the path.

ENDS = ("app", "server")
steps = st.lists(
    st.tuples(
        st.sampled_from(ENDS), st.sampled_from(["send", "send much", "send urgent", "read", "half-close", "reset"])
    ),
    max_size=8,
)
takes = st.lists(st.sampled_from([-1, -1, 1, 500, 100000]), max_size=12)


async def play(
    schedule: list[tuple[str, str]],
    *,
    early: bytes,
    looped: bool,
    takes: tuple[list[int], list[int]] = ([], []),
) -> tuple[object, ...]:
    """Go through a schedule; what both ends got, how the relay ended, and what it counted.

    `takes` is how much the relay's sockets take at a time, the client's and the upstream's.
    """
    got = {end: bytearray() for end in ENDS}
    broken: set[str] = set()
    results: list[RelayResult] = []
    sent_by = dict.fromkeys(ENDS, 0)
    with open_relay_loop() if looped else nullcontext(), Line() as line:
        sockets = {"app": line.app, "server": line.server}
        line.client = Fickle.instead_of(line.client, takes[0])
        line.upstream = Fickle.instead_of(line.upstream, takes[1])

        def read(end: str) -> None:
            if end in broken or sockets[end].fileno() == -1:
                return
            with suppress(BlockingIOError):
                try:
                    while data := sockets[end].recv(CHUNK):
                        got[end] += data
                except ConnectionResetError:
                    broken.add(end)

        async def run() -> None:
            result = await relay(line.client, line.upstream, line.counters, early)
            results.append(result)
            if result.failed is not None:
                abort(line.client)
                abort(line.upstream)

        async def settle() -> None:
            before = None
            while before != (before := (line.counters.client_to_upstream, line.counters.upstream_to_client)):
                await trio.testing.wait_all_tasks_blocked(0.003)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            for end, step in schedule:
                sock = sockets[end]
                if sock.fileno() == -1:
                    continue
                with suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
                    if step == "send":
                        sent_by[end] += sock.send(f"{end} {sent_by[end]};".encode())
                    elif step == "send much":
                        sent_by[end] += sock.send(end.encode() * 5000)
                    elif step == "send urgent":
                        sock.send(b"?!", socket.MSG_OOB)
                        sent_by[end] += 1 + sock.send(b"so")
                    elif step == "read":
                        read(end)
                    elif step == "half-close":
                        with suppress(OSError):  # it may be closed or reset already
                            sock.shutdown(socket.SHUT_WR)
                    else:
                        abort(sock)
                await settle()
            for end in ENDS:
                read(end)
                if sockets[end].fileno() != -1:
                    with suppress(OSError):
                        sockets[end].shutdown(socket.SHUT_WR)
            await settle()
            for end in ENDS:
                read(end)
            await until(lambda: bool(results))
        for end in ENDS:
            read(end)
    counters = line.counters
    # Which errno a dead connection shows, and to whom first, is the kernel's to say; that it failed is not.
    return (
        results[0].failed is None,
        {end: bytes(got[end]) for end in ENDS},
        counters.client_to_upstream,
        counters.upstream_to_client,
    )


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    schedule=steps,
    client=takes,
    upstream=takes,
    early=st.sampled_from([b"", b"early bird "]),
    largest=st.sampled_from([500, 4000, flows.LARGEST]),
)
async def test_every_schedule_ends_as_on_the_plain_path(
    schedule: list[tuple[str, str]],
    client: list[int],
    upstream: list[int],
    early: bytes,
    largest: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        reads(patch, min(500, largest), largest)
        seen = await play(schedule, early=early, looped=True, takes=(client, upstream))
        assert seen == await play(schedule, early=early, looped=False)


# Real stalls: sockets whose buffers are full, of ends that write in pieces, and read when they come to it.

pieces = st.lists(st.sampled_from([1, 70, 5000, 150000]), max_size=5)
pauses = st.lists(st.sampled_from([0.0, 0.001, 0.004]), max_size=6)


class End:
    """An end of a line: writes what it has to, reads with pauses, and half-closes, or resets once it has read enough.

    Attributes:
        said: what it wrote.
        got: what it read.
        broken: what it read or wrote was cut.
    """

    def __init__(
        self, sock: socket.socket, name: bytes, sizes: list[int], waits: list[float], quits: int | None
    ) -> None:
        self.said, self.got, self.broken = bytearray(), bytearray(), False
        self._socket = sock
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._words = [bytes(name) * size for size in sizes]
        self._waits = waits
        self._quits = quits

    async def run(self) -> None:
        with self._stream.socket:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._read, nursery.cancel_scope)

    async def _write(self) -> None:
        for number, words in enumerate(self._words):
            data = f"{number}:".encode() + words
            self.said += data
            try:
                await self._stream.send_all(data)
            except trio.BrokenResourceError:
                self.broken = True
                return
        with suppress(OSError):  # it was reset
            await self._stream.send_eof()

    async def _read(self, all_of_it: trio.CancelScope) -> None:
        waits = iter(self._waits)
        while self._quits is None or len(self.got) < self._quits:
            await trio.sleep(next(waits, 0.0))
            try:
                data = await self._stream.receive_some(10000)
            except trio.BrokenResourceError:
                self.broken = True
                data = b""
            if not data:
                return
            self.got += data
        all_of_it.cancel()
        self.broken = True
        abort(self._socket)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.tuples(pieces, pieces),
    waits=st.tuples(pauses, pauses),
    quits=st.one_of(st.none(), st.none(), st.tuples(st.sampled_from(ENDS), st.sampled_from([0, 1, 30000]))),
    early=st.sampled_from([b"", b"early bird "]),
    looped=st.booleans(),
)
async def test_no_byte_is_lost_or_made_up_while_ends_stall(
    sizes: tuple[list[int], list[int]],
    waits: tuple[list[float], list[float]],
    quits: tuple[str, int] | None,
    early: bytes,
    looped: bool,
) -> None:
    """Whole if nobody resets; else what arrived is how it began, and both ends know that it was cut."""
    with open_relay_loop() if looped else nullcontext(), Line() as line:
        for sock in (line.app, line.client, line.upstream, line.server):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        who, after = quits or ("", None)
        app = End(line.app, b"a", sizes[0], waits[0], after if who == "app" else None)
        server = End(line.server, b"s", sizes[1], waits[1], after if who == "server" else None)
        results: list[RelayResult] = []

        async def run() -> None:
            results.append(await relay(line.client, line.upstream, line.counters, early))
            for sock in (line.client, line.upstream):
                (close if results[0].failed is None else abort)(sock)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for part in (run, app.run, server.run):
                    nursery.start_soon(part)
    sent = early + bytes(app.said)
    assert sent.startswith(server.got)
    assert server.said.startswith(app.got)
    counted = (line.counters.client_to_upstream, line.counters.upstream_to_client)
    if app.broken or server.broken:
        assert len(server.got) <= counted[0] <= len(sent)
        assert len(app.got) <= counted[1] <= len(server.said)
    else:
        assert (bytes(server.got), bytes(app.got)) == (sent, bytes(server.said))
        assert counted == (len(sent), len(server.said))
        assert results[0].failed is None
    if quits is None:
        assert not app.broken
        assert not server.broken


async def test_the_end_of_a_turn_comes_after_all_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """But no more than `_ROUND` wait for it."""
    with ExitStack() as stack:
        loop = opened(stack)
        pairs = [tcp_pair() for _ in range(5)]
        for pair in pairs:
            for sock in pair:
                stack.enter_context(sock)
        told: list[str] = []

        def serve(number: int, sock: socket.socket) -> Callable[[int], None]:
            def handler(mask: int) -> None:
                assert sock.recv(10) == b"x"
                told.append(f"event {number}")
                loop.at_end(lambda: told.append(f"end {number}"))

            return handler

        async def turn() -> list[str]:
            told.clear()
            for ours, _ in pairs:
                ours.send(b"x")
            await until(lambda: len(told) == 10)
            return list(told)

        for number, (_, theirs) in enumerate(pairs):
            loop.watch(theirs)
            loop.handlers[theirs.fileno()] = serve(number, theirs)
        await trio.lowlevel.checkpoint()
        assert await turn() == [f"{what} {number}" for what in ("event", "end") for number in range(5)]
        monkeypatch.setattr(relay_loop, "_ROUND", 2)
        assert [each[:3] for each in await turn()] == ["eve", "eve", "end", "end"] * 2 + ["eve", "end"]
        # From a task it is done at once.
        loop.at_end(lambda: told.append("at once"))
        assert told[-1] == "at once"


async def test_what_is_done_at_the_end_of_a_turn_may_add_to_it() -> None:
    with ExitStack() as stack:
        loop = opened(stack)
        ours, theirs = watched(stack, loop)
        told: list[int] = []

        def again() -> None:
            told.append(len(told))
            if len(told) < 3:
                loop.at_end(again)

        loop.handlers[theirs.fileno()] = lambda mask: loop.at_end(again)
        ours.send(b"x")
        await until(lambda: len(told) == 3)
        assert told == [0, 1, 2]


async def test_a_task_may_do_something_as_a_turn_does() -> None:
    """What is put off comes once, behind it; also behind what fails."""
    with ExitStack() as stack:
        loop = opened(stack)
        told: list[str] = []

        def handler() -> None:
            loop.at_end(lambda: told.append("end"))
            told.append("event")

        def fails() -> None:
            handler()
            raise RuntimeError("a fault")

        loop.as_turn(handler)
        assert told == ["event", "end"]
        with pytest.raises(RuntimeError, match="a fault"):
            loop.as_turn(fails)
        assert told == ["event", "end"] * 2
        loop.at_end(lambda: told.append("at once"))
        assert told[-1] == "at once"


@pytest.mark.parametrize("ends", [True, False])
async def test_a_fault_in_a_handler_costs_its_connection_only(*, ends: bool, caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        loop = opened(stack)
        line = stack.enter_context(Line())
        ours, theirs = watched(stack, loop)
        masks: list[int] = []

        def handler(mask: int) -> None:
            masks.append(mask)
            if ends and mask & select.EPOLLHUP:
                del loop.handlers[theirs.fileno()]
            else:
                raise AssertionError("a fault")

        loop.handlers[theirs.fileno()] = handler
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            ours.send(b"x")
            # It is told of the end that this made, and is asked no more.
            await until(lambda: theirs.fileno() not in loop.handlers)
            assert len(masks) == 2
            assert "connection failed by a fault in the proxy" in caplog.text
            assert ours.recv(1) == b""
            async with Echo(line) as echo:
                await until(lambda: echo.rounds >= 3)
            nursery.cancel_scope.cancel()


async def test_a_fault_at_the_end_of_a_turn_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        loop = opened(stack)
        ours, theirs = watched(stack, loop)
        told: list[str] = []

        def fail() -> None:
            told.append("fault")
            raise AssertionError("a fault")

        def handler(mask: int) -> None:
            theirs.recv(10)
            loop.at_end(fail)
            loop.at_end(lambda: told.append("other"))

        loop.handlers[theirs.fileno()] = handler
        for rounds in (1, 2):
            ours.send(b"x")
            await until(lambda rounds=rounds: len(told) == 2 * rounds)  # type: ignore[misc]  # binds this round's
        assert told == ["fault", "other"] * 2
        assert "lost by a fault in the proxy" in caplog.text


class Waiting:
    """A task that waits for the loop to let it go on, again and again.

    Attributes:
        woken: how often it went on.
        next: set when it does so next.
    """

    def __init__(self) -> None:
        self.task: trio.lowlevel.Task | None = None
        self.woken = 0
        self.next = trio.Event()

    async def wait(self) -> None:
        while True:
            self.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)
            assert self.task is None
            self.woken += 1
            self.next.set()
            self.next = trio.Event()


async def test_a_listener_that_is_left_alone_takes_no_turn() -> None:
    """Connections that wait for nobody make no event: a proxy at its ceiling of descriptors must not spin."""
    with ExitStack() as stack:
        loop = opened(stack)
        line = stack.enter_context(Line())  # something that the loop sleeps for
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        taken: list[socket.socket] = []

        def handler(_: int) -> None:
            taken.append(stack.enter_context(listener.accept()[0]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            await trio.testing.wait_all_tasks_blocked()
            for round_ in (1, 2):
                loop.listen(listener, handler)
                stack.enter_context(socket.create_connection(listener.getsockname()))
                await until(lambda round_=round_: len(taken) == round_)  # type: ignore[misc]  # binds this round's
                loop.unlisten(listener)
                loop.unlisten(listener)  # of no effect
            stack.enter_context(socket.create_connection(listener.getsockname()))
            before = loop.turns
            await trio.sleep(0.05)
            assert loop.turns - before < 100
            assert len(taken) == 2
            # Who listens again finds the one that waited.
            loop.listen(listener, handler)
            await until(lambda: len(taken) == 3)
            loop.unlisten(listener)
            nursery.cancel_scope.cancel()


class Hands:
    """A clock that stands still until a test moves it, in the place of the loop's module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    """Tasks are deferred by 8 seconds of this clock."""
    made = Hands()
    monkeypatch.setattr(relay_loop, "time", made)
    monkeypatch.setattr(relay_loop, "DEFERRAL", 8.0)
    return made


async def a_pass() -> None:
    """Let Trio come by, and whoever it finds go on."""
    for _ in range(3):
        await trio.lowlevel.checkpoint()


async def test_deferred_tasks_go_on_when_they_are_due_unless_recalled(hands: Hands) -> None:
    """Each in its own time."""
    with ExitStack() as stack:
        loop = opened(stack)
        waiters = [Waiting() for _ in range(3)]
        async with trio.open_nursery() as nursery:
            for waiter in waiters:
                nursery.start_soon(waiter.wait)
            await trio.testing.wait_all_tasks_blocked()

            async def woken_at(seconds: float) -> list[int]:
                hands.now = 1000.0 + seconds
                await a_pass()
                return [each.woken for each in waiters]

            loop.defer(waiters[0])
            assert await woken_at(5) == [0, 0, 0]
            loop.defer(waiters[1])
            loop.defer(waiters[2])
            loop.recall(waiters[2])
            loop.recall(waiters[2])  # of no effect
            assert await woken_at(7.5) == [0, 0, 0]
            assert await woken_at(8) == [1, 0, 0]
            assert await woken_at(12.5) == [1, 0, 0]
            assert await woken_at(13) == [1, 1, 0]
            loop.defer(waiters[2])
            assert await woken_at(20.5) == [1, 1, 0]
            assert await woken_at(21) == [1, 1, 1]
            assert await woken_at(1000) == [1, 1, 1]
            nursery.cancel_scope.cancel()


async def test_deferred_tasks_whose_times_are_close_go_on_together(hands: Hands) -> None:
    """Each pass of Trio's costs as much as a few of their steps. Those that come later may be recalled yet."""
    with ExitStack() as stack:
        loop = opened(stack)
        waiters = [Waiting() for _ in range(4)]
        async with trio.open_nursery() as nursery:
            for waiter in waiters:
                nursery.start_soon(waiter.wait)
            await trio.testing.wait_all_tasks_blocked()
            for waiter, seconds in zip(waiters, (0, 3, 4, 5), strict=True):
                hands.now = 1000.0 + seconds
                loop.defer(waiter)
            hands.now = 1007.5
            await a_pass()
            assert [each.woken for each in waiters] == [0, 0, 0, 0]
            hands.now = 1008.0
            await a_pass()
            assert [each.woken for each in waiters] == [1, 1, 1, 0]
            hands.now = 1013.0
            await a_pass()
            assert [each.woken for each in waiters] == [1, 1, 1, 1]
            nursery.cancel_scope.cancel()


async def test_a_deferred_task_goes_on_though_nothing_else_wakes_trio() -> None:
    """Nor is a relay under way; and not before its time."""
    with ExitStack() as stack:
        loop = opened(stack)
        waiter = Waiting()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiter.wait)
            await trio.testing.wait_all_tasks_blocked()
            for round_ in (1, 2):
                before = trio.current_time()
                loop.defer(waiter)
                with trio.fail_after(5):
                    await waiter.next.wait()
                assert trio.current_time() - before >= relay_loop.DEFERRAL - 0.001
                assert waiter.woken == round_
            nursery.cancel_scope.cancel()


async def test_a_deferred_task_does_not_wait_for_bytes_to_stop() -> None:
    with ExitStack() as stack:
        loop = opened(stack)
        line, waiter = stack.enter_context(Line()), Waiting()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiter.wait)
            nursery.start_soon(line.relay)
            await trio.testing.wait_all_tasks_blocked()
            async with Echo(line) as echo:
                for round_ in range(1, 4):
                    loop.defer(waiter)
                    await until(lambda round_=round_: waiter.woken == round_)  # type: ignore[misc]  # binds this one's
                await until(lambda: echo.rounds > 0)
            nursery.cancel_scope.cancel()


def ends_both(line: Line) -> None:
    line.app.shutdown(socket.SHUT_WR)
    line.server.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("ends", ["cleanly", "by a reset"])
async def test_who_began_a_relay_is_told_of_its_end(ends: str) -> None:
    """With all bytes moved; and may close both sockets then."""
    with ExitStack() as stack:
        loop = opened(stack)
        line = stack.enter_context(Line())
        told: list[RelayResult] = []
        pair = loop.begin(line.client, line.upstream, line.counters)

        def concluded() -> None:
            told.append(pair.state.result())
            for sock in (line.client, line.upstream):
                close(sock, awaited=False)

        pair.on_end = concluded
        line.app.send(b"hello")
        if ends == "cleanly":
            ends_both(line)
        else:
            await until(lambda: line.counters.client_to_upstream == 5)
            abort(line.app)
        await until(lambda: bool(told))
        [result] = told
        assert (result.failed, result.reason) == ((None, "eof") if ends == "cleanly" else ("client", "reset"))
        assert line.server.recv(10) == b"hello"
        assert line.server.recv(10) == b""
        assert pair.done
        assert len(loop) == 0


@pytest.mark.parametrize("concludes", [True, False])
async def test_the_last_end_is_told_by_the_close_alone(concludes: bool) -> None:
    """A FIN takes one system call then; where a task closes the sockets later, the end goes on before."""
    with ExitStack() as stack:
        loop = opened(stack)
        line = stack.enter_context(Line())
        pair = loop.begin(line.client, line.upstream, line.counters)
        told: list[int] = []

        class Counted:
            def __init__(self, sock: socket.socket) -> None:
                self._sock = sock

            def shutdown(self, how: int) -> None:
                told.append(how)
                self._sock.shutdown(how)

        for flow in list(loop._flows.values()):
            flow.sink = Counted(flow.sink)  # type: ignore[assignment]  # no more of it is asked for
        ended = trio.Event()
        if concludes:
            pair.on_end = ended.set
        line.app.shutdown(socket.SHUT_WR)
        line.server.shutdown(socket.SHUT_WR)
        with trio.fail_after(10):
            while concludes and not ended.is_set():  # noqa: ASYNC110 - a clean end wakes nobody
                await trio.sleep(0.001)
            if not concludes:
                await pair.join()
        assert told == [socket.SHUT_WR] * (1 if concludes else 2)
        assert pair.state.result().failed is None


async def test_tasks_that_the_end_of_a_failed_relay_wakes_go_on_at_once() -> None:
    """It may end what somebody waits for: an instance that is ejected, a stream that is given up."""
    with ExitStack() as stack:
        loop = opened(stack)
        line = stack.enter_context(Line())
        pair = loop.begin(line.client, line.upstream, line.counters)
        ended = trio.Event()
        pair.on_end = ended.set
        with trio.move_on_after(5) as late:  # when Trio would look again otherwise
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ended.wait)
                await trio.testing.wait_all_tasks_blocked()
                abort(line.app)
        assert not late.cancel_called


async def test_who_waits_for_the_end_is_told_of_it_instead() -> None:
    with ExitStack() as stack:
        loop = opened(stack)
        line = stack.enter_context(Line())
        pair = loop.begin(line.client, line.upstream, line.counters)
        told: list[str] = []
        pair.on_end = lambda: told.append("end")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.join)
            await trio.testing.wait_all_tasks_blocked()
            ends_both(line)
        assert pair.done
        assert told == []


async def test_who_ends_a_relay_from_a_task_is_not_told_of_it() -> None:
    """The task that waits for it later finds it ended."""
    with ExitStack() as stack:
        loop = opened(stack)
        line = stack.enter_context(Line())
        pair = loop.begin(line.client, line.upstream, line.counters)
        told: list[str] = []
        pair.on_end = lambda: told.append("end")
        close(line.client)
        assert pair.done
        assert (await pair.join()).failed == "client"
        assert told == []


async def test_sockets_are_closed_at_a_relays_end_only_when_no_event_of_theirs_is_left() -> None:
    """Who is accepted next gets the number of one of them, and the event that was still to be served."""
    with ExitStack() as stack:
        loop = opened(stack)
        line = stack.enter_context(Line())
        others: list[socket.socket] = []
        masks: list[int] = []
        pair = loop.begin(line.client, line.upstream, line.counters)

        def concluded() -> None:
            for sock in (line.client, line.upstream):
                close(sock, awaited=False)
            others.extend(each for _ in range(3) for each in map(stack.enter_context, socket.socketpair()))
            for each in others:
                loop.handlers[each.fileno()] = masks.append

        pair.on_end = concluded
        # Two events in one turn, of which the first is the end.
        abort(line.app)
        line.server.send(b"x")
        await until(lambda: bool(others))
        assert set(pair.fds) <= {each.fileno() for each in others}
        assert masks == []


async def test_a_fault_at_a_relays_end_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        loop = opened(stack)
        lines = [stack.enter_context(Line()) for _ in range(3)]
        told: list[int] = []

        def concluded(number: int) -> None:
            told.append(number)
            if number == 0:
                raise AssertionError("a fault")

        for number, line in enumerate(lines):
            pair = loop.begin(line.client, line.upstream, line.counters)
            pair.on_end = partial(concluded, number)
            ends_both(line)
        await until(lambda: len(told) == len(lines))
        assert sorted(told) == [0, 1, 2]
        assert caplog.text.count("connection failed by a fault in the proxy") == 1
        assert len(loop) == 0
