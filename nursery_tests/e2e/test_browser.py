"""The pages in Chromium: what is shown, and what a change makes of it, over WebSocket with JSON (D1, D3, R2)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trustme

from nursery_tests.e2e.browser import Tab, open_tab

INSTANCES = """\
services:
  b:
    - {address: 10.0.0.1, port: 9001, port_name: grpc, labels: {node: n1}}
    - {address: 10.0.0.2, port: 9002, labels: {node: n2, version: "<b>2</b>"}}
  c: []
"""
CHANGED = """\
services:
  b:
    - {address: 10.0.0.1, port: 9001, port_name: grpc, labels: {node: n1}, ready: false}
    - {address: "fd00::3", port: 9003, labels: {node: n3}}
  c: []
"""
DISCOVERY = ("discovery", "--source", "file:instances.yaml")
READY = r"ready: grpcs?://(\S+) wss?://(\S+) admin=(\S+)"
COUNT = "document.getElementById('count').innerText"
STATE = "document.getElementById('state').innerText"


@asynccontextmanager
async def watching(processes: Any, program: Callable[[str], str], *arguments: str) -> AsyncIterator[tuple[Tab, str]]:
    """A browser, and the admin address of a discovery server."""
    processes.write("instances.yaml", INSTANCES)
    binds = ("--bind", "127.0.0.1:0", "--websocket-bind", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    server = await processes.meshlocal(*DISCOVERY, *binds, *arguments)
    ready = await server.printed(READY, "out")
    async with open_tab(processes, program("chromium")) as tab:
        yield tab, ready[3]


async def choose(tab: Tab, service: str) -> None:
    await tab.evaluate(
        f"document.getElementById('service').value = '{service}', document.querySelector('#choose button').click()"
    )


async def test_a_page_follows_a_service_live(processes: Any, program: Callable[[str], str], tmp_path: Path) -> None:
    """A snapshot, then each change as it comes, marked; what labels hold is text and no markup."""
    async with watching(processes, program) as (tab, admin):
        await tab.go(f"{admin}/watch#b")
        await tab.until(f"{COUNT} === 'b: 2 instances' && {STATE} === 'live'")
        rows = await tab.rows("#table")
        assert [row[:4] for row in rows] == [
            ["10.0.0.1:9001", "grpc", "n1", "ready"],
            ["10.0.0.2:9002", "–", "n2", "ready"],
        ]
        assert "version=<b>2</b>" in rows[1][4]
        assert await tab.evaluate("document.querySelectorAll('tr.changed').length") == 0
        assert await tab.evaluate("document.getElementById('history').hidden")

        processes.write("instances.yaml", CHANGED)
        await tab.until("document.getElementById('changes').children.length > 0")
        assert [row[:4] for row in await tab.rows("#table")] == [
            ["10.0.0.1:9001", "grpc", "n1", "not ready"],
            ["[fd00::3]:9003", "–", "n3", "ready"],
        ]
        said = await tab.evaluate("document.getElementById('changes').innerText")
        assert "new: [fd00::3]:9003; changed: 10.0.0.1:9001; gone: 10.0.0.2:9002" in said
        assert await tab.evaluate("document.querySelectorAll('tr.changed').length") == 2
        await tab.screenshot(tmp_path / "changed.png")

        await choose(tab, "c")
        await tab.until(f"{COUNT} === 'c: 0 instances'")
        assert await tab.evaluate("document.getElementById('table').hidden")
        await choose(tab, "nobody")
        await tab.until(f"{COUNT} === 'nobody: no registry knows it'")
        await tab.evaluate("location.hash = 'b'")
        await tab.until(f"{COUNT} === 'b: 2 instances'")


async def test_a_page_outlives_its_server(processes: Any, program: Callable[[str], str]) -> None:
    """D1, D3: an outage is said, and what was known stays; the page comes back by itself, with what changed."""
    processes.write("instances.yaml", INSTANCES)
    binds = ("--bind", "127.0.0.1:0", "--websocket-bind", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    first = await processes.meshlocal(*DISCOVERY, *binds)
    grpc, websocket, admin = (await first.printed(READY, "out")).groups()
    async with open_tab(processes, program("chromium")) as tab:
        await tab.go(f"{admin}/watch#b")
        await tab.until(f"{COUNT} === 'b: 2 instances'")
        await first.killed()
        await tab.until(f"{STATE}.startsWith('not connected')")
        assert (await tab.evaluate(STATE)).endswith("what is shown may be old")
        assert len(await tab.rows("#table")) == 2
        processes.write("instances.yaml", CHANGED)
        again = ("--bind", grpc, "--websocket-bind", websocket, "--admin", admin.removeprefix("http://"))
        await (await processes.meshlocal(*DISCOVERY, *again)).printed(READY, "out")
        await tab.until(f"{STATE} === 'live' && document.getElementById('changes').children.length > 0")
        assert [row[0] for row in await tab.rows("#table")] == ["10.0.0.1:9001", "[fd00::3]:9003"]


async def test_over_tls_with_a_token(processes: Any, program: Callable[[str], str]) -> None:
    """A page sends the token that a person types; with a wrong one it says why it shows nothing."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(processes.folder / "cert.pem")
    certificate.private_key_pem.write_to_path(processes.folder / "key.pem")
    processes.write("tokens", "sesame ü\n")
    processes.write(
        "config.yaml", "discovery: {tls_certificate_file: cert.pem, tls_key_file: key.pem, tokens_file: tokens}\n"
    )
    async with watching(processes, program, "--config", "config.yaml") as (tab, admin):
        await tab.go(f"{admin}/watch#b")
        assert await tab.evaluate(STATE) == "not connected"
        for token, shown in (("guess", "the token is not known"), ("sesame ü", "live")):
            await tab.evaluate(f"document.getElementById('token').value = '{token}'")
            await choose(tab, "b")
            await tab.until(f"{STATE}.includes('{shown}')")
        await tab.until(f"{COUNT} === 'b: 2 instances'")


async def test_pages_of_others_may_not_watch(processes: Any, program: Callable[[str], str]) -> None:
    """A page of another origin cannot read the registry, though the browser would let it connect."""
    async with watching(processes, program) as (tab, admin):
        await tab.go(f"{admin}/watch#b")
        await tab.until(f"{STATE} === 'live'")
        connect = """new Promise((done) => {
            const {port, path, subprotocol} = SETTINGS;
            const socket = new WebSocket("ws://127.0.0.1:" + port + path, [subprotocol]);
            socket.onopen = () => done("open");
            socket.onclose = () => done("refused");
        })"""
        settings = await tab.evaluate("document.getElementById('settings').textContent")
        assert await tab.evaluate(connect.replace("SETTINGS", settings)) == "open"
        await tab.go("data:text/html,other")
        assert await tab.evaluate(connect.replace("SETTINGS", settings)) == "refused"


async def test_from_the_overviews_to_what_they_tell_of(processes: Any, program: Callable[[str], str]) -> None:
    """R2: the links of both overviews lead to the live view, and to the next request's plan."""
    async with watching(processes, program) as (tab, admin):
        await tab.go(f"{admin}/")
        await tab.evaluate("[...document.querySelectorAll('a')].find((link) => link.innerText === 'b').click()")
        await tab.until(f"location.hash === '#b' && {COUNT} === 'b: 2 instances'")
        listen = ("--listen", "tcp://127.0.0.1:0=b", "--admin", "127.0.0.1:0", "--node-name", "n2")
        proxy = await processes.meshlocal("proxy", "--discovery", "file:instances.yaml", *listen)
        await tab.go((await proxy.printed(r"admin=(\S+)", "out"))[1] + "/")
        await tab.until("document.querySelector('a[href=\"/explain?service=b\"]') !== null")
        await tab.evaluate("document.getElementById('plan-link').click()")
        await tab.until("document.readyState === 'complete' && document.title.endsWith('plan of b, seen from node n2')")
        assert [row[:4] for row in await tab.rows("table")] == [
            ["1", "10.0.0.2:9002", "n2", "node"],
            ["2", "10.0.0.1:9001", "n1", "other"],
        ]
