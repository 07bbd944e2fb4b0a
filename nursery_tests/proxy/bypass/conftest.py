"""A cgroup for each test; it takes root, and cgroups of version 2."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nursery_tests.proxy.bypass.parts import cgroup2


@pytest.fixture
def bpffs(root: None, program: Callable[[str], str], tmp_path: Path) -> Iterator[Path]:
    """A BPF file system."""
    made = tmp_path / "bpf"
    made.mkdir()
    subprocess.run([program("mount"), "-t", "bpf", "bpf", str(made)], check=True)
    yield made
    subprocess.run([program("umount"), "--lazy", str(made)], check=True)


@pytest.fixture
def cgroup(root: None, request: pytest.FixtureRequest) -> Iterator[Path]:
    mounted = cgroup2()
    if mounted is None:
        pytest.skip("needs cgroups of version 2")
    made = mounted / f"meshlocal-test-{os.getpid()}"
    made.mkdir()
    yield made
    # Whoever was in it is gone by now, or goes: the kernel takes a moment to say so.
    for _ in range(1000):
        try:
            made.rmdir()
        except OSError:
            os.sched_yield()
        else:
            return
    (made.parent / "cgroup.procs").write_text("\n".join((made / "cgroup.procs").read_text().split()) or "0")
