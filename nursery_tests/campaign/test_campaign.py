"""The campaign of faults, in its short form: each group's faults, one after the other, on a fleet of its own.

`make soak` is the long form. Rules A2 to A8, D1 to D3, F1, H1, H2, S1, S2.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nursery_tests.campaign.campaign import Row
from nursery_tests.campaign.groups import GROUPS, lacks, try_group
from nursery_tests.campaign.report import table

SECONDS = 0.8
"""Of each fault."""


@pytest.mark.parametrize("name", GROUPS)
async def test_faults(name: str, tmp_path: Path, campaign_rows: list[Row]) -> None:
    if why := lacks(GROUPS[name]):
        pytest.skip(why)
    rows = await try_group(GROUPS[name], tmp_path, SECONDS)
    campaign_rows += rows
    problems = [f"{row.fault.name}: {problem}" for row in rows for problem in row.problems]
    assert not problems, "\n".join([*problems, table(rows)])
    assert len(rows) == len(GROUPS[name].faults)
    # A load that did not run would prove nothing.
    assert all(sent >= 10 for row in rows for sent in row.sent.values()), table(rows)
