"""net/dial: one connect, closed on every path but success; and what the host can reach."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
import trio.testing

from meshlocal.net.dial import classify_connect_error, dial, usable_families
from nursery_tests.ports import free_port


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as exits:
        yield exits


@pytest.fixture
def nothing_left_open() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    # The listing's own descriptor is in both.
    assert len(os.listdir("/proc/self/fd")) == len(before)


async def test_a_connected_socket_is_non_blocking_with_nodelay(stack: ExitStack) -> None:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    sock = stack.enter_context(await dial(*listener.getsockname()))
    assert sock.gettimeout() == 0
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    accepted = stack.enter_context(listener.accept()[0])
    sock.send(b"hello")
    assert accepted.recv(5) == b"hello"


async def test_ipv6_is_dialled_too(stack: ExitStack) -> None:
    try:
        listener = stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6))
    except OSError:
        pytest.skip("this host has no IPv6 loopback")
    port = listener.getsockname()[1]
    for address in ("::1", "::1%lo", "::1%1"):
        sock = stack.enter_context(await dial(address, port))
        assert sock.getpeername()[:2] == ("::1", port)


@pytest.mark.usefixtures("nothing_left_open")
async def test_a_refusal_is_an_error_and_closes() -> None:
    with pytest.raises(ConnectionRefusedError) as caught:
        await dial("127.0.0.1", free_port())
    assert classify_connect_error(caught.value) == "refused"


@pytest.mark.usefixtures("nothing_left_open")
@pytest.mark.parametrize("address", ["localhost", "", "1.2.3", "a::b::c", "x\0y", "::1%nowhere", "fe80::1%nowhere"])
async def test_nothing_is_ever_looked_up(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    def resolver(*_: object, **__: object) -> None:
        raise AssertionError("a resolver was asked")

    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    with pytest.raises(OSError, match=r"is no IP address|[Nn]o such device|no interface"):
        await dial(address, free_port())


class Slow(socket.socket):
    """A socket whose connect has no answer yet, as from a distant host."""

    made: list[Slow]

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.asked = 0

    def connect_ex(self, _: object) -> int:
        self.asked += 1
        if self.asked == 1:
            self.made.append(self)
            return errno.EINPROGRESS
        return errno.EALREADY


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[Slow]:
    Slow.made = []
    monkeypatch.setattr(socket, "socket", Slow)
    return Slow


@pytest.mark.usefixtures("nothing_left_open")
async def test_cancelled_before_it_begins_opens_nothing(slow: type[Slow]) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await dial("127.0.0.1", 9)
    assert scope.cancelled_caught
    assert slow.made == []


async def test_cancelled_while_connecting_closes(
    slow: type[Slow], monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async def never(_: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(trio.lowlevel, "wait_writable", never)
    with trio.move_on_after(0.25) as scope:
        await dial("127.0.0.1", 9)
    assert scope.cancelled_caught
    assert [sock.fileno() for sock in slow.made] == [-1]


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.ECONNREFUSED, "refused"),
        (errno.EHOSTUNREACH, "unreachable"),
        (errno.ENETUNREACH, "unreachable"),
        (errno.ECONNRESET, "reset"),
        (errno.ETIMEDOUT, "timeout"),
        (errno.EMFILE, "no_descriptors"),
        (errno.ENFILE, "no_descriptors"),
        (errno.EADDRNOTAVAIL, "no_ports"),
        (errno.EACCES, "other"),
    ],
)
async def test_late_errors_are_raised_and_named(
    slow: type[Slow], monkeypatch: pytest.MonkeyPatch, number: int, word: str
) -> None:
    monkeypatch.setattr(Slow, "getsockopt", lambda *_: number)
    with pytest.raises(OSError) as caught:
        await dial("127.0.0.1", 9)
    assert caught.value.errno == number
    assert classify_connect_error(caught.value) == word
    assert [sock.fileno() for sock in slow.made] == [-1]


def test_an_error_without_a_number_is_other() -> None:
    assert classify_connect_error(OSError("odd")) == "other"


async def test_a_late_answer_is_waited_for(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

    class Unhurried(socket.socket):
        asked = 0

        def connect_ex(self, address: object) -> int:
            self.asked += 1
            return super().connect_ex(address) if self.asked == 1 else errno.EALREADY  # type: ignore[arg-type]  # the stub's type is private

    monkeypatch.setattr(socket, "socket", Unhurried)
    sock = stack.enter_context(await dial(*listener.getsockname()))
    assert sock.getpeername() == listener.getsockname()


async def test_a_socket_that_connected_to_itself_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    # One of those from which the kernel chooses.
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    made: list[socket.socket] = []

    class Bound(socket.socket):
        def connect_ex(self, address: object) -> int:
            if not made:
                made.append(self)
                self.bind(("127.0.0.1", port))  # what the kernel does now and then by itself
            return super().connect_ex(address)  # type: ignore[arg-type]  # the stub's type is private

    monkeypatch.setattr(socket, "socket", Bound)
    with pytest.raises(ConnectionRefusedError):
        await dial("127.0.0.1", port)
    assert made[0].fileno() == -1


GLOBAL = "20010db8000000000000000000000001 02 40 00 80     eth0\n"
LINK = "fe800000000000000000000000000001 02 40 20 80     eth0\n"
LOOPBACK = "00000000000000000000000000000001 01 80 10 80       lo\n"
ON_LO = "20010db8000000000000000000000009 01 80 00 80       lo\n"
DUPLICATE = "20010db8000000000000000000000001 02 40 00 88     eth0\n"


@pytest.mark.parametrize(
    ("table", "usable"),
    [
        (GLOBAL + LINK + LOOPBACK, True),
        (LINK + LOOPBACK, False),
        (LOOPBACK + ON_LO, False),
        (DUPLICATE, False),
        ("", False),
        ("not the table at all\nzz 1 2 3 4 eth0\n", False),
    ],
)
def test_ipv6_needs_an_address_that_leads_somewhere(tmp_path: Path, table: str, usable: bool) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net/if_inet6").write_text(table)
    assert usable_families(tmp_path).ipv6 is usable


def test_ipv6_without_its_table(tmp_path: Path) -> None:
    assert usable_families(tmp_path / "missing").ipv6 is True  # nothing is known
    (tmp_path / "net").mkdir()
    (tmp_path / "net/dev").touch()
    assert usable_families(tmp_path).ipv6 is False  # the kernel has no IPv6


def ioctl_giving(**by_name: str | int) -> Callable[..., bytes]:
    def ioctl(_: object, __: int, request: bytes) -> bytes:
        found = by_name[request[:16].rstrip(b"\0").decode()]
        if isinstance(found, int):
            raise OSError(found, os.strerror(found))
        return request[:20] + socket.inet_aton(found) + request[24:]

    return ioctl


@pytest.mark.parametrize(
    ("addresses", "usable"),
    [
        ({"lo": "127.0.0.1", "eth0": "10.0.0.1"}, True),
        ({"lo": "127.0.0.1", "eth0": "169.254.7.7"}, False),
        ({"lo": "127.0.0.1", "eth0": errno.EADDRNOTAVAIL}, False),
        ({"lo": "127.0.0.1", "eth0": errno.ENODEV}, False),
        ({"lo": errno.EPERM, "eth0": errno.EPERM}, True),
    ],
)
def test_ipv4_needs_an_address_that_leads_somewhere(
    monkeypatch: pytest.MonkeyPatch, addresses: dict[str, str | int], usable: bool
) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(addresses, 1)))
    monkeypatch.setattr("fcntl.ioctl", ioctl_giving(**addresses))
    assert usable_families().ipv4 is usable
