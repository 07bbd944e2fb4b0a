"""What an idle proxy costs, and how soon it is ready: wakes and CPU while nothing happens, and the time to its start.

Many proxies at once stand for what a machine full of sidecars pays. Each reads an instances file, and has its pages.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from bench import report
from bench.machine import cpu_seconds, describe, memory_kb
from bench.processes import instances_file, meshlocal, ready_line, running

GOAL_WAKES = 2.0
GOAL_START = 0.25
FLAGS = ("--listen", "tcp://127.0.0.1:0=b", "--admin", "127.0.0.1:0")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.idle", description=__doc__)
    parser.add_argument("--proxies", type=int, default=100, help="at once [100]")
    parser.add_argument("--seconds", type=float, default=30.0, help="that they are watched [30]")
    parser.add_argument("--starts", type=int, default=21, help="starts, one after another [21]")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    return parser.parse_args()


def wakes(pid: int) -> int:
    """How often the threads of a process have gone to sleep (proc_pid_status(5))."""
    found = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        match = re.search(r"^voluntary_ctxt_switches:\s+(\d+)$", status.read_text(), re.MULTILINE)
        assert match is not None
        found += int(match[1])
    return found


def starts(file: Path, count: int) -> list[float]:
    """Seconds from exec to the line that says that it is ready."""
    found = []
    command = [sys.executable, "-m", "meshlocal", "proxy", "--discovery", f"file:{file}", *FLAGS]
    for _ in range(count):
        begin = time.perf_counter()
        with running([*command, "--log-level", "error"], environment={"NODE_NAME": "n1"}) as process:
            ready_line(process)
            found.append(time.perf_counter() - begin)
    return found


def idle(file: Path, count: int, seconds: float) -> dict[str, float]:
    """So many proxies that do nothing: what one of them does, and takes."""
    with ExitStack() as stack:
        pids = []
        for _ in range(count):
            process, _ = stack.enter_context(meshlocal("proxy", "--discovery", f"file:{file}", *FLAGS, node="n1"))
            pids.append(process.pid)
        time.sleep(5)
        slept, spent = sum(map(wakes, pids)), sum(map(cpu_seconds, pids))
        time.sleep(seconds)
        return {
            "wakes": (sum(map(wakes, pids)) - slept) / seconds / count,
            "cpu": (sum(map(cpu_seconds, pids)) - spent) / seconds / count,
            "memory": median(map(memory_kb, pids)) * 1024,
        }


def main() -> None:
    asked = options()
    machine = describe()
    report.heading("Idle, and started", machine)
    with tempfile.TemporaryDirectory(prefix="meshlocal-bench-") as folder:
        file = Path(folder) / "instances.yaml"
        instances_file(file, {"b": [("127.0.0.1", 9001, "n1"), ("127.0.0.2", 9001, "n2")]})
        starts(file, 2)  # what is on the disk is in memory from here on
        times = starts(file, asked.starts)
        found = idle(file, asked.proxies, asked.seconds)
    figures: dict[str, Any] = {
        "proxies": asked.proxies,
        "seconds": asked.seconds,
        "start": {"p50": median(times), "max": max(times)},
        "idle": found,
    }
    rows = [
        ["from exec to ready, with a file, p50", f"{median(times) * 1000:.0f} ms"],
        ["the slowest", f"{max(times) * 1000:.0f} ms"],
        [f"wakes a second, each of {asked.proxies} idle ones", f"{found['wakes']:.2f}"],
        ["CPU of one", f"{found['cpu'] * 1e6:.0f} µs/s"],
        ["CPU of 1,000, of a core", f"{found['cpu'] * 1000:.1%}"],
        ["memory of one, as the system counts it", f"{found['memory'] / 1e6:.1f} MB"],
    ]
    print(report.table(["A proxy with an instances file", ""], rows), end="\n\n")
    figures["goals"] = [
        report.verdict("wakes a second of an idle proxy with a file", found["wakes"], GOAL_WAKES),
        report.verdict("from exec to ready, with a file, p50", median(times) * 1000, GOAL_START * 1000, " ms"),
    ]
    report.write("idle", machine, figures, asked.output)


if __name__ == "__main__":
    main()
