"""What is known of one relay: bytes moved, who ended, what failed."""

from __future__ import annotations

import errno
from typing import Literal, NamedTuple

Side = Literal["client", "upstream"]

_REASONS = {
    errno.ECONNRESET: "reset",
    errno.ECONNABORTED: "reset",
    errno.EPIPE: "reset",
    errno.ENOTCONN: "reset",
    errno.ETIMEDOUT: "timeout",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.EBADF: "closed",
}


class RelayCounters:
    """What a relay has moved so far, for others to read while it runs.

    Attributes:
        client_to_upstream: bytes that the upstream's socket took.
        upstream_to_client: bytes that the client's socket took.
        last_activity: when bytes last moved, by trio.current_time(); who cuts idle connections goes by it.
    """

    __slots__ = ("client_to_upstream", "last_activity", "upstream_to_client")

    def __init__(self, now: float) -> None:
        self.client_to_upstream = 0
        self.upstream_to_client = 0
        self.last_activity = now


class RelayResult(NamedTuple):
    """How a relay ended.

    Attributes:
        failed: whose connection failed; None if both sides ended their streams, and all bytes were delivered.
        reason: `eof` if none failed, else reset, timeout, unreachable, closed (here, by another task) or other.
        errno: the system's number for the failure; 0 if there was none.
        first_end: who ended its stream first; None if nobody did before the failure.
    """

    failed: Side | None
    reason: str
    errno: int
    first_end: Side | None


class RelayState:
    """What the two directions of a relay share."""

    __slots__ = ("counters", "failed", "first_end", "number")

    def __init__(self, counters: RelayCounters) -> None:
        self.counters = counters
        self.failed: Side | None = None
        self.number = 0
        self.first_end: Side | None = None

    def fail(self, side: Side, number: int) -> None:
        """Note a failure by its errno; the first one counts, the others follow from it."""
        if self.failed is None:
            self.failed = side
            self.number = number

    def result(self) -> RelayResult:
        """How the relay ended."""
        reason = "eof" if self.failed is None else _REASONS.get(self.number, "other")
        return RelayResult(self.failed, reason, self.number, self.first_end)
