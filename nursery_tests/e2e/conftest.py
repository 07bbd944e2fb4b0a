"""Real processes, and what a test needs to watch them: their output, their pages, a load of new connections."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

LIMIT = 20.0
"""Seconds that anything awaited may take; reached only by a failure."""

_POLL = 0.02


class Program:
    """A process, and all that it has printed."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.out = ""
        self.err = ""
        self._news = trio.Event()
        self._open = 2

    async def collect(self, name: str, stream: trio.abc.ReceiveStream) -> None:
        async for part in stream:
            setattr(self, name, getattr(self, name) + part.decode(errors="replace"))
            self._tell()
        self._open -= 1
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def printed(self, pattern: str, where: str = "err") -> re.Match[str]:
        """The first match of a pattern in what the process prints, now or later."""
        with trio.move_on_after(LIMIT):
            while (found := re.search(pattern, getattr(self, where))) is None and self._open:
                await self._news.wait()
            if found is not None:
                return found
        raise AssertionError(f"not printed: {pattern}\nstdout:\n{self.out}\nstderr:\n{self.err}")

    async def exited(self) -> int:
        """The exit status, once all output was read."""
        with trio.move_on_after(LIMIT):
            status = await self.process.wait()
            while self._open:
                await self._news.wait()
            return status
        raise AssertionError(f"still running\nstdout:\n{self.out}\nstderr:\n{self.err}")

    async def killed(self) -> None:
        self.process.kill()
        await self.exited()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


class Processes:
    """Starts processes, which all end with the test."""

    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        self._nursery = nursery
        self.folder = folder

    async def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> Program:
        """Start a program in the test's folder, in an environment without anything of meshlocal's but `env`."""
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("MESHLOCAL_") and name != "NODE_NAME"
        }
        run = partial(
            trio.run_process,
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            check=False,
            cwd=self.folder,
            env={**clean, **(env or {})},
            deliver_cancel=_kill,
        )
        process: trio.Process = await self._nursery.start(run)
        program = Program(process)
        assert process.stdout is not None
        assert process.stderr is not None
        self._nursery.start_soon(program.collect, "out", process.stdout)
        self._nursery.start_soon(program.collect, "err", process.stderr)
        return program

    async def meshlocal(
        self, *arguments: str, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> Program:
        """Start `meshlocal` with these arguments."""
        return await self.start([*prefix, sys.executable, "-m", "meshlocal", *arguments], env)

    async def instance(self, name: str, address: str, *ports: int, prefix: Sequence[str] = ()) -> Program:
        """Start an instance that answers with its name, and wait until it listens."""
        script = str(Path(__file__).with_name("instance.py"))
        program = await self.start([*prefix, sys.executable, "-SE", script, name, address, *map(str, ports)])
        await program.printed("listening", "out")
        return program

    def write(self, name: str, text: str) -> Path:
        """Replace a file in the test's folder, as editors do: whole, by rename."""
        path = self.folder / name
        fresh = path.with_suffix(".new")
        fresh.write_text(text)
        return fresh.rename(path)


async def _kill(process: trio.Process) -> None:
    process.kill()


@pytest.fixture
def processes(nursery: trio.Nursery, tmp_path: Path) -> Processes:
    return Processes(nursery, tmp_path)


class Place:
    """Where a client stands: this process's network, or, in a subclass, a node's."""

    prefix: Sequence[str] = ()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """For synchronous code only: sockets made here belong to the place."""
        yield

    async def connect(self, host: str, port: int) -> trio.SocketStream:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with self.inside():
            sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            await sock.connect((host, port))
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)

    async def ask(self, host: str, port: int) -> str:
        """Open a connection, ask who serves it, and close it.

        Raises:
            OSError, trio.BrokenResourceError: there was no answer.
        """
        async with await self.connect(host, port) as stream:
            await stream.send_all(b"who are you?\n")
            if not (answer := await stream.receive_some(64)):
                raise ConnectionError("the connection ended without an answer")
            return answer.decode().strip()

    async def get(self, port: int, path: str) -> tuple[int, str]:
        """Status and body of a page of an admin server on this place's loopback."""
        answer = b""
        with trio.fail_after(LIMIT):
            async with await self.connect("127.0.0.1", port) as stream:
                await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                async for part in stream:
                    answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), body.decode()

    async def metrics(self, port: int) -> Metrics:
        status, text = await self.get(port, "/metrics")
        assert status == 200
        return Metrics.parse(text)

    async def measured(self, port: int, holds: Callable[[Metrics], bool]) -> Metrics:
        """The metrics, once something holds of them."""
        found = await self.metrics(port)
        with trio.move_on_after(LIMIT):
            while not holds(found):
                await trio.sleep(_POLL)
                found = await self.metrics(port)
        assert holds(found), found
        return found


class Metrics(NamedTuple):
    samples: list[tuple[str, Mapping[str, str], float]]

    @classmethod
    def parse(cls, text: str) -> Metrics:
        families = text_string_to_metric_families(text)
        return cls([(each.name, each.labels, each.value) for family in families for each in family.samples])

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        return sum(
            value
            for sample, its, value in self.samples
            if sample == f"meshlocal_{name}" and labels.items() <= its.items()
        )


@pytest.fixture
def here() -> Place:
    return Place()


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
    def start(place: Place, host: str, port: int, **how: float) -> Load:
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
        _enter(self._file)
        try:
            yield
        finally:
            _enter(_OWN_NETWORK)


_OWN_NETWORK = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
_libc = ctypes.CDLL(None, use_errno=True)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, 0x40000000):  # CLONE_NEWNET; os.setns is there from Python 3.12 on
        raise OSError(ctypes.get_errno(), "setns")


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
