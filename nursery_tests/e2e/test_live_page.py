"""The proxy's page in Chromium: live, to be sorted, filtered, read in the dark, on a phone and without a mouse (R1)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from nursery_tests.e2e.browser import Tab, open_tab
from nursery_tests.e2e.running import LIMIT, Place, Processes, Program

STATUS = "document.getElementById('status').textContent"
TAB, ENTER = ("Tab", 9, ""), ("Enter", 13, "\r")


def cell(table: str, row: int, column: str) -> str:
    """What a cell shows, by its column's title."""
    return (
        f"(() => {{ const table = document.getElementById('{table}');"
        f" const at = [...table.tHead.rows[0].cells].findIndex((each) => each.textContent === '{column}');"
        f" return table.tBodies[0].rows[{row}].cells[at].innerText; }})()"
    )


class Running:
    """A proxy with two instances of b, and services that nobody uses."""

    def __init__(self, processes: Processes, here: Place, tab: Tab) -> None:
        self.processes, self.here, self.tab = processes, here, tab
        self.instances: dict[str, Program] = {}
        self.ports: dict[str, int] = {}
        self.port = 0
        self.proxy: Program
        self.url = ""

    async def start(self, *more: str) -> None:
        for node in ("n1", "n2"):
            self.instances[node] = await self.processes.instance(node, "127.0.0.1", 0)
            self.ports[node] = int((await self.instances[node].printed(r"listening (\d+)", "out"))[1])
        rows = [f"{{address: 127.0.0.1, port: {port}, labels: {{node: {node}}}}}" for node, port in self.ports.items()]
        self.processes.write("instances.yaml", f"services: {{b: [{', '.join(rows)}], c: []}}")
        listen = [f"--listen=tcp://127.0.0.1:0={name}" for name in ("b", "c", "missing")]
        self.proxy = await self.processes.meshlocal(
            *("proxy", "--discovery", "file:instances.yaml", "--admin", "127.0.0.1:0", "--node-name", "n1"),
            *listen,
            *more,
        )
        ready = await self.proxy.printed(r"tcp://127.0.0.1:(\d+)=b.*admin=(\S+)", "out")
        self.port, self.url = int(ready[1]), f"{ready[2]}/"
        await self.tab.go(self.url)
        await self.tab.until(f"{STATUS} === 'live'")

    async def ask(self, times: int, by: str) -> None:
        for _ in range(times):
            assert await self.here.ask("127.0.0.1", self.port) == by


@asynccontextmanager
async def showing(
    processes: Processes, here: Place, program: Callable[[str], str], *more: str
) -> AsyncIterator[Running]:
    async with open_tab(processes, program("chromium")) as tab:
        running = Running(processes, here, tab)
        await running.start(*more)
        yield running


async def test_a_kill_is_seen_without_a_reload(
    processes: Processes, here: Place, program: Callable[[str], str]
) -> None:
    """R1, H1: where requests go, why they leave, which instance it is and what it suffers from."""
    async with showing(processes, here, program) as running:
        tab = running.tab
        await tab.evaluate("window.unchanged = true")
        await tab.until("document.querySelector('#services [aria-current] a')?.textContent === 'b'")
        await running.ask(4, "n1")
        await tab.until(f"{cell('services', 0, 'Local share, 10 min')}.trim() === '100 %'")
        near, far = (f"127.0.0.1:{running.ports[node]}" for node in ("n1", "n2"))
        await running.instances["n1"].killed()
        with trio.fail_after(LIMIT):
            await running.ask(4, "n2")
            await tab.until(f"{cell('services', 0, 'Local share, 10 min')}.trim() === '50 %'")
        rows = {row[0]: row for row in await tab.rows("#instances")}
        assert "ejected: connect, tried again" in rows[near][3]
        assert rows[near][7].startswith("refused ")
        assert rows[far][1:4] == ["n2", "other", "admitted"]
        assert rows[far][6] == "4"
        recent = await tab.rows("#recent")
        assert len(recent) == 4
        assert recent[-1][1:3] == ["tcp", "served"]
        assert recent[-1][4:6] == [f"{far} on n2", "local_failed"]
        assert recent[-1][6].startswith(f"{near} refused after ")
        reasons = " ".join(row[3] for row in await tab.rows("#requests"))
        assert "local_failed: only after every instance of the same node failed" in reasons
        assert [row[1] for row in await tab.rows("#plan")] == [far, near]
        assert {row[0] for row in await tab.rows("#latency")} == {"node", "other"}
        assert await tab.evaluate("window.unchanged"), "it was loaded again"


async def test_it_says_that_it_is_old_and_goes_on_when_the_proxy_is_back(
    processes: Processes, here: Place, program: Callable[[str], str]
) -> None:
    """D1."""
    async with showing(processes, here, program) as running:
        await running.tab.until("document.querySelectorAll('#services tbody tr').length === 3")
        await running.proxy.killed()
        await running.tab.until(f"{STATUS}.startsWith('not connected')")
        assert len(await running.tab.rows("#services")) == 3
        admin = running.url.removeprefix("http://").rstrip("/")
        again = ("proxy", "--discovery", "file:instances.yaml", "--admin", admin, "--listen", "tcp://127.0.0.1:0=b")
        await (await processes.meshlocal(*again)).printed("ready", "out")
        await running.tab.until(f"{STATUS} === 'live' && document.querySelectorAll('#services tbody tr').length === 1")


async def test_tables_are_sorted_and_filtered(processes: Processes, here: Place, program: Callable[[str], str]) -> None:
    async with showing(processes, here, program) as running:
        tab = running.tab
        await running.ask(3, "n1")
        await tab.until("document.querySelectorAll('#instances tbody tr').length === 2")
        await tab.until(f"[{cell('instances', 0, 'Attempts')}, {cell('instances', 1, 'Attempts')}].includes('3')")

        async def sort(column: str) -> None:
            await tab.evaluate(
                "[...document.querySelectorAll('#instances th')]"
                f".find((each) => each.textContent === '{column}').firstChild.click()"
            )

        await sort("Attempts")
        assert [row[6] for row in await tab.rows("#instances")] == ["3", "0"]
        await sort("Attempts")
        assert [row[6] for row in await tab.rows("#instances")] == ["0", "3"]
        sorted_by = (
            "[...document.querySelectorAll('#instances th[aria-sort]')]"
            ".map((each) => each.getAttribute('aria-sort') + each.textContent)"
        )
        assert await tab.evaluate(sorted_by) == ["ascendingAttempts"]
        await sort("Node")
        assert [row[1] for row in await tab.rows("#instances")] == ["n1", "n2"]
        filter_ = "document.getElementById('instances-filter')"
        await tab.evaluate(f"{filter_}.value = 'n2', {filter_}.dispatchEvent(new Event('input'))")
        assert [row[1] for row in await tab.rows("#instances")] == ["n2"]
        assert await tab.evaluate("document.getElementById('instances-count').textContent") == "1 of 2"
        # What is found is what is shown: the bars are a share in words, and no numbers of theirs.
        filter_ = "document.getElementById('services-filter')"
        for wanted, found in (("100 % local", ["b"]), ("missing", ["missing"]), ("0,0", [])):
            await tab.evaluate(f"{filter_}.value = '{wanted}', {filter_}.dispatchEvent(new Event('input'))")
            assert [row[0] for row in await tab.rows("#services")] == found


async def test_the_keyboard_is_enough(processes: Processes, here: Place, program: Callable[[str], str]) -> None:
    """Each link, button and field is reached by Tab, in the order of the page; and stays in focus when all changes."""
    async with showing(processes, here, program) as running:
        tab = running.tab
        await tab.until("document.querySelectorAll('#services tbody tr').length === 3")
        reached = []
        for _ in range(60):
            await tab.press(*TAB)
            name = await tab.evaluate("document.activeElement.id || document.activeElement.textContent.slice(0, 20)")
            reached.append(name)
            if name == "missing":
                break
        assert reached.index("services-filter") < reached.index("Service") < reached.index("c")
        await running.ask(2, "n1")
        await tab.until("document.querySelector('#services tbody').textContent.includes('100 %')")
        assert await tab.evaluate("document.activeElement.textContent") == "missing"
        await tab.press(*ENTER)
        await tab.until("document.getElementById('detail-title').textContent === 'Service missing'")
        state = await tab.evaluate("document.getElementById('detail-state').textContent")
        assert state == "no registry knows it: requests are refused"


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_is_accessible_and_fits_a_phone(
    processes: Processes, here: Place, program: Callable[[str], str], axe: Path, scheme: str
) -> None:
    """axe-core's rules, contrast included; no page is wider than its window."""
    async with showing(processes, here, program) as running:
        tab = running.tab
        await tab.prefer(scheme)
        await running.ask(1, "n1")
        await running.instances["n1"].killed()
        await running.ask(3, "n2")
        await tab.until("document.querySelectorAll('#recent tbody tr').length === 3")
        for page in ("", "explain?service=b"):
            if page:
                await tab.go(running.url + page)
            for width in (1200, 390):
                await tab.size(width, 900)
                assert await tab.violations(axe) == []
                assert await tab.evaluate("document.documentElement.scrollWidth") <= width, page


async def test_names_are_text_and_no_markup(processes: Processes, here: Place, program: Callable[[str], str]) -> None:
    """A registry's names and labels are drawn as they are."""
    async with showing(processes, here, program) as running:
        tab = running.tab
        near = running.ports["n1"]
        hostile = f"[{{address: 127.0.0.1, port: {near}, labels: {{node: '<img src=x onerror=alert(1)>'}}}}]"
        processes.write("instances.yaml", f"services: {{b: {hostile}}}")
        await tab.until(f"{cell('instances', 0, 'Node')} === '<img src=x onerror=alert(1)>'")
        assert await tab.evaluate("document.querySelectorAll('img').length") == 0


async def test_of_workers_one_is_shown(processes: Processes, here: Place, program: Callable[[str], str]) -> None:
    """S1: the page above several processes follows one of them, live."""
    async with showing(processes, here, program, "--workers", "2") as running:
        await running.tab.go(f"{running.url}?worker=2")
        await running.tab.until(f"{STATUS} === 'live'")
        assert "2 of 2" in await running.tab.evaluate("document.getElementById('facts').textContent")
        await running.tab.until("document.querySelectorAll('#instances tbody tr').length === 2")
