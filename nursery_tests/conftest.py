"""What all tests share.

A test that needs a program or root skips with a reason where there is none. With MESHLOCAL_TESTS_NO_SKIP set, as in CI,
a skip is a failure: there everything is there, and a test that quietly stopped running would prove nothing.
"""

import logging
import os
import shutil
import signal
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import pytest

from meshlocal.net.log import _flows

# The same examples every time, and no test that fails because the machine is busy. `make fuzz` looks for new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("fuzz", max_examples=2000, deadline=None, print_blob=True)
hypothesis.settings.register_profile("fuzz-quick", max_examples=100, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("MESHLOCAL_TESTS_PROFILE", "fixed"))

_NO_SKIP = bool(os.environ.get("MESHLOCAL_TESTS_NO_SKIP"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:
    report = yield
    if _NO_SKIP and report.skipped and not hasattr(report, "wasxfail"):
        _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: Any) -> Generator[None, Any, Any]:
    report = yield
    if _NO_SKIP and report.skipped:
        _fail(report)
    return report


def _fail(report: Any) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: skipped where nothing may be skipped: {reason}"


@pytest.fixture(autouse=True)
def _signals_restored() -> Iterator[Any]:
    """A process that drains in a test ignores signals from then on, and so would each one that a later test starts."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _log_level_restored() -> Iterator[Any]:
    """A process that starts in a test sets the level of the project's loggers, and would hide later tests' lines."""
    logger = logging.getLogger("meshlocal")
    before = logger.level
    # Nor may what one logs again and again keep another's lines out.
    _flows.clear()
    yield
    logger.setLevel(before)


@pytest.fixture(scope="session")
def program() -> Any:
    """Find a program, or skip: `program("curl")` is its path."""

    def find(name: Any) -> Any:
        path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if path is None:
            pytest.skip(f"needs the program {name}")
        return path

    return find


@pytest.fixture(scope="session")
def root() -> None:
    """Skip unless root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
