"""Discovery over gRPC: all calls on one connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from meshlocal.client.link import REQUEST_LIMIT, Events
from meshlocal.net.grpc.client import Channel
from meshlocal.wire.grpc.method import Method, Req, Resp


class GrpcLink:
    """A `Link` over one channel."""

    def __init__(self, channel: Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._metadata = metadata

    async def probe(self) -> None:
        """See `Link.probe`."""
        with anyio.fail_after(REQUEST_LIMIT):
            await self._channel.probe()

    @asynccontextmanager
    async def watch(self, method: Method[Req, Resp], request: Req) -> AsyncIterator[Events[Resp]]:
        """See `Link.watch`."""
        async with self._channel.call(method, self._metadata) as call:
            with anyio.fail_after(REQUEST_LIMIT):
                await call.send(request)
                await call.end()
            yield call

    async def unary(self, method: Method[Req, Resp], request: Req) -> Resp:
        """See `Link.unary`."""
        return await self._channel.unary(method, request, self._metadata)
