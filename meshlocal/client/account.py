"""What one request counts in while it lives, and what it is counted as in the end (R1, F3, H1, limits).

Theory of operation. Every request has one account, whatever its protocol and whoever serves it: a proxy's connection,
an HTTP request, an application's stream. The code that serves it says what happens, and the account does all that
follows from it: it counts, and tells the service's `Fitness` what an attempt shows of its instance. Nobody else counts.
It is the request's `Search` as well, so that what is decided next is decided of what was counted.

    begin → try_next → enter_instance → connected | answered | attempt_failed | drop_answer | abandoned → end
              └───────────────────────────────◁─────────────────────────────────────────────────┘

An attempt is settled once: by the first of `connected` (tcp), `answered` (HTTP), and those that follow them. `end`
settles one that is not, counts the request, and gives back all that is held; a second `end` does nothing. A request
that is served before what it holds is free, such as an application's stream, ends twice: the first time with `hold`.
"""

from __future__ import annotations

import math

from meshlocal.client.ended import Asked, EndedRequest, FailedAttempt, kept_attempts, log
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import AttemptOutcome, InstanceStatistics, Outcome, RequestKey
from meshlocal.policy.limits import Limit
from meshlocal.policy.model import Instance
from meshlocal.policy.picker import Pick
from meshlocal.policy.retry import Decision, Failure, RetryBudget
from meshlocal.policy.search import Search

_ANSWERED = AttemptOutcome.ANSWERED

_WELL = frozenset({Outcome.SERVED, Outcome.CLIENT_LEFT, Outcome.RETURNED, Outcome.DRAINED})
"""Outcomes of requests that nothing went wrong with, as far as the mesh is concerned."""


class Account(Search):
    """What one request counts in while it lives, and what it is counted as in the end.

    Args:
        started: when the request did, in seconds of the caller's clock.

    Attributes:
        peer: the client's address, as its socket has it; None if it is in this very process.
        state: its service; None before `begin`.
        began: when the attempt did whose outcome is told next; what it shows of its instance counts from then.
        error: how the last attempt failed, or the request, in a word; empty if neither did.
        failures: the attempts that failed, in order; None: none did.
    """

    __slots__ = (
        "_counted",
        "_counts",
        "_entered",
        "_held",
        "_instance",
        "_released",
        "_trying",
        "_waiting",
        "began",
        "error",
        "failures",
        "started",
        "state",
    )

    peer: object = None

    def __init__(self, started: float) -> None:
        super().__init__(math.inf, None)
        self.started = started
        self.state: ServiceState | None = None
        self.began = started
        self.error = ""
        self.failures: list[FailedAttempt] | None = None
        self._entered: tuple[Limit, ...] = ()
        self._instance: Instance | None = None
        self._counts: InstanceStatistics | None = None
        self._trying = False
        self._waiting = False
        self._counted = False
        self._held = False
        self._released = False

    # What is told of it.

    @property
    def reason(self) -> str:
        """Why it left the first tier (R1); empty if it did not."""
        return (self.pick.reason or "") if self.pick is not None else ""

    def asked(self) -> Asked:
        """What the request asks for."""
        return Asked("tcp")

    @property
    def is_server_fault(self) -> bool:
        """Whether the answer that went to the client says that a server failed."""
        return False

    @property
    def trying(self) -> bool:
        """Whether an attempt is under way that was not settled."""
        return self._trying

    @property
    def waiting(self) -> bool:
        """Whether the request waits, for an instance or for a snapshot."""
        return self._waiting

    # What happens to it.

    def begin(self, state: ServiceState, time: float, *limits: Limit) -> Limit | None:
        """Say which service the request is for.

        Args:
            state: the service.
            time: seconds that all attempts together have.
            limits: what it counts in until its end.

        Returns:
            The limit that has no room for it, so that it must end; None if there is room.
        """
        self.state = state
        state.in_use += 1
        for limit in limits:
            if not state.circuit.enter(limit):
                self._entered = limits[: limits.index(limit)]
                return self._full(limit)
        self._entered = limits
        self.deadline = self.started + time
        self.most = state.policy.max_attempts
        return None

    def try_next(self, now: float) -> Pick | None:
        """The instance to try now; None if there is to be no other attempt."""
        state = self.state
        assert state is not None
        if self.plan is None:
            self.plan = state.plan()
        pick = self.next()
        if pick is not None:
            self._trying = True
            self.began = now
            statistics = state.statistics
            statistics.picks[self.tier, pick.reason or ""] += 1
            place = pick.instance.key[:2]
            # Without a call of Python's own: every request passes here.
            counts = statistics.instances.get(place)
            self._counts = counts = counts if counts is not None else statistics.instance(place)
            counts.attempts += 1
        return pick

    def may_wait(self) -> bool:
        """Whether the request could wait now, if it had to; False: as many as may already do."""
        state = self.state
        assert state is not None
        if state.circuit.has_room(Limit.WAITING):
            return True
        self._full(Limit.WAITING)
        return False

    def start_waiting(self, *, limited: bool = True) -> bool:
        """Note that the request waits, for an instance or a snapshot; False: as many as may already do.

        Wants a `stop_waiting`.

        Args:
            limited: it counts in the limit of those that wait: not for a snapshot.
        """
        state = self.state
        assert state is not None
        if limited:
            if not state.circuit.enter(Limit.WAITING):
                self._full(Limit.WAITING)
                return False
            self._entered = (*self._entered, Limit.WAITING)
        self._waiting = True
        state.statistics.connecting += 1
        return True

    def stop_waiting(self) -> None:
        """Note that the request waits no longer; without a wait this does nothing."""
        state = self.state
        if self._waiting and state is not None:
            self._waiting = False
            state.statistics.connecting -= 1
            if Limit.WAITING in self._entered:
                self._entered = tuple(each for each in self._entered if each is not Limit.WAITING)
                state.circuit.leave(Limit.WAITING)

    def enter_instance(self) -> None:
        """Note that the request is under way on the instance from now on (F3), until `leave_instance`."""
        if self._instance is None and self.state is not None and self.pick is not None:
            self._instance = self.pick.instance
            self.state.fitness.begin(self._instance)

    def leave_instance(self) -> None:
        """Note that the request is under way on the instance no longer; if it was not, this does nothing."""
        if self._instance is not None and self.state is not None:
            instance, self._instance = self._instance, None
            self.state.fitness.end(instance)

    def reached(self, at: float | None, *, by_socket: bool = False) -> None:
        """A connection was made to the instance (H1), which is not all that the attempt is for.

        Args:
            at: when; None: nobody knows, or it was there before.
            by_socket: it was made by the instance's Unix socket.
        """
        state, pick = self._tried
        state.statistics.unix_connects += by_socket
        if at is not None and self._counts is not None:
            taken = at - self.began
            state.statistics.connects[self.tier].add(taken)
            self._counts.connect.add(taken)
        state.fitness.connected(pick.instance, self.began)

    def connected(self, at: float, *, by_socket: bool = False) -> None:
        """A connection was made at that time, and that is the attempt; `by_socket` as `reached` has it."""
        self.reached(at, by_socket=by_socket)
        self.error = ""
        self._settle(AttemptOutcome.CONNECTED)

    def answered(self) -> None:
        """The instance gave an answer, or showed in another way that it works (H1)."""
        state, pick = self.state, self.pick
        assert state is not None
        assert pick is not None
        fitness = state.fitness
        if fitness.health.known or fitness.feedback.failures:  # else there is nothing to be told
            fitness.worked(pick.instance, self.began)
        self.error = ""
        if self._trying:
            self._trying = False
            state.statistics.attempts[self.tier, _ANSWERED] += 1
            if self._counts is not None:
                self._counts.worked += 1

    def attempt_failed(
        self,
        failure: Failure,
        now: float,
        word: str = "",
        *,
        errno: int = 0,
        sent: bool = False,
        idempotent: bool = True,
        held: bool = True,
        failed_at: float | None = None,
    ) -> Decision:
        """The attempt failed; what follows.

        Args:
            failure: how.
            now: by the clock of `started`.
            word: the same as the system has it; by default the failure's own.
            errno: the system's number for it; 0: it gave none.
            sent: see `Search.failed`, as for the next two.
            idempotent: by its method, or its Idempotency-Key.
            held: all of the body that was read from the client is still there to be sent again.
            failed_at: when it did, if that is not what is decided by.
        """
        self._note_failed(failure, word or failure, errno, now if failed_at is None else failed_at)
        return self.failed(failure, now, sent=sent, idempotent=idempotent, held=held)

    def drop_answer(
        self, now: float, budget: RetryBudget, status: int, *, sent: bool, idempotent: bool, held: bool
    ) -> bool:
        """Whether an answer with a status of `retry_on` is dropped, and the next instance tried (A3); the attempt is
        settled then. See `Search.replaces_answer`; `status` is the answer's."""
        state, _ = self._tried
        usable = len(state.picker) if state.picker is not None else 0
        if not self.replaces_answer(now, usable, budget, sent=sent, idempotent=idempotent, held=held):
            return False
        self._note_failed(Failure.STATUS, Failure.STATUS, 0, now, status)
        return True

    def abandoned(self, word: str = AttemptOutcome.ABANDONED) -> None:
        """The attempt was left before it came to anything: that says nothing of the instance.

        Args:
            word: how it is counted.
        """
        if self.state is not None and self.pick is not None:
            self._settle(word)
            self.state.fitness.abandoned(self.pick.instance)

    def fell_silent(self, word: str) -> None:
        """The connection that was made to the instance ended before a byte came on it: it fails as much as one that
        cannot be connected (H1).

        Args:
            word: how the connection ended.
        """
        state, pick = self._tried
        state.fitness.judge(pick.instance, Failure.NO_RESPONSE, word, self.began)

    def end_search(self) -> None:
        """No other instance is tried: let go of the plan, which holds a whole snapshot, and of a pick taken already."""
        following, self._following = self._following, None
        self.plan = None
        if following is not None and self.state is not None:
            # It may have been taken for a trial, which another request can have (H1).
            self.state.fitness.abandoned(following.instance)

    def end(self, outcome: Outcome, now: float | None = None, *, hold: bool = False) -> bool:
        """End the request, whatever its outcome: count it, tell of it, and give back all that it counts in; each once.

        Args:
            outcome: what it is counted as, unless it was counted before.
            now: when it ended, by the clock of `started`; None: nobody is told of it.
            hold: keep what it counts in, for another `end` to give back.

        Returns:
            Whether this is what it is counted as.
        """
        state, pick = self.state, self.pick
        first, self._counted = not self._counted, True
        if state is None:
            return first
        if first:
            if self._trying:
                self.abandoned()
            self.end_search()
            reason = (pick.reason or "") if pick is not None else ""
            # As RequestKey(...) does, without a call of Python's own: every request passes here.
            state.statistics.requests[tuple.__new__(RequestKey, (self.tier, reason, outcome))] += 1
            if now is not None:
                told = state.told
                failed = outcome not in _WELL or self.is_server_fault
                stumbled = failed or bool(self.failures)
                wanting = told.wanting(now, reason, stumbled) if told.followers else ()
                if stumbled or reason or wanting or log.tells_all:
                    told.add(self._ended(state, outcome, now, failed), wanting)
        if not (hold or self._released):
            self._released = True
            if self._instance is not None:
                self.leave_instance()
            if self._waiting:
                self.stop_waiting()
            for limit in self._entered:
                state.circuit.leave(limit)
            state.in_use -= 1
        return first

    def took(self, seconds: float) -> None:
        """Note how long the request took, from its beginning to its response's end."""
        if self.state is not None:
            self.state.statistics.responses[self.tier].add(seconds)
        if self.pick is not None and self._counts is not None:
            self._counts.response.add(seconds)

    def lasted(self, seconds: float) -> None:
        """Note how long the connection with an instance lasted that the request was for."""
        self._tried[0].statistics.durations[self.tier].add(seconds)

    @property
    def _tried(self) -> tuple[ServiceState, Pick]:
        assert self.state is not None
        assert self.pick is not None
        return self.state, self.pick

    def _full(self, limit: Limit) -> Limit:
        self.error = f"limit_{limit}"
        return limit

    def _ended(self, state: ServiceState, outcome: Outcome, now: float, failed: bool) -> EndedRequest:
        pick = self.pick
        return EndedRequest(
            state.key,
            self.peer,
            self.asked(),
            self.started,
            now - self.started,
            outcome,
            failed,
            self.tier,
            self.reason,
            self.error,
            pick.instance if pick is not None else None,
            self.attempts,
            kept_attempts(self.failures),
        )

    def _note_failed(self, failure: Failure, word: str, errno: int, now: float, status: int = 0) -> None:
        state, pick = self._tried
        self.error = word
        self._settle(word)
        if self.failures is None:
            self.failures = []
        self.failures.append(
            FailedAttempt(pick, self.attempts, self.tier, word, errno, self.began, now - self.began, status)
        )
        state.fitness.judge(pick.instance, failure, word, self.began)

    def _settle(self, word: str) -> None:
        if self._trying and self.state is not None:
            self._trying = False
            self.state.statistics.attempts[self.tier, word] += 1
            counts = self._counts
            if counts is None:
                return
            if word == AttemptOutcome.CONNECTED:
                counts.worked += 1
            else:
                counts.failures[word] += 1
