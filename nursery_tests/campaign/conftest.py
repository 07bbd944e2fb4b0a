"""The table of what the campaign found, at the end of pytest's output."""

from typing import Any

import pytest

from nursery_tests.campaign.campaign import Row
from nursery_tests.campaign.report import table

_ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture
def campaign_rows(request: Any) -> Any:
    return request.config.stash.setdefault(_ROWS, [])


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    if rows := config.stash.get(_ROWS, None):
        terminalreporter.section("campaign")
        terminalreporter.write(table(rows))
