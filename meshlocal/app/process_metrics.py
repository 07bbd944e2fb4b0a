"""What a process itself takes: tasks, descriptors, memory. What grows here without end is a leak."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import trio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from meshlocal.net.log import dropped_lines
from meshlocal.net.supervision import Supervision


class ProcessCollector(Collector):
    """What this process takes. Asked within a Trio run.

    Args:
        supervision: of its tasks.
        proc: the kernel's directory of this process; metrics that it has no file for are left out.
    """

    def __init__(self, supervision: Supervision, proc: Path = Path("/proc/self")) -> None:
        self._supervision = supervision
        self._proc = proc

    def collect(self) -> Iterable[Metric]:
        """The metrics as they stand now."""
        tasks = GaugeMetricFamily(
            "meshlocal_tasks", "Trio tasks that live; a connection has one or two, and some are kept."
        )
        tasks.add_metric([], trio.lowlevel.current_statistics().tasks_living)
        descriptors = GaugeMetricFamily("meshlocal_descriptors_open", "File descriptors, of connections and all else.")
        memory = GaugeMetricFamily("meshlocal_memory_bytes", "Resident memory.")
        # None may be left to read these with.
        with suppress(OSError):
            # One of them is the directory itself, for as long as it is read.
            descriptors.add_metric([], len(os.listdir(self._proc / "fd")) - 1)
        with suppress(OSError, ValueError, IndexError):
            memory.add_metric([], int((self._proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        failures = CounterMetricFamily(
            "meshlocal_task_failures", "Tasks that failed and were begun again, by what they do.", labels=["task"]
        )
        for name, count in self._supervision.failures.items():
            failures.add_metric([name], count)
        dropped = CounterMetricFamily(
            "meshlocal_log_lines_dropped", "Log lines that nobody read in time from standard error."
        )
        dropped.add_metric([], dropped_lines())
        yield from (tasks, descriptors, memory, failures, dropped)
