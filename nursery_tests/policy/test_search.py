"""The search for an instance, as a machine: what is tried next, and when nothing is (A1 to A6, O1)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.model import make_instance
from meshlocal.policy.picker import Pick
from meshlocal.policy.retry import Decision, Failure, RetryBudget, decide
from meshlocal.policy.search import Search, Why


class Row:
    """A walk over so many instances, the first on the node."""

    tiers = ("node", "other")

    def __init__(self, size: int) -> None:
        self._picks: Iterator[Pick] = (
            Pick(make_instance("10.0.0.1", 1 + number), min(number, 1), None) for number in range(size)
        )
        self.taken = 0

    def next(self) -> Pick | None:
        pick = next(self._picks, None)
        self.taken += pick is not None
        return pick


def row_of(size: int) -> Any:
    """What looks like a walk to a search."""
    return Row(size)


def search(size: int = 3, *, most: int | None = None, deadline: float = 10.0) -> Search:
    return Search(deadline, most, row_of(size))


def refuse(machine: Search, now: float = 0.0) -> Decision:
    return machine.failed(Failure.CONNECT, now, sent=False, idempotent=False, held=True)


def test_it_goes_on_to_the_plans_end() -> None:
    """A2, A6, O1: each instance once, in the plan's order."""
    machine = search(3)
    ports, tiers = [], []
    while (pick := machine.next()) is not None:
        ports.append(pick.instance.key.port)
        tiers.append(machine.tier)
        assert machine.pick is pick
        assert refuse(machine) is (Decision.NEXT if len(ports) < 3 else Decision.ANSWER)
    assert (ports, tiers, machine.attempts) == ([1, 2, 3], ["node", "other", "other"], 3)
    assert machine.why(0.0) is Why.FAILED


def test_without_an_instance() -> None:
    """A6, A7: also while no plan is there."""
    for machine in (search(0), Search(10.0, None)):
        assert machine.next() is None
        assert (machine.pick, machine.tier, machine.attempts) == (None, "", 0)
        assert machine.why(9.9) is Why.NO_INSTANCE
        assert machine.why(10.0) is Why.DEADLINE


def test_a_plan_that_comes_later() -> None:
    """A7."""
    machine = Search(10.0, None)
    assert machine.next() is None
    machine.plan = row_of(1)
    assert machine.next() is not None


def test_no_more_attempts_than_may_be() -> None:
    """A1."""
    machine = search(5, most=2)
    machine.next()
    assert refuse(machine) is Decision.NEXT
    machine.next()
    assert refuse(machine) is Decision.ANSWER
    assert machine.next() is None
    assert machine.why(0.0) is Why.FAILED


def test_none_after_the_deadline() -> None:
    """A1: the deadline may be moved meanwhile, as by a body that is waited for."""
    machine = search(5, deadline=1.0)
    machine.next()
    machine.deadline = 2.0
    assert refuse(machine, 1.9) is Decision.NEXT
    machine.next()
    assert refuse(machine, 2.0) is Decision.ANSWER
    assert machine.why(2.0) is Why.DEADLINE


def test_the_same_instance_on_a_fresh_connection_is_no_new_attempt() -> None:
    """A4."""
    machine = search(2)
    first = machine.next()
    assert machine.failed(Failure.STALE, 0.0, sent=True, idempotent=True, held=True) is Decision.SAME
    assert (machine.pick, machine.attempts) == (first, 1)
    assert refuse(machine) is Decision.NEXT


CASES = list(itertools.product(Failure, (False, True), (False, True), (False, True)))


@pytest.mark.parametrize(("failure", "sent", "idempotent", "held"), CASES)
def test_what_follows_is_what_the_table_says(failure: Failure, sent: bool, idempotent: bool, held: bool) -> None:
    """A3: and nothing is taken of the plan unless it goes on."""
    row = row_of(2)
    machine = Search(10.0, None, row)
    machine.next()
    expected = decide(failure, sent=sent, idempotent=idempotent, held=held)
    assert machine.failed(failure, 0.0, sent=sent, idempotent=idempotent, held=held) is expected
    assert row.taken == 1 + (expected is Decision.NEXT)
    assert (machine.next() is not None) == (expected is Decision.NEXT)


def test_an_answer_is_dropped_only_if_there_is_an_instance_to_ask_instead() -> None:
    """A3: and while the budget allows it, and the request may be repeated."""

    def dropped(machine: Search, *, usable: int = 3, floor: int = 1, now: float = 0.0, idempotent: bool = True) -> bool:
        budget = RetryBudget(0.0, floor)
        return machine.replaces_answer(now, usable, budget, sent=True, idempotent=idempotent, held=True)

    for size, arguments, expected in (
        (2, {}, True),
        (1, {}, False),
        (2, {"usable": 1}, False),
        (2, {"floor": 0}, False),
        (2, {"now": 10.0}, False),
        (2, {"idempotent": False}, False),
    ):
        machine = search(size)
        machine.next()
        assert dropped(machine, **arguments) is expected, (size, arguments)
        assert (machine.next() is not None) is expected


def test_a_refusal_by_the_budget_is_counted() -> None:
    machine, budget = search(3), RetryBudget(0.0, 0)
    machine.next()
    assert not machine.replaces_answer(0.0, 3, budget, sent=True, idempotent=True, held=True)
    assert budget.refused == 1


@given(
    st.integers(0, 6),
    st.none() | st.integers(1, 6),
    st.lists(st.tuples(st.sampled_from(Failure), st.booleans(), st.booleans(), st.booleans(), st.floats(0, 3))),
)
def test_whatever_fails_it_ends(
    size: int, most: int | None, failures: list[tuple[Failure, bool, bool, bool, float]]
) -> None:
    """A1, O1: no instance twice, no more than may be, none after an answer or the deadline."""
    machine, now = search(size, most=most), 0.0
    seen: list[int] = []
    decision = Decision.NEXT
    for failure, sent, idempotent, held, later in failures:
        if decision is not Decision.SAME:
            pick = machine.next()
            assert (pick is not None) == (decision is Decision.NEXT and bool(seen or size))
            if pick is None:
                break
            seen.append(pick.instance.key.port)
        now += later
        decision = machine.failed(failure, now, sent=sent, idempotent=idempotent, held=held)
        assert decision is not Decision.NEXT or now < machine.deadline
    assert len(seen) == len(set(seen)) <= min(size, most or size)
