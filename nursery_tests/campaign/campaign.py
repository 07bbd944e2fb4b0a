"""How one fault is tried: under load, with what may fail said in advance, and nothing left behind."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import trio

from nursery_tests.campaign.fleet import LOCAL, Fleet
from nursery_tests.campaign.load import LIMIT, WORKERS, Load

AFTER = 10
"""Requests of each kind, after a fault is over, of which none may fail."""

MEMORY = 32 * 2**20
"""Bytes that the proxy may have more after a fault than before."""

BROKEN = ("reset", "ended", "cut")
"""How a tcp request fails whose instance failed after it was connected (A5)."""

LOST = ("unavailable", "cut", "reset")
"""How a call fails whose instance failed after it got it: before anything came back, or behind half of a message."""


class Allowance(NamedTuple):
    kinds: Collection[str]
    hows: Collection[str]
    most: float
    why: str


class Scene:
    """What a fault has at hand.

    Attributes:
        fleet: what it is done to.
        load: what goes on meanwhile.
        seconds: how long it is to last.
        rng: seeded.
        may_resend: the proxy ends kept-alive connections: clients may send requests again that never reached it.
    """

    def __init__(self, fleet: Fleet, load: Load, seconds: float, rng: random.Random) -> None:
        self.fleet = fleet
        self.load = load
        self.seconds = seconds
        self.rng = rng
        self.may_resend = False
        self.allowances: list[Allowance] = []

    def allow(self, kinds: str, hows: Iterable[str] | str, most: float, why: str) -> None:
        """Let requests of these kinds (separated by blanks) fail in these ways, so many at most."""
        self.allowances.append(
            Allowance(kinds.split(), hows.split() if isinstance(hows, str) else list(hows), most, why)
        )

    def allow_under_way(self, kinds: str, hows: Iterable[str] | str, times: int = 1) -> None:
        """Let what is under way at a moment fail, for so many such moments."""
        most = times * sum(WORKERS[kind] for kind in kinds.split())
        self.allow(kinds, hows, most, "were under way when it happened")

    async def hold(self, share: float = 1.0) -> None:
        """Let the load go on for as long as the fault is to last, or for a share of it."""
        await trio.sleep(self.seconds * share)


class Fault(NamedTuple):
    """One line of the table.

    Attributes:
        name: in a few words.
        holds: what must hold, in a few more.
        run: does it, lets the load go on, and undoes it.
    """

    name: str
    holds: str
    run: Callable[[Scene], Awaitable[None]]


class Row(NamedTuple):
    """What came of a fault."""

    fault: Fault
    sent: dict[str, int]
    failed: dict[str, Counter[str]]
    worst: dict[str, float]
    tasks: int
    descriptors: int
    memory: int
    problems: list[str]


async def try_fault(fault: Fault, fleet: Fleet, load: Load, seconds: float, rng: random.Random) -> Row:
    """Try a fault; `problems` of the row says what did not hold."""
    async with load.paused():
        before = await fleet.taken()
        known = len(fleet.executed())
        load.restart()
    scene = Scene(fleet, load, seconds, rng)
    problems: list[str] = []
    with trio.move_on_after(seconds * 4 + 6 * LIMIT) as limit:
        try:
            await fault.run(scene)
            await load.home(LOCAL)
        except* AssertionError as errors:
            problems += [str(error)[:3000] for error in _leaves(errors)]
        over = trio.current_time()
        await load.more(AFTER)
    if limit.cancelled_caught:
        problems.append("it does not come to an end")
    async with load.paused():
        problems += _judge(scene, over, fleet.executed()[known:])
        after = await fleet.settled(before)
    row = Row(
        fault,
        {kind: tally.sent for kind, tally in load.tallies.items()},
        {kind: tally.failed for kind, tally in load.tallies.items()},
        {kind: tally.worst for kind, tally in load.tallies.items()},
        max(after.tasks - before.tasks, 0),
        max(after.descriptors - before.descriptors, 0),
        after.memory - before.memory,
        problems,
    )
    if row.tasks or row.descriptors:
        problems.append(f"left behind: {row.tasks} tasks, {row.descriptors} descriptors")
    if row.memory > MEMORY:
        problems.append(f"{row.memory} bytes more are in use")
    return row


def _leaves(errors: BaseExceptionGroup[AssertionError]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _judge(scene: Scene, over: float, executed: list[str]) -> list[str]:
    load = scene.load
    problems = []
    left = list(load.failures)
    for allowance in scene.allowances:
        fit = [each for each in left if each.kind in allowance.kinds and each.how in allowance.hows]
        fit = fit if math.isinf(allowance.most) else fit[: int(allowance.most)]
        left = [each for each in left if each not in fit]
    for (kind, how), count in Counter((each.kind, each.how) for each in left).items():
        problems.append(f"{count} requests of {kind} failed that must not: {how}")
    if late := Counter((each.kind, each.how) for each in load.failures if each.began >= over):
        problems.append(f"after it was over, requests failed: {dict(late)}")
    if twice := [id for id, count in Counter(executed).items() if count > 1]:
        problems.append(f"POSTs or calls came to instances more than once: {twice[:5]}")
    if lost := set(load.done) - set(executed):
        problems.append(f"POSTs or calls were answered that no instance got: {sorted(lost)[:5]}")
    resent = sum(tally.resent for tally in load.tallies.values())
    if resent and not scene.may_resend:
        problems.append(f"the proxy ended {resent} kept-alive connections")
    return problems
