"""The discovery server's page in Chromium: it follows what changes without a reload, for everybody (D1, L1)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nursery_tests.e2e.browser import Tab, open_tab
from nursery_tests.e2e.running import Processes, Program

INSTANCES = """\
services:
  b:
    - {address: 10.0.0.1, port: 9001, labels: {node: n1}}
    - {address: 10.0.0.2, port: 9001, labels: {node: n1}}
    - {address: 10.0.0.3, port: 9001, labels: {node: n2}}
"""
STATE = "document.getElementById('state').textContent"


def row(label: str, number: int = 0) -> str:
    """A row of a table, by what the table is."""
    return f"(document.querySelectorAll('[aria-label=\"{label}\"] tbody tr')[{number}] || {{innerText: ''}}).innerText"


class Running:
    """A discovery server that is looked at.

    Attributes:
        grpc: its URL for proxies.
        url: of its page.
    """

    def __init__(self, server: Program, tab: Tab, grpc: str, url: str) -> None:
        self.server, self.tab, self.grpc, self.url = server, tab, grpc, url


@asynccontextmanager
async def showing(processes: Processes, program: Callable[[str], str]) -> AsyncIterator[Running]:
    processes.write("instances.yaml", INSTANCES)
    binds = ("--bind", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    server = await processes.meshlocal("discovery", "--source", "file:instances.yaml", *binds)
    ready = await server.printed(r"ready: (grpc://\S+).* admin=(\S+)", "out")
    async with open_tab(processes, program("chromium")) as tab:
        await tab.go(f"{ready[2]}/")
        await tab.until(f"{row('Services')}.includes('n1: 2, n2: 1')")
        yield Running(server, tab, ready[1], ready[2])


async def follow(processes: Processes, running: Running, node: str) -> Program:
    """A proxy on a node that follows the server."""
    listen = ("--listen", "tcp://127.0.0.1:0=b", "--admin", "127.0.0.1:0")
    proxy = await processes.meshlocal("proxy", "--discovery", running.grpc, *listen, "--node-name", node)
    await proxy.printed("ready", "out")
    return proxy


async def test_it_follows_without_a_reload(processes: Processes, program: Callable[[str], str]) -> None:
    """Who follows, who has no instance on its node, and what is gone; the keyboard stays where it was."""
    async with showing(processes, program) as running:
        tab = running.tab
        await tab.evaluate("window.mark = 1; document.querySelector('[aria-label=Services]').focus()")
        first = await follow(processes, running, "n1")
        await tab.until(f"{row('Proxies')}.includes('n1')")
        assert await tab.evaluate("document.querySelector('[aria-label=\"Hot nodes\"]')") is None
        await follow(processes, running, "n7")
        await tab.until(f"{row('Hot nodes')}.includes('n7') && {row('Hot nodes')}.includes('none: all requests leave')")
        await first.killed()
        await tab.until(f"!{row('Proxies')}.includes('n1') && !{row('Proxies', 1)}")
        assert await tab.evaluate("window.mark") == 1
        assert await tab.evaluate("document.activeElement.getAttribute('aria-label')") == "Services"


async def test_it_says_that_nothing_is_heard(processes: Processes, program: Callable[[str], str]) -> None:
    """What was known stays."""
    async with showing(processes, program) as running:
        await running.server.killed()
        await running.tab.until(f"{STATE}.startsWith('not heard of since then')")
        await running.tab.until(f"{row('Services')}.includes('n1: 2, n2: 1')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_is_accessible_and_fits_a_phone(
    processes: Processes, program: Callable[[str], str], axe: Path, scheme: str
) -> None:
    """axe-core's rules, contrast included; no page is wider than its window."""
    async with showing(processes, program) as running:
        tab = running.tab
        await tab.prefer(scheme)
        await follow(processes, running, "n7")
        await tab.until(f"{row('Hot nodes')}.includes('n7')")
        for width in (1200, 390):
            await tab.size(width, 900)
            assert await tab.violations(axe) == []
            assert await tab.evaluate("document.documentElement.scrollWidth") <= width


async def test_names_are_text_and_no_markup(processes: Processes, program: Callable[[str], str]) -> None:
    """Also where a script puts them in place."""
    async with showing(processes, program) as running:
        await follow(processes, running, "<img src=x onerror=alert(1)>")
        await running.tab.until(f"{row('Proxies')}.includes('<img src=x onerror=alert(1)>')")
        assert await running.tab.evaluate("document.querySelectorAll('img').length") == 0
