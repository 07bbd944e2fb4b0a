"""A plain socket as a pipe: nothing waits but what says so, and what fails is an OSError."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest
import trio
import trio.testing

from meshlocal.net.pipe import PlainPipe, is_silent


@pytest.fixture
def pair() -> Iterator[tuple[PlainPipe, socket.socket]]:
    """A pipe, and the other end of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    ours.setblocking(False)
    with ours, theirs:
        yield PlainPipe(ours), theirs


async def test_bytes_both_ways(pair: tuple[PlainPipe, socket.socket]) -> None:
    """`None` is nothing yet, empty the end; what is peeked at stays there."""
    pipe, theirs = pair
    assert pipe.read(10) is None
    assert is_silent(pipe)
    theirs.sendall(b"hello")
    await pipe.wait_readable()
    assert (pipe.peek(2), pipe.read(3), pipe.read(10), pipe.read(10)) == (b"he", b"hel", b"lo", None)
    assert pipe.write(b"world") == 5
    assert theirs.recv(10) == b"world"
    theirs.shutdown(socket.SHUT_WR)
    await pipe.wait_readable()
    assert pipe.read(10) == b""
    assert not is_silent(pipe)
    pipe.end()
    assert theirs.recv(10) == b""


async def test_what_finds_no_room_waits(pair: tuple[PlainPipe, socket.socket]) -> None:
    """A full connection takes nothing, and is waited for until it takes something."""
    pipe, theirs = pair
    while pipe.write(bytes(1 << 20)):
        pass
    with trio.move_on_after(0.01) as scope:
        await pipe.wait_writable()
    assert scope.cancelled_caught
    theirs.setblocking(False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pipe.wait_writable)
        with trio.fail_after(10):
            while nursery.child_tasks:
                await trio.lowlevel.wait_readable(theirs)
                theirs.recv(1 << 20)
    assert pipe.write(b"x") == 1


async def test_who_waits_can_be_interrupted(pair: tuple[PlainPipe, socket.socket]) -> None:
    """And the pipe goes on."""
    pipe, theirs = pair

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await pipe.wait_readable()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        pipe.interrupt()
    theirs.sendall(b"x")
    await pipe.wait_readable()
    assert pipe.read(1) == b"x"


async def test_an_end_that_is_cut_is_no_end(pair: tuple[PlainPipe, socket.socket]) -> None:
    """Closed in good order the stream ends; aborted, it fails. Both may be done twice."""
    pipe, theirs = pair
    pipe.abort()
    pipe.abort()
    pipe.close()
    with pytest.raises(ConnectionResetError):
        theirs.recv(1)


@pytest.mark.parametrize("act", ["read", "write", "peek"])
async def test_what_was_reset_fails(pair: tuple[PlainPipe, socket.socket], act: str) -> None:
    pipe, theirs = pair
    PlainPipe(theirs).abort()
    await pipe.wait_readable()
    acts: dict[str, Callable[[], object]] = {
        "read": lambda: pipe.read(1),
        "write": lambda: pipe.write(b"x"),
        "peek": lambda: pipe.peek(1),
    }
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        acts[act]()
    assert not is_silent(pipe)
