"""An instance that answers many short connections: `answers.py NAME PORT`; it prints a word once it listens."""

from __future__ import annotations

import socket
import sys


def main() -> None:
    name, port = sys.argv[1:]
    answer = f"{name}\n".encode()
    with socket.create_server(("127.0.0.1", int(port)), backlog=4096) as listener:
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        while True:
            client, _ = listener.accept()
            with client:
                client.recv(64)
                client.sendall(answer)


if __name__ == "__main__":
    main()
