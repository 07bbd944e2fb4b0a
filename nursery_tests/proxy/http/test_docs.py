"""What the pages on HTTP show is so: its configurations, its statuses and reasons."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from meshlocal.policy.config_build import Layer, build_config
from meshlocal.policy.protocols import APP_PROTOCOL
from meshlocal.proxy.http import answers

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGE = (DOCS / "http.md").read_text() + (DOCS / "grpc.md").read_text()
REASONS = {each.reason: each.status for each in vars(answers).values() if isinstance(each, answers.Answer)}


def test_its_configurations_are_accepted() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        build_config([Layer("docs/http.md", yaml.safe_load(block))])


@pytest.mark.parametrize("key", sorted(set(re.findall(r"`(?:proxy\.http\.|attempts\.)?([a-z]+_[a-z_]+)`", PAGE))))
def test_keys_and_reasons_exist(key: str) -> None:
    known = (DOCS / "configuration.md").read_text() + (DOCS / "metrics.md").read_text()
    assert key in (*REASONS, APP_PROTOCOL) or re.search(rf"^\| `{key}` \|", known, re.MULTILINE)


def test_statuses_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (`.*?`) \|", PAGE, re.MULTILINE)
    told = {reason.strip("`"): int(status) for status, reasons in rows for reason in reasons.split(", ")}
    assert len(told) >= 12
    assert told == {reason: REASONS[reason] for reason in told}
