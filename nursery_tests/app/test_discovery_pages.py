"""app/discovery_pages: who follows a discovery server, and where callers outnumber instances (L1, D1)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from meshlocal.admin.messages import Request, Response
from meshlocal.admin.server import answer
from meshlocal.app.config_loader import load_config
from meshlocal.app.discovery import DiscoveryProcess
from meshlocal.app.discovery_pages import discovery_routes
from meshlocal.discovery.watches import Watching
from meshlocal.policy.config import Config
from meshlocal.policy.model import Caller, ServiceKey

INSTANCES = """\
services:
  b:
    - {address: 10.0.0.1, port: 9001, labels: {node: n1}}
  c: []
"""
B, C = ServiceKey("b"), ServiceKey("c")


@pytest.fixture
async def process(tmp_path: Path, nursery: trio.Nursery) -> DiscoveryProcess:
    (tmp_path / "instances.yaml").write_text(INSTANCES)

    def load() -> Config:
        flags: Mapping[str, object] = {"discovery.sources": (f"file:{tmp_path}/instances.yaml",)}
        return load_config(None, flags, {}, "discovery")

    made = DiscoveryProcess(load, random.Random(0), {}, discovery_routes)
    await nursery.start(made.hub.run)
    await made.hub.wait_in_sync()
    return made


@contextmanager
def watched(process: DiscoveryProcess, name: str, node: str, *, behind: float | None = None) -> Iterator[None]:
    """Somebody follows both services, and is that many seconds behind."""
    now = trio.current_time()
    with process.hub.watch({B: "", C: ""}) as watcher:
        watcher.take()
        watching = Watching(Caller(name, node, "meshlocal proxy 1"), "10.0.9.9:1", "", watcher, now - 60)
        watching.behind_since = None if behind is None else now - behind
        scope = trio.CancelScope()
        process.service.watches._under_way[scope] = watching
        yield
        del process.service.watches._under_way[scope]


async def get(process: DiscoveryProcess, path: str) -> Response:
    return await answer(discovery_routes(process)[path], Request("GET", path, "", {}))


async def test_who_follows_and_who_is_behind(process: DiscoveryProcess, mock_clock: trio.testing.MockClock) -> None:
    """What is behind comes first; names are text; each with what it was told."""
    empty = (await get(process, "/")).body.decode()
    assert "Proxies and applications that follow this server</h2><p>none</p>" in empty
    assert "Hot nodes" not in empty
    with watched(process, "<web-1>", "n1"), watched(process, "web-2", "", behind=2.5), watched(process, "web-3", "n2"):
        page = (await get(process, "/")).body.decode()
        assert page.index("web-2") < page.index("&lt;web-1&gt;") < page.index("web-3")
        assert "for 2.5 s" in page
        assert "<web-1>" not in page
        found = json.loads((await get(process, "/proxies")).body)
        assert [each["name"] for each in found["proxies"]] == ["web-2", "<web-1>", "web-3"]
        assert found["left_out"] == 0
        first = found["proxies"][0]
        assert (first["node"], first["behind"], first["age"]) == (None, 2.5, 60)
        snapshot = process.hub.snapshot(B)
        assert snapshot is not None
        assert first["services"]["b"] == snapshot.version


async def test_hot_nodes(process: DiscoveryProcess, mock_clock: trio.testing.MockClock) -> None:
    """Without an instance first; who does not know its node is nobody's caller."""
    with (
        watched(process, "1", "n1"),
        watched(process, "2", "n1"),
        watched(process, "3", "n2"),
        watched(process, "4", ""),
    ):
        found = json.loads((await get(process, "/proxies")).body)
        assert [tuple(each.values()) for each in found["hot_nodes"]] == [
            ("c", "n1", 2, 0),
            ("b", "n2", 1, 0),
            ("c", "n2", 1, 0),
            ("b", "n1", 2, 1),
        ]
        assert found["hot_nodes_in_all"] == 4
        page = (await get(process, "/")).body.decode()
        assert page.count("none: all requests leave") == 3


async def test_lists_are_bounded(
    process: DiscoveryProcess, mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshlocal.app.discovery_pages._SHOWN", 1)
    monkeypatch.setattr("meshlocal.app.discovery_pages.MOST_LISTED", 1)
    with watched(process, "first", "n8"), watched(process, "second", "n9"):
        page = (await get(process, "/")).body.decode()
        assert "And 1 more; /proxies has them" in page
        assert "And 3 more; /proxies names the hottest thousand." in page
        found = json.loads((await get(process, "/proxies")).body)
        assert ([each["name"] for each in found["proxies"]], found["left_out"]) == (["first"], 1)
