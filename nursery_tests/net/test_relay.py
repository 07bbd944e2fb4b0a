"""net/relay: every byte arrives in order, an end as an end, a failure as a failure, and memory stays bounded.

Each test goes both ways: through the relay loop, and with two tasks a connection where there is none.
"""

from __future__ import annotations

import errno
import fcntl
import random
import socket
import struct
import termios
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from typing import Any, NamedTuple, cast

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshlocal.net import flows
from meshlocal.net.pipe import Pipe, PlainPipe
from meshlocal.net.relay import copy, relay, relay_pipes
from meshlocal.net.relay_loop import current_loop, open_relay_loop
from meshlocal.net.relay_state import RelayCounters, RelayResult
from meshlocal.net.sockets import abort, close
from meshlocal.net.ways import CHUNK, TURN

Pair = tuple[socket.socket, socket.socket]
_paths: list[str] = []


@pytest.fixture(params=["loop", "pipes", "copy"], autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """How bytes are moved in this test."""
    _paths[:] = [request.param]
    yield request.param
    _paths.clear()


def unix_pair() -> Pair:
    return socket.socketpair()


def tcp_pair() -> Pair:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        return dialled, listener.accept()[0]


class NotPlain:
    """What the relay loop has to take for something else than a plain socket, as it does TLS."""

    plain = None

    def __init__(self, sock: socket.socket) -> None:
        self._pipe = PlainPipe(sock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def as_pipe(sock: socket.socket) -> Pipe:
    made: Any = NotPlain(sock)
    return cast("Pipe", made)


class Setup(NamedTuple):
    """app <-> client, upstream <-> server; the relay stands between the middle two."""

    app: socket.socket
    client: socket.socket
    upstream: socket.socket
    server: socket.socket
    counters: RelayCounters

    async def relay(self) -> RelayResult:
        if _paths == ["pipes"]:
            return await relay_pipes(as_pipe(self.client), as_pipe(self.upstream), self.counters)
        return await relay(self.client, self.upstream, self.counters)


@contextmanager
def setup(make: Callable[[], Pair] = unix_pair, buffer: int = 0) -> Iterator[Setup]:
    with ExitStack() as stack:
        if _paths != ["copy"] and current_loop.get() is None:
            loop = stack.enter_context(open_relay_loop())
            assert loop is not None, "this trio hides its epoll instance: relays would take the slow path"
        app, client = map(stack.enter_context, make())
        upstream, server = map(stack.enter_context, make())
        for sock in (app, client, upstream, server):
            sock.setblocking(False)
            if buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        yield Setup(app, client, upstream, server, RelayCounters(trio.current_time()))


@contextmanager
def stream(sock: socket.socket) -> Iterator[trio.SocketStream]:
    """A peer's end as a trio stream, on a descriptor of its own."""
    with trio.socket.from_stdlib_socket(sock.dup()) as own:
        yield trio.SocketStream(own)


@contextmanager
def reads(first: int, largest: int) -> Iterator[None]:
    """Relay loops that are opened meanwhile read no more than that at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flows, "FIRST", first)
        patch.setattr(flows, "LARGEST", largest)
        yield


both_kinds = pytest.mark.parametrize("make", [unix_pair, tcp_pair])
STALL = 0
SIZES = [(flows.FIRST, flows.LARGEST), (CHUNK, 2 * CHUNK), (1000, 5000)]
moves = st.lists(st.sampled_from([STALL, 1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]), max_size=5)


async def write(sock: socket.socket, data: bytes, steps: list[int]) -> None:
    position = 0
    with stream(sock) as out:
        for step in steps:
            if step == STALL:
                await trio.testing.wait_all_tasks_blocked()
            await out.send_all(data[position : position + step])
            position += step
        await out.send_eof()


async def read(sock: socket.socket, steps: list[int], into: bytearray) -> None:
    remaining = iter(steps)
    with stream(sock) as source:
        while True:
            step = next(remaining, CHUNK)
            if step == STALL:
                await trio.testing.wait_all_tasks_blocked()
                continue
            data = await source.receive_some(step)
            if not data:
                return
            into += data


@both_kinds
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(up=moves, down=moves, app_reads=moves, server_reads=moves, small=st.booleans(), sizes=st.sampled_from(SIZES))
async def test_every_byte_arrives_whatever_the_schedule(
    make: Callable[[], Pair],
    up: list[int],
    down: list[int],
    app_reads: list[int],
    server_reads: list[int],
    small: bool,
    sizes: tuple[int, int],
) -> None:
    upward, downward = random.Random(1).randbytes(sum(up)), random.Random(2).randbytes(sum(down))
    at_server, at_app = bytearray(), bytearray()
    # Not on TCP: its window probes against buffers that small take real time.
    with reads(*sizes), setup(make, 4096 if small and make is unix_pair else 0) as made:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, made.app, upward, up)
            nursery.start_soon(write, made.server, downward, down)
            nursery.start_soon(read, made.app, app_reads, at_app)
            nursery.start_soon(read, made.server, server_reads, at_server)
            result = await made.relay()
        assert (result.failed, result.reason, result.errno) == (None, "eof", 0)
        assert at_server == upward
        assert at_app == downward
        assert made.counters.client_to_upstream == len(upward)
        assert made.counters.upstream_to_client == len(downward)
        for sock in made[:4]:
            assert sock.fileno() != -1  # the caller's to close


@both_kinds
@pytest.mark.parametrize("first", ["client", "upstream"])
async def test_data_goes_on_after_the_other_direction_ended(make: Callable[[], Pair], first: str) -> None:
    with setup(make) as made, stream(made.app) as app, stream(made.server) as server:
        early, late = (app, server) if first == "client" else (server, app)
        results: list[RelayResult] = []

        async def run() -> None:
            results.append(await made.relay())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await early.send_all(b"the last word")
            await early.send_eof()
            assert await late.receive_some(100) == b"the last word"
            assert await late.receive_some(100) == b""
            for word in (b"not", b"so", b"fast"):
                await late.send_all(word)
                assert await early.receive_some(100) == word
            assert not results
            await late.send_eof()
            assert await early.receive_some(100) == b""
        assert results == [RelayResult(None, "eof", 0, "client" if first == "client" else "upstream")]


async def test_last_activity_is_when_bytes_last_moved(autojump_clock: trio.testing.MockClock) -> None:
    with setup() as made:
        begin = made.counters.last_activity
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.relay)
            await trio.sleep(5)
            assert made.counters.last_activity == begin
            made.app.send(b"x")
            await trio.testing.wait_all_tasks_blocked(0.01)
            moved = trio.current_time()
            await trio.sleep(7)
            assert begin + 5 <= made.counters.last_activity <= moved
            made.app.close()
            made.server.close()


class Slow(socket.socket):
    """A sink that takes three bytes at a time."""

    def send(self, data: bytes | memoryview, *_: int) -> int:  # type: ignore[override]  # narrower
        return super().send(data[:3])


@pytest.mark.parametrize("size", [CHUNK, 9])
@pytest.mark.parametrize("who", ["app", "server"])
async def test_bulk_is_activity_too(autojump_clock: trio.testing.MockClock, who: str, size: int) -> None:
    """A1: also where reads are filled to the last byte, or a sink takes a message in pieces."""
    with reads(CHUNK, CHUNK), setup() as made:
        source, sink = (made.app, made.upstream) if who == "app" else (made.server, made.client)
        if size == 9:
            sink = Slow(fileno=sink.detach())
        client, upstream = (made.client, sink) if who == "app" else (sink, made.upstream)
        begin = made.counters.last_activity
        with sink:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(relay, client, upstream, made.counters)
                await trio.sleep(5)
                assert source.send(bytes(size)) == size
                await trio.testing.wait_all_tasks_blocked(0.01)
                moved = trio.current_time()
                await trio.sleep(7)
                assert made.counters.client_to_upstream + made.counters.upstream_to_client == size
                assert begin + 5 <= made.counters.last_activity <= moved
                nursery.cancel_scope.cancel()


@pytest.mark.parametrize("who", ["client", "upstream"])
@pytest.mark.parametrize("sends_first", [True, False])
async def test_a_reset_ends_both_directions_and_names_the_side(who: str, sends_first: bool) -> None:
    with setup(tcp_pair) as made:
        gone, stays, ours = (
            (made.app, made.server, made.upstream) if who == "client" else (made.server, made.app, made.client)
        )
        async with trio.open_nursery() as nursery:

            async def leave() -> None:
                await trio.testing.wait_all_tasks_blocked()
                if sends_first:
                    gone.send(b"half a mess")
                abort(gone)

            nursery.start_soon(leave)
            result = await made.relay()
        assert (result.failed, result.reason, result.first_end) == (who, "reset", None)
        # What the caller does next: the other side sees what there was, and then no clean end.
        abort(ours)
        if sends_first:
            with stream(stays) as rest:
                got = await rest.receive_some(100)
                assert got == b"half a mess"
        with pytest.raises(ConnectionResetError):
            stays.recv(1)


async def test_what_a_server_sent_before_its_reset_is_delivered() -> None:
    # Its early answer and its reset are both there when the relay next writes to it and next reads from it. Trio
    # runs the two directions in random order: every order must deliver.
    for _ in range(20):
        with setup(tcp_pair) as made:
            results: list[RelayResult] = []

            async def run(made: Setup = made, results: list[RelayResult] = results) -> None:
                results.append(await made.relay())

            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                made.app.send(b"the body that nobody reads")
                with stream(made.server) as server:
                    while made.counters.client_to_upstream == 0:
                        await trio.lowlevel.wait_readable(server.socket.fileno())
                made.server.send(b"413")
                made.server.close()  # with bytes unread, which is a reset
                made.app.send(b"more of it")
            assert made.app.recv(100) == b"413"
            assert results[0].failed == "upstream"
            assert results[0].reason == "reset"
            with pytest.raises(BlockingIOError):
                made.app.recv(1)  # no clean end was passed on


async def fill(made: Setup) -> int:
    """Let the server send until nobody takes more; the number of bytes it got rid of."""
    pushed = 0
    while True:
        try:
            pushed += made.server.send(bytes(CHUNK))
        except BlockingIOError:
            before = unread(made.upstream)
            await trio.testing.wait_all_tasks_blocked(0.01)
            if unread(made.upstream) == before:
                return pushed


async def test_what_a_reset_server_sent_is_delivered_to_a_slow_reader_too() -> None:
    with setup(tcp_pair) as made:
        results: list[RelayResult] = []

        async def run() -> None:
            results.append(await made.relay())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await fill(made)
            moved, waiting = made.counters.upstream_to_client, unread(made.upstream)
            abort(made.server)
            made.app.send(b"to nobody")  # fails, while the other direction holds a chunk that the app does not take
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not results
            with stream(made.app) as app:
                received = 0
                while not results:
                    with trio.move_on_after(0.01):
                        received += len(await app.receive_some(CHUNK))
                close(made.client)  # with what the kernel still holds for the app
                while data := await app.receive_some(CHUNK):
                    received += len(data)
            assert received > moved + waiting  # that and the chunk that was held
        assert (results[0].failed, results[0].reason) == ("upstream", "reset")


async def test_a_sink_that_fails_alive_ends_both_directions() -> None:
    class Failing(socket.socket):
        def send(self, *_: object) -> int:
            raise OSError(errno.ENOMEM, "no memory")

    with setup() as made, Failing(fileno=made.upstream.dup().detach()) as upstream:
        made.app.send(b"x")
        result = await relay(made.client, upstream, made.counters)
        assert result == RelayResult("upstream", "other", errno.ENOMEM, None)
        with pytest.raises(BlockingIOError):
            made.app.recv(1)  # no clean end was passed on


async def test_a_sink_that_takes_little_at_a_time_gets_all() -> None:
    class Sipping(socket.socket):
        turns = 0

        def send(self, data: bytes | memoryview, *_: int) -> int:  # type: ignore[override]  # narrower
            self.turns += 1
            if self.turns % 3 == 0:
                raise BlockingIOError
            return super().send(data[:7])

    data = random.Random(3).randbytes(200)
    with setup() as made, Sipping(fileno=made.upstream.dup().detach()) as upstream:
        made.app.send(data)
        made.app.shutdown(socket.SHUT_WR)
        made.server.shutdown(socket.SHUT_WR)
        assert (await relay(made.client, upstream, made.counters)).reason == "eof"
        assert made.server.recv(2000) == data
        assert made.counters.client_to_upstream == len(data)


async def test_a_side_that_is_reset_after_its_end_still_fails() -> None:
    with setup(tcp_pair) as made:
        results: list[RelayResult] = []

        async def run() -> None:
            results.append(await made.relay())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            made.app.shutdown(socket.SHUT_WR)
            with stream(made.server) as server:
                assert await server.receive_some(10) == b""
            abort(made.app)
            made.server.send(b"to nobody")
        assert results == [RelayResult("client", "reset", results[0].errno, "client")]


@pytest.mark.parametrize("end", [close, abort])
@pytest.mark.parametrize("who", ["client", "upstream"])
async def test_closed_by_another_task(end: Callable[[socket.socket], None], who: str) -> None:
    with setup() as made:
        async with trio.open_nursery() as nursery:

            async def cut() -> None:
                await trio.testing.wait_all_tasks_blocked()
                end(getattr(made, who))

            nursery.start_soon(cut)
            result = await made.relay()
        assert (result.failed, result.reason) == (who, "closed")


def unread(sock: socket.socket) -> int:
    (size,) = struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, b"\0" * 4))
    assert isinstance(size, int)
    return size


@pytest.mark.parametrize("sizes", SIZES)
async def test_a_stalled_reader_holds_one_read_and_no_more(path: str, sizes: tuple[int, int]) -> None:
    most = sizes[1] if path == "loop" else CHUNK
    with reads(*sizes), setup() as made:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.relay)
            pushed = await fill(made)
            held = pushed - unread(made.upstream) - made.counters.upstream_to_client
            assert 0 < held <= most
            assert unread(made.app) == made.counters.upstream_to_client
            # The other direction does not mind, and the stalled one goes on where it stopped.
            made.app.send(b"hello")
            with stream(made.server) as server, stream(made.app) as app:
                assert await server.receive_some(10) == b"hello"
                await server.send_eof()
                received = 0
                while data := await app.receive_some(CHUNK):
                    received += len(data)
                assert received == pushed
            made.app.shutdown(socket.SHUT_WR)


async def test_an_idle_relay_keeps_no_buffer() -> None:
    count = 20
    with ExitStack() as stack:
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        made = [stack.enter_context(setup()) for _ in range(count)]
        async with trio.open_nursery() as nursery:
            before, _ = tracemalloc.get_traced_memory()
            for each in made:
                nursery.start_soon(each.relay)
                each.app.send(bytes(CHUNK))
                each.server.send(bytes(CHUNK))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert all(each.counters.client_to_upstream == CHUNK for each in made)
            assert all(each.counters.upstream_to_client == CHUNK for each in made)
            after, _ = tracemalloc.get_traced_memory()
            # The one buffer that all share, and what tasks cost.
            assert after - before - CHUNK < count * 24 * 1024
            nursery.cancel_scope.cancel()


class Endless:
    """A pipe that always has data and always takes it: it never makes anybody wait."""

    plain = None

    def __init__(self, size: int) -> None:
        self.size = size

    def read(self, size: int) -> bytes:
        return bytes(min(size, self.size))

    def write(self, data: memoryview) -> int:
        return len(data)


async def test_a_busy_pair_lets_others_run_and_sees_cancellation() -> None:
    counters = RelayCounters(0)
    seen: list[int] = []
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                for _ in range(5):
                    seen.append(counters.client_to_upstream)
                    await trio.lowlevel.checkpoint()
                scope.cancel()

            nursery.start_soon(watch)
            client, upstream = Endless(CHUNK), Endless(CHUNK)
            # read and write are all that this relay uses of a pipe that never blocks.
            await copy(client, upstream, counters)  # type: ignore[arg-type]  # scripted streams
    assert scope.cancelled_caught
    assert len(seen) == 5
    assert max(later - earlier for earlier, later in pairwise(seen)) <= 2 * TURN * CHUNK


async def cancelled_when_blocked(made: Setup) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.relay)
            await trio.testing.wait_all_tasks_blocked(0.01)
            scope.cancel()
    assert scope.cancelled_caught


async def test_cancelled_while_reading_leaves_usable_sockets() -> None:
    with setup() as made:
        await cancelled_when_blocked(made)
        # Nothing waits for them any more, and nothing was ended on the peers' behalf.
        made.client.send(b"a")
        made.upstream.send(b"b")
        assert (made.app.recv(10), made.server.recv(10)) == (b"a", b"b")
        with pytest.raises(BlockingIOError):
            made.app.recv(1)
        with trio.move_on_after(0):
            await trio.lowlevel.wait_readable(made.client)


async def test_cancelled_while_writing_leaves_usable_sockets() -> None:
    with setup() as made:
        with suppress(BlockingIOError):
            while True:
                made.client.send(bytes(CHUNK))
        made.server.send(b"for a full client")
        await cancelled_when_blocked(made)
        assert made.counters.upstream_to_client == 0
        assert unread(made.upstream) == 0  # it was held, and is lost: a cancelled relay is a cut one
        with trio.move_on_after(0):
            await trio.lowlevel.wait_writable(made.client)
        close(made.client)


async def test_cancelled_before_it_begins() -> None:
    with setup() as made, trio.CancelScope() as scope:
        scope.cancel()
        await made.relay()
    assert scope.cancelled_caught


def test_each_trio_run_has_a_buffer_of_its_own() -> None:
    async def once() -> bytes:
        with setup() as made:
            made.app.send(b"x")
            made.app.shutdown(socket.SHUT_WR)
            made.server.shutdown(socket.SHUT_WR)
            await made.relay()
            return made.server.recv(10)

    assert [trio.run(once), trio.run(once)] == [b"x", b"x"]
