"""What a fault is tried on: four instances on three pretend nodes, a discovery server and a proxy, each a process."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import trio
import trustme

from nursery_tests.campaign.instance import KINDS
from nursery_tests.campaign.load import LIMIT, Target
from nursery_tests.e2e.running import Metrics, Place, Processes, Program
from nursery_tests.ports import free_port

ROOT = Path(__file__).parents[2]

NODES = {"n1a": "n1", "n1b": "n1", "n2": "n2", "n3": "n3"}
"""Each instance's node."""

LOCAL = frozenset(name for name, node in NODES.items() if node == "n1")

SERVICES = {"tcp": "line", "replay": "line", "get": "http", "post": "http", "call": "grpc"}
"""Each service's protocol; every instance serves them all."""

CONNECTIONS = 20
"""Connections that the service `tcp` takes, where there are limits."""

REQUESTS = 8
"""Requests that the services `get` and `call` take at once, likewise."""

_INSTANCES = "127.0.7."
DISCOVERY = ("127.0.7.20", "127.0.7.21")
"""The second server is started by who wants it."""
_PROXY = "127.0.7.30"
"""Addresses that no client has: a port that is free for a moment is never taken by one (RFC 9293, 3.5)."""

CONFIG = """\
proxy:
  node_name: n1
  listen: [tcp://{host}:{tcp}=tcp, tcp://{host}:{replay}=replay, http://{host}:{get}, http://{host}:{call}=call{listen}]
  admin: 127.0.0.1:0
  access_log: {access_log}
  workers: {workers}
  discovery: {{urls: [{discovery}], backoff_max: 0.5, keepalive_interval: 1, keepalive_timeout: 1{cache}{trust}}}
  ejection: {{time: 0.5, max_time: 2}}
  attempts: {{idle_timeout: {idle}, first_snapshot_wait: 2}}
  http: {{header_timeout: 1, body_timeout: 1, keep_alive_timeout: {idle}}}
  drain: {{timeout: 1}}
  services:
    replay: {{attempts: {{replay: true, replay_wait: 0.4}}}}
    get: {{attempts: {{attempt_timeout: 0.4}}{http_policy}}}
    call: {{{grpc_policy}}}
    tcp: {{{policy}}}
"""
"""Times are short, so that what follows from a fault does so while somebody watches."""


class Taken(NamedTuple):
    """What the proxy takes while nobody wants anything of it; its pool of connections to instances apart."""

    tasks: int
    descriptors: int
    memory: int


class Member:
    """One instance."""

    def __init__(self, fleet: Fleet, name: str, address: str) -> None:
        self._fleet = fleet
        self.name = name
        self.address = address
        self.ports = (0,) * len(KINDS)
        self.program: Program | None = None

    async def start(self) -> None:
        module = f"{__package__}.instance"
        command = [sys.executable, "-m", module, self.name, self.address, *map(str, self.ports), str(self._fleet.posts)]
        self.program = await self._fleet.processes.start(
            [*self._fleet.place.prefix, *command], {"PYTHONPATH": str(ROOT)}, talk=True
        )
        found = await self.program.printed(r"listening ([\d ]+)\n", "out")
        self.ports = tuple(map(int, found[1].split()))

    async def kill(self) -> None:
        assert self.program is not None
        await self.program.killed()

    def signal(self, number: signal.Signals) -> None:
        assert self.program is not None
        self.program.signal(number)

    async def tell(self, command: str) -> dict[str, int]:
        """Have it do something; returns once it is done."""
        assert self.program is not None
        assert self.program.process.stdin is not None
        said = len(self.program.out)
        try:
            await self.program.process.stdin.send_all(f"{command}\n".encode())
        except trio.BrokenResourceError:
            raise AssertionError(f"{self.name} has ended: {self.program.err}") from None
        found = await self.program.printed(rf"done {command.split(maxsplit=1)[0]} (.*)\n", "out", said)
        answer: dict[str, int] = json.loads(found[1])
        return answer


class Trust:
    """What a discovery server and the proxy need to trust each other, as files.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authority = trustme.CA()
        self.authority = folder / "authority.pem"
        self._authority.cert_pem.write_to_path(str(self.authority))
        self.token = folder / "token"
        self.token.write_text("secret\n")
        (folder / "tokens").write_text("secret\n")
        self.certify()

    def certify(self, *, by_another: bool = False) -> None:
        """Give the server a certificate; of an authority that nobody knows, if asked for."""
        authority = trustme.CA() if by_another else self._authority
        found = authority.issue_cert(*DISCOVERY)
        found.cert_chain_pems[0].write_to_path(str(self._folder / "server.pem"))
        found.private_key_pem.write_to_path(str(self._folder / "server.key"))

    @property
    def environment(self) -> dict[str, str]:
        """The server's."""
        keys = {"TLS_CERTIFICATE_FILE": "server.pem", "TLS_KEY_FILE": "server.key", "TOKENS_FILE": "tokens"}
        return {f"MESHLOCAL_DISCOVERY__{key}": str(self._folder / name) for key, name in keys.items()}

    @property
    def configuration(self) -> str:
        """Of the proxy's section `discovery`."""
        return f", ca_file: {self.authority}, token_file: {self.token}"


class Fleet:
    """All processes.

    Args:
        processes: starts them.
        place: where they, and their clients, run.
        environment: of the proxy and the discovery server.
        prefix: of the proxy's command.
        cache: the proxy keeps a cache file.
        limits: the services `tcp`, `get` and `call` have low limits.
        idle: the proxy's limit for silent connections, in seconds.
        trust: discovery is asked over TLS, and wants a token; `Trust` has the files.
        access_log: the proxy logs each request.
        workers: the proxy's processes.
    """

    def __init__(
        self,
        processes: Processes,
        place: Place,
        *,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        cache: bool = False,
        limits: bool = False,
        idle: float = 600,
        trust: bool = False,
        access_log: bool = False,
        workers: int = 1,
    ) -> None:
        self.processes = processes
        self.place = place
        self.folder = processes.folder
        self.posts = self.folder / "posts"
        self.posts.touch()
        self._environment = environment
        self._prefix = [*place.prefix, *prefix]
        self._cache = f", cache_file: {self.folder / 'cache'}" if cache else ""
        self._idle = idle
        self._limits = limits
        self.trust = Trust(self.folder) if trust else None
        self._access_log = access_log
        self._workers = workers
        self._ports = {key: self._free_port(_PROXY) for key in ("tcp", "replay", "get", "call")}
        self.members = {name: Member(self, name, f"{_INSTANCES}{number}") for number, name in enumerate(NODES, start=1)}
        self.discovery: Program | None = None
        self.discovery_ports = tuple(self._free_port(host) for host in DISCOVERY)
        self.proxy: Program | None = None
        self.admin = 0

    def _free_port(self, host: str) -> int:
        with self.place.inside():
            return free_port(host)

    @property
    def registry(self) -> str:
        """The instances file's text."""
        lines = ["services:"]
        for service, kind in SERVICES.items():
            lines.append(f"  {service}:")
            for member in self.members.values():
                port = member.ports[KINDS.index(kind)]
                node = NODES[member.name]
                lines.append(f"    - {{address: {member.address}, port: {port}, labels: {{node: {node}}}}}")
        return "\n".join(lines) + "\n"

    @property
    def target(self) -> Target:
        ports = self._ports
        return Target(_PROXY, {**ports, "post": ports["get"], "held": ports["tcp"], "stream": ports["call"]})

    async def start(self) -> None:
        async with trio.open_nursery() as nursery:
            for member in self.members.values():
                nursery.start_soon(member.start)
        self.processes.write("instances.yaml", self.registry)
        await self.start_discovery()
        await self.start_proxy()

    async def start_discovery(self, file: str = "instances.yaml", *, wait: bool = True) -> None:
        """Start the discovery server."""
        self.discovery = await self.start_server(0, file, wait=wait)

    async def start_server(self, number: int, file: str = "instances.yaml", *, wait: bool = True) -> Program:
        """Start the first or the second discovery server."""
        bind = f"{DISCOVERY[number]}:{self.discovery_ports[number]}"
        command = ["discovery", "--bind", bind, "--source", f"file:{file}", "--admin", "none"]
        environment = {**(self._environment or {}), **(self.trust.environment if self.trust is not None else {})}
        server = await self.processes.meshlocal(*command, env=environment, prefix=self.place.prefix)
        if wait:
            await server.printed("ready: ", "out")
        return server

    def configure(self, *, more: bool = False) -> None:
        """Write the proxy's configuration; another one, with a listener and a limit more, if asked for."""
        scheme = "grpc" if self.trust is None else "grpcs"
        servers = zip(DISCOVERY, self.discovery_ports, strict=True)
        text = CONFIG.format(
            host=_PROXY,
            discovery=", ".join(f"{scheme}://{host}:{port}" for host, port in servers),
            cache=self._cache,
            trust=self.trust.configuration if self.trust is not None else "",
            access_log=str(self._access_log).lower(),
            workers=self._workers,
            idle=self._idle,
            listen=f", tcp://{_PROXY}:0=post" if more else "",
            policy=f"limits: {{connections: {CONNECTIONS if self._limits else 500}}}" if more or self._limits else "",
            http_policy=f", limits: {{requests: {REQUESTS}}}" if self._limits else "",
            grpc_policy=f"limits: {{requests: {REQUESTS}}}" if self._limits else "",
            **self._ports,
        )
        self.processes.write("proxy.yaml", text)

    async def start_proxy(self, *, wait: bool = True) -> None:
        """Start the proxy, at the addresses that it had."""
        self.configure()
        self.proxy = await self.processes.meshlocal(
            *("proxy", "--config", "proxy.yaml"), env=self._environment, prefix=self._prefix
        )
        if wait:
            await self.ready()

    async def ready(self) -> str:
        """The line that the proxy prints once it is ready."""
        assert self.proxy is not None
        line = (await self.proxy.printed(r"meshlocal proxy ready: .*\n", "out"))[0]
        self.admin = int(line.split("admin=", 1)[1].split()[0].rpartition(":")[2])
        return line

    async def metrics(self) -> Metrics:
        return await self.place.metrics(self.admin)

    async def measured(self, name: str, value: float, **labels: str) -> None:
        """Wait until a metric has a value."""
        await self.place.measured(self.admin, lambda metrics: metrics(name, **labels) == value)

    async def taken(self) -> Taken:
        return _taken(await self.metrics())

    async def settled(self, before: Taken) -> Taken:
        """What is taken once it is no more than before; or, if it stays more, then."""
        with trio.move_on_after(LIMIT):
            while True:
                metrics = await self.metrics()
                taken = _taken(metrics)
                small = taken.tasks <= before.tasks and taken.descriptors <= before.descriptors
                if small and metrics("discovery_connected"):
                    return taken
                await trio.sleep(0.05)
        return await self.taken()

    def executed(self) -> list[str]:
        """The IDs of all POSTs and unary calls that instances got."""
        return self.posts.read_text().split()


def _taken(metrics: Metrics) -> Taken:
    """Without what is kept for the next requests, and bounded."""
    shared = metrics("http2_connections")
    tasks = metrics("tasks") - metrics("connection_tasks_kept") - shared
    descriptors = metrics("descriptors_open") - metrics("http_pool_connections") - shared
    return Taken(int(tasks), int(descriptors), int(metrics("memory_bytes")))
