"""An echo server in one process: `python -m bench.echo ADDRESS...` prints the port of each address, and serves.

Good for one connection at a time and for failover; where many connections are
measured, the upstream is a program in C.
"""

from __future__ import annotations

import select
import socket
import sys

from bench.machine import raise_file_limit

_BUFFER = 65536


def main() -> None:
    raise_file_limit()
    listeners = {}
    poll = select.epoll()
    for argument in sys.argv[1:]:
        address, _, port = argument.partition(":")
        sock = socket.create_server((address, int(port or 0)), backlog=4096)
        sock.setblocking(False)
        listeners[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
    print(*(sock.getsockname()[1] for sock in listeners.values()), flush=True)
    serve(poll, listeners)


def serve(poll: select.epoll, listeners: dict[int, socket.socket]) -> None:
    """Echo for ever. What a client does not read is waited for: nobody here sends more than it reads."""
    connections: dict[int, socket.socket] = {}
    while True:
        for number, _ in poll.poll():
            listener = listeners.get(number)
            if listener is not None:
                try:
                    sock, _ = listener.accept()
                except BlockingIOError:
                    continue
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[sock.fileno()] = sock
                poll.register(sock, select.EPOLLIN)
                continue
            sock = connections[number]
            try:
                data = sock.recv(_BUFFER)
                if data:
                    sock.sendall(data)
                    continue
            except OSError:
                pass
            del connections[number]
            sock.close()


if __name__ == "__main__":
    main()
