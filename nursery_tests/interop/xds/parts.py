"""What tests of xDS's clients are made of: registries, instances, and clients, all as processes.

Instances have one port and addresses of their own within 127.0.0.0/8, as Kubernetes has it. Bootstraps are those of
docs/xds.md, with the test's addresses in them.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import trio

from nursery_tests.discovery.kubernetes import apiserver
from nursery_tests.e2e.running import Place, Processes, Program
from nursery_tests.interop.etcd import Etcd
from nursery_tests.ports import free_port

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
GREETER = HERE.parent / "http" / "greeter.py"
LIMIT = 40.0
QUICK = (
    "grpc.initial_reconnect_backoff_ms=100",
    "grpc.min_reconnect_backoff_ms=100",
    "grpc.max_reconnect_backoff_ms=300",
)
"""A client that asks an instance that was away again soon."""

_block = Random(os.getpid()).randrange(20, 250)

Held = Mapping[str, Mapping[str, Any]]
"""Instances: by name, which is that of their node too, an address and further keys of an instances file."""


def block(language: str, position: int = 0) -> str:
    """A code block of docs/xds.md."""
    text = (ROOT / "docs" / "xds.md").read_text()
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return found[position]


class Registry:
    """Where instances of b stand."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.service = "b"

    async def arguments(self) -> Sequence[str]:
        """What discovery is started with."""
        raise NotImplementedError

    async def hold(self, held: Held) -> None:
        """Hold these, and no others."""
        raise NotImplementedError


class FileRegistry(Registry):
    def __init__(self, port: int, processes: Processes) -> None:
        super().__init__(port)
        self._processes = processes

    async def arguments(self) -> Sequence[str]:
        return ["--source", "file:instances.yaml"]

    async def hold(self, held: Held) -> None:
        instances = [{"port": self.port, "labels": {"node": name}, **held[name]} for name in held]
        self._processes.write("instances.yaml", json.dumps({"services": {"b": instances}}))


class EtcdRegistry(Registry):
    def __init__(self, port: int, etcd: Etcd) -> None:
        super().__init__(port)
        self._etcd = etcd
        self._held: Held = {}

    async def arguments(self) -> Sequence[str]:
        return ["--source", f"etcd://127.0.0.1:{self._etcd.port}/p"]

    async def hold(self, held: Held) -> None:
        for gone in self._held.keys() - held.keys():
            await self._etcd.ctl("del", f"p/b/{gone}")
        for name in held:
            await self._etcd.put(f"p/b/{name}", **{"port": self.port, "labels": {"node": name}, **held[name]})
        self._held = held


class KubernetesRegistry(Registry):
    def __init__(self, port: int, api: Any, processes: Processes) -> None:
        super().__init__(port)
        self.service = "b.shop"
        self._api = api
        self._processes = processes
        self._there = False

    async def arguments(self) -> Sequence[str]:
        self._processes.write(
            "kubeconfig",
            "{current-context: x, contexts: [{name: x, context: {cluster: c}}],"
            f" clusters: [{{name: c, cluster: {{server: 'https://127.0.0.1:{self._api.port}',"
            " certificate-authority: ca.crt}}]}",
        )
        return ["--source", "kubernetes:?kubeconfig=kubeconfig&namespace=shop"]

    async def hold(self, held: Held) -> None:
        endpoints = [{"addresses": [each["address"]], "nodeName": name} for name, each in held.items()]
        meta = {"name": "b", "namespace": "shop", "labels": {"kubernetes.io/service-name": "b"}}
        ports = [{"name": "", "port": self.port, "protocol": "TCP"}]
        item = {"metadata": meta, "addressType": "IPv4", "endpoints": endpoints, "ports": ports}
        self._api.put(apiserver.SLICES, "MODIFIED" if self._there else "ADDED", item)
        self._there = True


class Caller:
    """A client's process."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._read = 0

    async def order(self, text: str) -> Counter[str]:
        """What it answers to an order."""
        stdin = self.program.process.stdin
        assert stdin is not None
        await stdin.send_all(f"{text}\n".encode())
        found = await self.program.printed(r"(\{.*\})\n", "out", self._read, limit=LIMIT)
        self._read = found.end()
        return Counter(json.loads(found[1]))

    async def only(self, *names: str) -> None:
        """Wait until calls go to these, each of them, and to no other."""
        seen: Counter[str] = Counter()
        with trio.move_on_after(LIMIT):
            while (seen := await self.order("calls 12")).keys() != set(names):  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.05)
            return
        raise AssertionError(f"calls go to {dict(seen)}, not to {names}\n{self.program.err}")


class World:
    """A registry, a discovery server, instances and their clients."""

    def __init__(self, processes: Processes, registry: Registry) -> None:
        self.processes = processes
        self.registry = registry
        self.port = registry.port
        self.instances: dict[str, Program] = {}
        self.xds_port = free_port()
        self.admin_port = free_port()

    def address(self, number: int) -> str:
        """Of the instance of this number."""
        return f"127.{_block}.{self.port % 250}.{number}"

    async def discovery(self, *arguments: str) -> Program:
        """Start the discovery server, and wait until it is ready."""
        ports = ("--bind", "127.0.0.1:0", "--xds", f"127.0.0.1:{self.xds_port}")
        admin = ("--admin", f"127.0.0.1:{self.admin_port}")
        started = await self.processes.meshlocal(
            "discovery", *ports, *admin, *await self.registry.arguments(), *arguments
        )
        await started.printed(rf"xds=grpcs?://127\.0\.0\.1:{self.xds_port}", "out")
        return started

    async def held_and_told(self, held: Held) -> None:
        """Have the registry hold this, and wait until the client has accepted what discovery made of it."""

        async def responses() -> float:
            metrics = await Place().metrics(self.admin_port)
            return metrics("xds_responses_total", type="ClusterLoadAssignment")

        async def behind() -> float:
            _, page = await Place().get(self.admin_port, "/proxies")
            [client] = json.loads(page)["proxies"]
            return float(client["behind"])

        before = await responses()
        await self.registry.hold(held)
        with trio.fail_after(LIMIT):
            while await responses() == before or await behind():  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.02)
        # What it accepted, its connections and pickers follow in tasks of their own.
        await trio.sleep(0.2)

    async def instance(self, name: str, number: int, *arguments: str) -> Program:
        """Start an instance, and wait until it listens."""
        address = self.address(number)
        command = [sys.executable, str(GREETER), address, str(self.port), name, *arguments]
        started = self.instances[name] = await self.processes.start(command)
        with trio.fail_after(LIMIT):
            while True:
                try:
                    await (await trio.open_tcp_stream(address, self.port)).aclose()
                except OSError:
                    await trio.sleep(0.05)
                else:
                    return started

    async def client(self, kind: str, node: str, **more: Any) -> Caller:
        """Start a client on a node: `threads`, `asyncio`, `grpc-js`, or `envoy` with a client behind it.

        Args:
            kind: of client.
            node: that it runs on.
            more: replaces keys of `xds_servers[0]`.
        """
        if kind == "envoy":
            port, _ = await self.envoy(node)
            return await self.plain(port)
        bootstrap = json.loads(block("json"))
        bootstrap["xds_servers"][0].update({"server_uri": f"127.0.0.1:{self.xds_port}", **more})
        bootstrap["node"]["locality"]["sub_zone"] = node
        env = {"GRPC_XDS_BOOTSTRAP_CONFIG": json.dumps(bootstrap), "GRPC_VERBOSITY": "ERROR"}
        target = f"xds:///{self.registry.service}"
        if kind == "grpc-js":
            modules = str(ROOT / ".venv" / "node" / "node_modules")
            command = ["node", str(HERE / "caller.js"), target, *QUICK]
            return Caller(await self.processes.start(command, {**env, "NODE_PATH": modules}, talk=True))
        return Caller(
            await self.processes.start([sys.executable, str(HERE / "caller.py"), kind, target, *QUICK], env, talk=True)
        )

    async def plain(self, port: int) -> Caller:
        """A client without xDS, of what listens on a port."""
        command = [sys.executable, str(HERE / "caller.py"), "threads", f"127.0.0.1:{port}", *QUICK]
        return Caller(await self.processes.start(command, talk=True))

    async def envoy(self, node: str, change: Sequence[tuple[str, str]] = ()) -> tuple[int, int]:
        """Start an Envoy on a node; returns the ports of its listeners, for HTTP and for TCP."""
        http, tcp = free_port(), free_port()
        text = block("yaml", 1)
        for old, new in (
            ("port_value: 18000", f"port_value: {self.xds_port}"),
            ("port_value: 9001", f"port_value: {http}"),
            ("port_value: 9002", f"port_value: {tcp}"),
            ("sub_zone: n1", f"sub_zone: {node}"),
            ("route_config_name: b", f"route_config_name: {self.registry.service}"),
            ("\n                cluster: b\n", f"\n                cluster: {self.registry.service}\n"),
            *change,
        ):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        name = f"envoy-{node}.yaml"
        self.processes.write(name, text)
        program = await self.processes.start(
            [
                str(ROOT / ".venv" / "bin" / "envoy"),
                "-c",
                name,
                "--concurrency",
                "1",
                "--use-dynamic-base-id",
                "-l",
                "info",
            ]
        )
        await program.printed("starting main dispatch loop", limit=LIMIT)
        await program.printed("all dependencies initialized. starting workers", limit=LIMIT)
        return http, tcp
