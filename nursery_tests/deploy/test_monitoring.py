"""Alerts and dashboard of deploy/monitoring: promtool has nothing against them, and each alert does what it says."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "monitoring" / "rules.yaml"
CASES = Path(__file__).with_name("alerts.yaml")


def alerts() -> dict[str, Any]:
    """The alerts by name."""
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def run(*command: str) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_promtool_has_nothing_against_the_rules(program: Callable[[str], str]) -> None:
    status, said = run(program("promtool"), "check", "rules", "--lint=all", "--lint-fatal", str(RULES))
    assert status == 0, said
    assert f"{len(alerts())} rules found" in said


def test_alerts_fire_and_stay_silent(program: Callable[[str], str]) -> None:
    status, said = run(program("promtool"), "test", "rules", str(CASES))
    assert status == 0, said


def test_each_alert_has_a_case() -> None:
    """In which something beside it does not fire."""
    fires = set()
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for each in case["alert_rule_test"]:
            if each["exp_alerts"]:
                fires.add(each["alertname"])
                assert len(each["exp_alerts"]) < len(case["input_series"])
    assert fires == alerts().keys()


@pytest.mark.parametrize("name", alerts())
def test_a_wrong_expression_is_found_out(program: Callable[[str], str], tmp_path: Path, name: str) -> None:
    """Each case would fail if its alert never fired: none passes for nothing."""
    rules = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][0]["rules"]:
        if rule["alert"] == name:
            rule["expr"] = "vector(1) > 2"
    (tmp_path / "rules.yaml").write_text(yaml.dump(rules))
    cases = yaml.safe_load(CASES.read_text())
    cases["rule_files"] = [str(tmp_path / "rules.yaml")]
    cases["tests"] = [
        case for case in cases["tests"] if any(each["alertname"] == name for each in case["alert_rule_test"])
    ]
    (tmp_path / "alerts.yaml").write_text(yaml.dump(cases))
    status, said = run(program("promtool"), "test", "rules", str(tmp_path / "alerts.yaml"))
    assert status != 0
    assert name in said


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_what_it_means_and_what_to_do(name: str) -> None:
    rule = alerts()[name]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"].keys() == {"summary", "description"}
    page = (ROOT / "docs" / "monitoring.md").read_text()
    assert f"| `{name}` |" in page, f"docs/monitoring.md does not tell of {name}"
