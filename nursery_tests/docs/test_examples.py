"""Every code block of every page: run, or checked against what it is meant for, or marked with why neither is done."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from meshlocal.app.config_loader import load_config
from meshlocal.cli.main import cli
from meshlocal.wire.instances_file import parse_instances_file
from nursery_tests.docs.pages import PAGES, ROOT, Block, Step, alike, blocks, steps

ALL = [block for page in PAGES for block in blocks(page)]
RUN = ("sh", "console", "python")
READ = ("", "text", "protobuf")
"""Drawings, outputs and formulas: nothing that a reader could run."""
OTHERS = ("docs/tutorial.md",)
"""Pages with a test of their own."""
REST: dict[str, dict[str, object]] = {
    "proxy": {"proxy.listen": ("tcp://127.0.0.1:0=b",), "proxy.discovery.urls": ("grpc://127.0.0.1:7070",)},
    "discovery": {"discovery.sources": ("file:instances.yaml",)},
}
ADDRESSES = ("10.0.0.5", "10.0.0.6", "10.0.1.10", "10.0.2.10")
"""What the pages use: the machine's own, in the network that an example runs in."""
LIMIT = 120.0

BROKEN_INSTANCES = "services:\n  b:\n    - {address: 10.0.1.10, port: 70000}\n"
BROKEN_CONFIG = "proxy:\n  listen: []\n  attempts:\n    conect_timeout: 1\n"
GIVEN = {
    "docs/configuration.md": {"proxy.yaml": BROKEN_CONFIG},
    "docs/physical-machines.md": {"new.yaml": BROKEN_INSTANCES},
}
"""Files that a page speaks of without showing them."""
FAILING = ("docs/configuration.md", "new.yaml")
"""Where a command is shown to fail."""
BEFORE = {
    "docs/proxy.md": "meshlocal discovery --bind 10.0.0.5:7070 --source file:instances.yaml",
    "docs/monitoring.md": "meshlocal proxy --discovery file:instances.yaml --listen tcp://127.0.0.1:15001=b",
}
"""What runs already where a page begins."""

in_page = pytest.mark.parametrize("page", sorted({block.page for block in ALL}))


def _of(*languages: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", [block for block in ALL if block.language in languages], ids=str)


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    kinds = {*RUN, *READ, "yaml", "promql"}
    assert [str(block) for block in ALL if block.language not in kinds and not block.exempt] == []


@_of("yaml")
def test_yaml_is_what_it_is_meant_for(block: Block, tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all(block.text))
    if block.exempt:
        return
    keys = set(documents[0])
    if keys & {"proxy", "discovery", "log"}:
        file = tmp_path / "config.yaml"
        file.write_text(block.text)
        for role in ("proxy", "discovery"):
            if role in keys:
                # What an excerpt leaves to flags or to other parts of a file is not its mistake.
                given = documents[0][role]
                missing = {key: value for key, value in REST[role].items() if not _has(given, key.split(".")[1])}
                load_config(file, missing, {}, role)
    elif keys & {"services", "zone"}:
        assert parse_instances_file(block.text, str(block)).services
    elif keys == {"groups"}:
        rules = [rule for group in documents[0]["groups"] for rule in group["rules"]]
        assert rules
        for rule in rules:
            assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
            _metrics_exist(rule["expr"])
    else:
        # Kubernetes' and Prometheus' own: nursery_tests/deploy/test_docs.py builds and validates the former.
        assert keys & {"apiVersion", "env", "scrape_configs"}, f"{block}: what is this for?"


def _has(given: dict[str, Any], key: str) -> bool:
    return bool(given.get(key)) and (key != "discovery" or "urls" in given[key])


@_of("promql")
def test_queries_name_metrics_with_labels_that_they_have(block: Block) -> None:
    _metrics_exist(block.text)


def _metrics_exist(query: str) -> None:
    reference = PAGES["docs/metrics.md"].read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*)\|", reference, re.MULTILINE)
    known = {
        name: {*re.findall(r"\w+", labels), *(["le"] if kind == "histogram" else [])} for name, kind, labels in rows
    }
    used = re.findall(r"\b(meshlocal_\w+?)(?:_bucket)?\b(?:\{([^}]*)\})?(?![\w(])", query)
    assert used
    for name, labels in used:
        assert name in known
        assert set(re.findall(r"(\w+)(?:=~|!=|!~|=)\"", labels)) <= known[name], query
    for grouped in re.findall(r"by \(([^)]*)\)", query):
        assert set(re.findall(r"\w+", grouped)) <= set().union(*(known[name] for name, _ in used)), query


@_of("sh", "console")
def test_command_lines_are_meshlocals(block: Block) -> None:
    """Every `meshlocal COMMAND …` parses, on pages that are not run as well; and all of it is good shell."""
    text = block.text if block.language == "sh" else "\n".join(step.command for step in steps(block))
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    command = re.compile(r"^.*?(?<![-/\w.])(?=(/\S*/)?meshlocal (proxy|discovery|get|explain|demo)\b)")
    for line in text.replace("\\\n", " ").splitlines():
        if not command.search(line):
            continue
        _, name, *arguments = shlex.split(re.sub(r"( [0-9]?>.*| &.*)$", "", command.sub("", line)), comments=True)
        try:
            # With what is set for all commands: each keeps its help option as it was made first.
            with click.Context(cli, info_name="meshlocal", **cli.context_settings) as parent:
                cli.commands[name].make_context(name, arguments, parent=parent)
        except click.UsageError as error:
            pytest.fail(f"{block}: {line}: {error.format_message()}")


@in_page
def test_metrics_that_a_page_names_exist(page: str) -> None:
    reference = PAGES["docs/metrics.md"].read_text()
    named = set(re.findall(r"\bmeshlocal_[a-z_]+[a-z]\b", PAGES[page].read_text()))
    known = set(re.findall(r"`(meshlocal_\w+)`", reference))
    assert {name for name in named if not {name, f"{name}_total", name.removesuffix("_bucket")} & known} == set()


def _followed(page: str) -> Iterator[Step]:
    """What is run of a page: commands, and programs with what is shown right after them."""
    found = blocks(page)
    for block, following in zip(found, [*found[1:], None], strict=True):
        if block.language not in RUN or block.exempt:
            continue
        if block.language == "python":
            file = f"example_{block.line}.py"
            shown = following.text if following is not None and following.language == "text" else None
            yield Step(str(block), f"cat > {file} <<'@@@'\n{block.text}@@@\npython -W error {file}", shown)
        else:
            yield from (step._replace(command=_servers_behind(step.command)) for step in steps(block))


def _servers_behind(text: str) -> str:
    """The commands, with every server in the background from when it is ready on."""
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        if re.match(r"(\w+=\S+ )*meshlocal (proxy|discovery) ", line) and "--config" not in line:
            line = f": > ready.out; ({line}) > ready.out 2>> servers.err & "
            line += "while kill -0 $! && ! grep -q ready: ready.out; do sleep 0.02; done"
        lines.append(line)
    return "\n".join(lines)


RUNNABLE = sorted({block.page for block in ALL if block.language in RUN and not block.exempt} - {*OTHERS})


@pytest.mark.netns
@pytest.mark.parametrize("page", RUNNABLE)
def test_what_a_page_says_happens(page: str, tmp_path: Path, root: None, program: Any) -> None:
    """All commands and programs of a page, in order, in one shell, on a machine that has the pages' addresses."""
    (tmp_path / "protos").symlink_to(ROOT / "protos")
    written: list[tuple[str, str]] = []
    for each in ("README.md", page):
        for block in blocks(each):
            if block.language == "yaml" and (name := re.match(r"# ([\w/.-]+\.yaml)\n", block.text)):
                # Absolute paths are below the folder here. Of several of a name the first counts: others are elsewhere.
                file = tmp_path / Path(name[1]).name
                if (each, file.name) not in written:
                    file.write_text(_here(block.text, tmp_path))
                    written.append((each, file.name))
    for given, text in GIVEN.get(page, {}).items():
        (tmp_path / given).write_text(text)
    before = [Step("before", _servers_behind(BEFORE[page]), None)] if page in BEFORE else []
    followed = [*before, *_followed(page)]
    lines = ["exec 2>&1"]
    for number, step in enumerate(followed):
        lines += [f"echo '@@@ step {number}'", _here(step.command.rstrip(), tmp_path), 'echo "@@@ status $?"']
    (tmp_path / "script").write_text("\n".join(lines) + "\n")
    ip = program("ip")
    network = [f"{ip} link set lo up", f"{ip} link add v0 type veth peer name v1", f"{ip} link set v1 up"]
    network += [f"{ip} address add {each}/32 dev v0" for each in ADDRESSES]
    inside = " && ".join([*network, f"{ip} link set v0 up", f"exec timeout {LIMIT:.0f} bash script"])
    with (tmp_path / "output").open("w") as printed:
        done = subprocess.run(
            [program("unshare"), "--net", "--pid", "--fork", "--kill-child", "sh", "-c", inside],
            cwd=tmp_path,
            env={
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "LANG": "C.UTF-8",
                "HOME": str(tmp_path),
            },
            stdout=printed,
            stderr=subprocess.STDOUT,
            timeout=LIMIT + 30,
            check=False,
        )
    output = (tmp_path / "output").read_text()
    said = re.split(r"^@@@ step \d+\n", output, flags=re.MULTILINE)[1:]
    assert len(said) == len(followed), f"{done.returncode}: {output}"
    for step, each in zip(followed, said, strict=True):
        text, _, status = each.rpartition("@@@ status ")
        told = f"{step.where}: {step.command}\nsaid:\n{each}"
        shown = _here(step.shown or "", tmp_path)
        fails = any(word in f"{step.where} {step.command}" for word in FAILING)
        assert (status.strip() != "0") == fails, told
        same = step.shown is None or alike(shown, text)
        assert same, told


def _here(text: str, folder: Path) -> str:
    return text.replace("/etc/meshlocal/", f"{folder}/")
