"""The campaign's own judgement: what was not said beforehand is a failure of it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from nursery_tests.campaign.campaign import BROKEN, Fault, Row, Scene, _judge
from nursery_tests.campaign.load import WORKERS, Failure, Load, Target
from nursery_tests.campaign.report import BEGIN, END, put, table


async def _nowhere(host: str, port: int) -> Any:
    raise AssertionError("nothing is sent here")


@pytest.fixture
def scene() -> Scene:
    no_fleet: Any = None
    return Scene(no_fleet, Load(Target("", {}), _nowhere), 1.0, random.Random(1))


def fail(scene: Scene, kind: str, how: str, times: int, began: float = 1.0) -> None:
    scene.load.failures += [Failure(began + 0.1, kind, how, began)] * times


def test_what_is_allowed_may_fail_so_often_and_no_more(scene: Scene) -> None:
    scene.allow("tcp held", BROKEN, 2, "were under way")
    fail(scene, "tcp", "reset", 1)
    fail(scene, "held", "ended", 1)
    assert _judge(scene, 5.0, []) == []
    fail(scene, "tcp", "cut", 1)
    assert _judge(scene, 5.0, []) == ["1 requests of tcp failed that must not: cut"]


@pytest.mark.parametrize(("kind", "how"), [("get", "reset"), ("tcp", "timeout"), ("tcp", "wrong")])
def test_nothing_else_may_fail(scene: Scene, kind: str, how: str) -> None:
    scene.allow("tcp", BROKEN, 100, "were under way")
    fail(scene, kind, how, 1)
    assert _judge(scene, 5.0, []) == [f"1 requests of {kind} failed that must not: {how}"]


def test_once_it_is_over_nothing_may_fail(scene: Scene) -> None:
    scene.allow("tcp", BROKEN, 100, "were under way")
    fail(scene, "tcp", "reset", 1, began=6.0)
    assert _judge(scene, 5.0, []) == ["after it was over, requests failed: {('tcp', 'reset'): 1}"]


def test_posts_come_once(scene: Scene) -> None:
    """A3."""
    scene.load.done = ["post1", "post2"]
    assert _judge(scene, 5.0, ["post1", "post2", "post3"]) == []
    assert _judge(scene, 5.0, ["post1", "post2", "post2"]) == [
        "POSTs or calls came to instances more than once: ['post2']"
    ]
    assert _judge(scene, 5.0, ["post1"]) == ["POSTs or calls were answered that no instance got: ['post2']"]


def test_connections_are_kept_unless_the_proxy_is_stopped(scene: Scene) -> None:
    scene.load.tallies["get"].resent = 2
    assert _judge(scene, 5.0, []) == ["the proxy ended 2 kept-alive connections"]
    scene.may_resend = True
    assert _judge(scene, 5.0, []) == []


async def _nothing(scene: Scene) -> None:
    return


def test_the_table_goes_between_its_marks() -> None:
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in WORKERS}
    counts["tcp"]["reset"] = 2
    row = Row(
        Fault("a fault", "what holds", _nothing),
        sent=dict.fromkeys(counts, 600),
        failed=counts,
        worst=dict.fromkeys(counts, 0.0125),
        tasks=0,
        descriptors=1,
        memory=2**20,
        problems=[],
    )
    text = table([row])
    twice, once = "1,200 sent, 0 failed; 12 ms", "600 sent, 0 failed; 12 ms"
    cells = f"1,200 sent, 2 failed (2 reset); 12 ms | {once} | {twice} | {once} | {once}"
    assert f"| a fault | what holds | {cells} | 0 | 1 | +1.0 MB |" in text
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert put(document, text) == f"before\n{BEGIN}\n\n{text}\n{END}\nafter\n"
    with pytest.raises(ValueError, match="has no"):
        put("without marks", text)
