"""Load at a fixed rate, and idle connections: what no program in Debian makes as it is needed here.

Theory of operation. Request i is due at start + i / rate, whatever became of those before it. Its latency counts from
then on, not from when it could be sent: a proxy that stalls is charged for every request that had to wait, which a
generator that waits with it would leave out (coordinated omission). A request takes a connection that is free; if
none is, it waits for one. With `fresh`, each has a connection of its own: connect, one exchange, close.

One thread and one epoll. It sleeps until the next request is due, to the microsecond, and spins nowhere: it must leave
the cores to what it measures.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from statistics import fmean

from bench import report

_PR_SET_TIMERSLACK = 29
_BUFFER = 262144
STRAGGLERS = 12.0
"""Seconds after the last request was due, after which those that are under way have failed."""


class Outcomes:
    """What became of the requests.

    Attributes:
        latencies: seconds from due to done, of those that ended well, in the order of their ends.
        due: when each of these was due, in seconds since the start.
        failures: how the others failed, by kind.
        late: seconds from due to sent, for requests that found a free connection: the generator's own share.
    """

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.due: list[float] = []
        self.late: list[float] = []
        self.failures: dict[str, int] = {}

    @property
    def failed(self) -> int:
        """How many requests failed."""
        return sum(self.failures.values())

    def fail(self, kind: str) -> None:
        """Count a failure."""
        self.failures[kind] = self.failures.get(kind, 0) + 1

    def percentiles(self) -> dict[str, float]:
        """p50, p90, p99, p99.9, the worst and the mean, in seconds."""
        found = {f"p{share:g}": report.percentile(self.latencies, share) for share in (50, 90, 99, 99.9)}
        return {**found, "max": max(self.latencies), "mean": fmean(self.latencies)}


class _Connection:
    __slots__ = ("connected", "due", "end", "received", "sent", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.connected = False
        self.due = -1.0
        self.sent = 0
        self.received = 0
        self.end = 0


class Generator:
    """One run of load.

    Args:
        address: where it goes.
        payload: what a request sends.
        answer: the length of the answer that begins with these bytes; 0 while they do not tell. Echoes are as long as
            the payload.
        connections: how many are open, if they are not fresh.
        fresh: each request has a connection of its own.
        together: so many requests are due at the same moment, and as many fewer moments there are.
    """

    def __init__(
        self,
        address: tuple[str, int],
        payload: bytes,
        *,
        answer: Callable[[bytes], int] | None = None,
        connections: int = 32,
        fresh: bool = False,
        together: int = 1,
    ) -> None:
        self._address = address
        self._payload = payload
        self._answer = answer
        self._fresh = fresh
        self._together = together
        self._poll = select.epoll()
        self._open: dict[int, _Connection] = {}
        self._free: deque[_Connection] = deque()
        self._waiting: deque[float] = deque()
        self.outcomes = Outcomes()
        for _ in range(0 if fresh else connections):
            self._free.append(self._connect_now())

    def run(self, rate: float, seconds: float, steps: Iterator[float] | None = None) -> Outcomes:
        """Make the load, and wait for what is under way at its end.

        `steps` is a script beside the load: it gives the seconds at which its next step is due, and runs that step when
        it is resumed: between two requests, with none under way that it could harm.
        """
        with _fine_timer(), _no_collections():
            self._run(rate, seconds, steps)
        for connection in list(self._open.values()):
            self._drop(connection)
        self._poll.close()
        return self.outcomes

    def _run(self, rate: float, seconds: float, steps: Iterator[float] | None) -> None:
        total, started = int(rate * seconds), 0
        begin = time.perf_counter()
        step = next(steps) if steps is not None else float("inf")
        while started < total or self._under_way:
            now = time.perf_counter() - begin
            if now >= step and not self._under_way:
                assert steps is not None
                at, step = step, next(steps, float("inf"))
                # What a step waited for and took is no request's wait: the schedule goes on where it stood.
                begin = time.perf_counter() - at
                continue
            due = self._due(started, rate)
            while due <= now and started < total and step > now:
                self._start(due, now)
                started += 1
                due = self._due(started, rate)
                now = time.perf_counter() - begin
            if now > seconds + STRAGGLERS:
                for _ in range(self._under_way):
                    self.outcomes.fail("no answer")
                return
            wait = max(0.0, due - now) if started < total and step > now else 0.1
            select.select([self._poll], [], [], wait)
            for number, events in self._poll.poll(0):
                connection = self._open.get(number)
                if connection is not None:
                    self._handle(connection, events, begin)

    def _due(self, number: int, rate: float) -> float:
        return number // self._together * self._together / rate

    @property
    def _under_way(self) -> int:
        return len(self._open) - len(self._free) + len(self._waiting)

    def _start(self, due: float, now: float) -> None:
        if self._fresh:
            self._connect_fresh(due)
        elif self._free:
            self.outcomes.late.append(now - due)
            self._send(self._free.popleft(), due)
        else:
            self._waiting.append(due)

    def _connect_now(self) -> _Connection:
        sock = socket.create_connection(self._address, timeout=10)
        sock.setblocking(False)
        connection = self._adopt(sock, select.EPOLLIN)
        connection.connected = True
        return connection

    def _connect_fresh(self, due: float) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        number = sock.connect_ex(self._address)
        if number not in (0, errno.EINPROGRESS):
            sock.close()
            self.outcomes.fail(errno.errorcode[number])
            return
        connection = self._adopt(sock, select.EPOLLOUT)
        connection.due = due

    def _adopt(self, sock: socket.socket, events: int) -> _Connection:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = self._open[sock.fileno()] = _Connection(sock)
        self._poll.register(sock, events)
        return connection

    def _send(self, connection: _Connection, due: float) -> None:
        connection.due = due
        connection.sent = connection.received = 0
        connection.end = 0 if self._answer is not None else len(self._payload)
        try:
            connection.sent = connection.sock.send(self._payload)
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail(connection, error)
            return
        if connection.sent < len(self._payload):
            self._poll.modify(connection.sock, select.EPOLLIN | select.EPOLLOUT)

    def _handle(self, connection: _Connection, events: int, begin: float) -> None:
        try:
            if not connection.connected:
                number = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number:
                    raise OSError(number, "connect")
                connection.connected = True
                self._poll.modify(connection.sock, select.EPOLLIN)
                self._send(connection, connection.due)
                return
            if events & select.EPOLLOUT and connection.sent < len(self._payload):
                connection.sent += connection.sock.send(self._payload[connection.sent :])
                if connection.sent == len(self._payload):
                    self._poll.modify(connection.sock, select.EPOLLIN)
            received = connection.sock.recv(_BUFFER)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(connection, error)
            return
        if not received or connection.due < 0:
            self._fail(connection, None)
            return
        if not connection.end and self._answer is not None:
            connection.end = self._answer(received)
        connection.received += len(received)
        if connection.end and connection.received >= connection.end:
            self._done(connection, begin)

    def _done(self, connection: _Connection, begin: float) -> None:
        if self._fresh:
            due = connection.due
            self._drop(connection)
            self._succeed(due, begin)
            return
        self._succeed(connection.due, begin)
        connection.due = -1.0
        if self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._free.append(connection)

    def _succeed(self, due: float, begin: float) -> None:
        self.outcomes.latencies.append(time.perf_counter() - begin - due)
        self.outcomes.due.append(due)

    def _fail(self, connection: _Connection, error: OSError | None) -> None:
        if connection.due >= 0:
            self.outcomes.fail("closed" if error is None else errno.errorcode.get(error.errno or 0, "error"))
        else:
            with suppress(ValueError):
                self._free.remove(connection)
        self._drop(connection)
        if not self._fresh:
            try:
                self._free.append(self._connect_now())
            except OSError:
                self.outcomes.fail("reconnect")

    def _drop(self, connection: _Connection) -> None:
        del self._open[connection.sock.fileno()]
        connection.sock.close()


def http_answer(received: bytes) -> int:
    """The length of an HTTP response whose head came in one piece, from its Content-Length."""
    head, end, _ = received.partition(b"\r\n\r\n")
    if not end:
        return 0
    _, name, rest = head.lower().partition(b"content-length:")
    return len(head) + len(end) + (int(rest.split(b"\r\n", 1)[0]) if name else 0)


@contextmanager
def idle(address: tuple[str, int], count: int, payload: bytes = b"x") -> Iterator[None]:
    """Connections that were used once, and are held."""
    held: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = socket.create_connection(address, timeout=30)
            held.append(sock)
            sock.sendall(payload)
            if not sock.recv(len(payload)):
                raise ConnectionError("an idle connection was closed")
        yield
    finally:
        for sock in held:
            sock.close()


@contextmanager
def _fine_timer() -> Iterator[None]:
    """Let this thread wake when it asked to; the system rounds by 50 µs otherwise."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_TIMERSLACK, 0, 0, 0, 0)  # the default again


@contextmanager
def _no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
