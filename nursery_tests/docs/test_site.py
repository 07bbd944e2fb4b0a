"""The check of the built site finds what it is there to find."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nursery_tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def build_site() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import build_site

        yield build_site
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('<a href="b.html#there">', None),
        ('<a href="folder/">', None),
        ('<a href="#here"><p id="here">', None),
        ('<a href="https://example.com/x#y">', None),
        ('<a href="c.html">', "a.html links to c.html, which is not there"),
        ('<a href="b.html#gone">', "a.html links to b.html#gone: the page has no such anchor"),
        ('<a href="#gone">', "a.html links to #gone: the page has no such anchor"),
        ('<a href="htp://example.com">', "a.html links to htp://example.com, which is no address"),
        ('<img src="gone.svg">', "a.html links to gone.svg, which is not there"),
        ('<script src="https://cdn.example/x.js"></script>', "a.html loads https://cdn.example/x.js"),
        ('<link rel="stylesheet" href="//fonts.example/f.css">', "a.html loads //fonts.example/f.css"),
    ],
)
def test_links_and_what_is_loaded(build_site: Any, tmp_path: Path, body: str, problem: str | None) -> None:
    (tmp_path / "a.html").write_text(body)
    (tmp_path / "b.html").write_text('<h2 id="there">')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text("")
    found = build_site.problems(tmp_path)
    assert found[:1] == ([problem] if problem else [])


def test_links_of_the_repository_become_the_sites(build_site: Any) -> None:
    text = (
        "[a](docs/rules.md#order) [b](bench/) [c](protos/meshlocal/discovery/v1/discovery.proto)\n```\n[d](x.md)\n```\n"
    )
    assert build_site._pointed("index.md", "README.md", text) == (
        "[a](rules.md#order) [b](benchmarks.md) [c](source/protos/meshlocal/discovery/v1/discovery.proto.md)\n"
        "```\n[d](x.md)\n```\n"
    )
    assert build_site._pointed("rules.md", "docs/rules.md", "[a](../README.md)") == "[a](index.md)"
    with pytest.raises(SystemExit, match=r"docs/rules.md: there is no gone.md"):
        build_site._pointed("rules.md", "docs/rules.md", "[a](gone.md)")
