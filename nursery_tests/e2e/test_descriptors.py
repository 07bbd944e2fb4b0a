"""The limit of open files is raised at start, in each process that holds connections."""

from __future__ import annotations

import re
import resource

import pytest

from nursery_tests.e2e.running import Place, Processes
from nursery_tests.e2e.test_workers import children

SOFT = 256
LOWERED = ("sh", "-c", f'ulimit -S -n {SOFT} && exec "$@"', "sh")
"""Runs a command under a low soft limit, the hard one left as it is."""

PROXY = ("proxy", "--discovery", "file:instances.yaml", "--listen", "tcp://127.0.0.1:0=b", "--admin", "127.0.0.1:0")
DISCOVERY = ("discovery", "--source", "file:instances.yaml", "--bind", "127.0.0.1:0")


@pytest.mark.parametrize(
    ("arguments", "processes_below"),
    [(PROXY, 0), ((*PROXY, "--workers", "2"), 2), (DISCOVERY, 0)],
    ids=["proxy", "workers", "discovery"],
)
async def test_each_process_may_open_as_many_files_as_the_system_lets_it(
    processes: Processes, here: Place, arguments: tuple[str, ...], processes_below: int
) -> None:
    processes.write("instances.yaml", "services: {b: [{address: 127.0.0.1, port: 1, labels: {node: n1}}]}")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert hard > SOFT
    program = await processes.meshlocal(*arguments, env={"NODE_NAME": "n1"}, prefix=LOWERED)
    await program.printed(re.escape(f"meshlocal {arguments[0]} ready"), "out")
    pids = [program.process.pid, *children(program.process.pid)]
    assert len(pids) == 1 + processes_below
    assert [resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids] == [(hard, hard)] * len(pids)
