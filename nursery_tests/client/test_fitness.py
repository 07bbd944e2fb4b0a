"""What attempts show of a service as a whole: when discovery is asked again (D5)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from meshlocal.client.fitness import OWN_FAULTS, Fitness
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.health import Cause
from meshlocal.policy.model import ServiceKey, make_instance

B = ServiceKey("b")
ONE, OTHER = make_instance("10.0.0.1", 9000), make_instance("10.0.0.2", 9000)


def fitness(asked: list[ServiceKey], **ejection: Any) -> Fitness:
    made = Fitness(B, EjectionConfig(**ejection), None, random.Random(0))
    made.on_failing = asked.append
    return made


async def happen(to: Fitness, events: str) -> None:
    """Half a second after each other. In capitals: to the other instance."""
    for event in events.split():
        instance = ONE if event.islower() else OTHER
        match event.lower():
            case "refused":
                to.failed(instance, "refused")
            case "reset":
                to.failed(instance, "reset", Cause.RESET)
            case "connected":
                to.connected(instance)
            case "worked":
                to.worked(instance)
            case "abandoned":
                to.abandoned(instance)
            case _:
                raise AssertionError(event)
        await trio.sleep(0.5)


@pytest.mark.parametrize(
    ("events", "asks"),
    [
        ("refused refused refused", True),
        ("refused REFUSED refused", True),
        ("refused abandoned refused abandoned refused", True),
        ("reset reset reset", True),
        # What could be connected is not failing, but for one that resets what it accepts.
        ("refused refused connected refused refused", False),
        ("refused refused CONNECTED refused refused", False),
        ("reset connected reset connected reset connected", True),
        ("reset CONNECTED reset CONNECTED reset CONNECTED", False),
        ("RESET connected reset REFUSED connected refused", True),
        # What worked is not, whatever it did before.
        ("refused refused worked refused refused", False),
        ("reset connected worked reset connected worked reset", False),
        ("reset reset WORKED reset reset", False),
        # And a success is no more than that: what fails after it counts from then on.
        ("worked refused refused worked refused refused refused", True),
        ("connected refused refused connected refused refused refused", True),
    ],
)
async def test_discovery_is_asked_again_when_nothing_works(autojump_clock: MockClock, events: str, asks: bool) -> None:
    """D5."""
    asked: list[ServiceKey] = []
    await happen(fitness(asked), events)
    assert asked == [B] * asks


async def test_asking_again_needs_no_ejections(autojump_clock: MockClock) -> None:
    """D5, H1: they may be switched off."""
    asked: list[ServiceKey] = []
    made = fitness(asked, failures=None)
    await happen(made, "refused refused refused")
    assert asked == [B]
    assert made.gate() is None


@pytest.mark.parametrize("error", sorted(OWN_FAULTS))
async def test_what_this_host_has_run_out_of_is_no_failure(autojump_clock: MockClock, error: str) -> None:
    """H1, D5: neither of the instance nor of the service; and it is no verdict of a trial."""
    asked: list[ServiceKey] = []
    made = fitness(asked, failures=1)
    for _ in range(5):
        made.failed(ONE, error)
        await trio.sleep(1)
    assert made.health.quiet
    assert not asked
    made.failed(ONE, "refused")
    await trio.sleep(6)
    assert made.health.claim(ONE.key[:2], trio.current_time())
    made.failed(ONE, error)
    assert made.health.is_due(ONE.key[:2], trio.current_time())
