"""The machine that figures come from, and what its processes use."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

Machine = dict[str, str | int | float]


def describe() -> Machine:
    """What a reader needs to judge figures by."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "trio": version("trio"),
        "meshlocal": version("meshlocal"),
        "commit": _commit(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def describe_line(machine: Machine) -> str:
    """The same on one line."""
    return (
        f"{machine['cores']} × {machine['cpu']}, {machine['memory_gb']} GB, Linux {machine['kernel']},"
        f" CPython {machine['python']}, trio {machine['trio']}; load before the run {machine['load_before']}"
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return found.stdout.strip()


def raise_file_limit() -> int:
    """Let this process and those that it starts open as many files as the system allows; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for each in found:
        for task in _tasks(each):
            try:
                found += map(int, (task / "children").read_text().split())
            except OSError:  # it ended meanwhile
                continue
    return found


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its descendants so far: all threads, user and system."""
    # The clock of another process's CPU time, as clock_getcpuclockid(3) makes it; /proc counts in ticks of 10 ms.
    return sum(time.clock_gettime_ns((~each << 3) | 2) for each in family(pid)) / 1e9


def memory_kb(pid: int) -> int:
    """Resident memory of a process and its descendants, in KiB."""
    total = 0
    for each in family(pid):
        for line in Path(f"/proc/{each}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1])
    return total
