"""The comparison: who takes part, in which turns, what is made of the figures, and what counts as lost."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import load, peers, report, rounds
from bench.__main__ import goals, name_of
from bench.generator import Generator
from bench.rounds import Row, Workload

ROOT = Path(__file__).resolve().parent.parent.parent
KEPT = ROOT / "bench" / "results" / "compare.json"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing is installed."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(load, "_SYSTEM_PATHS", "")
    monkeypatch.setattr(peers, "envoy", lambda: None)


@pytest.mark.usefixtures("bare")
def test_what_is_missing_is_named_with_the_command_that_installs_it(capsys: pytest.CaptureFixture[str]) -> None:
    job = peers.Job({"b": [peers.Instance("127.0.0.1", 1)]})
    found = peers.present([peers.HAPROXY, peers.NGINX, peers.ENVOY, peers.MESHLOCAL], job)
    assert [each.name for each in found] == ["meshlocal"]
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["without HAProxy", "without nginx", "without Envoy"]
    assert "apt-get install haproxy" in said[0]
    assert "apt-get install nginx" in said[1]
    assert "install" in said[2]
    assert load.missing("wrk", "h2load") == ["wrk: apt-get install wrk", "h2load: apt-get install nghttp2-client"]


def test_what_is_missing_is_run_without(tmp_path: Path) -> None:
    """To the end, with what there is: here, nothing."""
    command = [sys.executable, "-m", "bench", "--quick", "--only", "http", "--output", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": ""}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "without HTTP: " in done.stdout
    assert "wrk: apt-get install wrk" in done.stdout
    assert json.loads((tmp_path / "compare-http.json").read_text())["http"] == {}


def test_a_run_of_a_part_is_kept_beside_one_of_the_whole() -> None:
    assert name_of(None) == "compare"
    assert name_of(["http", "tcp", "http"]) == "compare-tcp-http"


def test_contestants_take_turns_in_each_round() -> None:
    """A moment in which the machine is slow must not fall to one of them alone."""
    ran: list[tuple[str, int]] = []

    def workload(name: str) -> Workload:
        def run(port: int) -> rounds.Metrics:
            ran.append((name, port))
            return {"p50": float(port), "requests": 2.0}

        return Workload(name, "b", run)

    contestants = [peers.Running(name, os.getpid(), {"b": port}) for port, name in enumerate("abcd")]
    measured = rounds.take_turns([workload("x"), workload("y")], contestants, 6)
    turns = [ran[start : start + 4] for start in range(0, len(ran), 4)]
    assert [turn[0][0] for turn in turns] == ["x", "y"] * 6
    assert all(sorted(port for _, port in turn) == [0, 1, 2, 3] for turn in turns)
    assert len({tuple(port for _, port in turn) for turn in turns}) > 1
    assert rounds.values(measured, "x", "c", "p50") == [2.0] * 6
    assert all({"cores", "cpu_per_request"} <= each.keys() for each in measured["x"]["a"])


def by_round(metric: str, values: list[float]) -> list[rounds.Metrics]:
    return [{metric: value, "cores": 1.0} for value in values]


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """Not that of the medians: of a slow round both sides are slow."""
    measured = {"x": {"Envoy": by_round("p50", [1.0, 10.0, 2.0]), "meshlocal": by_round("p50", [2.0, 5.0, 1.0])}}
    assert rounds.ratio(measured, Row("", "x", "p50", "", 1), "meshlocal", "Envoy") == 0.5
    assert rounds.ratio(measured, Row("", "x", "p99", "", 1), "meshlocal", "Envoy") is None
    text = rounds.compare("TCP", measured, [Row("64 B", "x", "p50", "µs", 1)])
    assert "| 64 B, µs ↓ |  2.00 | 2.00 (0.50) |" in text


@pytest.mark.parametrize(
    ("p50", "rate", "held"), [(0.8, 14.0, [True, True]), (0.9, 13.0, [True, True]), (0.91, 12.9, [False, False])]
)
def test_a_goal_holds_or_is_missed(
    p50: float, rate: float, held: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    tcp = {
        "echo-64-1": {"Envoy": by_round("p50", [1.0]), "meshlocal": by_round("p50", [p50])},
        "echo-64-32": {"Envoy": by_round("rate", [10.0]), "meshlocal": by_round("rate", [rate])},
    }
    found = {goal["goal"]: goal["holds"] for goal in goals({"tcp": tcp})}
    assert [holds for goal, holds in found.items() if goal.startswith("64 B")] == held
    # No row is worse than Envoy's: a lower time, a higher rate.
    assert found["TCP rows of 2 at least as good as Envoy's"] is True
    assert capsys.readouterr().out.count("MISSED") == 2 * (not held[0])


def test_the_documentation_shows_the_run_that_is_kept() -> None:
    """Every figure and verdict of docs/performance.md is made from the JSON file beside it."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--render", str(KEPT)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    page = (ROOT / "docs" / "performance.md").read_text()
    printed, _, verdicts = done.stdout.partition("\nholds ")
    tables = re.findall(r"(?:^\|.*\n)+", printed, re.MULTILINE)
    assert len(tables) == 9
    for table in tables:
        assert table in page
    for goal in json.loads(KEPT.read_text())["goals"]:
        assert f"| {goal['goal']} " in page
    assert verdicts.count("MISSED") == page.partition("<!-- end of goals -->")[0].count("**missed**")


@contextmanager
def server(serve: Callable[[socket.socket, int], None]) -> Iterator[tuple[str, int]]:
    """One that does with each connection, which it counts from 0, what `serve` says."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:

        def run() -> None:
            number = 0
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    serve(sock, number)
                number += 1

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_requests_that_are_lost_are_counted() -> None:
    """By kind, and not among the latencies."""

    def serve(sock: socket.socket, number: int) -> None:
        received = sock.recv(64)
        if number % 4 == 1:
            return  # ends without an answer
        if number % 4 == 3:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        sock.sendall(received)

    with server(serve) as address:
        outcomes = Generator(address, b"x" * 64, fresh=True).run(200, 0.2)
    assert outcomes.failures == {"closed": 10, "ECONNRESET": 10}
    assert outcomes.failed == len(outcomes.latencies) == len(outcomes.due) == 20


def test_requests_may_be_due_together() -> None:
    """As those of a generator whose clients all keep the same time."""

    def serve(sock: socket.socket, _: int) -> None:
        sock.sendall(sock.recv(64))

    with server(serve) as address:
        outcomes = Generator(address, b"x", fresh=True, together=4).run(100, 0.12)
    assert sorted(outcomes.due) == pytest.approx([0.0] * 4 + [0.04] * 4 + [0.08] * 4)


def test_who_refuses_connections_has_lost_them() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    outcomes = Generator(address, b"x", fresh=True).run(100, 0.1)
    assert (outcomes.failures, outcomes.latencies) == ({"ECONNREFUSED": 10}, [])


def test_a_request_that_had_to_wait_is_charged_for_it() -> None:
    """Its latency counts from when it was due, or a server that stalls would be charged once (coordinated omission)."""
    stall = 0.2

    def serve(sock: socket.socket, _: int) -> None:
        first = True
        while data := sock.recv(64):
            if first:
                threading.Event().wait(stall)
                first = False
            sock.sendall(data)

    with server(serve) as address:
        outcomes = Generator(address, b"x", connections=1).run(100, 0.1)
    assert len(outcomes.latencies) == 10
    # All ten were due within the stall.
    assert min(outcomes.latencies) >= stall - 0.1
    assert report.percentile(outcomes.latencies, 100) >= stall
