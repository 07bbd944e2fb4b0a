"""What tests of the bypass share: a cgroup, and processes in it that connect."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CONNECTS = Path(__file__).with_name("connects.py")


def cgroup2() -> Path | None:
    """Where cgroups of version 2 are mounted; None: nowhere."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    return None


class Connects:
    """A process that connects.

    Args:
        cgroup: that it is in; None: in that of the test.
        prefix: what it is started with, such as `ip netns exec`.
    """

    def __init__(self, cgroup: Path | None, host: str, port: int, prefix: Sequence[str] = ()) -> None:
        command = [*prefix, sys.executable, "-SE", str(CONNECTS), str(cgroup or "-"), host, str(port)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def order(self, text: str) -> dict[str, int]:
        """What it answers to an order."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{text}\n".encode())
        self.process.stdin.flush()
        found: dict[str, int] = json.loads(self.process.stdout.readline())
        return found

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def connecting(cgroup: Path | None, place: tuple[str, int], prefix: Sequence[str] = ()) -> Iterator[Connects]:
    """A process that connects to a place, until the end."""
    made = Connects(cgroup, *place, prefix)
    try:
        yield made
    finally:
        made.close()
