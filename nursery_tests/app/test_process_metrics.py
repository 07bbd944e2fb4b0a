import os
import random
from typing import Any

import trio
from prometheus_client import CollectorRegistry
from trio.testing import wait_all_tasks_blocked

from meshlocal.app.process_metrics import ProcessCollector
from meshlocal.net.supervision import Supervision


def values(*arguments: Any) -> Any:
    registry = CollectorRegistry()
    supervision = Supervision(random.Random(0))
    supervision.failures["write the cache"] = 3
    collector = ProcessCollector(supervision, *arguments)
    registry.register(collector)
    return {
        sample.name: sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


async def test_tasks_and_descriptors_are_counted() -> None:
    before = values()
    assert before["meshlocal_memory_bytes"] > 1e6
    async with trio.open_nursery() as inner:
        for _ in range(3):
            inner.start_soon(trio.sleep_forever)
        await wait_all_tasks_blocked()
        ends = os.pipe()
        during = values()
        for end in ends:
            os.close(end)
        inner.cancel_scope.cancel()
    assert during["meshlocal_tasks"] - before["meshlocal_tasks"] == 3
    assert during["meshlocal_descriptors_open"] - before["meshlocal_descriptors_open"] == 2
    after = values()
    assert after["meshlocal_tasks"] == before["meshlocal_tasks"]
    assert after["meshlocal_descriptors_open"] == before["meshlocal_descriptors_open"]


async def test_what_cannot_be_read_is_left_out(tmp_path: Any) -> None:
    (tmp_path / "statm").write_text("")
    always = {"meshlocal_tasks", "meshlocal_task_failures_total", "meshlocal_log_lines_dropped_total"}
    assert values(tmp_path).keys() == always


async def test_failures_of_tasks_are_counted() -> None:
    """P1."""
    assert values()["meshlocal_task_failures_total"] == 3
