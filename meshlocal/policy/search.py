"""Which instance a request tries next, and when it tries no other (behaviour rules A1 to A6, O1).

Theory of operation. A search is a machine without I/O, over one plan. Whoever serves the request drives it: a Trio
task, the relay loop, an application's own event loop. So none of them decides anything.

    state      what happens            what follows
    seeking    next: a pick            trying
               next: None              over; `why` says for what reason
    trying     failed: NEXT            seeking; the pick that `next` gives is taken already
               failed: SAME            trying, on a fresh connection: that is no new attempt (A4)
               failed: ANSWER          over
    over       next: None              over

That the next pick is taken at once is what lets an answer be dropped only if there is an instance to ask instead (A3).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from meshlocal.policy.picker import Pick
from meshlocal.policy.retry import Decision, Failure, RetryBudget, decide


class Why(StrEnum):
    """Why a search gives no other instance."""

    NO_INSTANCE = "no_instance"
    """There was none to try (A6)."""
    FAILED = "failed"
    """The instances that were tried failed, and there is no other, or there may be no other attempt (A6)."""
    DEADLINE = "deadline"
    """The request's time is over (A1)."""


class Walk(Protocol):
    """What a search needs of `policy.picker.Plan`."""

    tiers: tuple[str, ...]
    """The names of the tiers, nearest first."""

    def next(self) -> Pick | None:
        """The next instance; None after the last."""
        ...


class Search:
    """One request's search.

    Args:
        deadline: when it is over, by the caller's clock, in seconds; may be changed at any time.
        most: how many instances may be tried; None: all of the plan.
        plan: its walk; None until the service's first snapshot is there (A7).

    Attributes:
        pick: the instance that is tried, or was last; None before the first.
        tier: the name of that pick's tier; empty before the first.
        attempts: how many instances were tried.
    """

    __slots__ = ("_following", "attempts", "deadline", "most", "pick", "plan", "tier")

    def __init__(self, deadline: float, most: int | None, plan: Walk | None = None) -> None:
        self.deadline = deadline
        self.most = most
        self.plan = plan
        self.pick: Pick | None = None
        self.tier = ""
        self.attempts = 0
        self._following: Pick | None = None

    def next(self) -> Pick | None:
        """The instance to try now; None if there is to be no other attempt."""
        plan = self.plan
        if plan is None:
            return None
        if self.pick is None:
            pick = plan.next()
        else:
            pick, self._following = self._following, None
        if pick is not None:
            self.pick = pick
            self.attempts += 1
            # By the plan: the service may have other tiers since that began (S2).
            self.tier = plan.tiers[pick.tier]
        return pick

    def failed(self, failure: Failure, now: float, *, sent: bool, idempotent: bool, held: bool) -> Decision:
        """What follows from the failure of the attempt under way.

        Args:
            failure: what happened.
            now: by the clock of the deadline.
            sent: see `policy.retry.decide`, as for the next two.
            idempotent: by its method, or its Idempotency-Key.
            held: all of the body that was read from the client is still there to be sent again.
        """
        decision = decide(failure, sent=sent, idempotent=idempotent, held=held)
        if decision is Decision.NEXT and not (self._may_go_on(now) and self._take_following()):
            return Decision.ANSWER
        return decision

    def replaces_answer(
        self, now: float, usable: int, budget: RetryBudget, *, sent: bool, idempotent: bool, held: bool
    ) -> bool:
        """Whether to drop an answer with a status of `retry_on` and try the next instance, which is taken then (A3).

        Args:
            now: by the clock of the deadline.
            usable: instances that the latest snapshot has: after so many answers no other one is to be hoped for.
            budget: of the service.
            sent: see `failed`, as for the next two.
            idempotent: by its method, or its Idempotency-Key.
            held: all of the body that was read from the client is still there to be sent again.
        """
        return (
            decide(Failure.STATUS, sent=sent, idempotent=idempotent, held=held) is Decision.NEXT
            and self._may_go_on(now)
            and self.attempts < usable
            and budget.retry(now)
            and self._take_following()
        )

    def why(self, now: float) -> Why:
        """Why `next` gave None, or the last failure was to be answered."""
        if now >= self.deadline:
            return Why.DEADLINE
        return Why.FAILED if self.attempts else Why.NO_INSTANCE

    def _may_go_on(self, now: float) -> bool:
        return (self.most is None or self.attempts < self.most) and now < self.deadline

    def _take_following(self) -> bool:
        if self._following is None and self.plan is not None:
            self._following = self.plan.next()
        return self._following is not None
