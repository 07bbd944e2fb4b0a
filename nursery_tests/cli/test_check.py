"""`meshlocal check`: what is wrong with a configuration, where, and what is most likely not meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from nursery_tests.certificates import Authority
from nursery_tests.cli.test_main import Run, run

__all__ = ["run"]

PROXY = """\
proxy:
  node_name: n1
  discovery: {urls: ["grpc://127.0.0.1:7070"]}
  listen: [tcp://127.0.0.1:15001=b]
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NODE_NAME", raising=False)


def write(text: str) -> str:
    Path("config.yaml").write_text(text)
    return "config.yaml"


def test_a_good_one(run: Run) -> None:
    assert run("check", write(PROXY)) == (0, "config.yaml is good, for proxy; no warnings\n", "")
    both = f"{PROXY}discovery: {{sources: ['file:instances.yaml']}}\n"
    assert run("check", write(both)) == (0, "config.yaml is good, for proxy and discovery; no warnings\n", "")


@pytest.mark.parametrize(
    ("text", "arguments", "problem"),
    [
        (
            PROXY.replace("node_name", "node_nam"),
            [],
            "config.yaml:2: proxy.node_nam: unknown key; did you mean 'node_name'?",
        ),
        (PROXY.replace(":15001=b", "=b"), [], "config.yaml:4: proxy.listen[0]: expected tcp://HOST:PORT=SERVICE"),
        ("proxy: {node_name: n1}\n", [], "config.yaml: has neither proxy.listen nor discovery.sources"),
        ("proxy: [\n", [], "config.yaml:2:1: "),
        (PROXY, ["--for", "discovery"], "discovery.sources: no source is given"),
        (
            PROXY + "  tls: {certificate_file: no.pem}\n  services: {b: {tls: {ca_file: no-ca.pem, server_name: b}}}\n",
            [],
            "proxy: no-ca.pem: No such file or directory",
        ),
        (
            "discovery: {sources: ['file:x'], tls_certificate_file: no.pem}\n",
            [],
            "discovery.tls_certificate_file: no.pem: No such file or directory",
        ),
        (PROXY + "  admin_access: {token_file: no}\n", [], "proxy: no: No such file or directory"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(run: Run, text: str, arguments: list[str], problem: str) -> None:
    status, out, err = run("check", write(text), *arguments)
    assert (status, out) == (2, "")
    assert problem in err


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (
            PROXY + "  services: {c: {port_name: http}}\n",
            "proxy.services.c is not used: no listener and no route names it",
        ),
        (PROXY.replace("  node_name: n1\n", ""), "proxy.node_name is not set, nor NODE_NAME"),
        (
            PROXY.replace("127.0.0.1:7070", "10.0.0.1:7070"),
            "proxy.discovery.urls[0]: grpc://10.0.0.1:7070 is plaintext",
        ),
        (PROXY + "  admin: 0.0.0.0:15000\n", "proxy.admin 0.0.0.0:15000 is served in plaintext beyond this machine"),
        (
            "discovery: {sources: ['file:x'], bind: ['0.0.0.0:7070'], tokens_file: tokens}\n",
            "discovery.bind 0.0.0.0:7070 is served in plaintext beyond this machine",
        ),
    ],
)
def test_warnings(run: Run, text: str, warning: str) -> None:
    """They are no errors, unless that is asked for."""
    Path("tokens").write_text("t\n")
    status, out, err = run("check", write(text))
    assert (status, err) == (0, "")
    assert any(line.startswith(f"warning: {warning}") for line in out.splitlines()), out
    assert "is good, for" in out.splitlines()[-1]
    assert run("check", "config.yaml", "--strict")[0] == 1
    assert run("check", write(PROXY), "--strict")[0] == 0


def test_a_variable_with_one_underscore(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHLOCAL_PROXY_ADMIN", "127.0.0.1:1")
    assert "warning: environment variable MESHLOCAL_PROXY_ADMIN is no key" in run("check", write(PROXY))[1]


def test_a_certificate_that_ends_soon(run: Run) -> None:
    pair = Authority(Path()).issue("own", ["localhost"], end=0.2)
    tls = f"  tls: {{certificate_file: {pair.certificate}, key_file: {pair.key}}}\n"
    text = PROXY.replace("listen: [", "listen: [tls://127.0.0.1:15002=b, ") + tls
    assert "warning: own.pem: the certificate expires at 20" in run("check", write(text))[1]
