"""Whom a discovery server learns from: loops and duplicates are refused, and every server of a loop sees it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.lineage import MOST, MOST_TEXT, DuplicateError, Lineage, LineageError


def test_tells_itself_and_those_it_learns_from() -> None:
    lineage = Lineage("a")
    assert lineage.servers() == ("a",)
    lineage.note("one", ["b", "d"])
    lineage.note("two", ["c", "d"])
    assert lineage.servers() == ("a", "b", "c", "d")
    lineage.note("one", ["e"])
    assert lineage.servers() == ("a", "c", "d", "e")
    lineage.forget("two")
    assert lineage.servers() == ("a", "e")


@pytest.mark.parametrize(
    ("servers", "what"),
    [
        (["a"], "it is this server itself"),
        (["b", "a"], "it learns from this server: each would hear what it said itself"),
        (["b", "c", "a"], "it learns from this server: each would hear what it said itself"),
        (["d", "e"], "it is the same server as 'other', which is followed already"),
        ([], "its lineage makes no sense: an id is missing, is too long, or cannot be printed"),
        (["b", ""], "its lineage makes no sense: an id is missing, is too long, or cannot be printed"),
        (["b\n"], "its lineage makes no sense: an id is missing, is too long, or cannot be printed"),
        (["b" * (MOST_TEXT + 1)], "its lineage makes no sense: an id is missing, is too long, or cannot be printed"),
        ([f"s{number}" for number in range(MOST + 1)], f"it learns from more than {MOST} servers"),
    ],
)
def test_refuses(servers: list[str], what: str) -> None:
    """What makes no sense is not passed on; a server that is refused is told of all the same, as it is asked."""
    lineage = Lineage("a")
    lineage.note("other", ["d"])
    with pytest.raises(LineageError) as caught:
        lineage.note("this", servers)
    assert str(caught.value) == what
    told = lineage.servers()
    assert told[0] == "a"
    assert told.count("a") == 1
    assert len(told) <= MOST + 1
    assert all(each and len(each) <= MOST_TEXT and each.isprintable() for each in told)
    lineage.note("this", ["f"])
    assert lineage.servers() == ("a", "d", "f")


def test_the_same_server_may_be_followed_once_the_other_source_is_gone() -> None:
    lineage = Lineage("a")
    lineage.note("one", ["b"])
    with pytest.raises(LineageError, match="the same server as 'one'"):
        lineage.note("two", ["b"])
    lineage.note("one", ["c"])
    lineage.note("two", ["b"])
    lineage.forget("one")
    assert lineage.servers() == ("a", "b")


def test_who_was_refused_as_the_same_is_told_when_it_no_longer_is() -> None:
    """The other source turned to another server, or is gone: nothing else would say so."""
    lineage, heard = Lineage("a"), []
    lineage.note("one", ["b"])
    with pytest.raises(DuplicateError):
        lineage.note("two", ["b"])
    with lineage.followed(lambda: heard.append("changed")):
        lineage.forget("one")
        assert heard == ["changed"]
        lineage.note("two", ["b"])
        assert heard == ["changed"] * 2
        with pytest.raises(DuplicateError):
            lineage.note("one", ["b"])
        assert heard == ["changed"] * 2


def test_who_listens_hears_of_changes_alone() -> None:
    lineage, heard = Lineage("a"), []
    with lineage.followed(lambda: heard.append(lineage.servers())):
        lineage.note("one", ["b"])
        lineage.note("one", ["b"])
        lineage.forget("one")
    lineage.note("one", ["c"])
    assert heard == [("a", "b"), ("a",)]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12), st.randoms(use_true_random=False))
def test_in_any_graph_who_is_in_a_loop_refuses_and_nobody_else(edges: list[tuple[int, int]], rng: object) -> None:
    """However the news travels, it settles: a server refuses another just where that one reaches it."""
    servers = [Lineage(str(number)) for number in range(6)]
    asks = {number: {to for come, to in edges if come == number} for number in range(6)}
    refused: dict[tuple[int, int], bool] = {}
    for _ in range(8):
        order = sorted((come, to) for come in asks for to in asks[come])
        rng.shuffle(order)  # type: ignore[attr-defined]
        for come, to in order:
            try:
                servers[come].note(str(to), servers[to].servers())
            except LineageError:
                refused[come, to] = True
            else:
                refused[come, to] = False
    for (come, to), is_refused in refused.items():
        reached, left = {to}, [to]
        while left:
            for each in asks[left.pop()] - reached:
                reached.add(each)
                left.append(each)
        assert is_refused == (come in reached), (come, to)
