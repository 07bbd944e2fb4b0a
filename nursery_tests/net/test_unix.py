"""Listening on Unix sockets: what was left behind there, what must not be touched, and what is removed."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshlocal.net import unix
from meshlocal.net.listen import ListenError
from meshlocal.net.unix import UnixFile, UnixOpening, open_unix_listener


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    """Closed at the end."""
    found: list[socket.socket] = []
    yield found
    for sock in found:
        sock.close()


def connects(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(path) == 0


def leave_behind(path: str) -> None:
    """As a process that was killed does."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


def test_whoever_can_enter_the_folder_may_connect(path: str, sockets: list[socket.socket]) -> None:
    before = os.umask(0o077)
    try:
        sock, _ = open_unix_listener(path)
    finally:
        os.umask(before)
    sockets.append(sock)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o666
    assert connects(path)
    assert not sock.getblocking()


def test_a_socket_that_nobody_listens_on_gives_way(path: str, sockets: list[socket.socket]) -> None:
    leave_behind(path)
    assert not connects(path)
    sockets.append(open_unix_listener(path)[0])
    assert connects(path)


def test_what_somebody_listens_on_stays(path: str, sockets: list[socket.socket]) -> None:
    sockets.append(open_unix_listener(path)[0])
    with pytest.raises(ListenError, match=f"cannot listen on unix:{path}: Address already in use"):
        open_unix_listener(path)
    assert connects(path)


def test_what_somebody_listens_on_stays_though_its_queue_is_full(path: str, sockets: list[socket.socket]) -> None:
    listener = socket.socket(socket.AF_UNIX)
    sockets.append(listener)
    listener.bind(path)
    listener.listen(0)
    sockets.append(client := socket.socket(socket.AF_UNIX))
    client.connect(path)
    with pytest.raises(ListenError, match="Address already in use"):
        open_unix_listener(path)
    assert os.path.exists(path)


def test_a_datagram_socket_stays(path: str, sockets: list[socket.socket]) -> None:
    other = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sockets.append(other)
    other.bind(path)
    with pytest.raises(ListenError, match="Address already in use"):
        open_unix_listener(path)
    assert os.path.exists(path)


def test_a_file_stays(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(ListenError, match="there is a file that is no socket"):
        open_unix_listener(path)
    assert Path(path).read_text() == "precious"


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match=f"cannot listen on unix:{tmp_path}/none/s: No such file or directory"):
        open_unix_listener(str(tmp_path / "none" / "s"))


def test_only_the_own_file_is_removed(path: str, sockets: list[socket.socket]) -> None:
    sock, file = open_unix_listener(path)
    sockets.append(sock)
    assert file.is_there
    os.unlink(path)
    assert not file.is_there
    other, others = open_unix_listener(path)
    sockets.append(other)
    file.remove()
    assert connects(path), "it is another's"
    others.remove()
    assert not os.path.exists(path)
    leave_behind(path)
    others.remove()
    assert os.path.exists(path), "once: it may have the same number"


def test_of_two_that_come_at_once_one_listens(path: str, sockets: list[socket.socket]) -> None:
    """Both find what was left behind; who is second must not take the first one's file for that."""
    for _ in range(50):
        leave_behind(path)
        barrier = threading.Barrier(2)
        opened: list[tuple[socket.socket, UnixFile]] = []
        refused: list[ListenError] = []

        def listen(
            barrier: threading.Barrier = barrier,
            opened: list[tuple[socket.socket, UnixFile]] = opened,
            refused: list[ListenError] = refused,
        ) -> None:
            barrier.wait()
            try:
                opened.append(open_unix_listener(path))
            except ListenError as error:
                refused.append(error)

        threads = [threading.Thread(target=listen) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sockets += [sock for sock, _ in opened]
        assert (len(opened), len(refused)) == (1, 1)
        assert connects(path)
        opened[0][1].remove()


def test_a_folder_that_somebody_keeps_locked_is_told(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix, "_LOCK_LIMIT", 0.05)
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ListenError, match="somebody keeps a lock on the folder"):
            open_unix_listener(path)
    finally:
        os.close(descriptor)
    assert not os.path.exists(path)


def test_one_whose_file_is_gone_is_opened_anew(path: str, sockets: list[socket.socket]) -> None:
    """Nobody could connect to it any more."""
    sock, file = open_unix_listener(path)
    sockets.append(sock)
    for gone in (False, True):
        if gone:
            os.unlink(path)
        opening = UnixOpening([("proxy.listen[0]", path, file)])
        opening.open()
        sockets += [sock for sock, _ in opening.opened.values()]
        assert list(opening.opened) == [path] * gone
        assert connects(path)
        opening.give_away()


def test_what_is_opened_for_nobody_is_closed(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    wanted = [("proxy.listen[0]", str(tmp_path / "a"), None), ("proxy.listen[2]", str(tmp_path / "none" / "b"), None)]
    opening = UnixOpening(wanted)
    with pytest.raises(ListenError, match=r"^proxy.listen\[2\]: cannot listen on unix:"):
        opening.open()
    assert list(opening.opened) == [str(tmp_path / "a")]
    opening.give_up()
    assert os.listdir(tmp_path) == []
    assert os.listdir("/proc/self/fd") == before


def test_what_a_thread_opens_too_late_is_closed(tmp_path: Path) -> None:
    """One that hung while its caller gave up."""
    before = os.listdir("/proc/self/fd")
    opening = UnixOpening([("proxy.listen[0]", str(tmp_path / "a"), None)])
    assert opening.leave() == []
    opening.open()
    assert opening.opened == {}
    assert os.listdir(tmp_path) == []
    assert os.listdir("/proc/self/fd") == before


def test_what_is_given_away_stays(path: str, sockets: list[socket.socket]) -> None:
    opening = UnixOpening([("proxy.listen[0]", path, None)])
    opening.open()
    sockets += [sock for sock, _ in opening.opened.values()]
    opening.give_away()
    assert opening.leave() == []
    assert connects(path)
