"""Ejection, trials and checks as a state machine (H1, H3)."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.health import Cause, Health, State

A = ("10.0.0.1", 9000)
C = ("10.0.0.2", 9000)


class Level:
    """A random source without any jitter."""

    def uniform(self, a: float, b: float, /) -> float:
        return (a + b) / 2


def health(**policy: Any) -> Health:
    return Health(EjectionConfig(**policy), Level())


def ejected(of: Health, now: float = 0.0) -> Health:
    while of.failed(A, now) is None:
        pass
    return of


def in_state(state: State, cause: Cause = Cause.CONNECT) -> Health:
    made = health()
    if state in (State.EJECTED, State.TRIAL):
        for _ in range(3):
            made.failed(A, 0.0, cause)
    if state is State.TRIAL:
        assert made.claim(A, 5.0)
    if state is State.FAILING:
        made.checks_failed(A)
    assert made.standing(A, 5.0).state is state
    return made


def test_the_third_failure_in_a_row_ejects_for_five_seconds() -> None:
    """H1."""
    made = health()
    assert [made.failed(A, 1.0), made.failed(A, 2.0)] == [None, None]
    assert made.is_admitted(A)
    assert made.failed(A, 3.0) == pytest.approx(5.0)
    assert not made.is_admitted(A)
    assert made.is_admitted(C)
    standing = made.standing(A, 4.0)
    assert standing == (State.EJECTED, Cause.CONNECT, 0, standing[3], 1)
    assert standing[3] == pytest.approx(4.0)


def test_a_success_between_failures_starts_the_count_anew() -> None:
    """H1: in a row."""
    made = health()
    for _ in range(10):
        made.failed(A, 0.0)
        made.failed(A, 0.0)
        made.succeeded(A, 0.0)
    assert made.is_admitted(A)
    assert made.quiet


@pytest.mark.parametrize(
    ("state", "event", "after"),
    [
        (State.ADMITTED, "failed", State.ADMITTED),
        (State.ADMITTED, "succeeded", State.ADMITTED),
        (State.ADMITTED, "abandoned", State.ADMITTED),
        (State.ADMITTED, "claim", State.ADMITTED),
        (State.ADMITTED, "checks_failed", State.FAILING),
        (State.ADMITTED, "check_passed", State.ADMITTED),
        (State.EJECTED, "failed", State.EJECTED),
        (State.EJECTED, "succeeded", State.ADMITTED),
        (State.EJECTED, "abandoned", State.EJECTED),
        (State.EJECTED, "claim", State.TRIAL),
        (State.EJECTED, "checks_failed", State.FAILING),
        (State.EJECTED, "check_passed", State.ADMITTED),
        (State.TRIAL, "failed", State.EJECTED),
        (State.TRIAL, "succeeded", State.ADMITTED),
        (State.TRIAL, "abandoned", State.EJECTED),
        (State.TRIAL, "claim", State.TRIAL),
        (State.TRIAL, "checks_failed", State.FAILING),
        (State.TRIAL, "check_passed", State.ADMITTED),
        (State.FAILING, "failed", State.FAILING),
        (State.FAILING, "succeeded", State.FAILING),
        (State.FAILING, "abandoned", State.FAILING),
        (State.FAILING, "claim", State.FAILING),
        (State.FAILING, "checks_failed", State.FAILING),
        (State.FAILING, "check_passed", State.ADMITTED),
    ],
)
def test_the_table_of_the_modules_header(state: State, event: str, after: State) -> None:
    """H1, H3: each cell."""
    made = in_state(state)
    arguments = (A,) if event == "checks_failed" else (A, 5.0)
    getattr(made, event)(*arguments)
    assert made.standing(A, 5.0).state is after
    assert made.is_admitted(A) == (after is State.ADMITTED)


def test_ejections_double_up_to_the_maximum_while_trials_fail() -> None:
    """H1."""
    made = health()
    now, lasts = 0.0, []
    lasted = None
    for _ in range(3):
        lasted = made.failed(A, now)
    for _ in range(6):
        assert lasted is not None
        lasts.append(lasted)
        now += lasted
        assert made.claim(A, now)
        lasted = made.failed(A, now)
    assert lasts == pytest.approx([5, 10, 20, 40, 60, 60])


def test_an_instance_away_for_ever_overflows_nothing() -> None:
    """H1."""
    made = ejected(health())
    now = 0.0
    for _ in range(2000):
        now += 1000
        made.claim(A, now)
        assert made.failed(A, now) is not None
    assert made.standing(A, now).left == pytest.approx(60)


def test_only_one_request_makes_the_trial() -> None:
    """H1."""
    made = ejected(health())
    assert [made.claim(A, now) for now in (0.0, 4.9, 5.0, 5.0, 9.0)] == [False, False, True, False, False]


def test_a_trial_without_a_verdict_passes_to_the_next_request() -> None:
    """H1, A8: its client left, or nobody heard of it again."""
    made = ejected(health())
    assert made.claim(A, 5.0)
    made.abandoned(A, 5.5)
    assert made.claim(A, 5.5)
    assert not made.claim(A, 10.4)
    assert made.claim(A, 10.5)


def test_doubling_starts_anew_after_a_time_of_health() -> None:
    """H1: an instance that flaps is ejected longer and longer, one that was well again is not."""
    made = ejected(health())
    made.succeeded(A, 5.0)
    flapped = [made.failed(A, 6.0) for _ in range(3)][-1]
    assert flapped == pytest.approx(10)
    made.claim(A, 16.0)
    made.succeeded(A, 16.0)
    made.succeeded(A, 27.0)
    assert made.quiet
    assert [made.failed(A, 27.0) for _ in range(3)][-1] == pytest.approx(5)


def test_doubling_starts_anew_also_for_an_instance_that_nobody_used_meanwhile() -> None:
    """H1."""
    made = ejected(health())
    made.succeeded(A, 5.0)
    assert [made.failed(A, 1000.0) for _ in range(3)][-1] == pytest.approx(5)


@given(st.integers(0, 2**32))
def test_jitter_is_a_tenth_either_way(seed: int) -> None:
    """H1."""
    made = Health(EjectionConfig(failures=1), random.Random(seed))
    lasts = made.failed(A, 0.0)
    assert lasts is not None
    assert 4.5 <= lasts <= 5.5


def test_a_thousand_proxies_do_not_return_to_an_instance_at_once() -> None:
    """H1: all lost it at the same moment."""
    ends = [Health(EjectionConfig(failures=1), random.Random(seed)).failed(A, 0.0) or 0.0 for seed in range(1000)]
    busiest = max(sum(tenth / 10 <= each < (tenth + 1) / 10 for each in ends) for tenth in range(40, 60))
    assert busiest < 200


def test_an_ejection_is_over_when_it_was_said_to_be() -> None:
    """H1: its jitter included."""
    for seed in range(20):
        made = Health(EjectionConfig(failures=1), random.Random(seed))
        lasts = made.failed(A, 100.0)
        assert lasts is not None
        assert made.standing(A, 100.0).left == pytest.approx(lasts)
        assert not made.is_due(A, 100.0 + lasts - 0.001)
        assert made.is_due(A, 100.0 + lasts + 0.001)


def test_without_a_limit_nothing_is_ejected_by_requests() -> None:
    """H1: failures: null."""
    made = health(failures=None)
    for _ in range(100):
        assert made.failed(A, 0.0) is None
    assert made.quiet


@pytest.mark.parametrize("by_check", [False, True])
@pytest.mark.parametrize("state", [State.ADMITTED, State.EJECTED, State.TRIAL])
def test_a_connect_is_no_success_where_connections_are_reset(state: State, by_check: bool) -> None:
    """H1: an instance that resets what it accepts is ejected, though it can be connected every time."""
    made = in_state(state, Cause.RESET)
    if state is State.ADMITTED:
        made.failed(A, 0.0, Cause.RESET)
    before = made.standing(A, 5.0)
    if by_check:
        assert not made.check_passed(A, 5.0, shallow=True)
    else:
        assert not made.succeeded(A, 5.0, shallow=True)
    assert made.is_doubted(A)
    assert made.standing(A, 5.0) == before
    made.succeeded(A, 5.0)
    assert made.is_admitted(A)
    assert not made.is_doubted(A)


def test_a_connect_is_a_success_where_connects_failed() -> None:
    """H1."""
    made = in_state(State.TRIAL)
    assert made.succeeded(A, 5.0, shallow=True)
    assert made.is_admitted(A)


def test_instances_that_are_gone_are_forgotten() -> None:
    """H1: and one that stays keeps its state, whatever snapshots come."""
    made = ejected(health())
    made.checks_failed(C)
    made.retain({A})
    assert not made.is_admitted(A)
    assert made.is_admitted(C)
    made.retain(set())
    assert made.quiet
    assert not len(made)


def test_checks_that_end_readmit_what_they_found_failing() -> None:
    """H3, S2: a reload that drops the checks must not leave their verdicts behind."""
    made = ejected(health())
    made.checks_failed(C)
    made.unchecked(1.0)
    assert made.is_admitted(C)
    assert not made.is_admitted(A)


class Ejections(RuleBasedStateMachine):
    """Whatever happens, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.health = Health(EjectionConfig(), random.Random(0))
        self.now = 0.0
        self.in_a_row = 0
        self.trials = 0
        self.trial_began = 0.0

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 5.5, 70.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(cause=st.sampled_from([Cause.CONNECT, Cause.RESET]))
    def failed(self, cause: Cause) -> None:
        was = self.health.standing(A, self.now)
        lasts = self.health.failed(A, self.now, cause)
        self.in_a_row += 1
        self.trials = 0
        if was.state is State.ADMITTED and self.in_a_row >= 3:
            assert lasts is not None
        if lasts is not None:
            assert was.state in (State.ADMITTED, State.TRIAL)
            assert 4.5 <= lasts <= 66.0
            assert not self.health.is_due(A, self.now)

    @rule(shallow=st.booleans())
    def succeeded(self, shallow: bool) -> None:
        counts = not (shallow and self.health.is_doubted(A))
        was = self.health.standing(A, self.now).state
        self.health.succeeded(A, self.now, shallow=shallow)
        if counts and was is not State.FAILING:
            self.in_a_row = self.trials = 0
            assert self.health.is_admitted(A)

    @rule()
    def claim(self) -> None:
        if self.health.claim(A, self.now):
            assert not self.trials or self.now - self.trial_began >= 5.0
            self.trials, self.trial_began = 1, self.now

    @rule()
    def abandoned(self) -> None:
        self.health.abandoned(A, self.now)
        self.trials = 0

    @rule()
    def checks_failed(self) -> None:
        self.health.checks_failed(A)
        self.in_a_row = self.trials = 0
        assert not self.health.is_admitted(A)
        assert not self.health.claim(A, self.now)

    @rule()
    def check_passed(self) -> None:
        self.health.check_passed(A, self.now)
        assert self.health.is_admitted(A)
        if self.health.standing(A, self.now).failures == 0:
            self.in_a_row = 0
        self.trials = 0

    @rule(stays=st.booleans())
    def snapshot(self, stays: bool) -> None:
        self.health.retain({A} if stays else set())
        if not stays:
            assert self.health.quiet
            self.in_a_row = self.trials = 0

    @invariant()
    def only_one_instance_is_known(self) -> None:
        assert len(self.health) == (not self.health.is_admitted(A))
        assert self.health.is_admitted(C)
        standing = self.health.standing(A, self.now)
        assert (standing.state is State.ADMITTED) == self.health.is_admitted(A)
        assert standing.failures <= 2


TestEjections = Ejections.TestCase


def test_what_an_older_attempt_shows_readmits_nobody_and_ejects_nobody() -> None:
    """H1: an attempt speaks of its instance as it was when the attempt began."""
    made = ejected(health(), 10.0)
    assert not made.succeeded(A, 11.0, began=9.9)
    assert not made.succeeded(A, 11.0, shallow=True, began=9.9)
    assert made.standing(A, 11.0).state is State.EJECTED
    # One that began since shows what it is now, trial or not.
    assert made.succeeded(A, 12.0, began=11.0)
    # And failures of before that say nothing of it any more.
    for _ in range(10):
        assert made.failed(A, 13.0, began=11.9) is None
    assert made.is_admitted(A)
    assert [made.failed(A, 13.0, began=12.5) for _ in range(3)][-1] is not None


def test_an_older_answer_does_not_double_the_ejection() -> None:
    """H1: it was readmitted by an answer on an older connection, and ejected at once for twice the time."""
    made = ejected(health(), 10.0)
    made.succeeded(A, 10.1, began=9.0)
    for _ in range(5):
        made.failed(A, 10.2, began=10.15)
    standing = made.standing(A, 10.3)
    assert standing == (State.EJECTED, Cause.CONNECT, 0, standing[3], 1)
    assert standing[3] == pytest.approx(4.7)


@pytest.mark.parametrize("state", list(State))
def test_an_instance_that_misbehaves_is_ejected_at_the_first_time(state: State) -> None:
    """H1: unless it is already, or fails its checks."""
    made = in_state(state)
    before = made.standing(A, 5.0)
    seconds = made.misbehaved(A, 5.0)
    if state in (State.ADMITTED, State.TRIAL):
        assert seconds is not None
        assert (made.standing(A, 5.0).state, made.standing(A, 5.0).cause) == (State.EJECTED, Cause.PROTOCOL)
        assert made.total[Cause.PROTOCOL] == 1
        assert made.succeeded(A, 5.0 + seconds, began=5.0 + seconds)
    else:
        assert seconds is None
        assert made.standing(A, 5.0) == before


def test_nothing_is_ejected_where_nothing_may_be() -> None:
    assert health(failures=None).misbehaved(A, 0.0) is None


@pytest.mark.parametrize("state", list(State))
def test_an_instance_that_is_ready_again_is_tried_at_once(state: State) -> None:
    """F1: what was ejected, by the next request; checks have their own say (H3)."""
    made = in_state(state)
    made.ready_again(A, 6.0)
    assert made.is_due(A, 6.0) == (state in (State.EJECTED, State.TRIAL))
    assert made.claim(A, 6.0) == (state in (State.EJECTED, State.TRIAL))


def test_that_it_can_be_connected_proves_nothing_against_answers_out_of_turn() -> None:
    """H1: neither by a late connect nor by a tcp check."""
    made = health()
    assert made.misbehaved(A, 5.0) is not None
    assert made.is_doubted(A)
    assert not made.succeeded(A, 6.0, shallow=True)
    assert not made.check_passed(A, 6.0, shallow=True)
    assert made.standing(A, 6.0).state is State.EJECTED
    assert made.succeeded(A, 6.0)


def test_a_trial_from_before_it_was_ready_again_does_not_eject_it_anew() -> None:
    """F1, H1."""
    made = in_state(State.TRIAL)
    made.ready_again(A, 6.0)
    assert made.claim(A, 6.1)
    assert made.failed(A, 6.2, began=5.0) is None
    assert made.standing(A, 6.2).state is State.TRIAL
    assert made.succeeded(A, 6.3, began=6.1)
