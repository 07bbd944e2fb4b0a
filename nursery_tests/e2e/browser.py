"""A browser of Debian's, driven over the DevTools protocol: a page, what it shows, and what a person does with it."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio
from trio_websocket import WebSocketConnection, open_websocket_url

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

    async def size(self, width: int, height: int) -> None:
        """Have a window of so many pixels."""
        await self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def prefer(self, scheme: str) -> None:
        """Have a person who prefers `dark`, or `light`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.command("Emulation.setEmulatedMedia", features=features)

    async def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key, and let it go."""
        common: dict[str, object] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        await self.command("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        await self.command("Input.dispatchKeyEvent", type="keyUp", **common)

    async def violations(self, axe: Path) -> list[str]:
        """What the page breaks of axe-core's rules.

        Args:
            axe: the library's script.
        """
        await self.command("Runtime.evaluate", expression=await trio.Path(axe).read_text())
        found: list[str] = await self.evaluate(
            "axe.run().then((found) => found.violations.flatMap((each) =>"
            " each.nodes.map((node) => each.id + ': ' + node.html.slice(0, 200))))"
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
