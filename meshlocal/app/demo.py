"""`meshlocal demo`: the main job on one machine, for people to watch.

Three small instances of a service `b` stand for three nodes. The proxy is a
process of its own, exactly as `meshlocal proxy` runs anywhere, told by
NODE_NAME that it runs on n1, and reads the instances from a file. A caller
opens one connection after another through it while n1's instance is stopped and
started again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from meshlocal.app.readiness import announce
from meshlocal.net.listen import open_tcp_listeners

NODES = ("n1", "n2", "n3")
OWN = "n1"
_START_LIMIT = 30.0
_RETURN_LIMIT = 30.0
_EJECTION = ("MESHLOCAL_PROXY__EJECTION__TIME", "0.5")
"""An instance that fails is left alone for a while: here a short one, so that nobody has to watch it pass."""
_BAR = 24


class DemoError(Exception):
    """The demo could not run, or showed something else than it should."""


class _Instance:
    """One instance of `b`: answers each line with its node's name."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.port = 0
        self._scope = trio.CancelScope()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        (sock,) = open_tcp_listeners("127.0.0.1", self.port)
        self.port = sock.getsockname()[1]
        self._scope = trio.CancelScope()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        with self._scope:
            await trio.serve_listeners(self._answer, [listener], task_status=_Forget(task_status))

    def stop(self) -> None:
        self._scope.cancel()

    async def _answer(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            async with stream:
                while await stream.receive_some(64):
                    await stream.send_all(f"{self.node}\n".encode())


class _Forget:
    """Passes on that a task has started, without what it started."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status

    def started(self, value: object = None) -> None:
        """Whether the task has started."""
        self._task_status.started()


def run_demo(seconds: float) -> int:
    """Run the demo; returns 0 if it showed what it should.

    Args:
        seconds: how long each act lasts.
    """
    problems: list[str] = []
    try:
        trio.run(_demo, seconds)
    except* DemoError as group:
        problems = [str(error) for error in group.exceptions]
    for problem in problems:
        announce(f"meshlocal demo: {problem}")
    return 1 if problems else 0


async def _demo(seconds: float) -> None:
    instances = {node: _Instance(node) for node in NODES}
    local = instances[OWN]
    with tempfile.TemporaryDirectory(prefix="meshlocal-demo-") as folder:
        file = Path(folder) / "instances.yaml"
        async with trio.open_nursery() as nursery:
            for instance in instances.values():
                await nursery.start(instance.serve)
            file.write_text(_instances_yaml(instances))
            proxy, ready = await _start_proxy(nursery, file)
            port, admin = _port(r"tcp://127\.0\.0\.1:(\d+)=b", ready), _port(r"admin=http://127\.0\.0\.1:(\d+)", ready)
            announce(f"Service b has an instance on each of {', '.join(NODES)}. The proxy runs on {OWN}:")
            announce(f"  NODE_NAME={OWN} {'='.join(_EJECTION)} \\")
            announce("  meshlocal proxy --discovery file:instances.yaml --listen tcp://127.0.0.1:0=b")
            announce(f"A caller on {OWN} opens one connection after another to 127.0.0.1:{port}.\n")

            served = await _act("1. every instance is up", port, seconds)
            _expect(set(served) == {OWN}, "every connection should have stayed on its node")

            local.stop()
            served = await _act(f"2. {OWN}'s instance is down", port, seconds)
            _expect(not served[OWN], "nobody should have been served by an instance that is down")
            _expect(_even(served), "the other nodes should have shared the connections evenly")

            await nursery.start(local.serve)
            await _wait_for(OWN, port)
            served = await _act(f"3. {OWN}'s instance is back", port, seconds)
            _expect(set(served) == {OWN}, "connections should have returned to their node")

            reasons = await _reasons(admin)
            announce(f"\nWhat the proxy says of it (http://127.0.0.1:{admin}/metrics):")
            for (tier, reason), count in sorted(reasons.items()):
                announce(f"  tier {tier:5}  reason {reason or '-':13}  {count:6} connections")
            failed, ejected = ("other", "local_failed"), ("other", "local_ejected")
            _expect(
                {("node", ""), failed} <= reasons.keys() <= {("node", ""), failed, ejected},
                "nothing should have left the node but what its instance failed, or was ejected for failing",
            )
            announce("\nNo connection failed. The node was left only while it had nothing to offer.")
            proxy.terminate()
            _expect(await proxy.wait() == 0, "the proxy should have drained cleanly")
            nursery.cancel_scope.cancel()


def _instances_yaml(instances: dict[str, _Instance]) -> str:
    rows = (
        f"    - {{address: 127.0.0.1, port: {each.port}, labels: {{node: {each.node}}}}}\n"
        for each in instances.values()
    )
    return f"services:\n  b:\n{''.join(rows)}"


async def _start_proxy(nursery: trio.Nursery, file: Path) -> tuple[trio.Process, str]:
    """A real proxy process, and the line that it printed when it was ready."""
    arguments = ["--discovery", f"file:{file}", "--listen", "tcp://127.0.0.1:0=b", "--admin", "127.0.0.1:0"]
    command = [sys.executable, "-m", "meshlocal", "proxy", *arguments, "--log-level", "error"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MESHLOCAL_")}
    environment |= {"NODE_NAME": OWN, _EJECTION[0]: _EJECTION[1]}

    process: trio.Process = await nursery.start(
        partial(trio.run_process, command, stdout=subprocess.PIPE, env=environment, check=False)
    )
    assert process.stdout is not None
    ready = b""
    with trio.move_on_after(_START_LIMIT):
        while not ready.endswith(b"\n"):
            received = await process.stdout.receive_some()
            if not received:
                break
            ready += received
    _expect(ready.endswith(b"\n"), "the proxy did not start")
    return process, ready.decode()


async def _ask(port: int) -> str:
    """Who serves a new connection; empty if it failed."""
    try:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"who are you?\n")
            return (await stream.receive_some(64)).decode().strip()
    except (OSError, trio.BrokenResourceError):
        return ""


async def _wait_for(node: str, port: int) -> None:
    """Open connections until the proxy, which tries again now and then, has found the node's instance back."""
    with trio.move_on_after(_RETURN_LIMIT):
        while await _ask(port) != node:  # noqa: ASYNC110 - only asking tells
            await trio.sleep(0.02)
        return
    raise DemoError(f"connections should have returned to {node}")


async def _act(title: str, port: int, seconds: float) -> Counter[str]:
    """Open connections one after another for a while; prints and returns who served them."""
    served: Counter[str] = Counter()
    failed = 0
    end = trio.current_time() + seconds
    while trio.current_time() < end:
        if answer := await _ask(port):
            served[answer] += 1
        else:
            failed += 1
    total = sum(served.values())
    announce(title)
    for node in NODES:
        share = served[node] / total if total else 0.0
        announce(f"   {node}  {'█' * round(share * _BAR):{_BAR}}  {share:4.0%}  {served[node]:6}")
    announce(f"   failed {failed}")
    _expect(failed == 0, "no connection should have failed")
    return served


def _even(served: Counter[str]) -> bool:
    counts = [served[node] for node in NODES if node != OWN]
    return max(counts) - min(counts) <= 1


async def _reasons(admin: int) -> Counter[tuple[str, str]]:
    """Requests by tier and reason, from the proxy's metrics."""
    stream = await trio.open_tcp_stream("127.0.0.1", admin)
    text = b""
    async with stream:
        await stream.send_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        async for received in stream:
            text += received
    found: Counter[tuple[str, str]] = Counter()
    for labels, count in re.findall(r"^meshlocal_requests_total\{(.*)\} (\S+)$", text.decode(), re.MULTILINE):
        pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[pairs["tier"], pairs["reason"]] += round(float(count))
    return found


def _port(pattern: str, line: str) -> int:
    match = re.search(pattern, line)
    if match is None:
        raise DemoError(f"the proxy's ready line names no {pattern}: {line.strip()}")
    return int(match[1])


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise DemoError(otherwise)
