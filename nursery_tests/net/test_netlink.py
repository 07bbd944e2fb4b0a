"""Questions to the kernel, and which answer is whose."""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Iterator

import pytest

from meshlocal.net.netlink import Netlink

ANSWER = 24


def message(kind: int, number: int, body: bytes = b"") -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, number, 0) + body


class FakeSocket:
    """Gives answers that were written down before."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = deque(answers)

    def send(self, data: bytes) -> None:
        pass

    def recv(self, size: int) -> bytes:
        if not self._answers:
            raise BlockingIOError
        return self._answers.popleft()

    def close(self) -> None:
        pass


@pytest.fixture
def netlink() -> Iterator[Netlink]:
    made = Netlink(socket.NETLINK_ROUTE)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([message(ANSWER, 1, b"body")], b"body"),
        # One that came too late for its own question is nobody's.
        ([message(ANSWER, 99, b"late"), message(ANSWER, 1, b"body")], b"body"),
        ([message(2, 1, b"error")], None),
        ([b"short"], None),
        ([], None),
    ],
)
def test_the_answer_is_that_of_the_question(netlink: Netlink, answers: list[bytes], found: bytes | None) -> None:
    netlink._socket.close()
    netlink._socket = FakeSocket(*answers)  # type: ignore[assignment]  # as much of a socket as is used
    assert netlink.ask(26, b"", ANSWER) == found
