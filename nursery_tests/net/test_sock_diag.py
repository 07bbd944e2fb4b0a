"""How many connections wait at a listening socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from meshlocal.net.sock_diag import SocketDiagnosis


@pytest.fixture
def diagnosis() -> Iterator[SocketDiagnosis]:
    made = SocketDiagnosis()
    yield made
    made.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connections_that_wait_are_counted(diagnosis: SocketDiagnosis, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server((host, 0), family=family, backlog=3))
        port = server.getsockname()[1]
        assert diagnosis.accept_queue(host, port) == (0, 3)
        clients = [stack.enter_context(socket.create_connection((host, port))) for _ in range(2)]
        assert diagnosis.accept_queue(host, port) == (2, 3)
        accepted, _ = server.accept()
        accepted.close()
        assert diagnosis.accept_queue(host, port) == (1, 3)
        assert len(clients) == 2


def test_one_at_every_address_is_found_by_any(diagnosis: SocketDiagnosis) -> None:
    with socket.create_server(("0.0.0.0", 0), backlog=7) as server:
        assert diagnosis.accept_queue("127.0.0.5", server.getsockname()[1]) == (0, 7)


def test_nobody_listens(diagnosis: SocketDiagnosis) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        assert diagnosis.accept_queue(*bound.getsockname()) is None
    # And the next question has its own answer.
    with socket.create_server(("127.0.0.1", 0), backlog=2) as server:
        assert diagnosis.accept_queue(*server.getsockname()) == (0, 2)


def test_a_closed_one_is_told_nothing(diagnosis: SocketDiagnosis) -> None:
    diagnosis.close()
    assert diagnosis.accept_queue("127.0.0.1", 1) is None
