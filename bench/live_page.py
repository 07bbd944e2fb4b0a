"""What the proxy's page costs: `python -m bench.live_page`, which needs Debian's chromium for its second half.

200 services with 50 instances each, all of which were called. First, without a browser: how long the longest step of
making the page's data takes, which is as long as traffic waits for it at most. Of each step the quickest of several
times counts, so that what the machine does beside does not. Then in a browser, which is told of changes each second:
the time between two frames.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import trio

from meshlocal.admin.messages import Request
from meshlocal.app.config_loader import load_config
from meshlocal.app.live_page import LivePage
from meshlocal.app.operator import Operator
from meshlocal.app.proxy import ProxyProcess
from meshlocal.client.account import Account
from meshlocal.client.statistics import Outcome
from meshlocal.policy import model
from meshlocal.policy.config import Config
from meshlocal.policy.limits import Limit
from meshlocal.policy.model import ServiceKey, ServiceSnapshot, make_instance
from nursery_tests.e2e.browser import open_tab
from nursery_tests.e2e.running import Place, Processes

SERVICES, INSTANCES = 200, 50
TIMES = 30
SECONDS = 10
FRAMES = """
new Promise((done) => {
  const gaps = [], end = performance.now() + SECONDS * 1000;
  let last = performance.now();
  const frame = (now) => { gaps.push(now - last); last = now; now < end ? requestAnimationFrame(frame) : done(gaps); };
  requestAnimationFrame(frame);
})
""".replace("SECONDS", str(SECONDS))


def _name(number: int) -> ServiceKey:
    return ServiceKey(f"service-{number}")


def _process() -> ProxyProcess:
    def load() -> Config:
        flags: Mapping[str, object] = {
            "proxy.discovery.urls": ("grpc://127.0.0.1:1",),
            "proxy.listen": tuple(f"tcp://127.0.0.1:0={_name(number)}" for number in range(SERVICES)),
            "proxy.node_name": "n1",
        }
        return load_config(None, flags, {}, "proxy")

    process = ProxyProcess(load, random.Random(0), Operator({}))
    for number in range(SERVICES):
        instances = [
            make_instance(f"10.0.{number}.{each}", 9000, labels={"node": f"n{each}"})
            for each in range(1, INSTANCES + 1)
        ]
        process.services.publish(ServiceSnapshot(_name(number), "1", model.index(instances)))
        state = process.services[_name(number)]
        for _ in range(INSTANCES):
            account = Account(trio.current_time())
            account.begin(state, 10.0, Limit.REQUESTS)
            account.try_next(trio.current_time())
            account.connected(trio.current_time())
            account.answered()
            account.end(Outcome.SERVED, trio.current_time())
    return process


async def longest_step() -> tuple[float, float]:
    """The longest step of making the page's data, and all of them together; both in seconds."""
    process = _process()
    page = LivePage(process, process.history)
    best: list[float] = []
    for _ in range(TIMES):
        await trio.lowlevel.checkpoint()
        taken = []
        steps = page.live(Request("GET", "/live", f"service={_name(0)}", {}))
        while True:
            start = time.perf_counter()
            over = next(steps, steps) is steps
            taken.append(time.perf_counter() - start)
            if over:
                break
        best = taken if not best else [min(pair) for pair in zip(best, taken, strict=True)]
    return max(best), sum(best)


async def frames(chromium: str, folder: Path) -> list[float]:
    """Milliseconds between frames, the longest last, while requests come for some of the services."""
    async with trio.open_nursery() as nursery:
        processes, here = Processes(nursery, folder), Place()
        instance = await processes.instance("n0", "127.0.0.1", 0)
        port = int((await instance.printed(r"listening (\d+)", "out"))[1])
        rows = [f"{{address: 127.0.0.1, port: {port}, labels: {{node: n0}}}}"]
        rows += [f"{{address: 10.0.0.{each}, port: 9000, labels: {{node: n{each}}}}}" for each in range(1, INSTANCES)]
        text = "".join(f"  {_name(number)}: [{', '.join(rows)}]\n" for number in range(SERVICES))
        processes.write("instances.yaml", f"services:\n{text}")
        listen = [f"--listen=tcp://127.0.0.1:0={_name(number)}" for number in range(SERVICES)]
        proxy = await processes.meshlocal(
            *("proxy", "--discovery", "file:instances.yaml", "--admin", "127.0.0.1:0", "--node-name", "n0"), *listen
        )
        ready = (await proxy.printed(r"meshlocal proxy ready: .*\n", "out"))[0]
        ports = [int(part.rpartition("=")[0].rpartition(":")[2]) for part in ready.split() if part.startswith("tcp://")]

        async def call() -> None:
            while True:
                for each in ports[:20]:
                    await here.ask("127.0.0.1", each)
                    await trio.sleep(0.01)

        nursery.start_soon(call)
        async with open_tab(processes, chromium) as tab:
            await tab.go(ready.rstrip().rpartition("admin=")[2] + "/")
            await tab.until(f"document.querySelectorAll('#services tbody tr').length === {SERVICES}")
            await tab.until("document.querySelectorAll('#instances tbody tr').length > 0")
            gaps: list[float] = await tab.evaluate(FRAMES)
        nursery.cancel_scope.cancel()
    return sorted(gaps)


def main() -> None:
    """Measure, and print."""
    longest, whole = trio.run(longest_step)
    print(f"{SERVICES} services of {INSTANCES} instances: the longest step of making the page's data takes")
    print(f"{longest * 1000:.2f} ms, all of them {whole * 1000:.1f} ms")
    chromium = shutil.which("chromium")
    if chromium is None:
        print("there is no chromium: frames were not measured")
        return
    with tempfile.TemporaryDirectory() as folder:
        gaps = trio.run(partial(frames, chromium, Path(folder)))
    middle, late = gaps[len(gaps) // 2], gaps[len(gaps) * 99 // 100]
    print(
        f"in a browser, {len(gaps)} frames in {SECONDS} s: {middle:.1f} ms between two in the middle, {late:.1f} of a"
    )
    print(f"hundredth, {gaps[-1]:.1f} at most")


if __name__ == "__main__":
    main()
