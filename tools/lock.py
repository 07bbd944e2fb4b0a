"""Write requirements/*.lock from the ranges in pyproject.toml: `name==version` lines for every platform, no hosts."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS: dict[str, list[str]] = {
    "run": [],
    "dev": ["dev"],
    "bench": ["bench"],
    "docs": ["docs"],
    "lowest": ["dev", "httpx"],
    "highest": ["dev", "httpx"],
}
CONSTRAINED = {"docs": "dev"}
"""Installed into one environment with another lock's packages."""
OPTIONS = {"lowest": ["--upgrade", "--resolution", "lowest-direct"], "highest": ["--upgrade"]}
"""What `make test-versions` tries: both ends of the ranges, whatever the lock had before."""


def compile_lock(name: str, source: str, extras: list[str], given: str | None = None) -> None:
    output = ROOT / "requirements" / f"{name}.lock"
    command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--universal", "--python-version", "3.11"]
    command += ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
    command += OPTIONS.get(name, [])
    for extra in extras:
        command += ["--extra", extra]
    if name in CONSTRAINED:
        command += ["--constraint", f"requirements/{CONSTRAINED[name]}.lock"]
    subprocess.run([*command, source, "-o", str(output)], cwd=ROOT, check=True, input=given, text=True)
    print(f"wrote {output.relative_to(ROOT)}")


def main() -> None:
    for name, extras in EXTRAS.items():
        compile_lock(name, "pyproject.toml", extras)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    compile_lock("build", "-", [], "\n".join(project["build-system"]["requires"]))


if __name__ == "__main__":
    main()
