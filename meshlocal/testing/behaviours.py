"""What an upstream may do with a connection. Any `Behaviour` of a test's own is as good."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import httptools

from meshlocal.testing.http import HttpRequest, HttpResponse, RequestReader
from meshlocal.testing.upstream import Behaviour, UpstreamConnection, echo

__all__ = ["answer", "echo", "http", "reset", "silent"]


async def reset(connection: UpstreamConnection) -> None:
    """Reset the connection as soon as it is accepted."""
    connection.reset()


async def silent(connection: UpstreamConnection) -> None:
    """Accept, and never say anything; end when the peer does."""
    while await connection.receive():
        pass


def answer(data: bytes) -> Behaviour:
    """Send these bytes once something came, and close."""

    async def behaviour(connection: UpstreamConnection) -> None:
        if await connection.receive():
            await connection.send(data)

    return behaviour


def http(
    response: HttpResponse | Callable[[HttpRequest], HttpResponse | None] | None = None,
    *,
    delay: float = 0.0,
) -> Behaviour:
    """Answer HTTP/1.1 requests, one after another on each connection.

    Args:
        response: each request's response, or what makes it from the request; where that makes None, the connection
            is reset in its place. By default, 200 with the upstream's name as the body.
        delay: seconds to wait before each response.
    """

    async def behaviour(connection: UpstreamConnection) -> None:
        reader = RequestReader()
        while received := await connection.receive():
            try:
                reader.feed(received)
            except httptools.HttpParserError:
                await connection.send(HttpResponse(400, close=True).encode())
                return
            while reader.requests:
                request = reader.requests.pop(0)
                connection.upstream.requests.append(request)
                made = response(request) if callable(response) else response or _name(connection)
                if delay:
                    await anyio.sleep(delay)
                if made is None:
                    connection.reset()
                    return
                await connection.send(made.encode())
                if made.close:
                    return

    return behaviour


def _name(connection: UpstreamConnection) -> HttpResponse:
    return HttpResponse(200, connection.upstream.name.encode())
