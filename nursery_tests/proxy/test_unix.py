"""Unix sockets on either side of tcp and http listeners, with the relay loop and without it."""

from __future__ import annotations

import array
import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from random import Random

import msgspec
import pytest
import trio

from meshlocal.client.services import ServiceTable
from meshlocal.client.statistics import Outcome
from meshlocal.net.dial import connect_socket
from meshlocal.net.flows import READS
from meshlocal.net.relay_loop import open_relay_loop
from meshlocal.net.relay_state import RelayCounters
from meshlocal.net.sockets import close
from meshlocal.net.unix import UnixOpening
from meshlocal.policy import model
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.config import AttemptPolicy, ProxyConfig
from meshlocal.policy.locality import Locality
from meshlocal.policy.model import Instance, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.proxy.http.forwarder import HttpForwarder
from meshlocal.proxy.listeners import Listeners
from meshlocal.proxy.tcp.forwarder import TcpForwarder

B = ServiceKey("b")
LIMIT = 20
Serve = Callable[[trio.SocketStream], Awaitable[None]]


async def until(holds: Callable[[], object]) -> None:
    with trio.fail_after(LIMIT):
        while not holds():  # noqa: ASYNC110 - the counts are plain numbers, with no event to wait for
            await trio.sleep(0.001)


class Unix:
    """A proxy that listens on `tcp` and `http` of a folder, and looks for instances' sockets there."""

    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        self.nursery = nursery
        self.folder = folder
        listen = (f"tcp://unix:{folder}/tcp=b", f"http://unix:{folder}/http=b", "tcp://127.0.0.1:0=b")
        self.config = ProxyConfig(
            listen=tuple(map(ListenAddress.parse, listen)),
            socket_folder=str(folder),
            attempts=AttemptPolicy(deadline=5.0),
        )
        self.table = ServiceTable(self.config, Locality({"node": "n1"}), Random(1))
        self.tcp = TcpForwarder(self.table)
        self.http = HttpForwarder(self.table, self.config)
        self.listeners = Listeners({"tcp": self.tcp, "http": self.http})
        self.scope = trio.CancelScope()
        self.ended = trio.Event()

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        opening = UnixOpening(self.listeners.paths(self.config))
        opening.open()
        self.listeners.adopt(self.listeners.prepare(self.config, opening.opened), self.config)
        opening.give_away()
        try:
            with self.scope:
                async with trio.open_nursery() as lifetime:
                    lifetime.start_soon(self.http.run)
                    async with trio.open_nursery() as connections, trio.open_nursery() as acceptors:
                        self.listeners.start(acceptors, connections)
                        task_status.started()
                        await trio.sleep_forever()
        finally:
            self.ended.set()

    def publish(self, *instances: Instance) -> None:
        self.table.publish(ServiceSnapshot(B, str(len(instances)), model.index(instances)))

    async def instance(self, serve: Serve, name: str = "b.sock") -> Instance:
        """One with a socket, and a port at which nobody listens."""
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(self.folder / name))
        sock.listen(10)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        self.nursery.start_soon(trio.serve_listeners, serve, [listener])
        return self.named(name)

    def named(self, name: str, port: int = 1) -> Instance:
        return make_instance("127.0.0.1", port, labels={"node": "n1", "socket": name})

    async def connect(self, name: str = "tcp") -> trio.SocketStream:
        sock = trio.socket.socket(socket.AF_UNIX)
        await sock.connect(str(self.folder / name))
        return trio.SocketStream(sock)

    def served(self, count: int = 1) -> bool:
        return sum(self.table[B].statistics.requests.values()) >= count

    def outcomes(self) -> set[str]:
        return {key.outcome for key, count in self.table[B].statistics.requests.items() if count}


@pytest.fixture(params=["loop", "tasks"])
async def proxy(request: pytest.FixtureRequest, nursery: trio.Nursery, tmp_path: Path) -> AsyncIterator[Unix]:
    with open_relay_loop() if request.param == "loop" else nullcontext():
        made = Unix(nursery, tmp_path)
        await nursery.start(made.serve)
        yield made
        made.scope.cancel()
        await made.ended.wait()


async def receive_all(stream: trio.SocketStream) -> bytes:
    received = b""
    with trio.fail_after(LIMIT):
        async for part in stream:
            received += part
    return received


async def echo(stream: trio.SocketStream) -> None:
    async with stream:
        async for received in stream:
            await stream.send_all(received)
        await stream.send_eof()


async def test_a_connection_passes_from_socket_to_socket(proxy: Unix) -> None:
    """Both halves of it end on their own."""
    proxy.publish(await proxy.instance(echo))
    async with await proxy.connect() as stream:
        await stream.send_all(b"one")
        assert await stream.receive_some() == b"one"
        await stream.send_all(b"two")
        await stream.send_eof()
        assert await receive_all(stream) == b"two"
    await until(proxy.served)
    assert proxy.outcomes() == {Outcome.SERVED}
    assert proxy.table[B].statistics.unix_connects == 1


@pytest.mark.parametrize("size", [100_000, 5_000_000])
async def test_bulk_passes_whole(proxy: Unix, size: int) -> None:
    """Also where its reader is slow, and the writer must wait."""
    proxy.publish(await proxy.instance(echo))
    sent = os.urandom(size)
    async with await proxy.connect() as stream, trio.open_nursery() as nursery:

        async def send() -> None:
            await stream.send_all(sent)
            await stream.send_eof()

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert await receive_all(stream) == sent


async def test_who_answers_and_closes_at_once_has_ended_well(proxy: Unix) -> None:
    """A Unix socket's other end that is closed shows as dead to an epoll instance, which TCP's does not."""

    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"answer")
        await stream.send_eof()
        await stream.aclose()

    proxy.publish(await proxy.instance(answer))
    async with await proxy.connect() as stream:
        await stream.send_all(b"question")
        assert await receive_all(stream) == b"answer"
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not proxy.served(), "the client may say more"
    await until(proxy.served)
    assert proxy.outcomes() == {Outcome.SERVED}


async def test_what_is_said_to_who_has_closed_is_a_cut(proxy: Unix) -> None:
    closed = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        await stream.send_all(b"answer")
        await stream.aclose()
        closed.set()

    proxy.publish(await proxy.instance(answer))
    async with await proxy.connect() as stream:
        assert await receive_all(stream) == b"answer"
        await closed.wait()
        await stream.send_all(b"more")
        await until(proxy.served)
    assert proxy.outcomes() == {Outcome.CUT}


async def test_who_leaves_what_was_sent_to_it_has_failed(proxy: Unix) -> None:
    """H1: a Unix socket that is closed with something unread tells the other end ECONNRESET, as TCP's reset does."""
    heard = trio.Event()

    async def leave(stream: trio.SocketStream) -> None:
        await heard.wait()
        await stream.aclose()

    proxy.publish(await proxy.instance(leave))
    async with await proxy.connect() as stream:
        await stream.send_all(b"question")
        await trio.testing.wait_all_tasks_blocked(0.01)
        heard.set()
        with trio.fail_after(LIMIT):
            assert await stream.receive_some() == b""
    await until(proxy.served)
    assert proxy.outcomes() == {Outcome.CUT}
    assert proxy.table[B].fitness.is_doubted(proxy.named("b.sock"))


async def test_bytes_behind_file_descriptors_pass(proxy: Unix) -> None:
    """A read ends behind them, though there is more; the descriptors themselves stay behind."""
    proxy.publish(await proxy.instance(echo))
    async with await proxy.connect() as stream:
        await stream.send_all(b"0")
        assert await stream.receive_some() == b"0"
        with socket.socket() as sent:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sent.fileno()]))]
            await stream.socket.sendmsg([b"1"], rights)
            await stream.socket.send(b"2")
        received = b""
        with trio.fail_after(LIMIT):
            while len(received) < 2:
                received += await stream.receive_some()
    assert received == b"12"


async def test_an_instance_without_its_socket_has_its_port(proxy: Unix) -> None:
    """Nobody listens at the socket, or it is not there, or it is no path within the folder: it is connected all the
    same, within the same attempt."""
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(proxy.folder / "left"))
    left.close()
    (proxy.folder / "file").write_text("")
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    proxy.nursery.start_soon(trio.serve_listeners, echo, listeners)
    port = listeners[0].socket.getsockname()[1]
    for name in ("left", "none", "file", "../left"):
        proxy.publish(proxy.named(name, port))
        async with await proxy.connect() as stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello", name
    statistics = proxy.table[B].statistics
    assert (statistics.unix_connects, dict(statistics.attempts)) == (0, {("node", "connected"): 4})


async def test_a_full_queue_is_gone_past(proxy: Unix) -> None:
    """A Unix socket's connect cannot wait for room in it as TCP's can."""
    full = socket.socket(socket.AF_UNIX)
    full.bind(str(proxy.folder / "full"))
    full.listen(0)
    waiting = socket.socket(socket.AF_UNIX)
    waiting.connect(str(proxy.folder / "full"))
    try:
        assert connect_socket(str(proxy.folder / "full")) is None
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy.nursery.start_soon(trio.serve_listeners, echo, listeners)
        proxy.publish(proxy.named("full", listeners[0].socket.getsockname()[1]))
        async with await proxy.connect() as stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
    finally:
        waiting.close()
        full.close()


async def test_an_instance_that_has_neither_is_left_for_the_next(proxy: Unix) -> None:
    """A2: as one whose connect fails."""
    proxy.publish(proxy.named("none", 1), await proxy.instance(echo))
    other = make_instance("127.0.0.1", 2, labels={"node": "n1", "socket": "b.sock"})
    proxy.publish(proxy.named("none", 1), other)
    for _ in range(4):
        async with await proxy.connect() as stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"


async def test_other_nodes_sockets_are_not_here(proxy: Unix) -> None:
    """Though a file of that name is."""
    await proxy.instance(echo)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    proxy.nursery.start_soon(trio.serve_listeners, echo, listeners)
    port = listeners[0].socket.getsockname()[1]
    proxy.publish(make_instance("127.0.0.1", port, labels={"node": "n2", "socket": "b.sock"}))
    async with await proxy.connect() as stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
    assert proxy.table[B].statistics.unix_connects == 0


async def answer_requests(stream: trio.SocketStream) -> None:
    async with stream:
        received = b""
        async for part in stream:
            received += part
            while b"\r\n\r\n" in received:
                head, _, received = received.partition(b"\r\n\r\n")
                body = head.split(b" ")[1]
                await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))


async def test_requests_pass_from_socket_to_socket(proxy: Unix) -> None:
    """On connections that are kept, on both sides."""
    proxy.publish(await proxy.instance(answer_requests))
    async with await proxy.connect("http") as stream:
        for number in range(20):
            await stream.send_all(b"GET /%d HTTP/1.1\r\nhost: b\r\n\r\n" % number)
            received = b""
            with trio.fail_after(LIMIT):
                while not received.endswith(b"\r\n\r\n/%d" % number):
                    received += await stream.receive_some()
            assert received.startswith(b"HTTP/1.1 200")
    assert proxy.table[B].statistics.unix_connects == 1


async def test_a_kept_connection_that_its_instance_closed_is_replaced(proxy: Unix) -> None:
    """A4."""
    streams: list[trio.SocketStream] = []

    async def keep(stream: trio.SocketStream) -> None:
        streams.append(stream)
        with trio.CancelScope():
            try:
                await answer_requests(stream)
            except trio.ClosedResourceError:
                return

    proxy.publish(await proxy.instance(keep))
    async with await proxy.connect("http") as stream:
        for number in range(3):
            await stream.send_all(b"GET /%d HTTP/1.1\r\nhost: b\r\n\r\n" % number)
            received = b""
            with trio.fail_after(LIMIT):
                while not received.endswith(b"\r\n\r\n/%d" % number):
                    received += await stream.receive_some()
            assert received.startswith(b"HTTP/1.1 200")
            await streams[-1].aclose()
            await trio.testing.wait_all_tasks_blocked(0.01)
    assert len(streams) == 3


async def test_a_request_behind_file_descriptors_is_served(proxy: Unix) -> None:
    """The read that finds it is not the one that found the request before."""
    proxy.publish(await proxy.instance(answer_requests))
    async with await proxy.connect("http") as stream:
        await stream.send_all(b"GET /0 HTTP/1.1\r\nhost: b\r\n\r\n")
        await receive_until(stream, b"\r\n\r\n/0")
        with socket.socket() as sent:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sent.fileno()]))]
            await stream.socket.sendmsg([b"GET /1 HTTP/1.1\r\nhost: b\r\n\r\n"], rights)
            await stream.socket.send(b"GET /2 HTTP/1.1\r\nhost: b\r\n\r\n")
        await receive_until(stream, b"\r\n\r\n/2")


async def test_a_response_behind_file_descriptors_is_passed_on(proxy: Unix) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            async for _ in stream:
                with socket.socket() as sent:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sent.fileno()]))]
                    await stream.socket.sendmsg([b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n"], rights)
                    await stream.socket.send(b"body")

    proxy.publish(await proxy.instance(answer))
    async with await proxy.connect("http") as stream:
        for _ in range(3):
            await stream.send_all(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
            await receive_until(stream, b"\r\n\r\nbody")


async def receive_until(stream: trio.SocketStream, end: bytes) -> None:
    received = b""
    with trio.fail_after(LIMIT):
        while not received.endswith(end):
            more = await stream.receive_some()
            assert more, received
            received += more


@pytest.mark.parametrize("change", ["another label", "no label", "no folder"])
async def test_a_kept_connection_does_not_outlive_what_it_was_made_by(proxy: Unix, change: str) -> None:
    """What an operator takes back must be taken back, however busy it is."""

    def named(name: str) -> Serve:
        async def serve(stream: trio.SocketStream) -> None:
            async with stream:
                async for _ in stream:
                    await stream.send_all(f"HTTP/1.1 200 OK\r\ncontent-length: {len(name)}\r\n\r\n{name}".encode())

        return serve

    first = await proxy.instance(named("first"), "first")
    await proxy.instance(named("second"), "second")
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    proxy.nursery.start_soon(trio.serve_listeners, named("port"), listeners)
    port = listeners[0].socket.getsockname()[1]

    async with await proxy.connect("http") as stream:

        async def ask() -> str:
            await stream.send_all(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
            received = b""
            with trio.fail_after(LIMIT):
                while not received.partition(b"\r\n\r\n")[2]:
                    received += await stream.receive_some()
            return received.partition(b"\r\n\r\n")[2].decode()

        proxy.publish(proxy.named("first", port))
        assert first.labels["socket"] == "first"
        assert [await ask() for _ in range(3)] == ["first"] * 3
        if change == "another label":
            proxy.publish(proxy.named("second", port), make_instance("127.0.0.1", 2))
            assert [await ask() for _ in range(3)] == ["second"] * 3
        elif change == "no label":
            proxy.publish(make_instance("127.0.0.1", port, labels={"node": "n1"}), make_instance("127.0.0.1", 2))
            assert [await ask() for _ in range(3)] == ["port"] * 3
        else:
            proxy.config = msgspec.structs.replace(proxy.config, socket_folder=None)
            proxy.table.reconfigure(proxy.config, proxy.table.locality)
            proxy.http.reconfigure(proxy.config)
            assert [await ask() for _ in range(3)] == ["port"] * 3


async def test_a_source_that_goes_on_and_on_leaves_others_their_turn(nursery: trio.Nursery) -> None:
    """P2: a direction that reads until there is nothing ends its turn before."""
    with open_relay_loop() as loop:
        assert loop is not None
        ends = [socket.socketpair() for _ in range(2)]
        for _, inner in ends:
            inner.setblocking(False)
        pair = loop.begin(ends[0][1], ends[1][1], RelayCounters(0.0))
        flow = loop._flows[ends[0][1].fileno()]
        reads = 0

        def endless(space: memoryview) -> int:
            nonlocal reads
            reads += 1
            assert reads < 100
            return 10

        flow.receive, flow.send = endless, len  # type: ignore[assignment]  # a socket's, with less to choose from
        loop._move(flow)
        assert reads == READS
        assert flow in loop._again
        loop._remove(pair)
        loop._again.clear()
        for end in ends:
            for sock in end:
                close(sock)


async def test_the_files_go_with_the_listeners(nursery: trio.Nursery, tmp_path: Path) -> None:
    made = Unix(nursery, tmp_path)
    await nursery.start(made.serve)
    assert [each.bound for each in made.listeners.current[:2]] == [[f"unix:{tmp_path}/tcp"], [f"unix:{tmp_path}/http"]]
    assert sorted(os.listdir(tmp_path)) == ["http", "tcp"]
    made.scope.cancel()
    await made.ended.wait()
    assert os.listdir(tmp_path) == []


async def test_a_file_system_that_hangs_does_not_hold_up_the_end(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1: the file stays then."""
    made = Unix(nursery, tmp_path)
    await nursery.start(made.serve)
    monkeypatch.setattr("meshlocal.proxy.listeners._REMOVAL", 0.01)
    reader, writer = os.pipe()
    monkeypatch.setattr("meshlocal.net.unix.os.lstat", lambda path: os.read(reader, 1))
    try:
        made.scope.cancel()
        with trio.fail_after(LIMIT):
            await made.ended.wait()
        assert sorted(os.listdir(tmp_path)) == ["http", "tcp"]
        with socket.socket(socket.AF_UNIX) as late:
            assert late.connect_ex(str(tmp_path / "tcp")) == errno.ECONNREFUSED
    finally:
        os.write(writer, b"..")
        os.close(writer)
        os.close(reader)
