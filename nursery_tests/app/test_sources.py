"""The table of registries: what other packages add to it, and what comes of a URL."""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import trio

from meshlocal.app import sources
from meshlocal.app.config_loader import load_config
from meshlocal.app.sources import load_kinds, make_sources
from meshlocal.discovery.file_source import FileSource
from meshlocal.discovery.source import Publisher, Source, SourceContext, SourceError
from meshlocal.policy.addresses import AddressError
from meshlocal.policy.config import DiscoveryServerConfig
from meshlocal.policy.config_build import ConfigError
from meshlocal.policy.sources import KINDS, SourceKind, SourceUrl


class Postcards:
    """A registry of somebody else's."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        publisher.replace({})
        task_status.started()


def open_postcards(options: object, context: SourceContext) -> Iterator[Source]:
    if options == "nowhere":
        raise SourceError("nobody lives there")
    yield Postcards(f"{options} from {context.zone}")


def read_postcards(text: str) -> object:
    if not text:
        raise ValueError("names no place")
    return text


KIND = SourceKind("post:PLACE", read_postcards, f"{__name__}:open_postcards")
NO_KIND = "nothing of the kind"
NOTHING: Any = None
EMPTY_KIND = SourceKind(NOTHING, NOTHING, NOTHING)


def __getattr__(name: str) -> object:
    if name == "EXITS":
        raise SystemExit("who imports it ends")
    raise AttributeError(name)


class Address:
    """Options that do not compare."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


def read_badly(text: str) -> object:
    if text == "exit":
        raise SystemExit(3)
    raise KeyError(text)


def open_badly(options: object, context: SourceContext) -> Iterator[Source]:
    raise SystemExit(3)


@pytest.fixture(autouse=True)
def _the_table_as_it_is() -> Iterator[None]:
    before = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(before)


def installed(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    found = [EntryPoint(name, f"{__name__}:{value}", "meshlocal.sources") for name, value in points.items()]
    monkeypatch.setattr(sources, "entry_points", lambda group: found if group == "meshlocal.sources" else [])


def test_a_kind_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its URLs are read, its sources made, its mistakes named: nothing else knows of it."""
    with pytest.raises(
        AddressError,
        match=r"^expected file:PATH, etcd://HOST:PORT/PREFIX, dns:NAME\?service=SERVICE, "
        r"meshlocal:grpc://HOST:PORT or kubernetes:, "
        r"got 'post:home'$",
    ):
        SourceUrl.parse("post:home")
    installed(monkeypatch, post="KIND")
    load_kinds()
    url = SourceUrl.parse("POST:home")
    assert str(url) == "post:home"
    with pytest.raises(AddressError, match=r"^names no place$"):
        SourceUrl.parse("post:")
    with pytest.raises(
        AddressError,
        match=r"^expected file:PATH, etcd://HOST:PORT/PREFIX, dns:NAME\?service=SERVICE, "
        r"meshlocal:grpc://HOST:PORT, kubernetes: or post:PLACE, "
        r"got 'x'$",
    ):
        SourceUrl.parse("x")
    config = DiscoveryServerConfig(sources=(SourceUrl.parse("file:a.yaml"), url), zone="z1")
    first, second = make_sources(config, random.Random(0), {})
    assert isinstance(first, FileSource)
    assert second.name == "home from z1"
    wrong = DiscoveryServerConfig(sources=(url, SourceUrl.parse("post:nowhere")))
    with pytest.raises(ConfigError) as caught:
        make_sources(wrong, random.Random(0), {})
    assert [str(each) for each in caught.value.problems] == ["discovery.sources[1]: post:nowhere: nobody lives there"]


@pytest.mark.parametrize(
    ("points", "problem"),
    [
        ({"post": "NOT_THERE"}, "AttributeError"),
        ({"post": "NO_KIND"}, "TypeError: str is no SourceKind"),
        ({"post": "EMPTY_KIND"}, "TypeError: its form and parse and factory cannot be used"),
        ({"post": "EXITS"}, "SystemExit: who imports it ends"),
        ({"Post": "KIND"}, "ValueError: its name is no scheme in lower case"),
        ({"file": "KIND"}, "there is one of this scheme"),
    ],
)
def test_a_kind_that_cannot_be_used_costs_nobody_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, points: dict[str, str], problem: str
) -> None:
    """It is said which, and left out; the one beside it is there."""
    installed(monkeypatch, **points, card="KIND")
    before = dict(KINDS)
    load_kinds()
    assert before | {"card": KIND} == KINDS
    (record,) = [each for each in caplog.records if each.getMessage().startswith("source kind left out")]
    assert problem in record.getMessage()


@pytest.mark.parametrize(("text", "problem"), [("boom", "KeyError: 'boom'"), ("exit", "SystemExit: 3")])
def test_options_that_cannot_be_read(text: str, problem: str) -> None:
    """Whatever somebody else's reading of them raises, the URL is refused, and nothing ends."""
    KINDS["post"] = KIND._replace(parse=read_badly)
    with pytest.raises(AddressError) as caught:
        SourceUrl.parse(f"post:{text}")
    assert str(caught.value) == f"post: cannot be read: {problem}"


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        ("no_such_module:open", "ModuleNotFoundError: No module named 'no_such_module'"),
        (f"{__name__}:no_such_function", f"AttributeError: {__name__}.no_such_function"),
        (f"{__name__}:open_badly", "SystemExit: 3"),
    ],
)
def test_sources_that_cannot_be_made(factory: str, problem: str) -> None:
    """The URL at fault is named, and nothing ends."""
    KINDS["post"] = KIND._replace(factory=factory)
    config = DiscoveryServerConfig(sources=(SourceUrl.parse("file:a.yaml"), SourceUrl.parse("post:home")))
    with pytest.raises(ConfigError) as caught:
        make_sources(config, random.Random(0), {})
    (found,) = caught.value.problems
    assert str(found).startswith("discovery.sources[1]: post:home: cannot be made: ")
    assert problem.rpartition(".")[2] in str(found)


def test_urls_are_the_same_if_they_are_written_the_same() -> None:
    """S2: a reload that changes no source changes nothing, whatever the options are."""
    KINDS["post"] = KIND._replace(parse=Address)
    one, same, other = (SourceUrl.parse(text) for text in ("post:home", "POST:home", "post:away"))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != "post:home"
    assert DiscoveryServerConfig(sources=(one,)) == DiscoveryServerConfig(sources=(same,))


def test_who_reads_a_file_for_both_knows_the_kinds_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A proxy reads the discovery server's section as well, and refuses no file that the server takes."""
    installed(monkeypatch, post="KIND")
    monkeypatch.setattr("meshlocal.policy.sources.find_more", [load_kinds])
    file = tmp_path / "both.yaml"
    proxy = "proxy: {discovery: {urls: ['grpc://127.0.0.1:1']}, listen: ['tcp://127.0.0.1:0=b']}"
    file.write_text(f"discovery: {{sources: ['post:home']}}\n{proxy}\n")
    assert load_config(file, {}, {}, "proxy").discovery.sources == (SourceUrl("post", "home"),)
