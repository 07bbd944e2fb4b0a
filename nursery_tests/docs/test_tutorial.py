"""The tutorial, followed to the letter by somebody who reads nothing else: every command, every output."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nursery_tests.docs.pages import ROOT, Step, alike, blocks, steps

LIMIT = 180.0
"""Seconds for all of it, of which a busy machine needs some twenty."""

_MARK = "@@@ step"


def script(followed: list[Step]) -> str:
    """One shell's input: the commands, with a line between what they print. A failing command is seen at once."""
    lines = ["exec 2>&1"]
    for number, step in enumerate(followed):
        lines.append(f"echo '{_MARK} {number}'\n{step.command.rstrip()}\necho \"@@@ status $?\"")
    return "\n".join(lines) + "\n"


def newcomers_tree(folder: Path) -> Path:
    """The repository as a newcomer has it; with the environment that the tests run in, so that nothing is fetched."""
    tree = folder / "meshlocal"
    tree.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".venv", "build"):
            (tree / entry.name).symlink_to(entry)
    (tree / ".venv").symlink_to(sys.prefix)
    return tree


@pytest.mark.netns
def test_a_newcomer_follows_the_tutorial_to_the_end(tmp_path: Path, root: None, program: Any) -> None:
    followed = [step for block in blocks("docs/tutorial.md") if not block.exempt for step in steps(block)]
    assert len(followed) > 15
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8"}
    # A network of its own: the tutorial's ports are fixed ones.
    inside = f"{program('ip')} link set lo up && exec timeout {LIMIT:.0f} bash -s"
    done = subprocess.run(
        [program("unshare"), "--net", "--pid", "--fork", "--kill-child", "sh", "-c", inside],
        input=script(followed),
        cwd=newcomers_tree(tmp_path),
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT + 30,
        check=False,
    )
    said = re.split(rf"^{_MARK} \d+\n", done.stdout, flags=re.MULTILINE)[1:]
    assert len(said) == len(followed), done.stdout + done.stderr
    for step, output in zip(followed, said, strict=True):
        text, _, status = output.rpartition("@@@ status ")
        # Programs in the background say that they are ready whenever they are.
        text = re.sub(r"^meshlocal \w+ ready: .*\n", "", text, flags=re.MULTILINE)
        told = f"{step.where}: {step.command}\nsaid:\n{output}"
        if step.shown is None or not step.shown.strip().endswith("…"):
            assert status.strip() == "0", told
        # Which of the other nodes comes first is left to chance (O4).
        swapped = re.sub(r"\b(n|900)([23])\b", lambda match: match[1] + str(5 - int(match[2])), step.shown or "")
        as_shown = step.shown is None or alike(step.shown, text) or alike(swapped, text)
        assert as_shown, told
