"""cli/instances: what is printed of snapshots that follow each other."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.cli.instances import Changes
from meshlocal.policy.model import ServiceKey, ServiceSnapshot, index, make_instance


def snapshot(**nodes: str) -> ServiceSnapshot:
    """Of service b: `p1="n1"` is an instance on port 1 and node n1."""
    made = [
        make_instance("127.0.0.1", int(port.removeprefix("p")), labels={"node": node, "service": "b"})
        for port, node in nodes.items()
    ]
    return ServiceSnapshot(ServiceKey("b"), "", index(made))


def test_what_is_there_comes_with_the_header_and_changes_without() -> None:
    changes = Changes("table")
    assert [line.split() for line in changes.text(snapshot(p1="n1", p2="n2")).splitlines()] == [
        ["EVENT", "ADDRESS", "PORT", "PORT", "NAME", "NODE", "STATE", "LABELS"],
        ["added", "127.0.0.1", "1", "-", "n1", "ready", "-"],
        ["added", "127.0.0.1", "2", "-", "n2", "ready", "-"],
    ]
    assert [line.split()[:5] for line in changes.text(snapshot(p2="n3", p4="n1")).splitlines()] == [
        ["removed", "127.0.0.1", "1", "-", "n1"],
        ["changed", "127.0.0.1", "2", "-", "n3"],
        ["added", "127.0.0.1", "4", "-", "n1"],
    ]
    assert changes.text(snapshot(p2="n3", p4="n1")) == ""


def test_no_instance_leaves_the_header() -> None:
    assert Changes("wide").text(snapshot()).split() == [
        *("EVENT", "ADDRESS", "PORT", "PORT", "NAME", "NODE", "STATE", "PROTOCOL", "REGISTRY", "LABELS")
    ]
    assert Changes("json").text(snapshot()) == ""


states = st.dictionaries(st.sampled_from(["p1", "p2", "p3", "p4"]), st.sampled_from(["n1", "n2"]))


@given(st.lists(states, max_size=6))
def test_who_adds_up_the_events_has_the_state(then: list[dict[str, str]]) -> None:
    changes = {"json": Changes("json"), "yaml": Changes("yaml")}
    held: dict[str, str] = {}
    for state in then:
        lines = changes["json"].text(snapshot(**state)).splitlines()
        events = [json.loads(line) for line in lines]
        assert list(yaml.safe_load_all(changes["yaml"].text(snapshot(**state)))) == events
        for event in events:
            place = f"p{event['instance']['port']}"
            assert (event["event"] == "added") == (place not in held)
            if event["event"] == "removed":
                del held[place]
            else:
                held[place] = event["instance"]["node"]
        assert held == state


@pytest.mark.parametrize("output", ["table", "json"])
def test_no_label_drives_the_terminal(output: str) -> None:
    text = Changes("table" if output == "table" else "json").text(snapshot(p1="\x1b[2J\nadded"))
    assert "\x1b" not in text
    assert len(text.splitlines()) == (2 if output == "table" else 1)
