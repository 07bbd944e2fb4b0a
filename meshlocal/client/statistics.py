"""What the proxy counts, as plain numbers.

Counting is on the path of every connection, reading is not: so these are bare
integers in dictionaries, which a collector turns into metrics when it is asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from meshlocal.client.latency import Latency
from meshlocal.policy.model import EndpointKey, HostPort


class Outcome(StrEnum):
    """How a request ended."""

    SERVED = "served"
    """An instance was connected, and both sides ended in good order."""
    CUT = "cut"
    """An instance was connected, and the connection was reset or timed out later."""
    FAILED = "failed"
    """Every instance was tried, none could be connected (A6)."""
    NO_INSTANCE = "no_instance"
    """No usable instance is known (A6)."""
    DEADLINE = "deadline"
    """The deadline came before an instance was connected (A1)."""
    CLIENT_LEFT = "client_left"
    """The client left before an instance was connected (A8)."""
    REFUSED = "refused"
    """HTTP: the request is malformed, too large, or did not come whole."""
    LIMITED = "limited"
    """The request was refused at once, because as many as may be were under way."""
    RETURNED = "returned"
    """The proxy ended it, so that its client comes back to the local tier (F2)."""
    DRAINED = "drained"
    """The proxy stopped before the connection ended (S1)."""
    ERROR = "error"
    """A fault in the proxy itself."""


class AttemptOutcome(StrEnum):
    """How an attempt ended. Failures to connect are named by `meshlocal.net.dial.classify_connect_error`."""

    CONNECTED = "connected"
    """tcp: the instance was connected."""
    ANSWERED = "answered"
    """HTTP: the instance began a response that went to the client."""
    TIMEOUT = "timeout"
    """The attempt's time ran out."""
    TLS = "tls"
    """The instance was connected, and did not prove who it is, or speaks no TLS (T1)."""
    ABANDONED = "abandoned"
    """The request's deadline came first, or its client left, or the proxy stopped."""


class RequestKey(NamedTuple):
    """What requests are counted by: tier and reason of the last instance tried, both empty if there was none."""

    tier: str
    reason: str
    outcome: str


class InstanceStatistics:
    """What was counted of the attempts on one instance.

    Attributes:
        attempts: that were made on it.
        worked: that it was connected by, or answered.
        failures: the others, by how they failed, in a word.
        connect: from an attempt to its connection.
        response: from a request to its response's end (HTTP).
    """

    __slots__ = ("attempts", "connect", "failures", "response", "worked")

    def __init__(self) -> None:
        self.attempts = 0
        self.worked = 0
        self.failures: defaultdict[str, int] = defaultdict(int)
        self.connect = Latency()
        self.response = Latency()


class ServiceStatistics:
    """What was counted of one service's requests."""

    __slots__ = (
        "attempts",
        "bytes_received",
        "bytes_sent",
        "checks",
        "connecting",
        "connects",
        "durations",
        "instances",
        "open",
        "picks",
        "replays",
        "requests",
        "responses",
        "tls_skipped",
        "unix_connects",
    )

    def __init__(self) -> None:
        self.requests: defaultdict[RequestKey, int] = defaultdict(int)
        self.attempts: defaultdict[tuple[str, str], int] = defaultdict(int)
        """By tier and outcome."""
        self.connects: defaultdict[str, Latency] = defaultdict(Latency)
        """By tier: from an attempt to its connection."""
        self.responses: defaultdict[str, Latency] = defaultdict(Latency)
        """By tier, empty for no instance: from a request to its response's end (HTTP)."""
        self.durations: defaultdict[str, Latency] = defaultdict(Latency)
        """By tier: how long connections with an instance lasted (tcp)."""
        self.instances: dict[HostPort, InstanceStatistics] = {}
        """Of the instances that there are, those that were tried."""
        self.picks: defaultdict[tuple[str, str], int] = defaultdict(int)
        """By tier and reason."""
        self.replays: defaultdict[str, int] = defaultdict(int)
        """Connections that went on to another instance before the first byte of one, by why (A5)."""
        self.tls_skipped = 0
        """Attempts to connect in plaintext because of `tls.skip_tiers`."""
        self.unix_connects = 0
        """Connections to instances that were made by their Unix sockets."""
        self.checks: defaultdict[str, int] = defaultdict(int)
        """Health checks that ended, `passed` or `failed` (H3)."""
        self.open = 0
        """Connections with an instance now."""
        self.connecting = 0
        """Clients waiting for an instance now."""
        self.bytes_sent = 0
        """To instances, on connections that ended."""
        self.bytes_received = 0
        """From instances, on connections that ended."""

    def instance(self, place: HostPort) -> InstanceStatistics:
        """What is counted of an instance."""
        found = self.instances.get(place)
        if found is None:
            found = self.instances[place] = InstanceStatistics()
        return found

    def retain(self, keys: Iterable[EndpointKey]) -> None:
        """Forget all instances but these."""
        if self.instances:
            places = {key[:2] for key in keys}
            for place in [place for place in self.instances if place not in places]:
                del self.instances[place]
