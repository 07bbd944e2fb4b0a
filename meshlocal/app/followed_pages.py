"""Which pages of a proxy can be followed, and under which paths: of one process, or of the one above its workers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import count

from meshlocal.admin.messages import Request, Response
from meshlocal.admin.server import AsyncRoute, Route, answer
from meshlocal.admin.streaming import Pieces, Stream, StreamRoute, events, lines, stream_route

LIVE = "/live"
TAP = "/tap/poll"

_FOLLOWED = {"/live/events": (LIVE, events), "/tap": (TAP, lines)}
"""By the path of a stream, the page that it follows, and how."""

_readers = count(1)


def streams(routes: Mapping[str, Route | AsyncRoute]) -> dict[str, StreamRoute]:
    """The streams of a proxy with these pages, by path."""
    return {
        path: partial(_follow, page, routes[page], pieces)
        for path, (page, pieces) in _FOLLOWED.items()
        if page in routes
    }


async def _follow(path: str, route: Route | AsyncRoute, pieces: Pieces, request: Request) -> Response | Stream:
    # Each reader is told what it was not told yet: so the page has to know one from another.
    query = f"reader=stream-{next(_readers)}&{request.query}"
    return await stream_route(partial(answer, route), pieces)(request._replace(path=path, query=query))
