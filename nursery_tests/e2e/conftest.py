"""Real processes, a load of new connections, and nodes as network namespaces."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from nursery_tests.e2e.namespaces import inside_namespace
from nursery_tests.e2e.running import LIMIT, Place, Processes


@pytest.fixture
def processes(nursery: trio.Nursery, tmp_path: Path) -> Processes:
    return Processes(nursery, tmp_path)


@pytest.fixture
def here() -> Place:
    return Place()


AXE = Path(__file__).parents[2] / ".venv" / "node" / "node_modules" / "axe-core" / "axe.min.js"


@pytest.fixture
def axe() -> Path:
    """The script of axe-core's rules."""
    if not AXE.exists():
        pytest.skip("needs axe-core, which make installs where there is npm")
    return AXE


class Load:
    """A steady load of new connections, and who served them.

    Attributes:
        served: answers by name, since `restart`.
        last: the newest answers, oldest first.
        errors: why connections had no answer, ever.
    """

    def __init__(self, place: Place, host: str, port: int, *, workers: int = 3, pause: float = 0.01) -> None:
        self._place, self._host, self._port = place, host, port
        self._workers, self._pause = workers, pause
        self._under_way = 0
        self._paused: trio.Event | None = None
        self._news = trio.Event()
        self.served: Counter[str] = Counter()
        self.last: list[str] = []
        self.errors: list[str] = []

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(self._workers):
                nursery.start_soon(self._work)

    async def _work(self) -> None:
        while True:
            while self._paused is not None:
                await self._paused.wait()
            self._under_way += 1
            try:
                answer = await self._place.ask(self._host, self._port)
                self.served[answer] += 1
                self.last = [*self.last[-99:], answer]
            except (OSError, trio.BrokenResourceError) as error:
                self.errors.append(f"{error!r} after {error.__cause__!r}, at {trio.current_time():.3f}")
            self._under_way -= 1
            self._news.set()
            self._news = trio.Event()
            await trio.sleep(self._pause)

    @asynccontextmanager
    async def between(self) -> AsyncIterator[None]:
        """Between two connections: none is under way. One that an instance accepted is that instance's (A5)."""
        self._paused = trio.Event()
        try:
            await self.until(lambda: not self._under_way)
            yield
        finally:
            self._paused.set()
            self._paused = None

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds of what was served."""
        with trio.move_on_after(LIMIT):
            while not holds():
                await self._news.wait()
        assert holds(), (self.served, self.last, self.errors)

    async def next(self, count: int) -> Counter[str]:
        """Who serves the next connections; those under way now are not among them."""
        async with self.between():
            self.served = Counter()
        await self.until(lambda: self.served.total() >= count)
        async with self.between():
            return self.served

    async def only(self, *names: str, count: int = 30) -> None:
        """Wait until the last `count` connections went to these, and to each of them."""
        self.last = []
        await self.until(lambda: len(self.last) >= count and set(self.last[-count:]) == set(names))


@pytest.fixture
async def load(nursery: trio.Nursery) -> Callable[..., Load]:
    def start(place: Place, host: str, port: int, **how: Any) -> Load:
        made = Load(place, host, port, **how)
        nursery.start_soon(made.run)
        return made

    return start


class Node(Place):
    """A network namespace with addresses on the nodes' common network."""

    def __init__(self, namespace: str, number: int) -> None:
        self.namespace = namespace
        self.address = f"10.77.0.{number}"
        self.address6 = f"fd77::{number:x}"
        self.prefix = ["ip", "netns", "exec", namespace]
        self._file = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._file)

    @contextmanager
    def inside(self) -> Iterator[None]:
        with inside_namespace(self._file):
            yield


class Network:
    """Nodes n1, n2 and n3, and `outside` for a discovery server, joined by veth to a bridge in a namespace apart."""

    NAMES = ("n1", "n2", "n3", "outside")
    _PREFIX = "meshlocal-test-"

    def __init__(self) -> None:
        self._remove_left_behind()
        self._run = f"{self._PREFIX}{os.getpid()}-"
        self._switch = f"{self._run}switch"
        self._nodes: dict[str, Node] = {}

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    def build(self) -> None:
        self._ip("", *(f"netns add {self._run}{name}" for name in ("switch", *self.NAMES)))
        self._ip(
            self._switch,
            "link add bridge type bridge",
            "link set bridge up",
            *(f"link add {name} type veth peer name eth0 netns {self._run}{name}" for name in self.NAMES),
            *(f"link set {name} master bridge up" for name in self.NAMES),
        )
        for number, name in enumerate(self.NAMES, start=1):
            node = self._nodes[name] = Node(self._run + name, number)
            self._ip(
                node.namespace,
                f"addr add {node.address}/24 dev eth0",
                f"addr add {node.address6}/64 dev eth0 nodad",
                "link set lo up",
                "link set eth0 up",
            )

    def plug(self, name: str, *, plugged: bool) -> None:
        """Plug a node's cable into the switch, or out: packets to it vanish, and nobody says so."""
        self._ip(self._switch, f"link set {name} {'up' if plugged else 'down'}")

    def remove(self) -> None:
        for node in self._nodes.values():
            node.close()
        for name in ("switch", *self.NAMES):
            subprocess.run(["ip", "netns", "del", self._run + name], check=False, capture_output=True)

    def _ip(self, namespace: str, *lines: str) -> None:
        command = ["ip", *(["-n", namespace] if namespace else []), "-batch", "-"]
        subprocess.run(command, input="\n".join(lines), check=True, text=True)

    def _remove_left_behind(self) -> None:
        """Remove what a run that was killed could not remove itself."""
        folder = Path("/run/netns")
        for found in folder.glob(f"{self._PREFIX}*") if folder.exists() else ():
            owner = found.name.removeprefix(self._PREFIX).partition("-")[0]
            if not Path(f"/proc/{owner}").exists():
                subprocess.run(["ip", "netns", "del", found.name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def network(root: None, program: Callable[[str], str]) -> Iterator[Network]:
    """Three nodes and a place outside them."""
    program("ip")
    made = Network()
    try:
        made.build()
        yield made
    finally:
        made.remove()
