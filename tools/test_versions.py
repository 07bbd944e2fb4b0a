"""Run the tests with the lowest and with the newest versions that pyproject.toml admits: `make test-versions`.

Each end of the ranges has a lock, requirements/lowest.lock and requirements/highest.lock (`make lock` writes them), and
a virtual environment of its own, .venv-lowest and .venv-highest, which is made anew when its lock changes. What tests
whole deployments, the benchmarks and the documentation is left out: `make test` runs it with the versions of dev.lock.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENDS = ("lowest", "highest")
LEFT_OUT = ("e2e", "campaign", "bench", "docs")
QUICK = (
    "admin",
    "app/test_config_loader.py",
    "cli",
    "client",
    "discovery/test_service.py",
    "discovery/test_websocket.py",
    "interop/test_grpcio_client.py",
    "interop/test_grpcio_server.py",
    "library/test_cancellation.py::test_a_question_to_a_discovery_server",
    "library/test_cancellation.py::test_a_watch_of_a_discovery_server",
    "library/test_cancellation.py::test_opening_watching_and_closing_a_mesh",
    "library/test_httpx.py",
    "library/test_httpx2.py",
    "net/grpc",
    "net/test_listen.py",
    "net/test_websocket_client.py",
    "proxy/http/test_routing.py",
    "wire/test_yaml_document.py",
)
"""Tests that stand closest to each dependency; both ends take less than three minutes, installation included."""


class Result(NamedTuple):
    """What came of one end.

    Attributes:
        status: pytest's exit status.
        counts: how many tests passed, failed and were skipped, in words.
        failed: names of the tests that failed.
    """

    end: str
    status: int
    counts: str
    failed: list[str]
    seconds: float


def lock_of(end: str) -> Path:
    return ROOT / "requirements" / f"{end}.lock"


def stale() -> list[str]:
    """What the lowest lock has otherwise than pyproject.toml's lower bounds, of what meshlocal itself runs with.

    A bound below which another package's bound lies is found too: nobody can install it, so no test can hold it.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {}
    for line in lock_of("lowest").read_text().splitlines():
        name, _, version = line.partition(" ")[0].partition("==")
        locked[name] = version
    findings = []
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["httpx"], *extras["httpx2"]]:
        match = re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+),<[0-9.]+", requirement)
        if match is None:
            findings.append(f"pyproject.toml: {requirement}: expected NAME>=VERSION,<VERSION")
        elif _padded(locked.get(match[1], "")) != _padded(match[2]):
            findings.append(f"{requirement}: requirements/lowest.lock has {locked.get(match[1], 'none')}")
    return findings


def _padded(version: str) -> list[str]:
    return [*version.split("."), "0", "0"][:3]


def prepare(end: str) -> Path:
    """The Python of the end's environment, which is made if there is none for its lock."""
    folder = ROOT / f".venv-{end}"
    python, stamp = folder / "bin" / "python", folder / "lock.sha256"
    inputs = lock_of(end).read_bytes() + (ROOT / "pyproject.toml").read_bytes() + sys.version.encode()
    wanted = hashlib.sha256(inputs).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"Installing the {end} versions into {folder.name} ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", str(python)]
    subprocess.run([*install, "-r", str(lock_of(end))], cwd=ROOT, check=True)
    subprocess.run([*install, "--no-deps", "-e", "."], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "-m", "uv", "pip", "check", "-q", "--python", str(python)], check=True)
    stamp.write_text(wanted)
    return python


def run(end: str, quick: bool) -> Result:
    """Run one end's tests; what pytest says is shown as it comes."""
    began = time.monotonic()
    python = prepare(end)
    report = ROOT / "build" / "versions" / f"{end}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    tests = [f"nursery_tests/{name}" for name in QUICK] if quick else ["nursery_tests"]
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    command += [f"--ignore=nursery_tests/{name}" for name in LEFT_OUT]
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    print(f"Testing with the {end} versions ...", flush=True)
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, check=False).returncode
    counts, failed = read_report(report)
    return Result(end, status, counts, failed, time.monotonic() - began)


def read_report(report: Path) -> tuple[str, list[str]]:
    """Counts, in words, and the names of the tests that failed."""
    if not report.exists():
        return "pytest wrote no report", []
    failed: list[str] = []
    passed = skipped = 0
    for case in ET.parse(report).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    failed = list(dict.fromkeys(failed))
    return f"{passed} passed, {len(failed)} failed, {skipped} skipped", failed


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests at both ends of the version ranges.")
    parser.add_argument("--quick", action="store_true", help="only the tests closest to the dependencies")
    parser.add_argument("--only", choices=ENDS, help="one end")
    options = parser.parse_args()
    findings = stale()
    if findings:
        print("\n".join([*findings, "The locks do not fit pyproject.toml: `make lock` writes them again."]))
        return 1
    results = [run(end, options.quick) for end in ENDS if options.only in (None, end)]
    print("\nVersions:")
    for result in results:
        verdict = "ok" if result.status == 0 else "FAILED"
        print(f"  {result.end:8} {verdict:6} {result.counts} in {result.seconds:.0f} s")
        for name in result.failed:
            print(f"    {name}")
    return 0 if all(result.status == 0 for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
