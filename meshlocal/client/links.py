"""Opens the link that a discovery server's URL names."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import anyio

from meshlocal.client.link import MAX_EVENT_SIZE, Credentials, Link
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.config import DiscoveryClientConfig


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
    url: DiscoveryUrl, config: DiscoveryClientConfig, credentials: Credentials | None = None
) -> AsyncIterator[Link]:
    """A way to the server at the URL, for as long as the block lasts.

    Args:
        url: where the server is.
        config: how it is reached; its URLs do not count here.
        credentials: those of `config`, kept from one link to the next by who opens several.

    Raises:
        GrpcError: there is none; its text says why.
        TimeoutError: none was found within `connect_timeout`.
    """
    credentials = credentials or Credentials(config)
    context = await credentials.context() if url.scheme in ("grpcs", "wss") else None
    metadata = await credentials.metadata(url)
    if url.scheme in ("ws", "wss"):
        from meshlocal.client.websocket_link import WebSocketLink

        yield WebSocketLink(url, config, context, metadata)
        return
    from meshlocal.client.grpc_link import GrpcLink
    from meshlocal.net.grpc.client import open_channel
    from meshlocal.net.grpc.options import GrpcOptions

    grpc_options = GrpcOptions(
        keepalive_interval=config.keepalive_interval,
        keepalive_timeout=config.keepalive_timeout,
        max_message_size=MAX_EVENT_SIZE,
    )
    with anyio.CancelScope() as connecting:
        connecting.deadline = anyio.current_time() + config.connect_timeout
        async with open_channel(url.host, url.port, options=grpc_options, ssl_context=context) as channel:
            connecting.deadline = float("inf")
            yield GrpcLink(channel, metadata)
    if connecting.cancelled_caught:
        raise TimeoutError
