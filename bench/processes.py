"""Starting what takes part in a measurement, and stopping it for sure."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.machine import ROOT

START_LIMIT = 30.0
STOP_LIMIT = 10.0


class StartError(Exception):
    """A process did not come up."""


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now, for programs that cannot choose one themselves."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def running(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, log: int | None = None, cwd: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its output on a pipe; terminated at the end, killed if that is not enough.

    Its log, standard error, goes to the file descriptor `log`, else where this process's own goes.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MESHLOCAL_")}
    clean.pop("NODE_NAME", None)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**clean, **(environment or {})},
        cwd=cwd,
    )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], sign: signal.Signals = signal.SIGTERM) -> None:
    """End a process."""
    process.send_signal(sign)
    if process.stdout is not None:
        process.stdout.close()
    try:
        process.wait(STOP_LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def ready_line(process: subprocess.Popen[bytes], limit: float = START_LIMIT) -> str:
    """The next line that a process prints.

    Raises:
        StartError: it ended, or said nothing in time.
    """
    assert process.stdout is not None
    line = b""
    end = time.monotonic() + limit
    # Read unbuffered: what a buffer holds, `select` does not see.
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        if not readable:
            raise StartError(f"{process.args!r} said nothing within {limit:g} s")
        received = os.read(process.stdout.fileno(), 1)
        if not received:
            raise StartError(f"{process.args!r} ended with status {process.wait()}")
        line += received
    return line.decode().rstrip("\n")


@contextmanager
def listening(command: Sequence[str], log: Path, ports: Iterable[int | Path]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that says nothing when it is ready: up once it listens on all its ports of 127.0.0.1, or Unix sockets.

    Raises:
        StartError: it ended, or did not listen in time; with the end of its log.
    """
    with log.open("wb") as sink, running(command, log=sink.fileno()) as process:
        for port in ports:
            end = time.monotonic() + START_LIMIT
            while not _connects(port):
                if time.monotonic() > end or process.poll() is not None:
                    raise StartError(f"{process.args!r} does not listen on {port}: {log.read_text()[-2000:]}")
                time.sleep(0.02)
        yield process


def _connects(port: int | Path) -> bool:
    if isinstance(port, Path):
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(port)) == 0
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def module(name: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A module of the benchmark as a process of its own, and the ports that its first line names."""
    with running([sys.executable, "-m", name, *arguments]) as process:
        yield process, [int(port) for port in ready_line(process).split()]


@contextmanager
def meshlocal(
    command: str, *arguments: str, node: str | None = None, log: int | None = None, checkout: Path = ROOT
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A meshlocal process, as it stands in a checkout, and the line that it prints when it is ready."""
    environment = {"NODE_NAME": node} if node is not None else {}
    full = [sys.executable, "-m", "meshlocal", command, *arguments]
    if log is None:
        full += ["--log-level", "error"]
    with running(full, environment=environment, log=log, cwd=checkout) as process:
        yield process, ready_line(process)


def port_in(line: str, pattern: str) -> int:
    """The port that a ready line names; `pattern` has one group for it."""
    found = re.search(pattern, line)
    if found is None:
        raise StartError(f"no {pattern} in: {line}")
    return int(found[1])


def instances_file(path: Path, services: Mapping[str, Sequence[tuple[str, int, str]]]) -> None:
    """Write an instances file, whole or not at all. Instances are address, port and node."""
    lines = ["services:"]
    for service, instances in services.items():
        lines.append(f"  {service}:")
        for address, port, node in instances:
            lines.append(f"    - {{address: {address}, port: {port}, labels: {{node: {node}}}}}")
    draft = path.with_suffix(".new")
    draft.write_text("\n".join(lines) + "\n")
    os.replace(draft, path)
