"""An instance on a loopback port that does what a test tells it."""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import TypeAlias

import anyio
from anyio.abc import TaskGroup

from meshlocal.net.groups import single
from meshlocal.policy.model import NODE, Instance, make_instance
from meshlocal.testing.http import HttpRequest

_BACKLOG = 128
_FILLERS = 8
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class UpstreamConnection:
    """A connection that an upstream accepted. Runs on trio and on asyncio."""

    def __init__(self, upstream: Upstream, sock: socket.socket) -> None:
        self.upstream = upstream
        self._socket = sock

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Wait for bytes; none at the peer's end.

        Raises:
            OSError: the connection was reset.
        """
        while True:
            await anyio.wait_readable(self._socket)
            with suppress(BlockingIOError):
                return self._socket.recv(max_bytes)

    async def send(self, data: bytes) -> None:
        """Send all bytes.

        Raises:
            OSError: the connection was reset.
        """
        left = memoryview(data)
        while left:
            await anyio.wait_writable(self._socket)
            with suppress(BlockingIOError):
                left = left[self._socket.send(left) :]

    def reset(self) -> None:
        """Let the close that follows be a reset."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


Behaviour: TypeAlias = Callable[[UpstreamConnection], Awaitable[None]]
"""What an upstream does with a connection, which is closed when it returns."""


class Upstream:
    """An instance. Made by `open_upstream`.

    Attributes:
        name: what `echo` greets with.
        instance: for `FakeSource.set`.
        accepted: how many connections it accepted.
        requests: the HTTP requests that it got.
    """

    def __init__(self, name: str, labels: Mapping[str, str], port_name: str, behaviour: Behaviour) -> None:
        self.name = name
        self.accepted = 0
        self.requests: list[HttpRequest] = []
        self._behaviour = behaviour
        self._next: deque[Behaviour] = deque()
        # It keeps the port while nobody listens.
        self._reserved = _bind(0)
        self.port: int = self._reserved.getsockname()[1]
        self.instance: Instance = make_instance("127.0.0.1", self.port, port_name, labels)
        self._listener: socket.socket | None = None
        self._accepting: anyio.CancelScope | None = None
        self._fillers: list[socket.socket] = []
        # A task that is cancelled before its first step closes nothing.
        self._owned: set[socket.socket] = set()
        self._connections: dict[UpstreamConnection, anyio.CancelScope] = {}
        self._tasks: TaskGroup | None = None

    @property
    def open(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    def behave(self, behaviour: Behaviour, *, times: int | None = None) -> None:
        """Treat connections in this way from now on, or only the next few of them; those that are open go on."""
        if times is None:
            self._behaviour = behaviour
            self._next.clear()
        else:
            self._next.extend([behaviour] * times)

    def accept(self) -> None:
        """Accept connections: the state that it starts in, and returns to."""
        self._stop_listening()
        self._listener = self._own(_bind(self.port))
        self._listener.listen(_BACKLOG)
        assert self._tasks is not None
        self._accepting = anyio.CancelScope()
        self._tasks.start_soon(self._accept, self._listener, self._accepting)

    def refuse(self) -> None:
        """Refuse connections from now on; those that are open go on."""
        self._stop_listening()

    def hang(self) -> None:
        """Neither accept connections nor refuse them from now on, as a host that is gone."""
        self._stop_listening()
        self._listener = self._own(_bind(self.port))
        # With its queue full, the system drops what would begin a connection.
        self._listener.listen(0)
        for _ in range(_FILLERS):
            filler = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            filler.connect_ex(("127.0.0.1", self.port))
            self._fillers.append(filler)

    def cut(self) -> None:
        """Reset the connections that are open."""
        for connection, scope in self._connections.items():
            connection.reset()
            scope.cancel()

    def kill(self) -> None:
        """`refuse` and `cut`: as a process that is killed."""
        self.refuse()
        self.cut()

    def _own(self, sock: socket.socket) -> socket.socket:
        self._owned.add(sock)
        return sock

    def _disown(self, sock: socket.socket) -> None:
        self._owned.discard(sock)
        sock.close()

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        accepting, self._accepting = self._accepting, None
        if accepting is not None and listener is not None:
            # The task that waits for the socket closes it; from here on it refuses.
            listener.shutdown(socket.SHUT_RDWR)
            accepting.cancel()
        elif listener is not None:
            self._disown(listener)
        self._close_fillers()

    def _close_fillers(self) -> None:
        for filler in self._fillers:
            filler.close()
        self._fillers.clear()

    async def _accept(self, listener: socket.socket, scope: anyio.CancelScope) -> None:
        assert self._tasks is not None
        try:
            with scope:
                while True:
                    await anyio.wait_readable(listener)
                    try:
                        sock, _ = listener.accept()
                    except (BlockingIOError, ConnectionAbortedError):
                        continue
                    sock.setblocking(False)
                    self.accepted += 1
                    # From here on it can be cut, also before its task has made a step.
                    connection = UpstreamConnection(self, self._own(sock))
                    self._connections[connection] = anyio.CancelScope()
                    self._tasks.start_soon(self._serve, connection, sock)
        except OSError:
            if not scope.cancel_called:
                raise
        finally:
            self._disown(listener)

    async def _serve(self, connection: UpstreamConnection, sock: socket.socket) -> None:
        try:
            with self._connections[connection], suppress(OSError):  # the peer reset it
                await (self._next.popleft() if self._next else self._behaviour)(connection)
        finally:
            del self._connections[connection]
            self._disown(sock)

    def _close(self) -> None:
        self._close_fillers()
        for sock in list(self._owned):
            self._disown(sock)
        self._reserved.close()


def _bind(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
    except BaseException:
        sock.close()
        raise
    return sock


async def echo(connection: UpstreamConnection) -> None:
    """Greet with the upstream's name and a line break, then send back what comes, to its end."""
    await connection.send(connection.upstream.name.encode() + b"\n")
    while received := await connection.receive():
        await connection.send(received)


@asynccontextmanager
async def open_upstream(
    name: str = "",
    *,
    node: str | None = None,
    labels: Mapping[str, str] | None = None,
    port_name: str = "",
    behaviour: Behaviour | None = None,
) -> AsyncIterator[Upstream]:
    """An instance for as long as the block lasts.

    Args:
        name: what `echo` greets with; by default the node.
        node: its label `node`; None: it has none.
        labels: its other labels.
        port_name: its port's name.
        behaviour: what it does with connections; `echo` by default.
    """
    all_labels = dict(labels or {})
    if node is not None:
        all_labels[NODE] = node
    upstream = Upstream(name or node or "upstream", all_labels, port_name, behaviour or echo)
    failure: Exception | None = None
    try:
        async with anyio.create_task_group() as tasks:
            upstream._tasks = tasks
            upstream.accept()
            try:
                yield upstream
            except Exception as error:  # noqa: BLE001 - raised below: the task group would wrap it in a group
                failure = error
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if failure is not None:
            # Two failures: neither is lost.
            raise BaseExceptionGroup("the test and its upstream failed", [failure, single(group)]) from None
        raise single(group) from None
    finally:
        upstream._close()
    if failure is not None:
        raise failure
