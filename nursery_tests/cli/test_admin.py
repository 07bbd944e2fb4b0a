"""cli/admin, tap, get proxies: what the command line asks of running processes, and what it says of no answer."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshlocal.app.query import QueryError
from meshlocal.app.watchers import watcher_view
from meshlocal.cli import lookup
from meshlocal.cli.admin import Admin
from meshlocal.cli.tap import tap
from meshlocal.policy import model
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.config import DiscoveryClientConfig, ProxyConfig
from meshlocal.policy.config_build import ConfigError
from meshlocal.policy.model import ServiceKey, ServiceSnapshot, make_instance
from meshlocal.wire.pb import discovery_pb2 as pb
from nursery_tests.ports import free_port

CONFIG = ProxyConfig(discovery=DiscoveryClientConfig(urls=(DiscoveryUrl("grpc", "127.0.0.1", 1),)))


@contextmanager
def answering(answer: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives this answer to each connection: its address, and what it was asked."""
    asked: list[bytes] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(self.request.recv(65536))
            self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def reply(body: bytes, status: str = "200 OK", kind: str = "application/json") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n".encode() + body


def test_a_page_is_asked_for_with_the_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("sesame\n")
    with answering(reply(b"{}")) as (address, asked):
        for spelt in (address, f"http://{address}/"):
            answer = Admin(spelt, None, str(tmp_path / "token")).get("/explain?service=b")
            assert (answer.status, answer.body, answer.word) == (200, b"{}", None)
    assert len(asked) == 2
    for request in asked:
        assert request.startswith(b"GET /explain?service=b HTTP/1.1\r\n")
        assert b"Authorization: Bearer sesame\r\n" in request


def test_a_tap_is_read_line_by_line_to_its_end() -> None:
    row = {"time": "2026-01-01T10:11:12.013Z", "service": "b", "outcome": "served", "attempts": 1, "seconds": 0.25}
    lines = json.dumps(row).encode() + b"\n\n" + b'{"service":"b","skipped":7}\n'
    with answering(reply(lines, kind="application/x-ndjson")) as (address, asked):
        found = list(tap(Admin(address, None, None), "b", left=True, failed=True, as_json=False))
        assert found == ["10:11:12.013  tcp  served  250.0ms", "… 7 more: too many to show"]
        raw = list(tap(Admin(address, None, None), "b c", left=False, failed=False, as_json=True))
        assert [json.loads(line) for line in raw] == [row, {"service": "b", "skipped": 7}]
    assert asked[0].startswith(b"GET /tap?service=b&left=1&failed=1 ")
    assert asked[1].startswith(b"GET /tap?service=b+c ")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (reply(b"no such service: 'b'\n", "404 Not Found", "text/plain"), "no such service: 'b'"),
        (reply(b"<html>", "503 Service Unavailable", "text/html"), "status 503"),
        (reply(b"<html>", kind="text/html"), "{} does not answer as a proxy's admin address does"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "cannot ask the proxy at {}: its answer is no HTTP"),
    ],
)
def test_what_is_no_tap_is_said(answer: bytes, told: str) -> None:
    with answering(answer) as (address, _), pytest.raises(QueryError) as caught:
        list(Admin(address, None, None).lines("/tap?service=b"))
    assert told.format(address) in str(caught.value)


def test_nobody_there() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(QueryError, match=f"cannot ask the proxy at {address}: connection refused"):
        Admin(address, None, None).get("/")


@pytest.mark.parametrize(
    ("address", "files", "told"),
    [
        ("nonsense", {}, "--proxy"),
        ("10.0.0.1:1", {"token_file": "token"}, "no token goes over plaintext beyond this machine"),
        ("127.0.0.1:1", {"token_file": "missing"}, "--token-file"),
        ("https://127.0.0.1:1", {"ca_file": "missing"}, "--ca-file"),
    ],
)
def test_what_cannot_be_asked_so(
    address: str, files: dict[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("token").write_text("sesame\n")
    with pytest.raises(ConfigError) as caught:
        Admin(address, files.get("ca_file"), files.get("token_file"))
    assert told in str(caught.value)


def watchers() -> list[dict[str, Any]]:
    messages = [
        pb.Watcher(
            caller=pb.Caller(name="web-1", node="n1", software="meshlocal proxy 1"),
            address="10.0.0.1:5",
            age_seconds=90,
            services=[pb.Watched(service=f"s{number}", version="abcdef" * 4) for number in range(7)],
        ),
        pb.Watcher(address="10.0.0.2:6", age_seconds=200_000, behind_ms=1500, services=[pb.Watched(service="s0")]),
    ]
    return [watcher_view(each) for each in reversed(messages)]


def test_get_proxies_and_hot_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "list_watchers", lambda discovery: (watchers(), 3))
    near = make_instance("10.0.1.1", 1, labels={"node": "n1"})
    snapshots = [
        ServiceSnapshot(ServiceKey("s0"), "v", model.index([near])),
        ServiceSnapshot(ServiceKey("s1"), "v", {}),
    ]
    monkeypatch.setattr(lookup, "fetch_all", lambda discovery: snapshots)
    lines = lookup.get("proxies", None, CONFIG, "table").splitlines()
    assert lines[0].split() == ["NAME", "NODE", "ADDRESS", "SOFTWARE", "BEHIND", "AGE", "SERVICES"]
    assert lines[1].split()[-4:] == ["-", "1.5s", "2d", "s0"]
    assert "90s" in lines[2]
    assert lines[2].endswith("s0, s1, s2, s3, s4, and 2 more")
    assert lines[3] == "… and 3 more"
    wide = lookup.get("proxies", None, CONFIG, "wide")
    assert "s0@nothing" in wide
    assert "s6@abcdefabcdef" in wide
    assert [each["address"] for each in json.loads(lookup.get("proxies", None, CONFIG, "json"))] == [
        "10.0.0.2:6",
        "10.0.0.1:5",
    ]
    hot = lookup.get("hot-nodes", None, CONFIG, "table").splitlines()
    assert [line.split() for line in hot] == [["SERVICE", "NODE", "CALLERS", "INSTANCES"], ["s1", "n1", "1", "0"]]
