"""Questions to the kernel over netlink(7), each of which has one answer at once."""

from __future__ import annotations

import itertools
import socket
import struct

_REQUEST = 1
_HEADER = struct.Struct("=IHHII")


class Netlink:
    """Asks one of the kernel's families, of this network namespace; any user may.

    Args:
        family: such as NETLINK_ROUTE.

    Raises:
        OSError: there is no such interface.
    """

    def __init__(self, family: int) -> None:
        self._numbers = itertools.count(1)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family)
        self._socket.setblocking(False)

    def close(self) -> None:
        """Ask no more."""
        self._socket.close()

    def ask(self, kind: int, body: bytes, answers: int) -> bytes | None:
        """The body of what the kernel answers.

        Args:
            kind: of the question's message.
            body: of it.
            answers: the kind of message that an answer is.

        Returns:
            None: it answers with an error, or not at once.
        """
        number = next(self._numbers) & 0xFFFFFFFF
        try:
            self._socket.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST, number, 0) + body)
            while True:
                # The kernel has answered by the time that it took the question.
                answer = self._socket.recv(4096)
                if len(answer) < _HEADER.size:
                    return None
                _, got, _, of, _ = _HEADER.unpack_from(answer)
                if of == number:
                    return answer[_HEADER.size :] if got == answers else None
        except OSError:
            return None
