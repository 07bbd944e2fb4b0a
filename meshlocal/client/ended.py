"""What is told of requests that ended, one by one: those worth a look are kept, and who follows hears of each (R1).

A request costs nothing here as long as it stays in the first tier, comes to a good end, and nobody follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from meshlocal.client.tried import attempt_text, in_a_row
from meshlocal.net.log import get_log
from meshlocal.policy.model import Instance, ServiceKey
from meshlocal.policy.picker import Pick

log = get_log("meshlocal.requests")
"""At the level debug, a line for each request: what was picked, and what became of each attempt."""

KEPT = 50
"""Requests of a service that are kept: the last that left the first tier, or failed."""

ATTEMPTS_KEPT = 10
"""Failed attempts that are kept of a request: the first and the last ones, half of each."""


class FailedAttempt(NamedTuple):
    """One attempt that came to nothing.

    Attributes:
        pick: what was tried.
        number: the how manieth attempt of its request it was; from 1.
        tier: its tier's name.
        error: how it failed, in a word.
        errno: the system's number for it; 0 where the system gave none.
        began: when it did, by the clock of its request.
        seconds: how long it took.
        status: of an answer that was dropped for it (A3), of HTTP or of gRPC; 0: there was no answer.
    """

    pick: Pick
    number: int
    tier: str
    error: str
    errno: int
    began: float
    seconds: float
    status: int = 0

    def __str__(self) -> str:
        return attempt_text(self.pick.instance.key, self.tier, self.error)


class Asked(NamedTuple):
    """What a request asked for, as far as it says so.

    Attributes:
        protocol: `tcp`, or the version of HTTP.
        method: of HTTP.
        path: of HTTP, without its query, which carries secrets more often than paths do.
        status: of the response; 0 if there is none.
        request_id: what the request is called; empty: nothing.
        trace_id: of its trace, in 32 digits; empty: it has none.
    """

    protocol: str
    method: str = ""
    path: str = ""
    status: int = 0
    request_id: str = ""
    trace_id: str = ""


class EndedRequest(NamedTuple):
    """A request that ended.

    Attributes:
        service: that it was for.
        peer: the client's address, as the socket has it; None for a request of this very process.
        asked: what it asked for.
        started: when it did, by the clock of whoever serves it, in seconds.
        seconds: how long it took.
        outcome: how it ended, a word of `client.statistics.Outcome`.
        failed: that is no good end, or the answer says that its server failed.
        tier: of the last instance tried; empty for none.
        reason: why that is not of the first tier (R1); empty if it is.
        error: how the last attempt failed, or the request, in a word; empty if neither did.
        instance: the last one tried; None: none was.
        attempts: how many instances were tried.
        failures: those that failed, in order; of many, the first and the last.
    """

    service: ServiceKey
    peer: object
    asked: Asked
    started: float
    seconds: float
    outcome: str
    failed: bool
    tier: str
    reason: str
    error: str
    instance: Instance | None
    attempts: int
    failures: tuple[FailedAttempt, ...]

    @property
    def stumbled(self) -> bool:
        """Whether it failed, or an attempt of it did."""
        return self.failed or bool(self.failures)

    @property
    def ended(self) -> float:
        """When it did, by the clock of its start."""
        return self.started + self.seconds


class Follower(Protocol):
    """Is told of requests of a service. It may neither raise nor wait."""

    def wants(self, now: float, reason: str, stumbled: bool) -> bool:
        """Whether it is to be told of a request that ends now. Asked once of each, before anything is made of it.

        Args:
            now: by the clock of requests.
            reason: why it left the first tier; empty if it did not.
            stumbled: it failed, or an attempt of it did.
        """
        ...

    def ended(self, request: EndedRequest) -> None:
        """A request ended that it wants."""
        ...


class Told:
    """What is told of one service's requests.

    Attributes:
        recent: the last that left the first tier, or failed; the latest comes last.
        followers: who is told of each request.
    """

    __slots__ = ("followers", "recent")

    def __init__(self) -> None:
        self.recent: deque[EndedRequest] = deque(maxlen=KEPT)
        self.followers: tuple[Follower, ...] = ()

    def wanting(self, now: float, reason: str, stumbled: bool) -> list[Follower]:
        """Those who are to be told of a request; see `Follower.wants`."""
        return [follower for follower in self.followers if follower.wants(now, reason, stumbled)]

    def add(self, request: EndedRequest, wanting: Iterable[Follower]) -> None:
        """Keep a request if it is worth a look, and tell those of it who want it."""
        if request.stumbled or request.reason:
            self.recent.append(request)
        for follower in wanting:
            follower.ended(request)
        if log.tells_all:
            _tell(request)

    def follow(self, follower: Follower) -> None:
        """Tell somebody of each request from now on, until `leave`."""
        self.followers = (*self.followers, follower)

    def leave(self, follower: Follower) -> None:
        """Tell somebody no longer; one who was not told is passed over."""
        self.followers = tuple(each for each in self.followers if each != follower)


def kept_attempts(failures: list[FailedAttempt] | None) -> tuple[FailedAttempt, ...]:
    """Of failed attempts those that are kept."""
    if not failures:
        return ()
    if len(failures) > ATTEMPTS_KEPT:
        return (*failures[: ATTEMPTS_KEPT // 2], *failures[-ATTEMPTS_KEPT // 2 :])
    return tuple(failures)


def _tell(request: EndedRequest) -> None:
    instance = request.instance
    log.debug(
        "request ended",
        service=request.service,
        request_id=request.asked.request_id or None,
        trace_id=request.asked.trace_id or None,
        outcome=request.outcome,
        instance=str(instance.key) if instance is not None else None,
        node=(instance.node or None) if instance is not None else None,
        tier=request.tier or None,
        reason=request.reason or None,
        error=request.error or None,
        attempts=request.attempts,
        failed=in_a_row([f"{each} after {each.seconds:.6f} s" for each in request.failures]) or None,
        seconds=round(request.seconds, 6),
    )
