"""admin/server: what is served, what is refused and how, and that no client is in another's way."""

from __future__ import annotations

import re
import shutil
import socket
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from meshlocal.admin.access import AdminAccess
from meshlocal.admin.messages import HEAD_LIMIT, Request, Response
from meshlocal.admin.server import (
    HEAD_TIMEOUT,
    IDLE_TIMEOUT,
    LINGER_TIMEOUT,
    MAX_CONNECTIONS,
    SEND_TIMEOUT,
    AdminServer,
)
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.policy.config_access import AdminAccessConfig
from nursery_tests.logged import events


def echo(request: Request) -> Response:
    return Response.text(f"{request.path} {request.values('a')} {request.headers.get('x', '-')}")


def broken(_: Request) -> Response:
    raise ZeroDivisionError


def forged(_: Request) -> Response:
    return Response(headers=(("X", "a\r\nSet-Cookie: b"),))


ACCESS = AdminAccess(AdminAccessConfig(), "proxy")

ROUTES = {
    "/echo": echo,
    "/json": lambda _: Response.json({"ready": True}),
    "/broken": broken,
    "/forged": forged,
    "/big": lambda _: Response(body=bytes(8 << 20)),
}


@asynccontextmanager
async def serving(server: AdminServer | None = None) -> AsyncIterator[tuple[str, int]]:
    listeners = open_tcp_listeners("127.0.0.1", 0)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start((server or AdminServer(ROUTES, ACCESS)).serve, listeners)
            yield listeners[0].getsockname()
            nursery.cancel_scope.cancel()
    finally:
        assert listeners[0].fileno() != -1  # the caller's to close
        listeners[0].close()


@asynccontextmanager
async def clients(address: tuple[str, int]) -> AsyncIterator[Callable[[], Awaitable[trio.SocketStream]]]:
    """Connections that are closed at the end."""
    async with AsyncExitStack() as opened:

        async def connect() -> trio.SocketStream:
            return await opened.enter_async_context(await trio.open_tcp_stream(*address))

        yield connect


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    data = b""
    async for part in stream:
        data += part
    return data


async def ask(address: tuple[str, int], raw: bytes) -> bytes:
    """Send, half-close, and read to the end."""
    async with await trio.open_tcp_stream(*address) as stream:
        await stream.send_all(raw)
        await stream.send_eof()
        return await read_all(stream)


def get(path: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: localhost", *headers, "", ""]).encode()


def statuses(answer: bytes | bytearray) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


@pytest.mark.parametrize(
    ("local", "request_", "status"),
    [
        ("127.0.0.1", b"PUT /echo?a=1", 200),
        ("::1", b"PUT /echo?a=1", 200),
        ("10.0.0.1", b"PUT /echo?a=1", 403),
        ("127.0.0.1", b"PUT /json", 405),
        ("127.0.0.1", b"DELETE /echo", 405),
        ("127.0.0.1", b"POST /echo", 405),
    ],
)
async def test_what_changes_something_is_for_who_is_on_this_machine(local: str, request_: bytes, status: int) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(AdminServer(ROUTES, ACCESS, changing=["/echo"]).serve_stream, ours, local)
        await theirs.send_all(request_ + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = await read_all(theirs)
        nursery.cancel_scope.cancel()
    assert int(answer.split(b" ")[1]) == status


async def test_a_page_with_its_headers() -> None:
    async with serving() as address:
        answer = await ask(address, get("/echo?a=1&a=2%203&b=4", "X: one", "x: two"))
    head, body = answer.split(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 200 OK",
        b"Content-Type: text/plain; charset=utf-8",
        b"Content-Length: 28",
        b"Cache-Control: no-store",
        b"X-Content-Type-Options: nosniff",
        b"X-Frame-Options: DENY",
        b"Content-Security-Policy: default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        b"Referrer-Policy: no-referrer",
        b"Cross-Origin-Resource-Policy: same-origin",
        b"Cross-Origin-Opener-Policy: same-origin",
    ]
    assert body == b"/echo ['1', '2 3'] one, two\n"


async def test_json_is_for_machines_and_people() -> None:
    async with serving() as address:
        answer = await ask(address, get("/json"))
    assert b"Content-Type: application/json\r\n" in answer
    assert answer.endswith(b'\r\n\r\n{\n  "ready": true\n}\n')


async def test_head_has_the_length_and_no_body() -> None:
    async with serving() as address:
        answer = await ask(address, get("/json", method="HEAD") + get("/echo"))
    assert statuses(answer) == [200, 200]
    assert answer.split(b"\r\n\r\n")[1].startswith(b"HTTP/1.1 200 OK")
    assert b"Content-Length: 20" in answer


async def test_an_absolute_target_is_served_by_its_path() -> None:
    async with serving() as address:
        answer = await ask(address, get("http://x/echo?a=b") + get("http://x"))
    assert statuses(answer) == [200, 404]
    assert b"/echo ['b']" in answer


async def test_pipelined_requests_are_answered_in_order() -> None:
    raw = b"".join(get(f"/echo?a={number}") for number in range(300))
    async with serving() as address:
        answer = await ask(address, raw)
    assert [f"['{number}']".encode() in part for number, part in enumerate(answer.split(b"HTTP/1.1 ")[1:])] == [
        True
    ] * 300


async def test_a_connection_is_kept_and_a_request_may_come_in_pieces() -> None:
    async with serving() as address, await trio.open_tcp_stream(*address) as stream:
        for _ in range(3):
            for byte in get("/echo"):
                await stream.send_all(bytes([byte]))
            answer = await stream.receive_some(4096)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"Connection" not in answer


@pytest.mark.parametrize(
    ("raw", "connection"),
    [
        (get("/echo", "Connection: close"), b"Connection: close"),
        (get("/echo", version="1.0"), b"Connection: close"),
        (get("/echo", "Connection: keep-alive", version="1.0"), b"Connection: keep-alive"),
        (
            get("/echo", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMA"),
            b"Connection: close",
        ),
    ],
)
async def test_the_connection_is_kept_or_closed_as_asked(raw: bytes, connection: bytes) -> None:
    async with serving() as address:
        answer = await ask(address, raw + get("/json"))
        assert connection in answer
        # After a close the second request is not looked at.
        assert statuses(answer) == ([200] if connection.endswith(b"close") else [200, 200])
        async with await trio.open_tcp_stream(*address) as stream:
            await stream.send_all(raw)
            if connection.endswith(b"close"):
                assert (await read_all(stream)).startswith(b"HTTP/1.1 200 OK")


async def test_an_unknown_path_gets_the_list_of_paths() -> None:
    async with serving() as address:
        answer = await ask(address, get("/nowhere"))
    assert statuses(answer) == [404]
    assert answer.endswith(b"no such page; there are:\n/big\n/broken\n/echo\n/forged\n/json\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
async def test_other_methods_are_not_allowed(method: str) -> None:
    async with serving() as address:
        answer = await ask(address, get("/echo", method=method) + get("/echo"))
    assert statuses(answer) == [405, 200]
    assert b"\r\nAllow: GET, HEAD\r\n" in answer


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (get("/echo", "A: b\x00c"), 400),
        (get("/echo", "Content-Length: x"), 400),
        (get("/echo", "Content-Length: 3", "Transfer-Encoding: chunked"), 400),
        (b"GET /echo HTTP/1.1\r\nA : b\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /echo HTTP/3.7\r\n\r\n", 400),
        (b"GET /echo HTTP/2.0\r\n\r\n", 505),
        (b"GET /echo\r\n\r\n", 505),
        (get("/echo", "Content-Length: 3") + b"abc", 413),
        (get("/echo", "Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\n\r\n", 413),
        (get("/echo", "Content-Length: 3", method="POST") + b"abc", 405),
        (get("x:1", method="CONNECT"), 405),
        (get("/" + "x" * HEAD_LIMIT), 431),
        (get("/echo", "A: " + "x" * HEAD_LIMIT), 431),
        (get("/echo", *["A: b"] * 4000), 431),
        (b"GET /echo HTTP/1.1\r\n" + b"A: b\r\n" * 20000, 431),
    ],
)
async def test_refusals_are_answered_and_close(raw: bytes, status: int) -> None:
    async with serving() as address, await trio.open_tcp_stream(*address) as stream:
        await stream.send_all(get("/echo") + raw + get("/echo"))
        # The server ends the connection itself, and what came before is answered.
        answer = await read_all(stream)
        assert statuses(answer) == [200, status]
        assert answer.count(b"Connection: close") == 1
        # Others are served as ever.
        assert statuses(await ask(address, get("/echo"))) == [200]


async def test_a_body_of_no_bytes_is_none() -> None:
    async with serving() as address:
        assert statuses(await ask(address, get("/echo", "Content-Length: 0") + get("/echo"))) == [200, 200]


async def test_a_head_just_within_the_limit_is_served() -> None:
    async with serving() as address:
        assert statuses(await ask(address, get("/echo", "A: " + "x" * (HEAD_LIMIT - 100)))) == [200]


@pytest.mark.parametrize("path", ["/broken", "/forged"])
async def test_a_routes_fault_is_its_own(path: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as address:
        answer = await ask(address, get(path) + get("/echo"))
    assert statuses(answer) == [500, 200]
    assert b"Set-Cookie" not in answer
    assert events(caplog.records) == ["admin route failed"]
    assert caplog.records[0].exc_info is not None


async def test_beyond_the_limit_whoever_was_idle_the_longest_makes_room() -> None:
    async with serving(AdminServer(ROUTES, ACCESS, max_connections=3)) as address, clients(address) as connect:
        fresh, first, second = [await connect() for _ in range(3)]
        for stream in (first, second, first):
            await stream.send_all(get("/echo"))
            assert statuses(await stream.receive_some(4096)) == [200]
        # One that never said anything goes first, then the one whose last request is the longest ago.
        for gone in (fresh, second):
            newest = await connect()
            await newest.send_all(get("/echo"))
            assert statuses(await newest.receive_some(4096)) == [200]
            assert await gone.receive_some(1) == b""
        await first.send_all(get("/echo"))
        assert statuses(await first.receive_some(4096)) == [200]


async def test_idle_connections_never_shut_out_a_probe() -> None:
    async with serving() as address, clients(address) as connect:
        idle = [await connect() for _ in range(MAX_CONNECTIONS)]
        for stream in idle:
            await stream.send_all(get("/echo"))
            assert statuses(await stream.receive_some(4096)) == [200]
        for _ in range(3):
            assert statuses(await ask(address, get("/echo"))) == [200]


async def test_a_connection_under_way_is_never_the_one_to_go() -> None:
    async with serving(AdminServer(ROUTES, ACCESS, max_connections=2)) as address, clients(address) as connect:
        first, second = [await connect() for _ in range(2)]
        for stream in (first, second):
            await stream.send_all(get("/echo") + b"GET")  # a second head has begun
            assert statuses(await stream.receive_some(4096)) == [200]
        assert statuses(await ask(address, get("/echo"))) == [503]
        for stream in (first, second):
            await stream.send_all(get("/echo").removeprefix(b"GET"))
            assert statuses(await stream.receive_some(4096)) == [200]
        assert statuses(await ask(address, get("/echo"))) == [200]


async def test_a_request_that_comes_as_its_connection_makes_room() -> None:
    """Both in one turn of the loop: the answer may be lost with its connection, the limit may not."""
    server = AdminServer(ROUTES, ACCESS, max_connections=1)
    async with trio.open_nursery() as nursery:
        first, ours = trio.testing.memory_stream_pair()
        nursery.start_soon(serve_and_close, server, ours)
        await trio.testing.wait_all_tasks_blocked()
        await first.send_all(get("/echo"))
        second, ours = trio.testing.memory_stream_pair()
        nursery.start_soon(serve_and_close, server, ours)
        await trio.testing.wait_all_tasks_blocked()
        await second.send_all(get("/echo"))
        # Which of the two tasks runs first is trio's choice.
        if statuses(await second.receive_some(4096)) == [200]:
            assert statuses(await read_all(first)) in ([200], [])
        else:
            assert statuses(await first.receive_some(4096)) == [200]
        nursery.cancel_scope.cancel()


async def test_refused_connections_are_bounded_too() -> None:
    server = AdminServer(ROUTES, ACCESS, max_connections=1)
    async with trio.open_nursery() as nursery:
        clients = []
        for _ in range(3):
            client, ours = trio.testing.memory_stream_pair()
            await client.send_all(b"GET")
            nursery.start_soon(serve_and_close, server, ours)
            await trio.testing.wait_all_tasks_blocked()
            clients.append(client)
        assert statuses(await clients[1].receive_some(4096)) == [503]
        assert await clients[2].receive_some(4096) == b""
        nursery.cancel_scope.cancel()


def test_the_default_limit() -> None:
    assert MAX_CONNECTIONS == 64


async def serve_and_close(server: AdminServer, stream: trio.abc.HalfCloseableStream) -> None:
    try:
        await server.serve_stream(stream)
    finally:
        await trio.aclose_forcefully(stream)


@asynccontextmanager
async def in_memory(
    server: AdminServer | None = None,
) -> AsyncIterator[trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]]:
    client, ours = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_and_close, server or AdminServer(ROUTES, ACCESS), ours)
        yield client
        nursery.cancel_scope.cancel()


async def test_a_slow_head_gets_408(autojump_clock: trio.testing.MockClock) -> None:
    async with in_memory() as client:
        for byte in b"GET /echo":  # a byte a second does not put it off
            await client.send_all(bytes([byte]))
            await trio.sleep(1)
        assert statuses(await client.receive_some(4096)) == [408]
        assert trio.current_time() == pytest.approx(HEAD_TIMEOUT)
        assert await client.receive_some(1) == b""


async def test_a_slow_second_head_gets_408_from_its_first_byte(autojump_clock: trio.testing.MockClock) -> None:
    async with in_memory() as client:
        await client.send_all(get("/echo"))
        assert statuses(await client.receive_some(4096)) == [200]
        await trio.sleep(50)
        await client.send_all(b"GET")
        assert statuses(await client.receive_some(4096)) == [408]
        assert trio.current_time() == pytest.approx(50 + HEAD_TIMEOUT)


async def test_a_head_that_began_with_the_last_request_has_its_own_time(autojump_clock: trio.testing.MockClock) -> None:
    async with in_memory() as client:
        await trio.sleep(5)
        await client.send_all(get("/echo") + b"GET")
        assert statuses(await client.receive_some(4096)) == [200]
        assert statuses(await client.receive_some(4096)) == [408]
        assert trio.current_time() == pytest.approx(5 + HEAD_TIMEOUT)


@pytest.mark.parametrize("requests", [0, 1])
async def test_an_idle_connection_ends_without_a_word(autojump_clock: trio.testing.MockClock, requests: int) -> None:
    async with in_memory() as client:
        if requests:
            await client.send_all(get("/echo"))
            await client.receive_some(4096)
        assert await client.receive_some(4096) == b""
        assert trio.current_time() == pytest.approx(IDLE_TIMEOUT if requests else HEAD_TIMEOUT)


async def test_a_client_that_does_not_leave_after_a_refusal_is_left(autojump_clock: trio.testing.MockClock) -> None:
    async with in_memory() as client:
        await client.send_all(b"nonsense\r\n\r\n")
        assert statuses(await read_all(client)) == [400]
        await trio.sleep(LINGER_TIMEOUT + 0.1)
        with pytest.raises(trio.BrokenResourceError):
            await client.send_all(b"more")


async def test_a_client_that_does_not_read_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    client, ours = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_and_close, AdminServer(ROUTES, ACCESS), ours)
        await client.send_all(get("/echo"))
        await trio.sleep(SEND_TIMEOUT + 0.1)
        with pytest.raises(trio.BrokenResourceError):
            await client.send_all(b"x")


async def test_a_client_that_leaves_halfway_harms_nobody() -> None:
    async with serving() as address:
        for raw in (b"", b"GET", get("/big")):
            stream = await trio.open_tcp_stream(*address)
            if raw:
                await stream.send_all(raw)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await stream.aclose()
        assert statuses(await ask(address, get("/echo"))) == [200]


class Faulty(trio.abc.HalfCloseableStream):
    """A stream with a fault that nobody foresaw."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        raise ZeroDivisionError

    async def send_all(self, data: object) -> None: ...

    async def wait_send_all_might_not_block(self) -> None: ...

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...


async def test_an_unforeseen_fault_ends_its_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    server = AdminServer(ROUTES, ACCESS, max_connections=1)
    await server.serve_stream(Faulty())
    assert [record.message for record in caplog.records] == ["admin connection failed"]
    async with in_memory(server) as client:
        await client.send_all(get("/echo"))
        assert statuses(await client.receive_some(4096)) == [200]


async def test_cancelled_in_every_state(autojump_clock: trio.testing.MockClock) -> None:
    # Before a head, within one, between two, while sending, while lingering: nothing stays, no slot is lost.
    server = AdminServer(ROUTES, ACCESS, max_connections=1)
    for raw in (b"", b"GET", get("/echo"), get("/big"), b"nonsense\r\n\r\n"):
        client, ours = trio.testing.lockstep_stream_pair() if raw == get("/big") else trio.testing.memory_stream_pair()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_and_close, server, ours)
                if raw:
                    await client.send_all(raw)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
    async with in_memory(server) as after:
        await after.send_all(get("/echo"))
        assert statuses(await after.receive_some(4096)) == [200]


async def test_urllib_reads_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")

    def fetch(url: str) -> tuple[int, bytes]:
        with urllib.request.urlopen(url) as answer:
            return answer.status, answer.read()

    async with serving() as (host, port):
        url = f"http://{host}:{port}/json"
        assert await trio.to_thread.run_sync(partial(fetch, url)) == (200, b'{\n  "ready": true\n}\n')


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--http2"], b"200"),  # asks for an upgrade to h2c, and takes no for an answer
        (["-I"], b"200"),
        (["-X", "POST", "-d", "x=1"], b"405"),
    ],
)
async def test_curl_is_served(options: list[str], expected: bytes) -> None:
    async with serving() as (host, port):
        command = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--noproxy", "*", *options]
        done = await trio.run_process([*command, f"http://{host}:{port}/echo"], capture_stdout=True)
    assert done.stdout == expected
