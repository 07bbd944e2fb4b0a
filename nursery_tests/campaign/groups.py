"""Which faults are tried on which fleet, and the trying."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import trio

from nursery_tests.campaign import (
    faults_beside,
    faults_clients,
    faults_discovery,
    faults_host,
    faults_instances,
    faults_proxy,
)
from nursery_tests.campaign.campaign import Fault, Row, try_fault
from nursery_tests.campaign.fleet import LOCAL, Fleet
from nursery_tests.campaign.load import Load
from nursery_tests.e2e.namespaces import inside_namespace
from nursery_tests.e2e.running import Place, Processes

SEED = 4
_IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h


class Group(NamedTuple):
    """Faults that one fleet after another bears.

    Attributes:
        faults: in this order.
        options: of the fleet.
        namespace: it lives in a network of its own, with few ports; takes root.
        clock: it has a clock of its own; takes libfaketime.
        root: it takes root.
    """

    faults: Sequence[Fault]
    options: Mapping[str, Any] = MappingProxyType({})
    namespace: bool = False
    clock: bool = False
    root: bool = False


_FEW_DESCRIPTORS = ["sh", "-c", f'ulimit -n {faults_host.DESCRIPTORS}; exec "$@"', "sh"]

GROUPS = {
    "instances": Group(faults_instances.FAULTS),
    "discovery": Group(faults_discovery.FAULTS),
    "start": Group(faults_discovery.AT_START),
    "start-cache": Group(faults_discovery.AT_START_WITH_CACHE, {"cache": True}),
    "descriptors": Group(faults_host.WITHOUT_DESCRIPTORS, {"prefix": _FEW_DESCRIPTORS}),
    "ports": Group(faults_host.WITHOUT_PORTS, namespace=True, root=True),
    "clock": Group(faults_host.CLOCK, {"cache": True}, clock=True),
    "clients": Group(faults_clients.FAULTS, {"idle": 1.5}, root=True),
    "limits": Group(faults_clients.LIMITS, {"limits": True}),
    "proxy": Group(faults_proxy.FAULTS, {"cache": True}),
    "trust": Group(faults_beside.TRUST, {"trust": True}),
    "log": Group(faults_beside.LOG, {"access_log": True}),
    "worker": Group(faults_beside.WORKER, {"workers": 2}),
}


def lacks(group: Group) -> str:
    """Why a group cannot be tried here; empty if it can."""
    if group.root and os.geteuid() != 0:
        return "needs root"
    if group.namespace and shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is None:
        return "needs the program ip"
    if group.clock and faults_host.faketime() is None:
        return "needs the Debian package libfaketime"
    return ""


class _Namespace(Place):
    """A network of its own, with few ports to connect from. Each client comes from an address of its own."""

    def __init__(self) -> None:
        self._name = f"meshlocal-campaign-{os.getpid()}"
        self.prefix = ["ip", "netns", "exec", self._name]
        first, last = faults_host.PORTS
        self._run("netns", "add", self._name)
        self._run("-n", self._name, "link", "set", "lo", "up")
        narrow = f"echo {first} {last} > /proc/sys/net/ipv4/ip_local_port_range"
        self._run("netns", "exec", self._name, "sh", "-c", narrow)
        self._file = os.open(f"/run/netns/{self._name}", os.O_RDONLY | os.O_CLOEXEC)
        self._clients = count(1)

    @contextmanager
    def inside(self) -> Iterator[None]:
        with inside_namespace(self._file):
            yield

    async def connect(self, host: str, port: int) -> trio.SocketStream:
        number = next(self._clients)
        with self.inside():
            sock = trio.socket.socket()
        # Without, an address takes its port from all others in the network, too (ip(7)).
        sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
        try:
            await sock.bind((f"127.{8 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}", 0))
            await sock.connect((host, port))
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)

    def remove(self) -> None:
        os.close(self._file)
        self._run("netns", "del", self._name)

    def _run(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)


async def try_group(group: Group, folder: Path, seconds: float, only: str = "", seed: int = SEED) -> list[Row]:
    """Try a group's faults, or those whose names contain `only`, each for so many seconds."""
    faults = [fault for fault in group.faults if only in fault.name]
    rows: list[Row] = []
    if not faults:
        return rows
    rng = random.Random(seed)
    environment = {}
    if group.clock:
        (folder / faults_host.FAKETIME).write_text("+0\n")
        environment = {
            "LD_PRELOAD": str(faults_host.faketime()),
            "FAKETIME_TIMESTAMP_FILE": str(folder / faults_host.FAKETIME),
            "FAKETIME_NO_CACHE": "1",
            # Clocks that count from the start of the machine do not jump.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
    async with AsyncExitStack() as stack:
        place = Place()
        if group.namespace:
            place = _Namespace()
            stack.callback(place.remove)
        nursery = await stack.enter_async_context(trio.open_nursery())
        fleet = Fleet(Processes(nursery, folder), place, environment=environment, **group.options)
        await fleet.start()
        load = Load(fleet.target, place.connect)
        nursery.start_soon(load.run)
        await load.home(LOCAL)
        await load.more(20)
        for fault in faults:
            row = await try_fault(fault, fleet, load, seconds, rng)
            rows.append(row)
        nursery.cancel_scope.cancel()
    return rows
