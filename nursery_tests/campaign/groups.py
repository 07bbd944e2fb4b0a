"""Which faults are tried on which fleet, and the trying."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import trio

from nursery_tests.campaign import faults_discovery, faults_instances
from nursery_tests.campaign.campaign import Fault, Row, try_fault
from nursery_tests.campaign.fleet import LOCAL, Fleet
from nursery_tests.campaign.load import WORKERS, Load
from nursery_tests.e2e.running import Place, Processes

SEED = 4


class Group(NamedTuple):
    """Faults that one fleet after another bears.

    Attributes:
        faults: in this order.
        options: of the fleet.
        kinds: of load.
    """

    faults: Sequence[Fault]
    options: Mapping[str, Any] = MappingProxyType({})
    kinds: Collection[str] = tuple(WORKERS)


GROUPS = {
    "instances": Group(faults_instances.FAULTS),
    "discovery": Group(faults_discovery.FAULTS),
    "start": Group(faults_discovery.AT_START),
    "start-cache": Group(faults_discovery.AT_START_WITH_CACHE, {"cache": True}),
}


async def try_group(group: Group, folder: Path, seconds: float, only: str = "", seed: int = SEED) -> list[Row]:
    """Try a group's faults, or those whose names contain `only`, each for so many seconds."""
    faults = [fault for fault in group.faults if only in fault.name]
    rows: list[Row] = []
    if not faults:
        return rows
    rng = random.Random(seed)
    async with trio.open_nursery() as nursery:
        place = Place()
        fleet = Fleet(Processes(nursery, folder), place, **group.options)
        await fleet.start()
        load = Load(fleet.target, place.connect, group.kinds)
        nursery.start_soon(load.run)
        await load.home(LOCAL)
        await load.more(20)
        for fault in faults:
            row = await try_fault(fault, fleet, load, seconds, rng)
            rows.append(row)
        nursery.cancel_scope.cancel()
    return rows
