"""Makes the pictures of pages that docs/ shows: `make screenshots`, which needs Debian's chromium.

A proxy with two services serves requests, loses its local instance amid them, and is looked at.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path

import trio

from nursery_tests.e2e.browser import open_tab
from nursery_tests.e2e.running import Place, Processes

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SIZE = (1100, 1250)
STATUS = "document.getElementById('status').textContent"


async def make(chromium: str, folder: Path) -> None:
    """Make them all.

    Args:
        chromium: the browser.
        folder: for what the processes write.
    """
    async with trio.open_nursery() as nursery:
        processes, here = Processes(nursery, folder), Place()
        ports = {}
        instances = {}
        for node in ("n1", "n2", "n3"):
            instances[node] = await processes.instance(node, "127.0.0.1", 0)
            ports[node] = int((await instances[node].printed(r"listening (\d+)", "out"))[1])
        rows = ", ".join(
            f"{{address: 127.0.0.1, port: {port}, labels: {{node: {node}}}}}" for node, port in ports.items()
        )
        processes.write("instances.yaml", f"services: {{cache: [{rows}], flags: [{rows}], payments: [{rows}]}}")
        server = await processes.meshlocal(
            *("discovery", "--bind", "127.0.0.1:0", "--source", "file:instances.yaml", "--admin", "127.0.0.1:0"),
            *("--websocket-bind", "127.0.0.1:0"),
        )
        found = await server.printed(r"(grpc://\S+).* admin=(\S+)", "out")
        names = ("cache", "flags", "payments")
        proxy = await processes.meshlocal(
            *("proxy", "--discovery", found[1], "--admin", "127.0.0.1:0", "--node-name", "n1"),
            *(f"--listen=tcp://127.0.0.1:0={name}" for name in names),
        )
        ready = await proxy.printed(r"=(?:cache).*:(\d+)=flags.*:(\d+)=payments.*admin=(\S+)", "out")
        cache = int((await proxy.printed(r":(\d+)=cache", "out"))[1])
        async with open_tab(processes, chromium) as tab:
            await tab.size(*SIZE)
            await tab.go(f"{ready[3]}/")
            await tab.until(f"{STATUS} === 'live'")
            for number in range(600):
                if number == 350:
                    await instances["n1"].killed()
                for port in (cache, int(ready[1])) if number % 3 else (cache,):
                    await here.ask("127.0.0.1", port)
                await trio.sleep(0.03)
            await tab.screenshot(IMAGES / "proxy-page.png")
            await tab.size(SIZE[0], 500)
            await tab.go(f"{ready[3]}/explain?service=cache")
            await tab.screenshot(IMAGES / "plan-page.png")
            for node in ("n4", "n1"):
                # One on a node that has an instance, and one on a node without.
                other = await processes.meshlocal(
                    *("proxy", "--discovery", found[1], "--node-name", node, "--admin", "127.0.0.1:0"),
                    "--listen=tcp://127.0.0.1:0=cache",
                )
                await other.printed("ready", "out")
            await tab.size(SIZE[0], 900)
            await tab.go(f"{found[2]}/")
            await tab.until("document.body.textContent.includes('Hot nodes')")
            await tab.screenshot(IMAGES / "discovery-page.png")
            await tab.size(SIZE[0], 500)
            await tab.go(f"{found[2]}/watch#cache")
            await tab.until("document.getElementById('state').innerText === 'live'")
            await tab.screenshot(IMAGES / "watch-page.png")
        nursery.cancel_scope.cancel()


def main() -> None:
    """Find the browser, and make the pictures."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("there is no chromium")
    with tempfile.TemporaryDirectory() as folder:
        trio.run(partial(make, chromium, Path(folder)))


if __name__ == "__main__":
    main()
