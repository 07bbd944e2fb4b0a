"""An upstream that streams: it answers each call in HTTP/2 with many small messages, each in a DATA frame of its own.

It says on which port of 127.0.0.1 it listens. It makes no use of what it is asked, and lays an answer's frames out in
one go, so that it is never the limit.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

MESSAGES = 500
"""Of a call: fewer bytes than a stream's first window (RFC 9113, 6.9.2)."""

SIZE = 59
"""Bytes of one, which its prefix makes 64."""

_PREFACE = 24
_HEAD = 9
_DATA, _HEADERS, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 4, 6, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_MESSAGE = b"\0" + SIZE.to_bytes(4, "big") + b"x" * SIZE
# `:status: 200` by its number in the static table, the others as literals that nobody keeps (RFC 7541, 6.1 and 6.2.2).
_BEGIN = b"\x88\x00\x0ccontent-type\x10application/grpc"
_END = b"\x00\x0bgrpc-status\x010"


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    """A frame (RFC 9113, 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def answer(stream_id: int) -> bytes:
    """All of a call's."""
    begin = frame(_HEADERS, _END_HEADERS, stream_id, _BEGIN)
    end = frame(_HEADERS, _END_HEADERS | _END_STREAM, stream_id, _END)
    return begin + frame(_DATA, 0, stream_id, _MESSAGE) * MESSAGES + end


class Connection(threading.Thread):
    """One client's."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self._sock = sock
        self._received = b""
        self._window = 65_535
        self._asked: list[int] = []

    def run(self) -> None:
        """Until the client leaves."""
        with self._sock, suppress(ConnectionError):
            self._serve(self._sock)

    def _serve(self, sock: socket.socket) -> None:
        sock.sendall(frame(_SETTINGS, 0, 0, b""))
        begun = False
        while data := sock.recv(262_144):
            self._received += data
            if not begun:
                if len(self._received) < _PREFACE:
                    continue
                self._received, begun = self._received[_PREFACE:], True
            out = b"".join(self._frames())
            cost = MESSAGES * len(_MESSAGE)
            while self._asked and self._window >= cost:
                self._window -= cost
                out += answer(self._asked.pop(0))
            if out:
                sock.sendall(out)

    def _frames(self) -> list[bytes]:
        """Take in whole frames; gives what they are answered with at once."""
        out = []
        received, at = self._received, 0
        while len(received) - at >= _HEAD:
            size = int.from_bytes(received[at : at + 3], "big")
            if len(received) - at - _HEAD < size:
                break
            kind, flags = received[at + 3], received[at + 4]
            stream_id = int.from_bytes(received[at + 5 : at + _HEAD], "big")
            payload = received[at + _HEAD : at + _HEAD + size]
            at += _HEAD + size
            if kind in (_SETTINGS, _PING) and not flags & _ACK:
                out.append(frame(kind, _ACK, 0, b"" if kind == _SETTINGS else payload))
            elif kind == _WINDOW_UPDATE and not stream_id:
                self._window += int.from_bytes(payload, "big")
            elif kind == _DATA and size:
                out.append(frame(_WINDOW_UPDATE, 0, 0, size.to_bytes(4, "big")))
            if kind in (_HEADERS, _DATA) and flags & _END_STREAM:
                self._asked.append(stream_id)
        self._received = received[at:]
        return out


def main() -> None:
    """Serve whoever connects."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(listener.getsockname()[1], flush=True)
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        Connection(sock).start()


if __name__ == "__main__":
    main()
