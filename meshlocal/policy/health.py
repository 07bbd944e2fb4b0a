"""Which instances are fit to be tried first: passive ejection and active checks (behaviour rules H1, H3).

Theory of operation. Every instance of a service is in one of four states. What requests and checks find out moves it
from one to another; each cell is the state that follows, `-` is the same state.

    state      request failed      request succeeded    ejection is over      checks failed       check passed
    ADMITTED   n-th in a row:      - (count is 0)                             FAILING             - (*)
               EJECTED
    EJECTED    -                   ADMITTED             next request that     FAILING             ADMITTED (*)
                                                        comes to it: TRIAL
    TRIAL      EJECTED, longer     ADMITTED             next request that     FAILING             ADMITTED (*)
                                                        comes to it: TRIAL
    FAILING    -                   -                                          -                   ADMITTED

A *request failed* when the instance could not be connected, or ended the connection by a reset before it said a
word; an answer of any kind is a success, for it takes a live instance to give one. A *check* fails as a whole after
`failures` tries in a row, and passes at the first that succeeds.

An instance in any state but ADMITTED is passed over while others are left, and tried last of all (O5): a request never
fails because of what is remembered here. Requests that try it so late are no trial, but if one of them succeeds, it
has shown what a trial would have shown.

The n-th ejection lasts `time` seconds, times two for each one before it, `max_time` at most, give or take a tenth: a
thousand proxies that lost one instance at the same moment do not return to it at the same moment. The doubling starts
anew when the instance stayed admitted for as long as its last ejection was. One request makes the trial; if it brings
no verdict, because its client left, the next request tries. A trial that nobody hears of again ends after `time`.

What a request shows counts from when it began: one that began before its instance was ejected, or readmitted, says
nothing of what the instance has been since. An instance that was not ready, and is again, is due for its trial at once.

(*) That an instance can be connected says nothing about one that resets what it accepts. Such a *shallow* success, a
tcp request's connect or a check of kind tcp, changes nothing where the last failure was a reset; what counts there is
that a connection lives.

Only what is not simply admitted is remembered, so that a service in good health costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from enum import StrEnum
from typing import NamedTuple

from meshlocal.policy.backoff import UniformSource
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.model import HostPort

_JITTER = 0.1


class State(StrEnum):
    """Where an instance stands; the table in the module's header says how it gets there."""

    ADMITTED = "admitted"
    EJECTED = "ejected"
    TRIAL = "trial"
    FAILING = "failing"


class Cause(StrEnum):
    """What ejected an instance."""

    CONNECT = "connect"
    """The instance could not be connected."""
    RESET = "reset"
    """The instance was connected, and failed before it said a word."""
    CHECK = "check"
    """The instance's health checks fail."""
    PROTOCOL = "protocol"
    """The instance said what nobody had asked for."""


class Standing(NamedTuple):
    """How an instance stands, for people to read.

    Attributes:
        state: in the table above.
        cause: of its last failure; None if there is none to remember.
        failures: requests that failed in a row, while admitted.
        left: seconds until a request may try it; 0 if one may; None where no time decides.
        ejections: how often it was ejected in short order.
    """

    state: State
    cause: Cause | None = None
    failures: int = 0
    left: float | None = None
    ejections: int = 0


DEEP = frozenset({Cause.RESET, Cause.PROTOCOL})
"""Causes that came after a connect: that it can be connected proves nothing against them."""


def _nobody() -> None:
    """Whom nobody wants to hear."""


class _Record:
    __slots__ = ("cause", "changed", "ejections", "failures", "lasted", "readmitted", "state", "until")

    def __init__(self) -> None:
        self.state = State.ADMITTED
        self.cause: Cause | None = None
        self.failures = 0
        self.ejections = 0
        self.lasted = 0.0
        self.until = 0.0
        self.readmitted = 0.0
        self.changed = -math.inf
        """When it was ejected or readmitted last."""


class Health:
    """The states of one service's instances. Times are seconds of one monotonic clock.

    Args:
        policy: when an instance is ejected, and for how long.
        rng: for the jitter of ejections.

    Attributes:
        policy: may be replaced at any time.
        total: ejections so far, by cause.
        known: what is remembered of any instance; for others to see whether there is something.
        unfit: what is remembered of the instances that are not admitted; for others to see which.
        on_change: called when which instances are admitted, or when one is due for its trial, may be otherwise.
    """

    __slots__ = ("_rng", "known", "on_change", "policy", "total", "unfit")

    def __init__(self, policy: EjectionConfig, rng: UniformSource) -> None:
        self.policy = policy
        self.total = dict.fromkeys(Cause, 0)
        self._rng = rng
        self.known: dict[HostPort, _Record] = {}
        self.unfit: dict[HostPort, _Record] = {}
        self.on_change: Callable[[], None] = _nobody

    @property
    def quiet(self) -> bool:
        """Nothing is remembered of any instance: a success need not be told."""
        return not self.known

    def __len__(self) -> int:
        """How many instances are not admitted."""
        return len(self.unfit)

    def is_admitted(self, place: HostPort) -> bool:
        """Whether the instance comes in its place of the order."""
        return place not in self.unfit

    def standing(self, place: HostPort, now: float) -> Standing:
        """How the instance stands."""
        record = self.known.get(place)
        if record is None:
            return Standing(State.ADMITTED)
        timed = record.state in (State.EJECTED, State.TRIAL)
        left = max(0.0, record.until - now) if timed else None
        return Standing(record.state, record.cause, record.failures, left, record.ejections)

    def is_due(self, place: HostPort, now: float) -> bool:
        """Whether a request that comes to the instance would be its trial."""
        record = self.unfit.get(place)
        return record is not None and record.state is not State.FAILING and now >= record.until

    def claim(self, place: HostPort, now: float) -> bool:
        """Make the calling request the instance's trial, if it is time for one; tells whether it is."""
        if not self.is_due(place, now):
            return False
        record = self.unfit[place]
        record.state = State.TRIAL
        record.until = now + self.policy.time
        self.on_change()
        return True

    def failed(
        self, place: HostPort, now: float, cause: Cause = Cause.CONNECT, *, began: float | None = None
    ) -> float | None:
        """A request failed on the instance.

        Args:
            place: the instance.
            now: the time.
            cause: how.
            began: when the attempt did; by default now.

        Returns:
            The seconds for which it is ejected, if this ejected it.
        """
        limit = self.policy.failures
        if limit is None:
            return None
        record = self.known.get(place)
        if record is None:
            record = self.known[place] = _Record()
        elif began is not None and began < record.changed:
            return None
        if record.state is State.ADMITTED:
            record.failures += 1
            record.cause = cause
            if record.failures < limit:
                return None
            if now - record.readmitted > record.lasted:
                record.ejections = 0
        elif record.state is not State.TRIAL:
            return None
        return self._eject(place, record, now, cause)

    def misbehaved(self, place: HostPort, now: float) -> float | None:
        """The instance did what no instance may do: one time is enough.

        Returns:
            The seconds for which it is ejected, if this ejected it.
        """
        if self.policy.failures is None:
            return None
        record = self.known.get(place)
        if record is None:
            record = self.known[place] = _Record()
        if record.state not in (State.ADMITTED, State.TRIAL):
            return None
        return self._eject(place, record, now, Cause.PROTOCOL)

    def ready_again(self, place: HostPort, now: float) -> None:
        """The instance was not ready, and is: what was found out about it before may be over (F1)."""
        record = self.unfit.get(place)
        if record is not None and record.state in (State.EJECTED, State.TRIAL):
            record.state = State.EJECTED
            record.until = now
            # What an attempt shows that began before says nothing of it now.
            record.changed = now
            self.on_change()

    def is_doubted(self, place: HostPort) -> bool:
        """Whether a shallow success of the instance would change nothing."""
        record = self.known.get(place)
        return record is not None and record.cause in DEEP

    def succeeded(self, place: HostPort, now: float, *, shallow: bool = False, began: float | None = None) -> bool:
        """A request succeeded on the instance; tells whether that readmitted it.

        Args:
            place: the instance.
            now: the time.
            shallow: all that is known is that it could be connected.
            began: when the attempt did; by default now.
        """
        record = self.known.get(place)
        if record is None or record.state is State.FAILING or (shallow and record.cause in DEEP):
            return False
        if began is not None and began < record.changed:
            return False
        return self._admit(place, record, now)

    def abandoned(self, place: HostPort, now: float) -> None:
        """A request left the instance without a verdict: if it was the trial, the next request may try."""
        record = self.unfit.get(place)
        if record is not None and record.state is State.TRIAL:
            record.state = State.EJECTED
            record.until = now
            self.on_change()

    def checks_failed(self, place: HostPort) -> bool:
        """The instance's checks failed; tells whether it was in another state until now."""
        record = self.known.get(place)
        if record is None:
            record = self.known[place] = _Record()
        if record.state is State.FAILING:
            return False
        record.state = State.FAILING
        record.cause = Cause.CHECK
        record.failures = 0
        self.unfit[place] = record
        self.total[Cause.CHECK] += 1
        self.on_change()
        return True

    def check_passed(self, place: HostPort, now: float, *, shallow: bool = False) -> bool:
        """A check of the instance succeeded; tells whether that readmitted it.

        Args:
            place: the instance.
            now: the time.
            shallow: all that is known is that it could be connected.
        """
        record = self.unfit.get(place)
        if record is None or (shallow and record.cause in DEEP):
            return False
        return self._admit(place, record, now)

    def unchecked(self, now: float) -> None:
        """There are no more checks: nobody else could readmit what they found failing."""
        for place, record in list(self.unfit.items()):
            if record.state is State.FAILING:
                self._admit(place, record, now)

    def retain(self, places: Collection[HostPort]) -> None:
        """Forget the instances that are not among these."""
        for place in [place for place in self.known if place not in places]:
            del self.known[place]
            self.unfit.pop(place, None)

    def _eject(self, place: HostPort, record: _Record, now: float, cause: Cause) -> float:
        policy = self.policy
        record.state = State.EJECTED
        record.cause = cause
        record.failures = 0
        # The power is bounded: an instance that is away for a month must not overflow a float.
        lasts = min(policy.time * 2.0 ** min(record.ejections, 32), max(policy.time, policy.max_time))
        record.ejections += 1
        record.lasted = lasts * self._rng.uniform(1 - _JITTER, 1 + _JITTER)
        record.until = now + record.lasted
        record.changed = now
        self.unfit[place] = record
        self.total[cause] += 1
        self.on_change()
        return record.lasted

    def _admit(self, place: HostPort, record: _Record, now: float) -> bool:
        was_unfit = self.unfit.pop(place, None) is not None
        record.failures = 0
        record.cause = None
        if was_unfit:
            record.state = State.ADMITTED
            record.readmitted = record.changed = now
        if not record.ejections or (not was_unfit and now - record.readmitted > record.lasted):
            del self.known[place]
        if was_unfit:
            self.on_change()
        return was_unfit
