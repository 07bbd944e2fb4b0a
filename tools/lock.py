"""Write requirements/*.lock from the ranges in pyproject.toml: `name==version` lines for every platform, no hosts."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS: dict[str, list[str]] = {
    "run": [],
    "dev": ["dev"],
    "peers": ["peers"],
    "bench": ["bench"],
    "docs": ["docs"],
    "lowest": ["dev", "httpx", "httpx2"],
    "highest": ["dev", "httpx", "httpx2"],
}
CONSTRAINED = {"docs": "dev", "peers": "dev"}
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


def lock_node(ranges: Sequence[str]) -> None:
    """Lock packages of npm's, all of which are installed side by side."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--package-lock-only", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
        subprocess.run(["npm", "install", *options, *ranges], cwd=folder, check=True)
        packages = json.loads((Path(folder) / "package-lock.json").read_text())["packages"]
    lines = []
    for place, package in packages.items():
        _, *names = place.split("node_modules/")
        if len(names) > 1:
            raise SystemExit(f"{place}: two versions of a package cannot stand side by side")
        lines += [f"{name}=={package['version']}" for name in names]
    output = ROOT / "requirements" / "node.lock"
    output.write_text("\n".join(sorted(lines)) + "\n")
    print(f"wrote {output.relative_to(ROOT)}")


def main() -> None:
    for name, extras in EXTRAS.items():
        compile_lock(name, "pyproject.toml", extras)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    compile_lock("build", "-", [], "\n".join(project["build-system"]["requires"]))
    lock_node(project["tool"]["meshlocal"]["node"])


if __name__ == "__main__":
    main()
