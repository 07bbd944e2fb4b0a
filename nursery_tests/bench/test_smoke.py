"""Every benchmark runs, with sizes that measure nothing, and writes the figures that it names."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.attacks import ATTACKS

ROOT = Path(__file__).resolve().parent.parent.parent


def run(name: str, output: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What a benchmark printed, and the JSON that it wrote."""
    command = [sys.executable, "-m", f"bench.{name}", *arguments, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout, json.loads((output / f"{name}.json").read_text())


def test_latency(tmp_path: Any) -> None:
    printed, figures = run("latency", tmp_path, "--rounds", "2", "--exchanges", "5", "--connects", "3")
    assert set(figures["established"]) == {"direct", "same", "other", "failover", "far-direct", "far"}
    for kind in ("established", "connect"):
        rows = figures[kind]
        assert all(0 < row["p50"] <= row["p90"] <= row["p99"] for row in rows.values())
        # The far node's round trip is in every figure that crosses to it.
        assert min(rows["far"]["p50"], rows["far-direct"]["p50"]) >= 2 * figures["far_one_way_asked"]
    assert "| proxy, same node " in printed


def test_watchers(tmp_path: Any) -> None:
    sizes = ("--watchers", "6", "--processes", "2", "--instances", "3", "--changes", "2", "--idle", "0.1")
    _, figures = run("watchers", tmp_path, *sizes)
    assert len(figures["each_change"]) == 2
    assert all(0 < each["first"] <= each["p50"] <= each["last"] for each in figures["each_change"])
    assert figures["connect_cpu_per_watcher"] > 0


def test_kubernetes(tmp_path: Any) -> None:
    sizes = ("--services", "4", "--endpoints", "3", "--scales", "1,6", "--rate", "40", "--seconds", "0.5")
    printed, figures = run("kubernetes", tmp_path, *sizes)
    small, large = figures["clusters"]
    assert [(each["services"], each["endpoints"], each["changes"]) for each in (small, large)] == [
        (4, 12, 20),
        (24, 72, 20),
    ]
    for each in (small, large):
        # Changes of one slice that came together are published together; no other service is published with them.
        assert 0 < each["published"] <= each["changes"]
        assert 0 < each["late"]["p50"] <= each["late"]["last"]
        assert each["cpu_per_change"] > 0
    assert printed.count("(goal ≤") == len(figures["goals"]) == 3


def test_etcd(tmp_path: Any, program: Callable[[str], str]) -> None:
    """Of each registry every change was published, and the watcher saw the last of it."""
    program("etcd")
    sizes = ("--services", "4", "--endpoints", "3", "--rate", "40", "--seconds", "0.5")
    printed, figures = run("etcd", tmp_path, *sizes)
    assert [each["registry"] for each in figures["measured"]] == ["etcd", "kubernetes"]
    for each in figures["measured"]:
        assert (each["services"], each["endpoints"], each["changes"]) == (4, 12, 20)
        assert 0 < each["published"] <= each["changes"]
        assert 0 < each["late"]["p50"] <= each["late"]["last"]
    assert printed.count("(goal ≤") == len(figures["goals"]) == 2


def test_xds(tmp_path: Any) -> None:
    """Every client has every change, and all of it again after a restart."""
    sizes = ("--clients", "6", "--services", "3", "--instances", "4", "--changes", "2", "--idle", "0.1")
    printed, figures = run("xds", tmp_path, *sizes)
    assert len(figures["each_change"]) == 2
    assert all(0 < each["first"] <= each["p50"] <= each["last"] for each in figures["each_change"])
    assert figures["restart"]["server_cpu"] > 0
    assert "6 clients of 3 services" in printed


def test_bypass(tmp_path: Any, root: None) -> None:
    """Every route is measured, the bypass among them, and the cgroup is gone."""
    printed, figures = run("bypass", tmp_path, "--rounds", "2", "--exchanges", "5", "--connects", "3")
    for kind in ("connect", "established"):
        assert set(figures[kind]) >= {"direct", "direct, once more", "meshlocal", "meshlocal, bypass"}
        assert all(0 < row["p50"] <= row["p99"] for row in figures[kind].values())
    assert "| meshlocal, bypass " in printed


def test_restart(tmp_path: Any) -> None:
    """D1: every watcher comes back, and none forgets its last state meanwhile."""
    _, figures = run("restart", tmp_path, "--watchers", "6", "--instances", "3", "--down", "0.2")
    assert figures["lost_their_state"] == 0
    assert sum(figures["in_sync_each_second"]) == 6
    assert figures["in_sync_after"]["first"] <= figures["in_sync_after"]["last"]


def test_policy(tmp_path: Any) -> None:
    printed, figures = run("policy", tmp_path, "--instances", "20", "--large", "50", "--repeat", "3")
    assert set(figures["change"]) == {"label changed", "instance added", "instance removed"}
    assert [goal["holds"] for goal in figures["goals"]] == [goal["value"] <= goal["limit"] for goal in figures["goals"]]
    assert printed.count("goal ≤") == len(figures["goals"]) == 3


@pytest.mark.parametrize("adds", [0.0, 0.004])
def test_a_relay_that_does_not_delay_as_asked_is_refused(adds: Any) -> None:
    """Figures through it would mean nothing."""
    from bench.delay import DelayError, delaying, verify
    from bench.processes import module

    with (
        module("bench.echo", "127.0.0.1") as (_, (echo,)),
        delaying(echo, adds) as relay,
        pytest.raises(DelayError, match=r"asked for 4\.00 ms a round trip"),
    ):
        verify(("127.0.0.1", echo), ("127.0.0.1", relay), 0.002, exchanges=5)


def test_percentiles_are_the_values_that_enough_others_do_not_exceed() -> None:
    from bench.report import percentile

    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, share) for share in (0, 20, 21, 50, 99, 100)] == [1.0, 1.0, 2.0, 3.0, 5.0, 5.0]
    assert percentile([7.0], 50) == 7.0


def test_restart_without_a_change(tmp_path: Any) -> None:
    """D1: who resumes is told nothing, and is back."""
    sizes = ("--watchers", "6", "--instances", "3", "--down", "0.2", "--unchanged", "--output", str(tmp_path))
    command = [sys.executable, "-m", "bench.restart", *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "restart-unchanged.json").read_text())
    assert sum(figures["in_sync_each_second"]) == 6
    assert figures["lost_their_state"] == 0


def test_resend(tmp_path: Any) -> None:
    printed, figures = run("resend", tmp_path, "--watchers", "6", "--instances", "30")
    for key in ("first", "again"):
        assert 0 < figures[key]["p50"] <= figures[key]["last"]
        assert figures[key]["cpu_seconds"] > 0
    assert "| after a restart " in printed
    assert len(figures["verdicts"]) == 1


def test_neighbours(tmp_path: Any) -> None:
    """The load is there: bytes were carried, bodies posted, pages made."""
    sizes = ("--seconds", "0.5", "--rounds", "1", "--streams", "3", "--services", "3", "--instances", "20")
    printed, figures = run("neighbours", tmp_path, *sizes)
    (bulk,) = figures["bulk"]["rounds"]
    assert bulk["bulk_alone"] > 0
    assert bulk["bulk_beside"] > 0
    assert 0 < bulk["beside"]["p50"] <= bulk["beside"]["p99"]
    assert figures["large"]["requests"] > 0
    assert figures["rest"]["wakes_per_second"] > 0
    for name in ("scrape", "page"):
        (made,) = figures[name]["rounds"]
        assert made["bytes"] > 1000
        assert 0 < made["beside"]["p50"] <= made["beside"]["most"]
    assert printed.count("(goal ≤") == len(figures["verdicts"]) == 6


def test_attacks(tmp_path: Any, program: Callable[[str], str]) -> None:
    """GETs are served beside each."""
    program("nghttpd")
    printed, figures = run("attacks", tmp_path, "--seconds", "0.3", "--rounds", "1")
    assert set(figures["rounds"]) == {"alone", *ATTACKS}
    for (made,) in figures["rounds"].values():
        assert 0 < made["p50"] <= made["p99"] <= made["most"]
    assert printed.count("(goal ≤") == 1


def test_unix(tmp_path: Any) -> None:
    printed, figures = run("unix", tmp_path, "--rounds", "2", "--exchanges", "5", "--connects", "3")
    for kind in ("established", "connect"):
        rows = figures[kind]
        assert {"direct", "direct, Unix", "meshlocal", "meshlocal, Unix"} <= set(rows)
        assert all(0 < row["p50"] <= row["p90"] <= row["p99"] for row in rows.values())
    assert "| meshlocal, Unix " in printed


def test_library(tmp_path: Any) -> None:
    printed, figures = run("library", tmp_path, "--rounds", "2", "--count", "3")
    for kind in ("stream", "get"):
        rows = figures[kind]
        assert set(rows) == {"direct", "meshlocal"}
        assert all(0 < row["p50"] <= row["p90"] <= row["p99"] for row in rows.values())
    assert printed.count("(goal ≤") == len(figures["goals"]) == 1


def test_idle(tmp_path: Any) -> None:
    printed, figures = run("idle", tmp_path, "--proxies", "2", "--seconds", "0.2", "--starts", "1")
    assert 0 < figures["start"]["p50"] <= figures["start"]["max"]
    assert figures["idle"]["wakes"] >= 0
    assert figures["idle"]["memory"] > 1e6
    assert printed.count("(goal ≤") == len(figures["goals"]) == 2


def test_services(tmp_path: Any) -> None:
    """The proxy has a state whole, and then another one whole."""
    printed, figures = run("services", tmp_path, "--services", "3", "--instances", "4", "--seconds", "0.5")
    assert figures["instances"] == 12
    assert figures["first"] > 0
    assert figures["resync"] > 0
    for key in ("quiet", "meanwhile"):
        assert figures[key]["requests"] == 500
        assert figures[key]["errors"] == 0
    assert printed.count("(goal ≤") == len(figures["goals"]) == 1


def test_cache(tmp_path: Any, program: Callable[[str], str]) -> None:
    """A real Redis, asked by its own benchmark."""
    program("redis-server")
    program("redis-benchmark")
    command = [sys.executable, "-m", "bench", "--only", "cache", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    measured = json.loads((tmp_path / "compare-cache.json").read_text())["cache"]
    assert set(measured) >= {"cache-1", "cache-50", "cache-50-16", "cache-fresh-1", "cache-fresh-20", "cache-fresh-100"}
    for found in measured.values():
        for name in ("direct", "meshlocal"):
            [once] = found[name]
            assert once["requests"] > 0
            assert 0 < once["p50"] <= once["p99"]
    assert "| GET, 1 connection, p50, µs ↓" in done.stdout
