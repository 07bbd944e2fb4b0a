"""Build the site in build/site from docs/, and check every link of it: `make docs`.

Pages are written to be read in the repository, with links to whatever file they mean. The site has the README as its
first page, the change log and the benchmarks' page from where they lie, and a page for every other file that is linked
to, so that no link leads out of it. Nothing is fetched, neither when it is built nor when it is read.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "pages"
SITE = ROOT / "build" / "site"
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "bench/README.md": "benchmarks.md",
    "SECURITY.md": "reporting.md",
}
"""Pages that are made from files outside docs/."""
LANGUAGES = {".yaml": "yaml", ".json": "json", ".proto": "protobuf", ".py": "python", ".service": "ini", ".sh": "sh"}

_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^(```|~~~).*?^\1[ ]*$", re.MULTILINE | re.DOTALL)


def assemble() -> None:
    """Write the site's pages to build/pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    origins = {page: origin for origin, page in ELSEWHERE.items()}
    origins |= {path.relative_to(PAGES).as_posix(): f"docs/{path.relative_to(PAGES)}" for path in PAGES.rglob("*.md")}
    sources: set[str] = set()
    for page, origin in origins.items():
        text = (ROOT / origin).read_text()
        sources.update(_sources(origin, text))
        (PAGES / page).write_text(_pointed(page, origin, text))
    for path in sources:
        file = PAGES / _source(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_source_page(path))


def _pointed(page: str, origin: str, markdown: str) -> str:
    """The page with links to files of the repository pointed at their pages."""

    def pointed(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, mark, anchor = target.partition("#")
        there = _page_of(_resolved(origin, path))
        return match[1] + posixpath.relpath(there, posixpath.dirname(page) or ".") + mark + anchor + match[3]

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(pointed, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(pointed, markdown[end:])])


def _sources(origin: str, text: str) -> Iterator[str]:
    """The repository's files and folders that a page links to and that are no pages."""
    for match in _LINK.finditer(_FENCE.sub("", text)):
        target = match[2].partition("#")[0]
        if target and not re.match(r"[a-z]+:", target):
            path = _resolved(origin, target)
            if path not in ELSEWHERE and not path.startswith("docs/"):
                yield path


def _resolved(origin: str, target: str) -> str:
    """A link's path from the repository's root."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
    if path.startswith("..") or not (ROOT / path).exists():
        raise SystemExit(f"{origin}: there is no {target}")
    return f"{path}/README.md" if f"{path}/README.md" in ELSEWHERE else path


def _page_of(path: str) -> str:
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else _source(path)


def _source(path: str) -> str:
    return f"source/{path}.md"


def _source_page(path: str) -> str:
    """A file, or the files of a folder, shown."""
    place = ROOT / path
    files = sorted(each for each in place.rglob("*") if each.is_file()) if place.is_dir() else [place]
    parts = [f"# {path}\n"]
    for file in files:
        if len(files) > 1:
            parts.append(f"\n## {file.relative_to(place)}\n")
        parts.append(f"\n````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text().rstrip()}\n````\n")
    return "".join(parts)


class Page(HTMLParser):
    """What a built page has and wants.

    Attributes:
        ids: what a link may lead to within it.
        links: where its own links lead.
        loads: what a browser fetches to show it.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.update(value for name in ("id", "name") if (value := found.get(name)))
        if tag == "a" and (href := found.get("href")):
            self.links.append(href)
        elif source := found.get("src") or (found.get("href") if tag == "link" else None):
            self.loads.append(source)


def problems(site: Path) -> list[str]:
    """Links and anchors that lead nowhere, and whatever a page would fetch from elsewhere."""
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        name = path.relative_to(site)
        found += [f"{name} loads {url}" for url in page.loads if urlsplit(url).netloc]
        for url in [*page.links, *page.loads]:
            try:
                parts = urlsplit(url)
            except ValueError as error:
                found.append(f"{name}: {url}: {error}")
                continue
            if parts.scheme or parts.netloc:
                if parts.scheme not in ("http", "https") or "." not in parts.netloc:
                    found.append(f"{name} links to {url}, which is no address")
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if there.is_dir():
                there /= "index.html"
            if not there.exists():
                found.append(f"{name} links to {url}, which is not there")
            elif there in pages and unquote(parts.fragment) not in pages[there].ids | {"", "__skip"}:
                found.append(f"{name} links to {url}: the page has no such anchor")
    return found


def build() -> None:
    """Build it and check it; whatever is wrong is said, and ends the process with status 1."""
    assemble()
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", "mkdocs.yml"]
    plain = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(command, check=False, cwd=ROOT, env=plain, capture_output=True, text=True)
    found = problems(SITE) if SITE.exists() else []
    if done.returncode or found:
        # What links lead nowhere is said shorter and in full by our own check.
        print("\n".join(found) or done.stdout + done.stderr)
        sys.exit(1)
    print(f"site is whole: {len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}")


if __name__ == "__main__":
    build()
