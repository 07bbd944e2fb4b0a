"""app/log_page: what is logged is shown, and changed while the process runs; what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from meshlocal.admin.messages import Request, Response
from meshlocal.app.log_page import LOG, log_page
from meshlocal.net.log import configure_logging
from nursery_tests.logged import entry


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    configure_logging("info")
    yield
    configure_logging("info")


def ask(method: str, query: str = "") -> Response:
    return log_page(Request(method, LOG, query, {}))


def test_the_level_is_shown_and_changed(caplog: pytest.LogCaptureFixture) -> None:
    assert json.loads(ask("GET", "level=debug").body) == {"level": "info", "levels": {}}
    assert json.loads(ask("PUT", "level=Debug").body) == {"level": "debug", "levels": {}}
    changed = json.loads(ask("PUT", "level=error&logger=trio").body)
    assert changed == json.loads(ask("GET").body) == {"level": "debug", "levels": {"trio": "error"}}
    assert [entry(each).fields for each in caplog.records] == [
        {"level": "debug", "logger": None},
        {"level": "error", "logger": "trio"},
    ]


@pytest.mark.parametrize("query", ["", "level=", "level=loud", "logger=trio"])
def test_what_is_no_level_changes_nothing(query: str) -> None:
    refused = ask("PUT", query)
    assert refused.status == 400
    assert b"is none of debug, info, warning, error; PUT /log?level=LEVEL, and &logger=NAME" in refused.body
    assert json.loads(ask("GET").body) == {"level": "info", "levels": {}}
