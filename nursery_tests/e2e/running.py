"""Real processes, and what a test needs to watch them: their output and their pages."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
        self._hears = trio.Event()
        self._hears.set()

    @contextmanager
    def deaf(self) -> Iterator[int]:
        """What it says on standard error stays in the pipe; gives the pipe's descriptor."""
        stream = self.process.stderr
        assert stream is not None
        self._hears = trio.Event()
        try:
            yield stream.fileno()  # type: ignore[attr-defined]  # an FdStream has one
        finally:
            self._hears.set()

    async def collect(self, name: str, stream: trio.abc.ReceiveStream) -> None:
        async for part in stream:
            if name == "err":
                await self._hears.wait()
            setattr(self, name, getattr(self, name) + part.decode(errors="replace"))
            self._tell()
        self._open -= 1
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def printed(self, pattern: str, where: str = "err", start: int = 0, *, limit: float = LIMIT) -> re.Match[str]:
        """The first match of a pattern in what the process prints, now or later, from the character `start` on."""
        searched = re.compile(pattern)
        with trio.move_on_after(limit):
            while (found := searched.search(getattr(self, where), start)) is None and self._open:
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

    async def start(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, *, talk: bool = False
    ) -> Program:
        """Start a program in the test's folder, in an environment without anything of meshlocal's but `env`.

        With `talk` its standard input is a pipe, else there is none.
        """
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("MESHLOCAL_") and name != "NODE_NAME"
        }
        run = partial(
            trio.run_process,
            command,
            stdin=subprocess.PIPE if talk else b"",
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

    async def get(self, port: int, path: str, *, method: str = "GET") -> tuple[int, str]:
        """Status and body of a page of an admin server on this place's loopback."""
        answer = b""
        with trio.fail_after(LIMIT):
            async with await self.connect("127.0.0.1", port) as stream:
                head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                await stream.send_all(head.encode())
                async for part in stream:
                    answer += part
        told, _, body = answer.partition(b"\r\n\r\n")
        return int(told.split()[1]), body.decode()

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
