"""discovery/etcd/table: of two states of a key the newer counts, in whatever order they come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshlocal.discovery.etcd.table import EtcdTable
from meshlocal.policy.model import Instance, ServiceKey, make_instance
from meshlocal.wire.etcd_keys import InstanceKey

B, C = ServiceKey("b"), ServiceKey("c")


def instance(number: int, node: str = "n1") -> Instance:
    return make_instance(f"10.0.0.{number}", 9000, labels={"node": node})


def key(name: str, service: ServiceKey = B) -> InstanceKey:
    return InstanceKey(service, name)


def addresses(table: EtcdTable) -> dict[str, list[str] | None]:
    found = table.take()
    return {
        service: None if instances is None else sorted(each.address for each in instances)
        for service, instances in found.items()
    }


def test_only_what_changed_is_given() -> None:
    table = EtcdTable()
    table.put(key("i"), 1, instance(1))
    table.put(key("k", C), 2, instance(2))
    assert addresses(table) == {"b": ["10.0.0.1"], "c": ["10.0.0.2"]}
    table.put(key("j"), 3, instance(3))
    assert addresses(table) == {"b": ["10.0.0.1", "10.0.0.3"]}
    table.remove(key("k", C), 4)
    assert addresses(table) == {"c": None}
    assert addresses(table) == {}


def test_what_is_given_does_not_change() -> None:
    table = EtcdTable()
    table.put(key("i"), 1, instance(1))
    before = table.take()[B]
    table.put(key("j"), 2, instance(2))
    assert before is not None
    assert len(before) == 1


def test_two_keys_for_one_endpoint() -> None:
    """An instance that registers anew before its old lease ends: the later one counts, and stays without the other."""
    table = EtcdTable()
    table.put(key("old"), 1, instance(1, "n1"))
    table.put(key("new"), 2, instance(1, "n2"))
    [found] = (table.take()[B] or {}).values()
    assert found.node == "n2"
    table.remove(key("old"), 3)
    [found] = (table.take()[B] or {}).values()
    assert found.node == "n2"
    table.remove(key("new"), 4)
    assert table.take() == {B: None}


def test_what_cannot_be_read_keeps_what_was() -> None:
    table = EtcdTable()
    assert table.refuse(key("i"), 1, "no JSON") == "nothing of it"
    assert addresses(table) == {"b": []}, "it is known, and has no instance"
    table.put(key("i"), 2, instance(1))
    assert table.refused == {}
    assert table.refuse(key("i"), 3, "no JSON") == "what it said before"
    assert table.refuse(key("i"), 4, "no JSON") is None, "it was said"
    assert addresses(table) == {"b": ["10.0.0.1"]}
    table.remove(key("i"), 5)
    assert (addresses(table), table.refused) == ({"b": None}, {})


def test_a_list_says_what_is_gone() -> None:
    table = EtcdTable()
    for number in (1, 2, 3):
        table.put(key(f"i{number}"), number, instance(number))
    table.put(key("late"), 9, instance(9))
    table.take()
    table.begin_list()
    table.put(key("i1"), 1, instance(1))
    table.put(key("i2"), 5, instance(7))
    table.end_list(6)
    assert addresses(table) == {"b": ["10.0.0.1", "10.0.0.7", "10.0.0.9"]}


def test_a_cluster_that_was_restored() -> None:
    """Its revisions are lower, and count nevertheless."""
    table = EtcdTable()
    table.put(key("i"), 900, instance(1))
    table.put(key("j"), 901, instance(2))
    table.take()
    table.forget_revisions()
    table.begin_list()
    table.put(key("i"), 5, instance(3))
    table.end_list(6)
    assert addresses(table) == {"b": ["10.0.0.3"]}


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["i", "j", "k"]), st.sampled_from([1, 2, None])), min_size=1, max_size=12
)


@given(OPERATIONS, st.data())
def test_whatever_is_repeated_or_late_ends_the_same(
    operations: list[tuple[str, int | None]], data: st.DataObject
) -> None:
    """Events in order, some of them twice, and lists amid them: what is held is what the history ends with."""
    table = EtcdTable()
    held: dict[str, tuple[int, int]] = {}
    for revision, (name, what) in enumerate(operations, 1):
        if what is None:
            held.pop(name, None)
        else:
            held[name] = (revision, what)
        if data.draw(st.booleans()):
            # The watch may have given it already, or will, which must not count twice.
            table.begin_list()
            for each, (at, number) in held.items():
                apply(table, each, at, number)
            table.end_list(revision)
        else:
            for _ in range(data.draw(st.integers(1, 2))):
                apply(table, name, revision, what)
    found = table.take().get(B)
    assert {each.address for each in found or ()} == {f"10.0.0.{number}" for _, number in held.values()}
    assert (found is None) == (not held)


def apply(table: EtcdTable, name: str, revision: int, what: int | None) -> None:
    if what is None:
        table.remove(key(name), revision)
    else:
        table.put(key(name), revision, instance(what))
