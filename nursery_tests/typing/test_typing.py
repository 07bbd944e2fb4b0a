"""The annotations as a user's type checker sees them: mypy, strict, over an application that uses it all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_types_of_the_public_surface() -> None:
    """What is right passes, and what is wrong is found: strict mypy calls an ignore that hides nothing an error."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(HERE / "sample.py")]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Success: no issues found in 1 source file" in done.stdout
