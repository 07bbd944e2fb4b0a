"""Limits and timings of gRPC connections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from meshlocal.wire.grpc.framing import DEFAULT_MAX_MESSAGE_SIZE


class Holding(Protocol):
    """Counts the bytes that are held for clients."""

    def change(self, peer: str, size: int) -> None:
        """Note how many bytes more, or, negative, less are held for a peer. Raises GrpcError where more is too much."""
        ...


@dataclass(frozen=True, slots=True)
class GrpcOptions:
    """What one side of a connection allows. Times are seconds, sizes bytes."""

    max_message_size: int = DEFAULT_MAX_MESSAGE_SIZE
    """The largest message received, before and after decompression. Larger: RESOURCE_EXHAUSTED."""
    max_concurrent_streams: int = 100
    """Calls at once on one connection. A client's further calls wait, a server refuses them."""
    max_header_list_size: int = 16_384
    """The largest metadata received."""
    keepalive_interval: float | None = 30.0
    """A PING is sent when nothing was received for this long. None: never. Note that a grpcio server ends a
    connection that pings more often than every five minutes while no data flows."""
    keepalive_timeout: float = 10.0
    """The connection is over if nothing, not even the PING's answer, came this long after a PING."""
    stall_timeout: float = 30.0
    """The connection is over if the peer takes none of the bytes on offer for this long."""
    send_timeout: float | None = None
    """A call is over, RESOURCE_EXHAUSTED, if the peer's windows do not take a response, or its next 64 KiB, in this
    long. None: it waits for as long as it takes."""
    receive_rate: float | None = None
    """Bytes read in a second, beyond `receive_burst`; more wait in the peer. None: as many as come."""
    receive_burst: int = 2 * DEFAULT_MAX_MESSAGE_SIZE
    """Bytes read at once after a while without."""
    holding: Holding | None = None
    """A server: bounds what is held of requests that are not whole, of one client and of all. None: nothing does."""
    gzip: bool = False
    """Compress sent messages of 1 KiB and more (a server: if the client accepts it)."""
