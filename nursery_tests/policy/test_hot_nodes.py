"""policy/hot_nodes: where callers outnumber the instances of their own node (L1)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy import model
from meshlocal.policy.hot_nodes import MOST, hot_nodes
from meshlocal.policy.model import Conditions, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.policy.steps import finish


def snapshot(service: str, nodes: Sequence[str], *, ready: bool = True, unknown: bool = False) -> ServiceSnapshot:
    instances = [
        make_instance("10.0.0.1", 1 + number, labels={"node": node} if node else {}, conditions=Conditions(ready=ready))
        for number, node in enumerate(nodes)
    ]
    return ServiceSnapshot(ServiceKey(service), "v", model.index(instances), unknown)


@pytest.mark.parametrize(
    ("callers", "snapshots", "hot"),
    [
        ([], [snapshot("b", ["n1"])], []),
        ([("n1", ["b"])], [snapshot("b", ["n1"])], []),
        ([("n1", ["b"])], [snapshot("b", ["n2"])], [("b", "n1", 1, 0)]),
        ([("n1", ["b"])], [snapshot("b", [])], [("b", "n1", 1, 0)]),
        ([("n1", ["b"])], [snapshot("b", ["n1"], ready=False)], [("b", "n1", 1, 0)]),
        ([("n1", ["b"])] * 3, [snapshot("b", ["n1", "n1"])], [("b", "n1", 3, 2)]),
        ([("", ["b"])], [snapshot("b", ["", "n2"])], []),
        ([("n1", ["zz"])], [snapshot("b", [])], []),
        ([("n1", ["zz"])], [snapshot("zz", [], unknown=True)], []),
        (
            [("n1", ["b", "c"])] * 2 + [("n2", ["c"])] * 5 + [("n3", ["b"])],
            [snapshot("b", ["n1"]), snapshot("c", ["n1", "n2"])],
            [("b", "n3", 1, 0), ("c", "n2", 5, 1), ("b", "n1", 2, 1), ("c", "n1", 2, 1)],
        ),
    ],
)
def test_hot_nodes(
    callers: list[tuple[str, list[ServiceKey]]], snapshots: list[ServiceSnapshot], hot: list[tuple[str, str, int, int]]
) -> None:
    """Without an instance first, then by callers for each instance; who does not know its node counts nowhere."""
    assert finish(hot_nodes(callers, snapshots)) == (hot, len(hot))


@given(
    st.lists(st.tuples(st.sampled_from(["", "n1", "n2"]), st.lists(st.sampled_from("bc"), unique=True)), max_size=8),
    st.lists(st.sampled_from(["", "n1", "n2"]), max_size=6),
)
def test_each_is_hot_for_a_reason(callers: list[tuple[str, list[ServiceKey]]], nodes: list[str]) -> None:
    found, total = finish(hot_nodes(callers, [snapshot("b", nodes)]))
    assert total == len(found)
    assert len({(each.service, each.node) for each in found}) == len(found)
    for each in found:
        assert each.callers == sum(node == each.node and "b" in services for node, services in callers)
        assert each.instances == nodes.count(each.node)
        assert each.node
        assert each.callers > each.instances


def test_so_many_are_named_and_the_others_counted() -> None:
    """The hottest of them, in order, whichever came first; and no step looks at more than a few."""
    callers = [(f"n{number}", [ServiceKey("b")]) for number in range(3 * MOST) for _ in range(1 + number % 7)]
    steps = hot_nodes(callers, [snapshot("b", [])])
    found, total = finish(steps)
    assert (len(found), total) == (MOST, 3 * MOST)
    assert [each.callers for each in found] == sorted((1 + number % 7 for number in range(3 * MOST)), reverse=True)[
        :MOST
    ]
