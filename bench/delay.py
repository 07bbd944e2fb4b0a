"""A network between two nodes, pretended: a TCP relay that holds every byte for a while.

`python -m bench.delay LISTEN_ADDRESS TARGET_PORT ONE_WAY_SECONDS` prints its port, and relays to
127.0.0.1:TARGET_PORT. Each chunk leaves `ONE_WAY_SECONDS` after it came, in both directions. The handshake of a real
connection takes a round trip too; the system answers the relay's clients at once, so the relay adds that round trip to
the first bytes instead. Kernels with netem would do this better; not every kernel has it.

What it really does is measured before it is used: see `verify`.
"""

from __future__ import annotations

import heapq
import select
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from statistics import median

from bench.machine import raise_file_limit
from bench.processes import module

_BUFFER = 262144
_TRIES = 20


class DelayError(Exception):
    """The relay's delay is not what was asked for: figures taken through it would mean nothing."""


class _Side:
    """One socket of a relayed connection, and where its bytes go."""

    __slots__ = ("closed", "earliest", "peer", "sock")

    def __init__(self, sock: socket.socket, earliest: float) -> None:
        self.sock = sock
        self.earliest = earliest
        self.peer = self
        self.closed = False


class Relay:
    """The relay's loop.

    Args:
        listener: where connections come in.
        target: the port on 127.0.0.1 that they go to.
        one_way: seconds that each byte is held.
    """

    def __init__(self, listener: socket.socket, target: int, one_way: float) -> None:
        self._listener = listener
        self._target = target
        self._one_way = one_way
        self._sides: dict[int, _Side] = {}
        self._due: list[tuple[float, int, _Side, bytes]] = []
        self._numbers = count()
        self._poll = select.epoll()
        self._poll.register(listener, select.EPOLLIN)

    def run(self) -> None:
        """Relay for ever."""
        while True:
            wait = None
            if self._due:
                wait = max(0.0, self._due[0][0] - time.monotonic())
            # epoll waits in whole milliseconds; select on the epoll itself waits by a fine timer.
            select.select([self._poll], [], [], wait)
            for number, _ in self._poll.poll(0):
                if number == self._listener.fileno():
                    self._accept()
                elif (side := self._sides.get(number)) is not None:
                    self._receive(side)
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                _, _, side, data = heapq.heappop(self._due)
                self._deliver(side, data)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return
        try:
            upstream = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            client.close()
            return
        sides = _Side(client, time.monotonic() + 2 * self._one_way), _Side(upstream, 0.0)
        for side, peer in (sides, reversed(sides)):
            side.peer = peer
            side.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            side.sock.settimeout(5.0)
            self._sides[side.sock.fileno()] = side
            self._poll.register(side.sock, select.EPOLLIN)

    def _receive(self, side: _Side) -> None:
        try:
            data = side.sock.recv(_BUFFER)
        except OSError:
            data = b""
        due = max(time.monotonic(), side.earliest) + self._one_way
        heapq.heappush(self._due, (due, next(self._numbers), side.peer, data))
        if not data:
            self._poll.unregister(side.sock)
            del self._sides[side.sock.fileno()]
            side.closed = True

    def _deliver(self, side: _Side, data: bytes) -> None:
        try:
            if data:
                side.sock.sendall(data)
                return
            side.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        if side.closed and not data:
            side.sock.close()
            side.peer.sock.close()


@contextmanager
def delaying(target: int, one_way: float, address: str = "127.0.0.1") -> Iterator[int]:
    """A relay process to an echo port of this machine; gives its port once its delay is verified.

    Raises:
        DelayError: it delays otherwise.
    """
    with module("bench.delay", address, str(target), str(one_way)) as (_, (port,)):
        yield port


def verify(direct: tuple[str, int], delayed: tuple[str, int], one_way: float, exchanges: int = 50) -> float:
    """Measure what the relay adds to a round trip to an echo server; returns it, in seconds.

    Again, for a machine that is busy for a moment, where both round trips have little to do with the relay.

    Raises:
        DelayError: it is less than two ways, or exceeds them by half and 0.3 ms, each time.
    """
    asked, added = 2 * one_way, 0.0
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(0.05)
        added = _round_trip(delayed, exchanges) - _round_trip(direct, exchanges)
        if asked <= added <= 1.5 * asked + 0.0003:
            return added
    raise DelayError(f"asked for {asked * 1000:.2f} ms a round trip, the relay adds {added * 1000:.2f} ms")


def _round_trip(address: tuple[str, int], exchanges: int) -> float:
    times = []
    with socket.create_connection(address, timeout=10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(exchanges + 1):
            start = time.perf_counter()
            sock.sendall(b"x")
            if not sock.recv(1):
                raise DelayError(f"{address[0]}:{address[1]} closed the connection")
            times.append(time.perf_counter() - start)
    return median(times[1:])


def main() -> None:
    raise_file_limit()
    address, target, one_way = sys.argv[1:]
    listener = socket.create_server((address, 0), backlog=4096)
    listener.setblocking(False)
    print(listener.getsockname()[1], flush=True)
    Relay(listener, int(target), float(one_way)).run()


if __name__ == "__main__":
    main()
