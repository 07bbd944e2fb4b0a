"""What http listeners count beside what every listener does, as plain numbers."""

from __future__ import annotations

from collections import defaultdict

STATUS_CLASSES = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")
"""By a status's hundreds; `none` where no response was begun."""


STATUS_NAMES = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
"""gRPC's statuses by number."""

SERVER_FAULTS = frozenset({2, 4, 8, 12, 13, 14, 15})
"""Those that say that the server failed, as an HTTP status from 500 on does; the others are the caller's."""


class HttpStatistics:
    """Counts of one service's requests.

    Attributes:
        ended: requests that ended, by tier, reason (R1), the hundreds of their response's status, 0 for none, and the
            version of HTTP that they came in.
        calls: gRPC calls that ended, by tier, reason (R1), and status.
        retries: by cause, a word of `policy.retry.Failure`.
        connections_made: to instances.
        connections_reused: how often a kept one was used again.
    """

    __slots__ = (
        "calls",
        "connections_made",
        "connections_reused",
        "ended",
        "retries",
    )

    def __init__(self) -> None:
        self.ended: defaultdict[tuple[str, str, int, str], int] = defaultdict(int)
        self.calls: defaultdict[tuple[str, str, int], int] = defaultdict(int)
        self.retries: defaultdict[str, int] = defaultdict(int)
        self.connections_made = 0
        self.connections_reused = 0

    @property
    def responses(self) -> dict[tuple[str, str, str, str], int]:
        """Requests that ended, by tier, reason (R1), status class, and the version of HTTP that they came in."""
        found: dict[tuple[str, str, str, str], int] = defaultdict(int)
        for (tier, reason, hundreds, protocol), count in self.ended.items():
            status = STATUS_CLASSES[hundreds] if hundreds < len(STATUS_CLASSES) else "other"
            found[tier, reason, status, protocol] += count
        return found
