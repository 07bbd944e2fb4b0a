"""The pages in Chromium: what is shown, and what a change makes of it, over WebSocket with JSON (D1, D3, R2)."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio
import trustme
from trio_websocket import WebSocketConnection, open_websocket_url

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

LIMIT = 60.0
"""Seconds that anything awaited may take; reached only by a failure."""

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *(
        "--window-size=1100,800",
        "--disable-dev-shm-usage",
        "--no-proxy-server",
        "--ignore-certificate-errors",
        "--remote-debugging-port=0",
    ),
)


class CommandError(Exception):
    """The browser could not do it, or what it ran failed."""


class Tab:
    """A page."""

    def __init__(self, connection: WebSocketConnection) -> None:
        self._connection = connection
        self._session: str | None = None
        self._last = 0

    async def command(self, method: str, **parameters: object) -> dict[str, Any]:
        """Send a command, and wait for its answer."""
        self._last += 1
        message: dict[str, object] = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        with trio.fail_after(LIMIT):
            await self._connection.send_message(json.dumps(message))
            while True:
                answer = json.loads(await self._connection.get_message())
                if answer.get("id") == self._last:
                    if "error" in answer:
                        raise CommandError(answer["error"]["message"])
                    result: dict[str, Any] = answer["result"]
                    return result

    async def open(self) -> None:
        target = await self.command("Target.createTarget", url="about:blank")
        attached = await self.command("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]

    async def go(self, url: str) -> None:
        """Open a page, and wait until it was read."""
        await self.command("Page.enable")
        await self.command("Page.navigate", url=url)
        await self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    async def evaluate(self, expression: str) -> Any:
        """What a JavaScript expression comes to; of a promise, what it is kept with."""
        answer = await self.command("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise CommandError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until a JavaScript expression holds."""
        with trio.move_on_after(LIMIT):
            while True:
                # While a page takes another one's place, there is no document to ask.
                with suppress(CommandError):
                    if await self.evaluate(condition):
                        return
                await trio.sleep(0.05)
        text = await self.evaluate("document.body.innerText")
        raise AssertionError(f"never so: {condition}\n{text}")

    async def rows(self, table: str) -> list[list[str]]:
        """The cells of a table's body, as they are shown."""
        found: list[list[str]] = await self.evaluate(
            f"[...document.querySelectorAll({json.dumps(table + ' tbody tr')})]"
            ".map((row) => [...row.cells].map((cell) => cell.innerText.trim()))"
        )
        return found

    async def screenshot(self, path: Path) -> None:
        shot = await self.command("Page.captureScreenshot", format="png")
        await trio.Path(path).write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def open_tab(processes: Any, chromium: str) -> AsyncIterator[Tab]:
    """A page in a browser of its own."""
    profile = processes.folder / "profile"
    browser = await processes.start([chromium, *FLAGS, f"--user-data-dir={profile}", "about:blank"])
    url = (await browser.printed(r"DevTools listening on (ws://\S+)", limit=LIMIT))[1]
    async with open_websocket_url(url, max_message_size=1 << 26) as connection:
        tab = Tab(connection)
        await tab.open()
        yield tab


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
        await tab.evaluate("document.querySelector('a[href^=\"/explain\"]').click()")
        await tab.until("document.readyState === 'complete' && document.title.endsWith('plan of b, seen from node n2')")
        assert [row[:4] for row in await tab.rows("table")] == [
            ["1", "10.0.0.2:9002", "n2", "node"],
            ["2", "10.0.0.1:9001", "n1", "other"],
        ]
