"""An instance, as a process, that fails when it is told to.

python -m nursery_tests.campaign.instance NAME ADDRESS LINE_PORT HTTP_PORT GRPC_PORT POSTS

It answers each line `ID` with `NAME ID`, and each HTTP request with a body that begins so, and each message of a gRPC
call likewise; the ID of a POST, and of a unary call, it first adds to the file POSTS.

Commands come as lines on standard input, and each is answered with a line once it is done.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from collections import Counter
from contextlib import suppress

import trio

from nursery_tests.campaign.grpc import UNARY, GrpcInstance, Send, message
from nursery_tests.h2_peer import H2PeerError

KINDS = ("line", "http", "grpc")
"""Protocols, in the order of the ports."""

BACKLOG = 512
BODY = 2000
"""Bytes of an HTTP response's body, and of a gRPC message: what is cut is half of it."""


class Connection:
    def __init__(self, kind: str, sock: trio.socket.SocketType) -> None:
        self.kind = kind
        self.sock = sock
        self.scope = trio.CancelScope()
        self.buffer = b""

    async def until(self, end: bytes) -> bytes | None:
        """What comes up to and with `end`; None if it does not come."""
        while end not in self.buffer:
            received = await self.sock.recv(65536)
            if not received:
                return None
            self.buffer += received
        found, _, self.buffer = self.buffer.partition(end)
        return found + end

    async def exactly(self, count: int) -> bytes | None:
        while len(self.buffer) < count:
            received = await self.sock.recv(65536)
            if not received:
                return None
            self.buffer += received
        found, self.buffer = self.buffer[:count], self.buffer[count:]
        return found

    async def send(self, data: bytes) -> None:
        while data:
            data = data[await self.sock.send(data) :]

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()
        self.scope.cancel()


class Instance:
    """All servers.

    Attributes:
        mode: `work`; `reset` what is accepted; `silent`; `slow`; `cut` every second response half-way.
        counts: connections that it reset, and responses that it cut, by protocol.
    """

    def __init__(self, name: str, address: str, ports: tuple[int, ...], posts: str) -> None:
        self.name = name
        self.address = address
        self.ports = list(ports)
        self.mode = "work"
        self.delay = 0.0
        self.counts: Counter[str] = Counter()
        self.speaking = trio.Event()
        self.speaking.set()
        self._posts = os.open(posts, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._connections: set[Connection] = set()
        self._listeners: list[trio.socket.SocketType] = []
        self._accepting: trio.CancelScope | None = None
        self._flapping: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        async with trio.open_nursery() as self._nursery:
            self.open()
            sys.stdout.write(f"listening {' '.join(map(str, self.ports))}\n")
            sys.stdout.flush()
            commands = trio.lowlevel.FdStream(os.dup(0))
            buffer = b""
            async for part in commands:
                buffer += part
                while b"\n" in buffer:
                    line, _, buffer = buffer.partition(b"\n")
                    word, *arguments = line.decode().split()
                    done = getattr(self, word)(*map(float, arguments))
                    sys.stdout.write(f"done {word} {json.dumps(done or {})}\n")
                    sys.stdout.flush()
            self._nursery.cancel_scope.cancel()

    # Commands.

    def work(self) -> None:
        self.mode = "work"
        self.speaking.set()

    def reset(self) -> None:
        """Reset what is open, and what comes."""
        self.mode = "reset"
        self._reset_all()

    def silent(self) -> None:
        self.mode = "silent"
        self.speaking = trio.Event()

    def slow(self, delay: float) -> None:
        self.mode = "slow"
        self.delay = delay

    def cut(self) -> None:
        self.mode = "cut"

    def count(self) -> dict[str, int]:
        return dict(self.counts)

    def open(self) -> None:
        for number, port in enumerate(self.ports):
            # Trio's own `bind` is a coroutine; this function is not.
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self.address, port))
            sock.listen(BACKLOG)
            self.ports[number] = sock.getsockname()[1]
            self._listeners.append(trio.socket.from_stdlib_socket(sock))
        self.accept()

    def accept(self) -> None:
        assert self._nursery is not None
        self._accepting = trio.CancelScope()
        self._nursery.start_soon(self._accept, self._accepting)

    def close(self) -> None:
        """Listen no longer. What the kernel accepted before is served."""
        self._stop_accepting()
        for kind, listener in zip(KINDS, self._listeners, strict=True):
            with socket.fromfd(listener.fileno(), listener.family, listener.type) as same, suppress(BlockingIOError):
                same.setblocking(False)
                while True:
                    sock, _ = same.accept()
                    self._serve(kind, trio.socket.from_stdlib_socket(sock))
            listener.close()
        self._listeners.clear()

    def stall(self) -> None:
        """Accept nothing more, and leave the kernel as little room for it as there is."""
        self._stop_accepting()
        for listener in self._listeners:
            listener.listen(0)

    def resume(self) -> None:
        for listener in self._listeners:
            listener.listen(BACKLOG)
        self.accept()

    def flap(self, interval: float) -> None:
        """Be there and not there in turn."""
        assert self._nursery is not None
        self._flapping = trio.CancelScope()
        self._nursery.start_soon(self._flap, interval, self._flapping)

    def steady(self) -> None:
        assert self._flapping is not None
        self._flapping.cancel()
        if not self._listeners:
            self.open()

    # What they do.

    async def _flap(self, interval: float, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                self.close()
                self._reset_all()
                self.counts["flaps"] += 1
                await trio.sleep(interval)
                self.open()
                await trio.sleep(interval)

    def _stop_accepting(self) -> None:
        assert self._accepting is not None
        self._accepting.cancel()

    def _reset_all(self) -> None:
        for connection in list(self._connections):
            self.counts[f"{connection.kind}-reset"] += 1
            connection.reset()

    async def _accept(self, scope: trio.CancelScope) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                for kind, listener in zip(KINDS, self._listeners, strict=True):
                    nursery.start_soon(self._accept_one, kind, listener)

    async def _accept_one(self, kind: str, listener: trio.socket.SocketType) -> None:
        # It may be closed before the cancellation gets here: EBADF, or Trio's word for it.
        with suppress(trio.ClosedResourceError, OSError):
            while True:
                sock, _ = await listener.accept()
                self._serve(kind, sock)

    def _serve(self, kind: str, sock: trio.socket.SocketType) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(kind, sock)
        if self.mode == "reset":
            self.counts[f"{kind}-reset"] += 1
            connection.reset()
            return
        assert self._nursery is not None
        self._connections.add(connection)
        self._nursery.start_soon(self._converse, connection)

    async def _converse(self, connection: Connection) -> None:
        try:
            with connection.scope:
                serve = {"line": self._line, "http": self._http, "grpc": self._grpc}[connection.kind]
                while await serve(connection):
                    pass
        except* (OSError, trio.ClosedResourceError, H2PeerError):
            pass
        finally:
            self._connections.discard(connection)
            connection.sock.close()

    async def _line(self, connection: Connection) -> bool:
        line = await connection.until(b"\n")
        if line is None:
            return False
        return await self._answer(connection, connection.send, b"", f"{self.name} ".encode() + line)

    async def _http(self, connection: Connection) -> bool:
        head = await connection.until(b"\r\n\r\n")
        if head is None:
            return False
        method, target, *_ = head.decode("latin-1").split()
        length = 0
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        if await connection.exactly(length) is None:
            return False
        if method == "POST":
            os.write(self._posts, f"{target[1:]}\n".encode())
        body = f"{self.name} {target[1:]}\n".encode().ljust(BODY, b".")
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
        return await self._answer(connection, connection.send, head, body)

    async def _grpc(self, connection: Connection) -> bool:
        """All calls of a connection."""

        async def answer(path: str, id: bytes, send: Send) -> bool:
            if path == UNARY:
                os.write(self._posts, id + b"\n")
            body = f"{self.name} {id.decode()}\n".encode().ljust(BODY, b".")
            return await self._answer(connection, send, b"", message(body))

        async def receive() -> bytes:
            return await connection.sock.recv(65536)

        async with trio.open_nursery() as nursery:
            await GrpcInstance(receive, connection.send, answer).run(nursery)
            nursery.cancel_scope.cancel()
        return False

    async def _answer(self, connection: Connection, send: Send, head: bytes, body: bytes) -> bool:
        await self.speaking.wait()
        if self.mode == "slow":
            await trio.sleep(self.delay)
        if self.mode == "cut":
            self.counts["answers"] += 1
            if self.counts["answers"] % 2:
                self.counts[f"{connection.kind}-cut"] += 1
                await send(head + body[: len(body) // 2])
                connection.reset()
                return False
        await send(head + body)
        return True


if __name__ == "__main__":
    name, address, *ports, posts = sys.argv[1:]
    trio.run(Instance(name, address, tuple(map(int, ports)), posts).run)
