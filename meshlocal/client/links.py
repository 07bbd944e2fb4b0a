"""Opens the link that a discovery server's URL names."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import anyio

from meshlocal.client.link import Credentials, Link, LinkOptions
from meshlocal.policy.addresses import DiscoveryUrl


def import_links(urls: Iterable[DiscoveryUrl]) -> None:
    """Import what the URLs will need: an import reads files, which nothing may do once the event loop runs."""
    for url in urls:
        if url.scheme in ("ws", "wss"):
            import meshlocal.client.websocket_link
        elif url.scheme in ("grpc", "grpcs"):
            import meshlocal.client.grpc_link  # noqa: F401 - who reads a file needs no gRPC
        if url.scheme in ("grpcs", "wss"):
            import anyio.streams.tls  # noqa: F401 - few use TLS


@asynccontextmanager
async def open_link(
    url: DiscoveryUrl, options: LinkOptions, credentials: Credentials | None = None
) -> AsyncIterator[Link]:
    """A way to the server at the URL, for as long as the block lasts.

    Args:
        url: where the server is.
        options: how it is reached.
        credentials: those of `options`, kept from one link to the next by who opens several.

    Raises:
        GrpcError: there is none; its text says why.
        TimeoutError: none was found within `connect_timeout`.
    """
    credentials = credentials or Credentials(options.ca_file, options.token_file)
    context = await credentials.context() if url.scheme in ("grpcs", "wss") else None
    metadata = await credentials.metadata()
    if url.scheme in ("ws", "wss"):
        from meshlocal.client.websocket_link import WebSocketLink

        yield WebSocketLink(url, options, context, metadata)
        return
    from meshlocal.client.grpc_link import GrpcLink
    from meshlocal.net.grpc.client import open_channel
    from meshlocal.net.grpc.options import GrpcOptions

    grpc_options = GrpcOptions(
        keepalive_interval=options.keepalive_interval,
        keepalive_timeout=options.keepalive_timeout,
        max_message_size=options.max_message_size,
    )
    with anyio.CancelScope() as connecting:
        connecting.deadline = anyio.current_time() + options.connect_timeout
        async with open_channel(url.host, url.port, options=grpc_options, ssl_context=context) as channel:
            connecting.deadline = float("inf")
            yield GrpcLink(channel, metadata)
    if connecting.cancelled_caught:
        raise TimeoutError
