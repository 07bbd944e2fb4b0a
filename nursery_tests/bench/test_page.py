"""bench/page: runs write their own sections of the page on performance, and nothing else of it."""

from __future__ import annotations

import pytest

from bench import page, report


@pytest.mark.parametrize("name", ["goals", "figures", "compare-grpc", "locality"])
def test_the_page_has_a_place_for_each_section(name: str) -> None:
    before = page.PAGE.read_text()
    after = page.insert(before, name, "| new |\n")
    assert after.count("| new |") == 1
    # Written again, it takes its own place.
    assert page.insert(after, name, "| newer |\n").count("| new") == 1
    outside = before.partition(f"<!-- {name}: ")[0]
    assert after.startswith(outside)
    assert after.endswith(before.partition(f"<!-- end of {name} -->")[2])


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(SystemExit, match="has no place for goals"):
        page.insert("# Performance\n", "goals", "x")


def test_goals_that_are_missed_are_shown_as_such() -> None:
    goals = [report.verdict("p50", 0.8, 0.9), report.verdict("rate", 1.0, 1.3, at_least=True)]
    table = page.verdicts(goals).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert rows == [["p50", "0.8", "≤ 0.9", "holds"], ["rate", "1", "≥ 1.3", "**missed**"]]
