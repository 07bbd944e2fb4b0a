"""The section of the configuration that says how much a discovery server takes on."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from meshlocal.policy.config_types import ByteRate, Count, MessageSize, Seconds, Section


class ServerLimitsConfig(Section, frozen=True):
    """How much a discovery server takes on, so that no client can take it from the others."""

    connections: Annotated[
        Count, Meta(description="Connections open at once, of gRPC and of WebSocket each. More are closed at once.")
    ] = 4096
    client_connections: Annotated[
        Count | None,
        Meta(
            description="Connections open at once from one address (IPv6: from one /64), of gRPC and of WebSocket each;"
            " null: no matter how many."
        ),
    ] = 3072
    watchers: Annotated[Count, Meta(description="Watches under way at once.")] = 8192
    client_watchers: Annotated[
        Count | None,
        Meta(description="Watches under way at once from one address (IPv6: from one /64); null: no matter how many."),
    ] = 4096
    subscriptions: Annotated[Count, Meta(description="Services that one watch may follow.")] = 1000
    client_subscriptions: Annotated[
        Count | None,
        Meta(
            description="Services that all watches from one address (IPv6: from one /64) together may follow; null: no"
            " matter how many."
        ),
    ] = 100_000
    all_subscriptions: Annotated[Count, Meta(description="Services that all watches together may follow.")] = 500_000
    message_size: Annotated[MessageSize, Meta(description="Bytes of one request at most.")] = 1 << 20
    client_calls_per_second: Annotated[
        Count | None,
        Meta(
            description="Calls that may begin in a second from one address (IPv6: from one /64), beyond"
            " client_calls_burst; null: no matter how many."
        ),
    ] = 100
    client_calls_burst: Annotated[Count, Meta(description="Calls that may begin at once after a while without.")] = 5000
    bytes_per_second: Annotated[
        ByteRate | None,
        Meta(
            description="Bytes read in a second from one connection, beyond a first message_size; more wait in the"
            " client. null: as many as come."
        ),
    ] = 65_536
    stall_timeout: Annotated[
        Seconds,
        Meta(description="Seconds that a client may leave unread what is sent to it before it is cut off."),
    ] = 30.0
