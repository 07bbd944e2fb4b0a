"""TLS as a pipe (T1, T2): the contract of `Pipe`, handshakes that fail, ends and cuts, full sockets, resumption."""

from __future__ import annotations

import ctypes
import ctypes.util
import select
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import trio
import trio.testing
import trustme

from meshlocal.net.pipe import Pipe, finish_writing, is_silent
from meshlocal.net.tls_error import TlsError
from meshlocal.net.tls_pipe import CHUNK, TlsPipe

LIMIT = 10.0
NAME = "b.example"


class Certificates:
    """An authority, and contexts for both sides that believe it."""

    def __init__(self) -> None:
        self.authority = trustme.CA()
        self.certificate = self.authority.issue_cert(NAME)

    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.certificate.configure_cert(context)
        return context

    def client(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.authority.configure_trust(context)
        return context


@pytest.fixture(scope="module")
def certificates() -> Certificates:
    return Certificates()


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client's and a server's end of a connection."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        near = stack.enter_context(socket.create_connection(listener.getsockname()))
        far, _ = listener.accept()
        stack.enter_context(far)
        for sock in (near, far):
            sock.setblocking(False)
        yield near, far


Pair = tuple[TlsPipe, TlsPipe]
Shake = Callable[..., Awaitable[Pair]]


@pytest.fixture
def shake(certificates: Certificates, sockets: tuple[socket.socket, socket.socket]) -> Shake:
    """Shake hands: the client's pipe and the server's."""

    async def shake(client: ssl.SSLContext | None = None, server: ssl.SSLContext | None = None, **given: Any) -> Pair:
        near = TlsPipe(sockets[0], client or certificates.client(), server_name=NAME, **given)
        far = TlsPipe(sockets[1], server or certificates.server(), server=True)
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(near.handshake)
                nursery.start_soon(far.handshake)
        return near, far

    return shake


async def received(pipe: Pipe, size: int) -> bytes:
    """So many bytes; fewer if the stream ends."""
    got = bytearray()
    with trio.fail_after(LIMIT):
        while len(got) < size:
            data = pipe.read(size - len(got))
            if data is None:
                await pipe.wait_readable()
            elif data:
                got += data
            else:
                break
    return bytes(got)


def has_come(sock: socket.socket) -> None:
    """Wait until a socket has something to read, while no task runs."""
    assert select.select([sock], [], [], LIMIT)[0]


async def sent(pipe: Pipe, data: bytes) -> None:
    with trio.fail_after(LIMIT):
        rest = memoryview(data)
        while rest:
            taken = pipe.write(rest)
            rest = rest[taken:]
            if not taken:
                await pipe.wait_writable()


async def test_bytes_both_ways(shake: Shake) -> None:
    """`None` is nothing yet, empty the end; what is peeked at stays there, and is not waited for."""
    near, far = await shake()
    assert near.plain is None
    assert near.read(10) is None
    assert is_silent(near)
    assert far.write(b"hello") == 5
    await near.wait_readable()
    assert await received(near, 0) == b""
    with trio.fail_after(LIMIT):
        while near.peek(2) is None:
            await near.wait_readable()
    assert (near.peek(2), near.read(3)) == (b"he", b"hel")
    with trio.fail_after(LIMIT):
        await near.wait_readable()
    assert (near.read(10), near.read(10)) == (b"lo", None)
    assert near.write(b"") == 0
    assert near.write(b"world") == 5
    assert await received(far, 5) == b"world"


async def test_what_came_with_something_else_is_not_waited_for(shake: Shake) -> None:
    """Two records in one segment make one event of the socket."""
    near, far = await shake()
    assert near.read(100) is None
    assert far.write(b"one") == 3
    assert far.write(b"two") == 3
    await trio.sleep(0.01)
    got: list[bytes] = []
    with trio.fail_after(LIMIT):
        while len(got) < 2:
            await near.wait_readable()
            if (data := near.read(100)) is not None:
                got.append(data)
    assert got == [b"one", b"two"]
    assert near.read(100) is None
    with trio.move_on_after(0.01) as scope:
        await near.wait_readable()
    assert scope.cancelled_caught


async def test_an_end_is_passed_on_and_the_other_way_goes_on(shake: Shake) -> None:
    """Half-close inside TLS: close_notify ends one direction (RFC 8446, 6.1)."""
    near, far = await shake()
    near.write(b"last")
    near.end()
    assert await received(far, 100) == b"last"
    assert far.read(10) == b""
    assert far.read(10) == b""
    assert far.write(b"answer") == 6
    far.end()
    assert await received(near, 100) == b"answer"
    assert near.read(10) == b""


async def test_an_end_that_finds_no_room_is_sent_once_there_is(shake: Shake) -> None:
    near, far = await shake()
    taken = 0
    while size := near.write(bytes(CHUNK)):
        taken += size
    async with trio.open_nursery() as nursery:
        nursery.start_soon(finish_writing, near)
        await trio.testing.wait_all_tasks_blocked()
        assert near.is_unsent
        got = 0
        with trio.fail_after(LIMIT):
            while (data := far.read(CHUNK)) != b"":
                if data is None:
                    await far.wait_readable()
                else:
                    got += len(data)
    assert got >= taken
    assert not near.is_unsent


async def test_an_end_loses_nothing_of_what_came(shake: Shake, sockets: tuple[socket.socket, socket.socket]) -> None:
    """T2: also of what was taken from the socket, and not read yet."""
    near, far = await shake()
    assert near.read(1) is None
    for piece in (b"one", b"two", b"three"):
        assert far.write(piece) == len(piece)
    has_come(sockets[0])
    assert near.read(100) == b"one"
    near.end()
    assert far.write(b"four") == 4
    far.end()
    assert await received(near, 100) == b"twothreefour"
    assert near.read(1) == b""
    assert far.read(1) == b""


async def test_who_asks_for_input_takes_none(shake: Shake, sockets: tuple[socket.socket, socket.socket]) -> None:
    """Another task may sleep until the socket has some."""
    near, far = await shake()
    assert near.read(1) is None
    assert not near.has_input()
    got: list[bytes] = []

    async def read() -> None:
        got.append(await received(near, 5))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        assert far.write(b"hello") == 5
        has_come(sockets[0])
        assert near.has_input()
        assert near.has_input()
    assert got == [b"hello"]


class Updating:
    """A client that changes its keys again and again, which Python's ssl has no call for: OpenSSL by way of ctypes."""

    def __init__(self, library: str) -> None:
        self._ssl = ctypes.CDLL(library)
        crypto = ctypes.CDLL(library.replace("ssl", "crypto"))
        for name in ("TLS_client_method", "SSL_CTX_new", "SSL_new"):
            getattr(self._ssl, name).restype = ctypes.c_void_p
        for name in ("BIO_new", "BIO_s_mem"):
            getattr(crypto, name).restype = ctypes.c_void_p
        self._crypto = crypto
        method = ctypes.c_void_p(self._ssl.TLS_client_method())
        self._context = ctypes.c_void_p(self._ssl.SSL_CTX_new(method))
        self._object = ctypes.c_void_p(self._ssl.SSL_new(self._context))
        memory = ctypes.c_void_p(crypto.BIO_s_mem())
        self._in, self._out = (ctypes.c_void_p(crypto.BIO_new(memory)) for _ in range(2))
        self._ssl.SSL_set_bio(self._object, self._in, self._out)
        self._ssl.SSL_set_connect_state(self._object)

    def _taken(self) -> bytes:
        buffer = ctypes.create_string_buffer(65_536)
        data = b""
        while (size := self._crypto.BIO_read(self._out, buffer, len(buffer))) > 0:
            data += buffer.raw[:size]
        return data

    async def shake(self, stream: trio.SocketStream) -> None:
        while self._ssl.SSL_do_handshake(self._object) != 1:
            await stream.send_all(self._taken())
            data = bytes(await stream.receive_some(65_536))
            self._crypto.BIO_write(self._in, data, len(data))
        await stream.send_all(self._taken())

    def updates(self, count: int) -> bytes:
        for _ in range(count):
            self._ssl.SSL_key_update(self._object, 0)
            self._ssl.SSL_do_handshake(self._object)
        return self._taken()

    def close(self) -> None:
        self._ssl.SSL_free(self._object)
        self._ssl.SSL_CTX_free(self._context)


async def test_a_flood_of_key_updates_costs_its_connection(
    certificates: Certificates, sockets: tuple[socket.socket, socket.socket]
) -> None:
    """P2: a read takes a record's worth from the socket at most, and not for ever what holds no data."""
    library = ctypes.util.find_library("ssl")
    if library is None:
        pytest.skip("needs OpenSSL's shared library")
    client = Updating(library)
    pipe = TlsPipe(sockets[1], certificates.server(), server=True)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sockets[0].dup()))

    async def flood() -> None:
        await client.shake(stream)
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.send_all(client.updates(5000))

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery, stream:
            nursery.start_soon(flood)
            await pipe.handshake()
            with pytest.raises(TlsError, match="holds no data"):
                await received(pipe, 1)
            pipe.abort()
    client.close()


@pytest.mark.parametrize("reset", [False, True])
async def test_a_cut_is_no_end(shake: Shake, sockets: tuple[socket.socket, socket.socket], reset: bool) -> None:
    """T2: whether the connection ends by a FIN without close_notify, or is reset."""
    near, far = await shake()
    near.write(b"half")
    if reset:
        assert await received(far, 4) == b"half"
        near.abort()
    else:
        sockets[0].shutdown(socket.SHUT_WR)
        assert await received(far, 4) == b"half"
    with pytest.raises(ConnectionResetError):
        await received(far, 1)


async def test_what_finds_no_room_is_offered_again(shake: Shake) -> None:
    """Every byte arrives once, however little the socket takes."""
    near, far = await shake()
    data = bytes(range(256)) * 40_000
    got: list[bytes] = []

    async def read() -> None:
        await trio.sleep(0.05)
        got.append(await received(far, len(data)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await sent(near, data)
    assert got == [data]
    taken = 0
    while size := near.write(bytes(CHUNK)):
        taken += size
    with trio.move_on_after(0.01) as scope:
        await near.wait_writable()
    assert scope.cancelled_caught
    # What was taken is there; what was not, was not.
    assert len(await received(far, taken)) == taken
    assert near.write(bytes(CHUNK)) == CHUNK
    assert len(await received(far, CHUNK)) == CHUNK


@pytest.mark.parametrize("what", ["garbage", "nothing", "half a handshake", "reset", "old", "http"])
async def test_a_server_survives_what_is_no_handshake(
    certificates: Certificates, sockets: tuple[socket.socket, socket.socket], what: str
) -> None:
    near, far = sockets
    pipe = TlsPipe(far, certificates.server(), server=True)
    if what == "old":
        hello = TlsPipe(near, certificates.client(), server_name=NAME)
        server = certificates.server()
        server.minimum_version = ssl.TLSVersion.TLSv1_3
        client = certificates.client()
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        pipe, hello = TlsPipe(far, server, server=True), TlsPipe(near, client, server_name=NAME)
        problems: list[str] = []

        async def shake(each: TlsPipe) -> None:
            with pytest.raises(TlsError) as caught:
                await each.handshake()
            problems.append(str(caught.value.strerror))

        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(shake, pipe)
                nursery.start_soon(shake, hello)
        # Both sides know why.
        assert sorted(problems) == ["tlsv1 alert protocol version", "unsupported protocol"]
        return
    if what == "garbage":
        near.send(b"\xff" * 100)
    elif what == "http":
        near.send(b"GET / HTTP/1.1\r\nHost: b\r\n\r\n")
    elif what == "half a handshake":
        near.send(b"\x16\x03\x01\x02\x00\x01")
    if what == "reset":
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    if what in ("nothing", "half a handshake", "reset"):
        near.close()
    with trio.fail_after(LIMIT), pytest.raises(OSError, match=r"(?i)ended|wrong|request|reset|record|version"):
        await pipe.handshake()
    pipe.abort()
    assert far.fileno() == -1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda made, context: setattr(made, "name", "other.example"), "(?i)hostname mismatch"),
        (lambda made, context: trustme.CA().configure_trust(context), "unable to get local issuer certificate"),
    ],
)
async def test_a_server_that_proves_nothing_is_left(
    certificates: Certificates, sockets: tuple[socket.socket, socket.socket], change: Any, problem: str
) -> None:
    class Made:
        name = NAME

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if "issuer" not in problem:
        certificates.authority.configure_trust(context)
    change(Made, context)
    near = TlsPipe(sockets[0], context, server_name=Made.name)
    far = TlsPipe(sockets[1], certificates.server(), server=True)

    async def hear() -> None:
        await far.handshake()
        await received(far, 1)

    async def serve() -> None:
        # It hears of it by an alert: at once in TLS 1.2, with its first read in TLS 1.3.
        with pytest.raises(OSError, match="alert"):
            await hear()

    with trio.fail_after(LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            with pytest.raises(TlsError, match=problem):
                await near.handshake()


async def test_a_handshake_is_cancelled_at_each_flight(
    certificates: Certificates, sockets: tuple[socket.socket, socket.socket]
) -> None:
    for server in (False, True):
        pipe = TlsPipe(
            sockets[server],
            certificates.server() if server else certificates.client(),
            server=server,
            server_name=None if server else NAME,
        )
        with trio.move_on_after(0.01) as scope:
            await pipe.handshake()
        assert scope.cancelled_caught


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_session_is_resumed(certificates: Certificates, version: ssl.TLSVersion) -> None:
    client, server = certificates.client(), certificates.server()
    client.maximum_version = version
    sessions: list[ssl.SSLSession] = []
    for attempt in range(2):
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_connection(listener.getsockname()) as one,
        ):
            other, _ = listener.accept()
            one.setblocking(False)
            other.setblocking(False)
            near = TlsPipe(
                one,
                client,
                server_name=NAME,
                session=sessions[0] if sessions else None,
                on_session=sessions.append,
            )
            far = TlsPipe(other, server, server=True)
            with trio.fail_after(LIMIT):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(near.handshake)
                    nursery.start_soon(far.handshake)
            far.write(b"hi")
            assert await received(near, 2) == b"hi"
            assert near.resumed == bool(attempt)
            assert near.version == ("TLSv1.2" if version is ssl.TLSVersion.TLSv1_2 else "TLSv1.3")
            near.close()
            far.close()
    assert len(sessions) == 2


async def test_what_comes_unasked_is_seen_and_closing_twice_is_harmless(shake: Shake) -> None:
    near, far = await shake()
    assert far.write(b"x") == 1
    with trio.fail_after(LIMIT):
        while is_silent(near):
            await near.wait_readable()
    assert near.read(1) == b"x"
    far.close()
    far.close()
    with trio.fail_after(LIMIT):
        while near.read(1) is None:
            await near.wait_readable()
    assert not is_silent(near)
    near.abort()
    near.abort()
    near.close()


async def test_who_waits_is_interrupted(shake: Shake) -> None:
    near, _ = await shake()
    for _ in range(2):
        assert near.read(1) is None  # what the server gave to resume its session with, and nothing
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await near.wait_readable()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        near.interrupt()
