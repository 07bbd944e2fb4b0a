"""net/sockets: addresses as text, and the two ways to close."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from meshlocal.net.sockets import abort, close, format_address


@pytest.mark.parametrize(
    ("sockaddr", "text"),
    [
        (("127.0.0.1", 80), "127.0.0.1:80"),
        (("::1", 80, 0, 0), "[::1]:80"),
        (("fe80::1%eth0", 80, 0, 2), "[fe80::1%eth0]:80"),
        (("host", 80), "host:80"),
        ("/run/x.sock", "unix:/run/x.sock"),
        (b"\0abstract", "unix:@abstract"),
        ("/run/\udcff.sock", "unix:/run/\\xff.sock"),
        ("", "unix:"),
    ],
)
def test_addresses_as_people_write_them(sockaddr: object, text: str) -> None:
    assert format_address(sockaddr) == text


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        return dialled, listener.accept()[0]


async def test_close_is_a_clean_end_and_abort_a_reset() -> None:
    for end, expected in ((close, b""), (abort, None)):
        near, far = tcp_pair()
        with far:
            end(near)
            assert near.fileno() == -1
            end(near)  # twice is harmless
            if expected is None:
                with pytest.raises(ConnectionResetError):
                    far.recv(1)
            else:
                assert far.recv(1) == expected


@pytest.mark.parametrize("end", [close, abort])
async def test_both_wake_who_waits(end: object) -> None:
    assert callable(end)
    near, far = socket.socketpair()
    with far:
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(near)

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            end(near)
