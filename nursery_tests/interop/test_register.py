"""`meshlocal register` against a real etcd: there while it works, gone when it ends, whatever happens to either."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from nursery_tests.e2e.running import Processes, Program
from nursery_tests.interop.etcd import LIMIT, Etcd
from nursery_tests.ports import free_port

SERVER = """\
import signal, socketserver, sys, time
delay, port = float(sys.argv[1]), int(sys.argv[2])
def told(number, frame):
    print("got", signal.Signals(number).name, flush=True)
    if number == signal.SIGTERM: sys.exit(7)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1): signal.signal(number, told)
time.sleep(delay)
class Handler(socketserver.BaseRequestHandler):
    def handle(self): self.request.recv(100)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
print("listening", flush=True)
Server(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def etcd(program: Callable[[str], str], tmp_path: Path) -> Any:
    made = Etcd(program("etcd"), program("etcdctl"), tmp_path)
    made.start()
    yield made
    made.kill()


@pytest.fixture
def processes(nursery: trio.Nursery, tmp_path: Path) -> Processes:
    (tmp_path / "server.py").write_text(SERVER)
    return Processes(nursery, tmp_path)


class Registering:
    """`meshlocal register` of the service b on node n1, with a server of its own."""

    def __init__(self, etcd: Etcd, processes: Processes) -> None:
        self.etcd, self.processes = etcd, processes
        self.port = free_port()
        self.flags = ["--registry", f"etcd://127.0.0.1:{etcd.port}/p", "--service", "b", "--port", str(self.port)]
        self.flags += ["--address", "127.0.0.1", "--health-interval", "0.2", "--lease", "3", "--name", "i"]

    async def start(self, *flags: str, delay: float = 0, command: tuple[str, ...] | None = None) -> Program:
        if command is None:
            command = (sys.executable, "-u", "server.py", str(delay), str(self.port))
        tail = ("--", *command) if command else ()
        return await self.processes.meshlocal(
            "register", *self.flags, "--drain", "0.3", *flags, *tail, env={"NODE_NAME": "n1"}
        )

    async def held(self) -> dict[str, Any] | None:
        """What the key holds; None: there is none."""
        text = await self.etcd.ctl("get", "p/b/i", "--print-value-only")
        found: dict[str, Any] | None = json.loads(text) if text.strip() else None
        return found

    async def until(self, holds: Callable[[dict[str, Any] | None], object]) -> dict[str, Any] | None:
        with trio.fail_after(LIMIT):
            while not holds(found := await self.held()):  # noqa: ASYNC110 - etcd is asked
                await trio.sleep(0.05)
        return found


@pytest.fixture
def registering(etcd: Etcd, processes: Processes) -> Registering:
    return Registering(etcd, processes)


async def test_from_its_start_to_its_end(registering: Registering) -> None:
    """There once it works, terminating before it is stopped, gone after; its status is the command's (S1, H3)."""
    running = await registering.start("--label", "zone=z1", "--drain", "2", delay=1)
    await registering.etcd.ctl("get", "x")
    assert await registering.held() is None, "it does not work yet"
    found = await registering.until(lambda held: held is not None)
    labels = {"node": "n1", "zone": "z1"}
    assert found == {"address": "127.0.0.1", "port": registering.port, "labels": labels}
    await running.printed("listening", "out")
    running.signal(signal.SIGTERM)
    await registering.until(lambda held: held is not None and held.get("terminating"))
    assert "got SIGTERM" not in running.out, "its clients have a while"
    assert await running.exited() == 7
    assert "got SIGTERM" in running.out
    assert await registering.held() is None


async def test_told_twice(registering: Registering) -> None:
    """Nobody is waited for."""
    running = await registering.start("--drain", "1000")
    await registering.until(lambda held: held is not None)
    running.signal(signal.SIGTERM)
    await running.printed("draining")
    running.signal(signal.SIGTERM)
    assert await running.exited() == 7


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
async def test_a_command_that_ends_by_itself(registering: Registering, code: str, status: int) -> None:
    running = await registering.start(
        "--health", "none", command=(sys.executable, "-c", f"import time; time.sleep(1); {code}")
    )
    await registering.until(lambda held: held is not None)
    assert await running.exited() == status
    assert await registering.held() is None


async def test_a_command_that_does_not_end(registering: Registering) -> None:
    ignores = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(1000)"
    running = await registering.start(
        "--health", "none", "--stop-timeout", "0.5", command=(sys.executable, "-c", ignores)
    )
    await running.printed("up", "out")
    await registering.until(lambda held: held is not None)
    running.signal(signal.SIGTERM)
    assert await running.exited() == 137
    assert "did not end in time" in running.err


async def test_signals_and_streams_are_the_commands(registering: Registering) -> None:
    running = await registering.start()
    await running.printed("listening", "out")
    running.signal(signal.SIGHUP)
    await running.printed("got SIGHUP", "out")
    running.signal(signal.SIGUSR1)
    await running.printed("got SIGUSR1", "out")
    echo = await registering.processes.start(
        [sys.executable, "-m", "meshlocal", "register", *registering.flags, "--health", "none", "--", "cat"], talk=True
    )
    assert echo.process.stdin is not None
    await echo.process.stdin.send_all(b"said\n")
    await echo.printed("said", "out")
    await echo.process.stdin.aclose()
    assert await echo.exited() == 0


async def test_a_lease_that_is_lost(registering: Registering) -> None:
    """Revoked by somebody: a new one, and the key again."""
    running = await registering.start()
    await registering.until(lambda held: held is not None)
    leases = (await registering.etcd.ctl("lease", "list")).split()
    await registering.etcd.ctl("lease", "revoke", leases[-1])
    await running.printed("lease lost")
    await registering.until(lambda held: held is not None)


async def test_etcd_is_away_for_longer_than_the_lease(registering: Registering) -> None:
    """The command goes on, and the key is there again once etcd is."""
    running = await registering.start()
    await registering.until(lambda held: held is not None)
    registering.etcd.kill()
    await running.printed("registration cannot be kept")
    registering.etcd.start(anew=True)
    await registering.until(lambda held: held is not None)
    assert running.process.returncode is None


async def test_a_frozen_etcd(registering: Registering) -> None:
    """Its answer does not come: found out within the lease; it goes on once etcd does."""
    running = await registering.start()
    await registering.until(lambda held: held is not None)
    registering.etcd.signal(signal.SIGSTOP)
    await running.printed("registration cannot be kept")
    registering.etcd.signal(signal.SIGCONT)
    await registering.until(lambda held: held is not None)


async def test_an_etcd_whose_disk_is_full(program: Callable[[str], str], tmp_path: Path, processes: Processes) -> None:
    """Who follows it goes on. What registers says what is wrong, lets its command run, and comes once there is room."""
    full = Etcd(program("etcd"), program("etcdctl"), tmp_path, "full", "--quota-backend-bytes", "2000000")
    full.start()
    with contextlib.ExitStack() as stack:
        stack.callback(full.kill)
        await full.put("p/c/i")
        command = [program("etcdctl"), f"--endpoints=http://127.0.0.1:{full.port}", "put", "fill"]
        said = b""
        for _ in range(20):
            done = await trio.run_process(
                command, stdin=b"x" * 500_000, capture_stdout=True, capture_stderr=True, check=False
            )
            said += done.stderr
            if done.returncode:
                break
        assert b"database space exceeded" in said
        registering = Registering(full, processes)
        running = await registering.start()
        await running.printed("listening", "out")
        await running.printed("database space exceeded")
        found = ["--bind", "127.0.0.1:0", "--source", f"etcd://127.0.0.1:{full.port}/p"]
        server = await processes.meshlocal("discovery", *found)
        url = (await server.printed(r"ready: (\S+)", "out"))[1]
        seen = await processes.meshlocal("get", "services", "--discovery", url)
        assert await seen.exited() == 0
        assert "c" in seen.out
        await full.ctl("del", "fill")
        revision = json.loads(await full.ctl("get", "x", "-w", "json"))["header"]["revision"]
        await full.ctl("compact", str(revision))
        await full.ctl("defrag")
        await full.ctl("alarm", "disarm")
        await registering.until(lambda held: held is not None)
        running.signal(signal.SIGTERM)
        assert await running.exited() == 7
        assert await registering.held() is None


async def test_one_that_is_killed_is_gone_with_its_lease(registering: Registering) -> None:
    running = await registering.start("--health", "none", command=("sleep", "15"))
    await registering.until(lambda held: held is not None)
    # The command goes on: it may well be in use.
    running.process.kill()
    await registering.until(lambda held: held is None)


async def test_what_is_there_already(registering: Registering, nursery: trio.Nursery) -> None:
    """Without a command: not ready while it does not work, ready again when it does, until told to stop."""

    async def serve(*, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        async def hold(stream: trio.SocketStream) -> None:
            async with stream:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.receive_some(1)

        with trio.CancelScope() as scope:
            listeners = await trio.open_tcp_listeners(registering.port, host="127.0.0.1")
            task_status.started(scope)
            await trio.serve_listeners(hold, listeners)

    running = await registering.start(command=())
    scope = await nursery.start(serve)
    await registering.until(lambda held: held is not None and held.get("ready", True))
    scope.cancel()
    await registering.until(lambda held: held is not None and held.get("ready") is False)
    await nursery.start(serve)
    await registering.until(lambda held: held is not None and held.get("ready", True))
    running.signal(signal.SIGTERM)
    assert await running.exited() == 0
    assert await registering.held() is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--registry", "file:x"], "--registry: expected etcd://HOST:PORT/PREFIX, got 'file:x'"),
        (["--registry", "etcd://h:1"], "--registry: expected etcd://HOST:PORT/PREFIX"),
        (["--service", "b c"], "--service: 'b c' is no service name"),
        (["--label", "node=n2"], "--label: node is set by --node-name"),
        (["--label", "x"], "expected KEY=VALUE, got 'x'"),
        (["--address", "b.example"], "address"),
        (["--name", "a/b"], "cannot be part of a key"),
        (["--health-path", "x"], "--health-path: expected a path such as /healthz, got 'x'"),
    ],
)
async def test_what_makes_no_sense(processes: Processes, flags: list[str], message: str) -> None:
    given = ["--registry", "etcd://127.0.0.1:1/p", "--service", "b", "--port", "1", "--address", "127.0.0.1"]
    program = await processes.meshlocal("register", *given, *flags, "--", "true")
    assert await program.exited() == 2
    assert message in program.err


async def test_a_command_that_cannot_be_started(processes: Processes) -> None:
    given = ["--registry", "etcd://127.0.0.1:1/p", "--service", "b", "--port", "1", "--address", "127.0.0.1"]
    program = await processes.meshlocal("register", *given, "--", "/nowhere/at/all")
    assert await program.exited() == 2
    assert "/nowhere/at/all: No such file or directory" in program.err


async def test_an_instance_on_this_very_machine_names_its_address(processes: Processes) -> None:
    given = ["--registry", "etcd://127.0.0.1:1/p", "--service", "b", "--port", "1"]
    program = await processes.meshlocal("register", *given, "--", "true")
    assert await program.exited() == 2
    assert "give the --address at which others reach the instance" in program.err


async def test_from_a_machine_to_a_client(registering: Registering) -> None:
    """All of it: registered, discovered, and served on its node."""
    await registering.start()
    await registering.until(lambda held: held is not None)
    registry = f"etcd://127.0.0.1:{registering.etcd.port}/p"
    server = await registering.processes.meshlocal("discovery", "--bind", "127.0.0.1:0", "--source", registry)
    url = (await server.printed(r"(grpc://\S+)", "out"))[1]
    proxy = await registering.processes.meshlocal(
        "proxy", "--discovery", url, "--listen", "tcp://127.0.0.1:0=b", "--admin", "none", env={"NODE_NAME": "n1"}
    )
    await proxy.printed("ready: node=n1", "out")
    plan = await registering.processes.meshlocal("explain", "b", "--discovery", url, env={"NODE_NAME": "n1"})
    assert await plan.exited() == 0
    assert f"127.0.0.1:{registering.port}" in plan.out
    assert "n1" in plan.out
