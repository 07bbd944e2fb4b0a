"""The table of what the campaign found, at the end of pytest's output."""

import pytest

from nursery_tests.campaign.report import table

_ROWS = pytest.StashKey()


@pytest.fixture
def campaign_rows(request):
    return request.config.stash.setdefault(_ROWS, [])


def pytest_terminal_summary(terminalreporter, config):
    if rows := config.stash.get(_ROWS, None):
        terminalreporter.section("campaign")
        terminalreporter.write(table(rows))
