"""cli/tables: columns as wide as their widest cell, and one line a row whatever is in it."""

from __future__ import annotations

import pytest

from meshlocal.cli.tables import Columns, table


def test_columns_line_up() -> None:
    text = table(("NAME", "N"), [("a", 1), ("longer", 22)])
    assert text.splitlines() == ["NAME    N", "a       1", "longer  22"]


def test_a_table_that_goes_on_keeps_its_columns_or_widens_them() -> None:
    columns = Columns(("A", "B"))
    assert columns.lines([("xx", 1)], header=True) == ["A   B", "xx  1"]
    assert columns.lines([], header=False) == []
    assert columns.lines([("y", 1)], header=False) == ["y   1"]
    assert columns.lines([("longer", 1)], header=False) == ["longer  1"]


def test_no_rows_leave_the_header() -> None:
    assert table(("NAME", "N"), []) == "NAME  N"


@pytest.mark.parametrize(
    ("cell", "shown"),
    [(None, "-"), ("", "-"), (True, "yes"), (False, "no"), (0, "0"), ("a\nb\x1b", r"a\nb\x1b"), ("ü", "ü")],
)
def test_cells(cell: object, shown: str) -> None:
    assert table(("A", "B"), [(cell, "x")]).splitlines()[1].split() == [shown, "x"]
