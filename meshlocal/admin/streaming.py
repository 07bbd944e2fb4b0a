"""Answers of the admin server that go on: what a route says, again and again, as far as it changed.

Such a route is asked every so often for as long as somebody reads, and each of its lines is told when it is new. So
a page of another process (`meshlocal.app.worker_pages`) can be followed as one of this process, nothing waits in a
queue, and nobody is asked for what nobody reads.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import NamedTuple

import trio

from meshlocal.admin.messages import Request, Response

LINES = "application/x-ndjson"
EVENTS = "text/event-stream"

SILENCE = 15.0
"""Seconds after which a reader that is told nothing is told so: a connection that is gone shows at a write only."""


class Stream(NamedTuple):
    """An answer without a length, that ends with its connection (RFC 9112, 6.3).

    Attributes:
        content_type: of what is sent.
        pieces: gives what is to be sent next, for ever or to the stream's end.
    """

    content_type: str
    pieces: AsyncGenerator[bytes]


Ask = Callable[[], Awaitable[Response]]
"""What is to be told now, a line each."""


Pieces = Callable[[Ask], Stream]
"""Makes the stream of what is told: `events` or `lines`."""


def stream_route(ask: Callable[[Request], Awaitable[Response]], pieces: Pieces) -> StreamRoute:
    """A route that follows another one.

    Args:
        ask: that route.
        pieces: makes the stream.
    """

    async def route(request: Request) -> Response | Stream:
        first = await ask(request)
        if first.status != 200 or request.method == "HEAD":
            return first
        unused = [first]

        async def again() -> Response:
            return unused.pop() if unused else await ask(request)

        return pieces(again)

    return route


StreamRoute = Callable[[Request], Awaitable["Response | Stream"]]
"""Answers one path's requests with a stream, or a response that says why not."""


def events(ask: Ask, interval: float = 1.0) -> Stream:
    """A stream of server-sent events (HTML, 9.2): each line that is not what stood in its place before.

    An event named `problem` has what the page says instead of lines.

    Args:
        ask: the page.
        interval: seconds between two looks at it.
    """
    return Stream(EVENTS, _events(ask, interval))


async def _events(ask: Ask, interval: float) -> AsyncGenerator[bytes]:
    told: list[bytes] = []
    yield b"retry: %d\n\n" % (interval * 1000)
    silent_since = trio.current_time()
    while True:
        response = await ask()
        if response.status == 200:
            lines = response.body.splitlines()
            new = [b"data: %b\n\n" % line for place, line in enumerate(lines) if told[place : place + 1] != [line]]
        else:
            lines = [response.body.strip()]
            new = [b"event: problem\ndata: %b\n\n" % b" ".join(lines[0].split())] if lines != told else []
        told = lines
        now = trio.current_time()
        if new:
            yield b"".join(new)
            silent_since = now
        elif now - silent_since >= SILENCE:
            yield b": nothing new\n\n"
            silent_since = now
        await trio.sleep(interval)


def lines(ask: Ask, interval: float = 0.25) -> Stream:
    """A stream of all lines that a page has, each time that it is asked; an empty line where it has none for long.

    It ends when the page says something else than lines.

    Args:
        ask: the page.
        interval: seconds between two looks at it.
    """
    return Stream(LINES, _lines(ask, interval))


async def _lines(ask: Ask, interval: float) -> AsyncGenerator[bytes]:
    silent_since = trio.current_time()
    while (response := await ask()).status == 200:
        now = trio.current_time()
        if response.body:
            yield response.body
            silent_since = now
        elif now - silent_since >= SILENCE:
            yield b"\n"
            silent_since = now
        await trio.sleep(interval)
