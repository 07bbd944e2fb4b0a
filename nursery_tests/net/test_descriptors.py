"""net/descriptors: the limit of open files is raised, whatever it was, and the log says what there is."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest

from meshlocal.net.descriptors import connections_ceiling, raise_limit
from nursery_tests.logged import events

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


# The same without a process of its own: every limit that a system may have set.

EVER = resource.RLIM_INFINITY


class System:
    """A system with limits of its own.

    Attributes:
        limits: of open files, the soft one and the hard one.
        refuses: what it says to whom sets them.
    """

    def __init__(self, soft: int, hard: int, refuses: Exception | None) -> None:
        self.limits = (soft, hard)
        self.refuses = refuses

    def getrlimit(self, which: int) -> tuple[int, int]:
        assert which == resource.RLIMIT_NOFILE
        return self.limits

    def setrlimit(self, which: int, limits: tuple[int, int]) -> None:
        assert which == resource.RLIMIT_NOFILE
        if self.refuses is not None:
            raise self.refuses
        self.limits = limits


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Callable[..., System]:
    def make(soft: int, hard: int, refuses: Exception | None = None) -> System:
        made = System(soft, hard, refuses)
        monkeypatch.setattr(resource, "getrlimit", made.getrlimit)
        monkeypatch.setattr(resource, "setrlimit", made.setrlimit)
        return made

    return make


FEW = "few files may be open; each connection takes two"
STAYS = "the limit of open files stays as it is"
SAID = "limit of open files"


@pytest.mark.parametrize(
    ("soft", "hard", "refuses", "limits", "says"),
    [
        (1024, 4096, None, (4096, 4096), {SAID: "DEBUG"}),
        (1024, 4095, None, (4095, 4095), {FEW: "WARNING"}),
        (4096, 4096, None, (4096, 4096), {SAID: "DEBUG"}),
        (64, 64, None, (64, 64), {FEW: "WARNING"}),
        (1024, EVER, None, (EVER, EVER), {SAID: "DEBUG"}),
        (EVER, EVER, None, (EVER, EVER), {SAID: "DEBUG"}),
        # What is so already is not set again.
        (5000, 5000, PermissionError(1, "no"), (5000, 5000), {SAID: "DEBUG"}),
        # A hard limit above what the kernel takes now (fs.nr_open).
        (1024, 2**40, PermissionError(1, "no"), (1024, 2**40), {STAYS: "WARNING", FEW: "WARNING"}),
        (1024, 2**40, ValueError("no"), (1024, 2**40), {STAYS: "WARNING", FEW: "WARNING"}),
        (5000, EVER, PermissionError(1, "no"), (5000, EVER), {STAYS: "WARNING", SAID: "DEBUG"}),
    ],
)
def test_every_limit_that_there_may_be(
    system: Callable[..., System],
    caplog: pytest.LogCaptureFixture,
    soft: int,
    hard: int,
    refuses: Exception | None,
    limits: tuple[int, int],
    says: dict[str, str],
) -> None:
    """It gives what may be open from now on; what the system refuses is said, and never fatal."""
    caplog.set_level("DEBUG")
    made = system(soft, hard, refuses)
    assert raise_limit() == limits[0]
    assert made.limits == limits
    records = [record for record in caplog.records if record.name == "meshlocal.net.descriptors"]
    assert dict(zip(events(records), (record.levelname for record in records), strict=True)) == says
    assert f"limit={soft if refuses else hard} " in f"{caplog.messages[-1]} "


@pytest.mark.parametrize(
    ("limit", "ceiling"),
    [(EVER, sys.maxsize), (1_000_000, 999_744), (1025, 769), (1024, 768), (1023, 768), (64, 48), (4, 3), (3, 3)],
)
def test_some_descriptors_are_left_to_others(system: Callable[..., System], limit: int, ceiling: int) -> None:
    """256 of them; of few, a quarter. It goes by the limit of the moment."""
    system(limit, EVER)
    assert connections_ceiling() == ceiling
