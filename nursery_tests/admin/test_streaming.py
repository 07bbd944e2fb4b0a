"""admin/streaming: pages that are followed: what is told, and that no reader is in another's way (P1)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from meshlocal.admin.access import AdminAccess
from meshlocal.admin.messages import Request, Response
from meshlocal.admin.server import MAX_STREAMS, SEND_TIMEOUT, AdminServer
from meshlocal.admin.streaming import EVENTS, LINES, SILENCE, Ask, Stream, events, lines, stream_route
from meshlocal.policy.config_access import AdminAccessConfig
from nursery_tests.logged import events as logged

ACCESS = AdminAccess(AdminAccessConfig(), "proxy")
HEAD = b"GET /followed HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Page:
    """What the followed page says, as the test sets it."""

    def __init__(self, body: bytes = b"") -> None:
        self.response: Response | Exception = Response(body=body)
        self.asked = 0

    def says(self, body: bytes, status: int = 200) -> None:
        self.response = Response(status, body=body)

    async def __call__(self, request: Request) -> Response:
        self.asked += 1
        if isinstance(self.response, Exception):
            raise self.response
        return self.response


def server(page: Page, pieces: Callable[[Ask], Stream] = events, max_streams: int = MAX_STREAMS) -> AdminServer:
    routes = {"/other": lambda _: Response.text("other")}
    return AdminServer(routes, ACCESS, streams={"/followed": stream_route(page, pieces)}, max_streams=max_streams)


class Reader:
    """A client, and what came for it."""

    def __init__(self, nursery: trio.Nursery, admin: AdminServer) -> None:
        self.stream, ours = trio.testing.memory_stream_pair()
        self.served = trio.Event()
        nursery.start_soon(self._serve, admin, ours)

    async def _serve(self, admin: AdminServer, stream: trio.abc.Stream) -> None:
        await admin.serve_stream(stream)
        await stream.aclose()
        self.served.set()

    async def ask(self, head: bytes = HEAD) -> tuple[bytes, bytes]:
        await self.stream.send_all(head)
        told = await self.next()
        first, _, rest = told.partition(b"\r\n\r\n")
        return first, rest or await self.next()

    async def next(self) -> bytes:
        await trio.testing.wait_all_tasks_blocked()
        return bytes(await self.stream.receive_some(1 << 16))


async def test_events_tell_each_line_that_changed(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    page = Page(b'{"a":1}\n{"b":1}\n')
    reader = Reader(nursery, server(page))
    head, first = await reader.ask()
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert f"Content-Type: {EVENTS}".encode() in head
    assert b"Connection: close" in head
    assert b"Content-Length" not in head
    assert first == b'retry: 1000\n\ndata: {"a":1}\n\ndata: {"b":1}\n\n'
    page.says(b'{"a":1}\n{"b":2}\n')
    assert await reader.next() == b'data: {"b":2}\n\n'
    page.says(b'{"a":1}\n')
    await trio.sleep(2)
    page.says(b'{"a":1}\n{"b":2}\n')
    assert await reader.next() == b'data: {"b":2}\n\n'


async def test_a_problem_is_told_once_and_then_all_again(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    page = Page(b'{"a":1}\n')
    reader = Reader(nursery, server(page))
    await reader.ask()
    page.says(b"no worker\nis ready\n", 503)
    assert await reader.next() == b"event: problem\ndata: no worker is ready\n\n"
    await trio.sleep(5)
    page.says(b'{"a":1}\n')
    assert await reader.next() == b'data: {"a":1}\n\n'


@pytest.mark.parametrize(("pieces", "sign"), [(events, b": nothing new\n\n"), (lines, b"\n")])
async def test_silence_is_told(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, pieces: Callable[[Ask], Stream], sign: bytes
) -> None:
    page = Page(b'{"a":1}\n')
    reader = Reader(nursery, server(page, pieces))
    await reader.ask()
    page.says(b'{"a":1}\n' if pieces is events else b"")
    start = trio.current_time()
    told = await reader.next()
    while told not in (sign, b""):
        told = await reader.next()
    assert told == sign
    assert SILENCE - 1 <= trio.current_time() - start <= SILENCE + 2


async def test_lines_are_told_each_time_until_the_page_has_none(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    page = Page(b"1\n2\n")
    reader = Reader(nursery, server(page, lines))
    head, first = await reader.ask()
    assert f"Content-Type: {LINES}".encode() in head
    assert first == b"1\n2\n"
    page.says(b"3\n")
    assert await reader.next() == b"3\n"
    page.says(b"", 404)
    assert await reader.next() == b""
    await reader.served.wait()


async def test_what_cannot_be_followed_is_answered_as_ever(nursery: trio.Nursery) -> None:
    page = Page()
    page.says(b"no such service\n", 404)
    reader = Reader(nursery, server(page))
    head, body = await reader.ask()
    assert head.startswith(b"HTTP/1.1 404 ")
    assert body == b"no such service\n"


@pytest.mark.parametrize("leave", ["closes", "half-closes"])
async def test_nobody_is_asked_once_the_reader_left(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, leave: str
) -> None:
    page = Page(b"{}\n")
    reader = Reader(nursery, server(page))
    await reader.ask()
    await (reader.stream.aclose() if leave == "closes" else reader.stream.send_eof())
    await reader.served.wait()
    asked = page.asked
    await trio.sleep(10)
    assert page.asked == asked


async def test_a_reader_that_does_not_read_is_left(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    page = Page(b"{}\n")
    ours, theirs = trio.testing.lockstep_stream_pair()
    nursery.start_soon(server(page).serve_stream, ours)
    await theirs.send_all(HEAD)
    await trio.sleep(10 * SEND_TIMEOUT)
    assert page.asked == 1


async def test_so_many_are_followed_and_no_more(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """They never take the places of others; one that ended makes room."""
    page = Page(b"{}\n")
    admin = server(page, max_streams=2)
    readers = [Reader(nursery, admin) for _ in range(3)]
    heads = [(await reader.ask())[0] for reader in readers]
    assert [head.split(b" ")[1] for head in heads] == [b"200", b"200", b"503"]
    other = Reader(nursery, admin)
    head, _ = await other.ask(HEAD.replace(b"/followed", b"/other"))
    assert head.startswith(b"HTTP/1.1 200")
    await readers[0].stream.aclose()
    await readers[0].served.wait()
    again = Reader(nursery, admin)
    head, _ = await again.ask()
    assert head.startswith(b"HTTP/1.1 200")


async def test_a_fault_ends_that_stream_and_is_logged(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    page = Page(b"{}\n")
    reader = Reader(nursery, server(page))
    await reader.ask()
    page.response = ZeroDivisionError()
    assert await reader.next() == b""
    await reader.served.wait()
    assert "admin route failed" in logged(caplog.records)


async def test_a_stop_ends_streams_at_once(autojump_clock: trio.testing.MockClock) -> None:
    page = Page(b"{}\n")
    with trio.fail_after(5):
        async with trio.open_nursery() as inner:
            reader = Reader(inner, server(page))
            await reader.ask()
            inner.cancel_scope.cancel()
