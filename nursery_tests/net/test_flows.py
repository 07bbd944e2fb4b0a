"""net/flows: large transfers leave time and memory to others, and no end of a connection is missed (P1, P2, A8)."""

from __future__ import annotations

import errno
import socket
import struct
from contextlib import ExitStack

import pytest
import trio

from meshlocal.net import flows
from meshlocal.net.relay_loop import RelayLoop
from meshlocal.net.relay_state import RelayResult
from meshlocal.net.sockets import abort
from nursery_tests.net.test_relay_loop import Line, opened, until

BULK = 40


def fill(sock: socket.socket, size: int) -> int:
    """Write as much as a socket takes, up to a size; returns how much."""
    sent = 0
    block = b"x" * 65536
    while sent < size:
        try:
            sent += sock.send(block)
        except BlockingIOError:
            break
    return sent


def drain(sock: socket.socket) -> int:
    """Read all that is there; returns how much."""
    size = 0
    while True:
        try:
            piece = sock.recv(1 << 20)
        except BlockingIOError:
            return size
        if not piece:
            return size
        size += len(piece)


def wide(line: Line) -> Line:
    """With buffers in which megabytes wait to be read."""
    for sock in (line.app, line.client, line.upstream, line.server):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
    return line


async def test_large_reads_share_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """P1: however many transfers there are, a turn moves a bounded number of bytes for them, and all that is small.

    None of the transfers is passed over for ever, and each byte arrives.
    """
    moved: list[int] = []

    class Measuring(RelayLoop):
        def _turn(self, timeout: float) -> bool:
            before = sum(line.counters.client_to_upstream for line in lines)
            try:
                return super()._turn(timeout)
            finally:
                moved.append(sum(line.counters.client_to_upstream for line in lines) - before)

    monkeypatch.setattr("meshlocal.net.relay_loop.RelayLoop", Measuring)
    lines: list[Line] = []
    with ExitStack() as stack:
        loop = opened(stack)
        lines += [wide(stack.enter_context(Line())) for _ in range(BULK)]
        small = stack.enter_context(Line())
        async with trio.open_nursery() as nursery:
            for line in [*lines, small]:
                nursery.start_soon(line.relay)
            await until(lambda: len(loop) == BULK + 1)
            # Let each of them grow to large reads.
            said, heard = [0] * BULK, [0] * BULK
            for _ in range(12):
                for number, line in enumerate(lines):
                    said[number] += fill(line.app, 1 << 21)
                small.app.send(b"ping")
                for _ in range(30):
                    await trio.lowlevel.checkpoint()
                    for number, line in enumerate(lines):
                        heard[number] += drain(line.server)
            with trio.fail_after(20):
                while heard != said:
                    await trio.sleep(0.001)
                    for number, line in enumerate(lines):
                        heard[number] += drain(line.server)
            nursery.cancel_scope.cancel()
        assert min(heard) > 1 << 21
        # One read may begin when little is left, and one is made in any case; small first reads are not counted.
        most = flows.TURN_BYTES + 2 * flows.LARGEST + BULK * flows.FIRST
        assert max(moved) <= most
        assert small.counters.client_to_upstream == 4 * 12


async def test_a_transfer_that_was_left_over_goes_on_whatever_others_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """P1: its sender waits for it, so that no event of its own would bring it back. Here others took all, each turn."""
    with ExitStack() as stack:
        loop = opened(stack)
        line = wide(stack.enter_context(Line()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            await until(lambda: len(loop) == 1)
            said = heard = 0
            for _ in range(12):  # let it grow to large reads
                said += fill(line.app, 1 << 21)
                await trio.sleep(0.001)
                heard += drain(line.server)
            monkeypatch.setattr("meshlocal.net.relay_loop.TURN_BYTES", 0)
            with trio.fail_after(20):
                for _ in range(4):
                    said += fill(line.app, 1 << 21)
                    while heard != said:
                        await trio.sleep(0.001)
                        heard += drain(line.server)
            nursery.cancel_scope.cancel()
    assert heard > 1 << 21


async def test_a_small_message_is_served_in_the_turn_that_it_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """P1: what large reads may move has been moved already; that is not its business."""
    with ExitStack() as stack:
        loop = opened(stack)
        line = stack.enter_context(Line())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            await until(lambda: len(loop) == 1)
            monkeypatch.setattr("meshlocal.net.relay_loop.TURN_BYTES", 0)
            line.app.send(b"ping")
            await until(lambda: line.counters.client_to_upstream == 4)
            nursery.cancel_scope.cancel()


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("end", ["app", "server"])
@pytest.mark.parametrize("sent_first", [False, True])
async def test_a_reset_after_a_half_close_ends_the_relay(end: str, sent_first: bool) -> None:
    """A8: it holds its limits, and the other side, for no longer."""
    with ExitStack() as stack:
        loop = opened(stack)
        line = stack.enter_context(Line())
        results: list[RelayResult] = []

        async def run() -> None:
            results.append(await line.relay())

        ending, other = (line.app, line.server) if end == "app" else (line.server, line.app)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                await until(lambda: len(loop) == 1)
                if sent_first:
                    ending.send(b"a question")
                ending.shutdown(socket.SHUT_WR)
                await trio.lowlevel.wait_readable(other)
                while other.recv(100):
                    await trio.lowlevel.wait_readable(other)
                # The other side takes its time; meanwhile who asked leaves.
                reset(ending)
        (result,) = results
        assert result.failed == ("client" if end == "app" else "upstream")
        assert result.errno in (errno.ECONNRESET, errno.EPIPE)
        assert result.first_end == result.failed
        assert len(loop) == 0


async def test_a_half_close_is_no_reset() -> None:
    """The other direction goes on, for as long as it likes."""
    with ExitStack() as stack:
        loop = opened(stack)
        line = stack.enter_context(Line())
        results: list[RelayResult] = []

        async def run() -> None:
            results.append(await line.relay())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await until(lambda: len(loop) == 1)
            line.app.shutdown(socket.SHUT_WR)
            await trio.sleep(0.05)
            assert results == []
            line.server.send(b"still here")
            await until(lambda: line.counters.upstream_to_client == 10)
            line.server.shutdown(socket.SHUT_WR)
        assert results[0].failed is None


async def test_what_stalled_readers_hold_is_bounded_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """P2: from a limit on, each further one holds a few kilobytes; once they read again, reads are large again."""
    monkeypatch.setattr(flows, "HELD_MOST", 1 << 20)
    with ExitStack() as stack:
        loop = opened(stack)
        lines = [stack.enter_context(Line()) for _ in range(40)]
        for line in lines:
            for sock in (line.upstream, line.server):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        async with trio.open_nursery() as nursery:
            for line in lines:
                nursery.start_soon(line.relay)
            await until(lambda: len(loop) == len(lines))
            for line in lines:
                fill(line.app, 1 << 20)
                await trio.sleep(0.002)
            await until(lambda: loop.held > 1 << 20)
            await trio.sleep(0.05)
            held = sum(len(flow.rest) for flow in loop._flows.values())
            assert held == loop.held
            assert held <= (1 << 20) + flows.LARGEST + len(lines) * flows.SCANT
            with trio.fail_after(20):
                while loop.held > 1 << 19:
                    for line in lines:
                        drain(line.server)
                    await trio.sleep(0.001)
            assert {flow.limit for flow in loop._flows.values()} != {flows.SCANT}
            nursery.cancel_scope.cancel()
        assert loop.held == 0


async def test_what_a_cancelled_relay_held_is_let_go() -> None:
    with ExitStack() as stack:
        loop = opened(stack)
        line = stack.enter_context(Line())
        for sock in (line.upstream, line.server):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            await until(lambda: len(loop) == 1)
            fill(line.app, 1 << 20)
            await until(lambda: loop.held > 0)
            nursery.cancel_scope.cancel()
        assert loop.held == 0


async def test_a_loop_that_a_fault_takes_from_trio_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """P1: nothing of it goes on; whoever watches it must end the process. Trio itself lives to tell."""
    with ExitStack() as stack:
        loop = opened(stack)
        line = stack.enter_context(Line())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(line.relay)
            await until(lambda: len(loop) == 1)

            def broken(self: RelayLoop, timeout: float) -> bool:
                raise MemoryError("no room")

            monkeypatch.setattr(RelayLoop, "_turn", broken)
            with trio.fail_after(10):
                await loop.died.wait()
            assert loop.problem == "MemoryError: no room"
            await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert "the relay loop failed" in caplog.text
        assert caplog.text.count("the relay loop failed") == 1


async def test_a_handler_that_closes_its_socket_and_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """P1: the loop goes on with the others."""
    with ExitStack() as stack:
        loop = opened(stack)
        line, other = stack.enter_context(Line()), stack.enter_context(Line())
        loop.watch(line.client)

        def handler(mask: int) -> None:
            abort(line.client)
            raise RuntimeError("of ours")

        loop.handlers[line.client.fileno()] = handler
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.relay)
            await until(lambda: len(loop) == 1)
            line.app.send(b"x")
            await until(lambda: "RuntimeError: of ours" in caplog.text)
            other.app.send(b"ping")
            await until(lambda: other.counters.client_to_upstream == 4)
            assert not loop.problem
            nursery.cancel_scope.cancel()
