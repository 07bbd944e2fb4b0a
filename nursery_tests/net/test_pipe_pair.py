"""net/pipe_pair: what only comes about where a side of a relay is TLS, in the relay loop and with two tasks alike."""

from __future__ import annotations

import select
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import trio
import trio.testing
import trustme

from meshlocal.net.pipe import PlainPipe
from meshlocal.net.relay import relay_pipes
from meshlocal.net.relay_loop import RelayLoop, open_relay_loop
from meshlocal.net.relay_state import RelayCounters, RelayResult, RelayState
from meshlocal.net.sockets import abort
from meshlocal.net.tls_pipe import TlsPipe
from meshlocal.net.ways import CHUNK, LEAST, TURN, Need, Way
from nursery_tests.pairs import tcp_pair

AUTHORITY = trustme.CA()
NAME = "b.example"


@pytest.fixture(params=["loop", "tasks"])
def loop(request: pytest.FixtureRequest) -> str:
    """How bytes are moved in this test."""
    return str(request.param)


class Line:
    """peer <-TLS-> ours, plain <-> app; the relay stands between the middle two."""

    def __init__(self) -> None:
        self.peer_socket, ours = tcp_pair()
        plain, self.app = tcp_pair()
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        AUTHORITY.issue_cert(NAME).configure_cert(server)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        AUTHORITY.configure_trust(client)
        self.peer = TlsPipe(self.peer_socket, client, server_name=NAME)
        self.ours = TlsPipe(ours, server, server=True)
        self.plain = PlainPipe(plain)
        self.sockets = self.peer_socket, ours, plain, self.app
        self.counters = RelayCounters(trio.current_time())
        self.results: list[RelayResult] = []

    async def relay(self) -> None:
        self.results.append(await relay_pipes(self.ours, self.plain, self.counters))

    def encrypted(self, data: bytes) -> bytes:
        """One record with it, for the test to send as it likes."""
        self.peer._object.write(data)
        return self.peer._going.read()


@contextmanager
def relay_loop(kind: str) -> Iterator[RelayLoop | None]:
    if kind == "tasks":
        yield None
        return
    with open_relay_loop() as opened:
        assert opened is not None, "this trio hides its epoll instance: relays would take the slow path"
        yield opened


@contextmanager
def closing(line: Line) -> Iterator[Line]:
    """Close its sockets with the block."""
    with ExitStack() as stack:
        for sock in line.sockets:
            stack.callback(sock.close)
        yield line


async def shake(line: Line) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(line.peer.handshake)
        nursery.start_soon(line.ours.handshake)


def finish(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("ends", [finish, reset])
@pytest.mark.parametrize("kept", [0, 1000])
async def test_an_end_that_comes_with_a_part_of_a_record_is_noticed(
    loop: str, ends: Callable[[socket.socket], None], kept: int
) -> None:
    """T2: that stream was cut. Both come as one event, and no other follows."""
    with relay_loop(loop), closing(Line()) as line:
        await shake(line)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            await trio.testing.wait_all_tasks_blocked()
            line.peer_socket.send(line.encrypted(b"x" * 5000)[:kept])
            ends(line.peer_socket)
        (result,) = line.results
        assert (result.failed, result.reason) == ("client", "reset")


async def test_bytes_after_urgent_data_are_not_left_behind(loop: str) -> None:
    """A read ends before urgent data (tcp(7)), though there is more to read."""
    with relay_loop(loop), closing(Line()) as line:
        await shake(line)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            await trio.testing.wait_all_tasks_blocked()
            line.app.send(b"abc")
            line.app.send(b"!", socket.MSG_OOB)
            line.app.send(b"def")
            got = b""
            while len(got) < 6:
                data = line.peer.read(100)
                if data is None:
                    await line.peer.wait_readable()
                    continue
                got += data
            nursery.cancel_scope.cancel()
        assert got == b"abcdef"


class Source(PlainPipe):
    """One that always has a byte."""

    may_hold = True

    def read(self, size: int) -> bytes:
        return b"x"


async def test_many_small_records_give_others_their_turn_as_a_few_large_ones_do() -> None:
    near, far = socket.socketpair()
    far.setblocking(False)
    near.setblocking(False)
    counters = RelayCounters(trio.current_time())
    with near, far:
        way = Way(Source(near), PlainPipe(far), "client", RelayState(counters), trio.current_time)
        assert way.move() is Need.TURN
        assert counters.client_to_upstream == TURN * CHUNK // LEAST
        assert len(near.recv(CHUNK)) == TURN * CHUNK // LEAST


@pytest.mark.parametrize("turns", [0, 1])
async def test_a_fault_of_ours_ends_that_relay_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, turns: int
) -> None:
    """Whether it comes with an event, or in a turn that was put off."""
    needs = [*([Need.TURN] * turns), Need.INPUT, Need.INPUT]

    def fails(_: Way) -> Need:
        if needs:
            return needs.pop(0)
        raise MemoryError

    monkeypatch.setattr(Way, "_move", fails)
    with relay_loop("loop"), closing(Line()) as line, closing(Line()) as other:
        await shake(line)
        await shake(other)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            await trio.testing.wait_all_tasks_blocked()
            line.app.send(b"hello")
        (result,) = line.results
        assert result.failed is not None
        assert "a fault in the proxy" in caplog.text
        monkeypatch.undo()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.relay)
            other.app.send(b"hello")
            while (data := other.peer.read(100)) is None:
                await other.peer.wait_readable()
            assert data == b"hello"
            nursery.cancel_scope.cancel()


async def test_a_number_that_has_a_new_owner_is_left_to_it() -> None:
    """A task closes a socket of the pair, and its number is taken before the relay's own task runs again."""
    with relay_loop("loop") as opened, closing(Line()) as line, ExitStack() as stack:
        assert opened is not None
        await shake(line)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            await trio.testing.wait_all_tasks_blocked()
            number = line.ours.fileno()
            abort(line.ours._sock)
            pair = socket.socketpair()
            for each in pair:
                stack.enter_context(each)
                each.setblocking(False)
            (mine,) = (each for each in pair if each.fileno() == number)
            (other,) = (each for each in pair if each is not mine)
            events: list[int] = []
            opened.attend(number, events.append, lambda: None)
        assert line.results[0].failed == "client"
        other.send(b"x")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert any(event & select.EPOLLIN for event in events)
        opened.neglect(number)
