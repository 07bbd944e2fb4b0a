"""An echo server in one process: `python -m bench.echo ADDRESS...` prints the port of each address, and serves.

An address with a slash is the path of a Unix socket, whose port is 0.

It does next to nothing between two system calls. What it costs is in the direct figures of each benchmark, and the
checks of `make bench` compare it with a server in C.
"""

from __future__ import annotations

import select
import socket
import sys

from bench.machine import raise_file_limit

_BUFFER = 65536
_ACCEPTS = 64


def main() -> None:
    raise_file_limit()
    listeners = {}
    poll = select.epoll()
    for argument in sys.argv[1:]:
        address, _, port = argument.partition(":")
        if "/" in address:
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(address)
            sock.listen(4096)
        else:
            sock = socket.create_server((address, int(port or 0)), backlog=4096)
        sock.setblocking(False)
        listeners[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
    ports = (sock.getsockname()[1] if sock.family == socket.AF_INET else 0 for sock in listeners.values())
    print(*ports, flush=True)
    serve(poll, listeners)


def serve(poll: select.epoll, listeners: dict[int, socket.socket]) -> None:
    """Echo for ever. What a client does not read is waited for: no client here sends without reading."""
    connections: dict[int, socket.socket] = {}
    buffer = bytearray(_BUFFER)
    view = memoryview(buffer)
    while True:
        for number, _ in poll.poll():
            sock = connections.get(number)
            if sock is None:
                accept(listeners[number], poll, connections)
                continue
            try:
                size = sock.recv_into(buffer)
                if size:
                    sock.sendall(view[:size])
                    continue
            except OSError:
                pass
            del connections[number]
            sock.close()


def accept(listener: socket.socket, poll: select.epoll, connections: dict[int, socket.socket]) -> None:
    """Accept what waits, a few at a time."""
    for _ in range(_ACCEPTS):
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        if listener.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connections[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)


if __name__ == "__main__":
    main()
