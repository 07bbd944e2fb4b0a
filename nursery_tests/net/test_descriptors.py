"""net/descriptors: the limit of open files is raised, whatever it was, and the log says what there is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_SCRIPT = """
import resource, sys
soft, hard = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from meshlocal.net.log import configure_logging
from meshlocal.net.descriptors import connections_ceiling, raise_limit
configure_logging("debug", "json")
raised = raise_limit()
print(raised, *resource.getrlimit(resource.RLIMIT_NOFILE), connections_ceiling())
"""


def run(soft: int, hard: int) -> tuple[list[int], dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(soft), str(hard)], capture_output=True, text=True, check=True, timeout=30
    )
    return [int(word) for word in done.stdout.split()], json.loads(done.stderr)


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    figures, said = run(1024, 5000)
    assert figures == [5000, 5000, 5000, 5000 - 256]
    assert (said["event"], said["limit"], said["before"]) == ("limit of open files", 5000, 1024)


@pytest.mark.parametrize("soft", [64, 1024])
def test_a_low_limit_is_warned_of(soft: int) -> None:
    figures, said = run(soft, 1024)
    assert figures == [1024, 1024, 1024, 1024 - 256]
    assert (said["level"], said["limit"], said["wanted"]) == ("warning", 1024, 4096)


def test_of_few_descriptors_a_quarter_is_kept_back() -> None:
    assert run(64, 64)[0] == [64, 64, 64, 48]
