"""The worked examples of docs/algorithm.md are what the picker does (L2, L3, L4, L6, O1, O2, O3)."""

from __future__ import annotations

import pytest

from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import Conditions, Instance, ServiceKey, ServiceSnapshot, diff, index, make_instance
from meshlocal.policy.picker import Cursors, Picker
from nursery_tests.docs.pages import Block, blocks

EXAMPLES = [block for block in blocks("docs/algorithm.md") if block.text.startswith("proxy")]


class First:
    """Every rotation begins with the first instance."""

    def randrange(self, stop: int) -> int:
        return 0


class World:
    """Runs an example line by line."""

    def __init__(self, labels: dict[str, str], prefer: tuple[str, ...], within: str | None) -> None:
        self.selector = Selector(Locality(labels, prefer, within))
        self.cursors = Cursors(First())
        self.names: dict[str, str] = {}
        self.instances: dict[str, Instance] = {}
        self.down: set[str] = set()
        self.picker = Picker.build(self.selector, self.snapshot())

    def snapshot(self) -> ServiceSnapshot:
        return ServiceSnapshot(ServiceKey("b"), str(len(self.names)), index(self.instances.values()))

    def change(self, words: list[str], *, remove: bool = False) -> None:
        for word in words:
            if remove:
                del self.instances[word]
                continue
            name, colon, place = word.removesuffix("!").partition(":")
            labels = dict(zip(("node", "zone"), place.split("/"), strict=False)) if colon else {}
            conditions = Conditions(ready=False, terminating=True) if word.endswith("!") else Conditions()
            # Addresses in the order of names, as the rotation goes by them.
            address = f"10.0.{100 + ord(name[0]) - ord('a')}.{int(name[1:] or 0)}"
            self.instances[name] = make_instance(address, 80, labels=labels, conditions=conditions)
            self.names[address] = name
        snapshot = self.snapshot()
        self.picker = self.picker.updated(snapshot, diff(self.picker.snapshot, snapshot))

    def request(self) -> str:
        plan, told, tier = self.picker.plan(self.cursors), [], 0
        reason, last_resort = "", False
        while (pick := plan.next()) is not None:
            name = self.names[pick.instance.key.address]
            told += ["|"] if pick.last_resort > last_resort else ["|"] * (pick.tier - tier)
            tier, reason, last_resort = pick.tier, pick.reason or "", pick.last_resort
            told.append(name + ("✗" if name in self.down else "✓"))
            if name not in self.down:
                break
        return " ".join([*told, *([reason] if reason else [])])


@pytest.mark.parametrize("block", EXAMPLES, ids=str)
def test_the_picker_does_what_the_example_shows(block: Block) -> None:
    lines = [line.split() for line in block.text.splitlines()]
    given = dict(word.split("=") for word in lines[0][1:])
    prefer, within = tuple(given.pop("prefer", "node").split(",")), given.pop("within", None)
    world = World(given, prefer, within)
    requests = 0
    for number, (verb, *words) in enumerate(lines[1:], block.line + 2):
        match verb:
            case "instances" | "add":
                world.change(words)
            case "remove":
                world.change(words, remove=True)
            case "down":
                world.down.update(words)
            case "up":
                world.down.difference_update(words)
            case "request":
                requests += 1
                assert world.request() == " ".join(words), f"{block.page}:{number}"
            case _:
                pytest.fail(f"{block.page}:{number}: {verb}")
    assert requests


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 10
