"""A rolling update of a DaemonSet under load: API server → discovery → proxy, and no request fails.

The events are those that a real API server sent when the instances of `b` on n2 and then n3 were replaced (terminating,
gone, a new address that is not ready, ready), with the addresses of servers on this host put in. The proxies are those
of n2 and of n3, processes of their own as discovery is; every address has its own server, and the load goes on
throughout: new TCP connections, and HTTP requests over connections that are kept.
"""

from __future__ import annotations

import importlib.util
import re
import socket
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from nursery_tests.ports import free_port

_spec = importlib.util.spec_from_file_location(
    "kubernetes_apiserver", Path(__file__).parents[1] / "discovery" / "kubernetes" / "apiserver.py"
)
assert _spec is not None
assert _spec.loader is not None
apiserver = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(apiserver)

# The recorded addresses, moved to this host's loopback; every node's instances are named after the node.
NAMES = {
    "127.77.1.10": "n1 older",
    "127.77.1.11": "n1",
    "127.77.2.10": "n2 old",
    "127.77.3.10": "n3 old",
    "127.77.2.20": "n2 new",
    "127.77.3.20": "n3 new",
}
# Lines of the watch before the rolling update; after them each step has two, of b and of headless, which has the same
# instances.
BEFORE = 10
COUNT = 12
"""The newest requests that are looked at, to see where requests go now."""
PAUSE = 0.15
"""Seconds between two steps: an instance lives on that long after it was told to go."""


class Instance:
    """A pod: a TCP server that names itself, and an HTTP server that does. Both end as well-behaved servers do."""

    def __init__(self, address: Any, ports: Any) -> None:
        self.address, self.ports, self.name = address, ports, NAMES[address]
        self.requests = 0
        self.closed = trio.Event()
        self._stop = trio.CancelScope()
        self._idle: set[trio.CancelScope] = set()
        self._closing = False

    async def run(self, *, task_status: Any) -> None:
        """Serve; after `stop` nothing new is accepted, and idle connections close."""
        async with trio.open_nursery() as nursery:
            grpc, http = [
                trio.SocketListener(_bind(self.address, port)) for port in (self.ports["grpc"], self.ports["http"])
            ]
            async with grpc, http:
                with self._stop:
                    async with trio.open_nursery() as accepting:
                        accepting.start_soon(_serve, nursery, self._tcp, grpc)
                        accepting.start_soon(_serve, nursery, self._http, http)
                        task_status.started()
            self.closed.set()

    def stop(self) -> None:
        """SIGTERM, and the end of the grace period: refuse from now on."""
        self._closing = True
        self._stop.cancel()
        for scope in self._idle:
            scope.cancel()

    def is_closing(self) -> bool:
        """Whether it was told to stop."""
        return self._closing

    async def _tcp(self, stream: Any) -> None:
        with suppress(trio.BrokenResourceError):
            async with stream:
                while await stream.receive_some(100):
                    self.requests += 1
                    await stream.send_all(f"{self.name}\n".encode())

    async def _http(self, stream: Any) -> None:
        with suppress(trio.BrokenResourceError):
            async with stream:
                while not self.is_closing():
                    head = b""
                    with trio.CancelScope() as scope:
                        self._idle.add(scope)
                        while not head.endswith(b"\r\n\r\n"):
                            if not (data := await stream.receive_some(1000)):
                                break
                            # From its first byte on a request is answered.
                            self._idle.discard(scope)
                            head += data
                    self._idle.discard(scope)
                    if not head:
                        return
                    self.requests += 1
                    body = f"{self.name}\n".encode()
                    close = b"Connection: close\r\n" if self.is_closing() else b""
                    await stream.send_all(
                        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s" % (len(body), close, body)
                    )


def _bind(address: Any, port: Any) -> Any:
    sock = socket.create_server((address, port), backlog=512)
    sock.setblocking(False)
    return trio.socket.from_stdlib_socket(sock)


async def _serve(nursery: Any, handler: Any, listener: Any) -> None:
    while True:
        nursery.start_soon(handler, await listener.accept())


class HttpLoad:
    """Requests without a pause but for a moment, over connections that are kept; who answered, and what went wrong."""

    def __init__(self, port: Any) -> None:
        self._port = port
        self.last: list[Any] = []
        self.count = 0
        self.errors: list[Any] = []
        self.news = trio.Event()

    async def run(self, method: Any) -> None:
        """One client."""
        while True:
            try:
                async with await trio.open_tcp_stream("127.0.0.1", self._port) as stream:
                    for _ in range(40):
                        await self._ask(stream, method)
                        await trio.sleep(0.01)
            except (OSError, trio.BrokenResourceError, ValueError) as error:
                self.errors.append(f"{method}: {error!r} after {error.__cause__!r}")

    async def _ask(self, stream: Any, method: Any) -> None:
        await stream.send_all(f"{method} / HTTP/1.1\r\nHost: headless\r\nContent-Length: 0\r\n\r\n".encode())
        answer = b""
        while not (found := re.fullmatch(rb"HTTP/1.1 (\d+)[^\n]*\r\n(?:[^\n]+\r\n)*\r\n([^\n]*\n)", answer)):
            if not (data := await stream.receive_some(4096)):
                raise ValueError(f"ended after {answer!r}")
            answer += data
        status, name = int(found[1]), found[2].decode().strip()
        if status != 200:
            self.errors.append(f"{method}: {status} {answer!r}")
        self.count += 1
        self.last = [*self.last[-99:], name]
        self.news.set()
        self.news = trio.Event()


class Rollout:
    """Everything that takes part."""

    def __init__(self, nursery: Any, server: Any) -> None:
        self.ports = {"http": free_port(*NAMES), "grpc": free_port(*NAMES)}
        self.nursery, self.server = nursery, server
        self.instances: dict[Any, Instance] = {}
        self._events = iter(())

    def local(self, data: Any) -> Any:
        """Recorded bytes, with this host's addresses and ports for the cluster's."""
        data = data.replace(b"10.77.", b"127.77.")
        return re.sub(
            rb'("port": ?)(8080|9000)',
            lambda m: m[1] + str(self.ports["http" if m[2] == b"8080" else "grpc"]).encode(),
            data,
        )

    def begin(self) -> None:
        """The list, and all up to the rolling update."""
        lines = [self.local(line) for line in apiserver.lines("endpointslices.watch.jsonl")]
        slices = apiserver.SLICES
        self.server.load(slices, "endpointslices.list.json", self.local)
        self.server.play(slices, lines[:BEFORE])
        self._events = iter(lines[BEFORE:])

    def step(self) -> None:
        """The next two events: both services', as the controllers saw the same pods."""
        self.server.play(apiserver.SLICES, [next(self._events), next(self._events)])

    async def start(self, address: Any) -> Any:
        instance = self.instances[address] = Instance(address, self.ports)
        await self.nursery.start(instance.run)
        return instance

    def requests(self) -> Any:
        return Counter({each.name: each.requests for each in self.instances.values()})


class Sidecar:
    """The proxy of one node, and the load on it."""

    def __init__(self, node: Any, tcp: Any, http: Any) -> None:
        self.node, self.tcp, self.http = node, tcp, http

    @property
    def errors(self) -> Any:
        return self.tcp.errors + self.http.errors

    async def only(self, *names: Any) -> None:
        """Wait until the newest requests, TCP and HTTP, all went to these, and to each of them."""
        await self.tcp.only(*names, count=COUNT)
        self.http.last = []
        with trio.move_on_after(20):
            while len(self.http.last) < COUNT or set(self.http.last[-COUNT:]) != set(names):
                await self.http.news.wait()
        assert set(self.http.last[-COUNT:]) == set(names), (self.http.last, self.errors)


async def start_sidecar(processes: Any, nursery: Any, here: Any, load: Any, discovery: Any, node: Any) -> Any:
    config = processes.write(
        f"{node}.yaml",
        "proxy: {namespace: shop, services: {b: {port_name: grpc}, headless: {port_name: http}}}\n",
    )
    proxy = await processes.meshlocal(
        *("proxy", "--discovery", f"grpc://127.0.0.1:{discovery}", "--node-name", node, "--config", str(config)),
        *("--listen", "tcp://127.0.0.1:0=b", "--listen", "http://127.0.0.1:0=headless", "--admin", "127.0.0.1:0"),
    )
    ready = (await proxy.printed(r"ready: (.*)\n", "out"))[1]
    tcp, http = (int(re.findall(rf"{scheme}://127\.0\.0\.1:(\d+)", ready)[0]) for scheme in ("tcp", "http"))
    requests = HttpLoad(http)
    for method in ("GET", "PUT", "GET"):
        nursery.start_soon(requests.run, method)
    return Sidecar(node, load(here, "127.0.0.1", tcp, workers=2), requests)


@pytest.mark.parametrize("order", ["the event before the end", "the end before the event"])
async def test_rolling_update(processes: Any, nursery: Any, here: Any, load: Any, tmp_path: Any, order: Any) -> None:
    """F1, A2, A3, A4, L4: nobody notices the update of his node but by the names; traffic returns with the new one.

    Kubernetes promises no order between an instance's end and the event that says so: both are played.
    """
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    async with apiserver.serving(authority) as server:
        rollout = Rollout(nursery, server)
        rollout.begin()
        for address in ("127.77.1.11", "127.77.2.10", "127.77.3.10"):
            await rollout.start(address)
        processes.write(
            "kubeconfig",
            "{current-context: x, contexts: [{name: x, context: {cluster: c}}],"
            f" clusters: [{{name: c, cluster: {{server: 'https://127.0.0.1:{server.port}',"
            " certificate-authority: ca.crt}}]}",
        )
        discovery = await processes.meshlocal(
            *("discovery", "--bind", "127.0.0.1:0", "--source", "kubernetes:?kubeconfig=kubeconfig&namespace=shop")
        )
        port = int((await discovery.printed(r"grpc://127\.0\.0\.1:(\d+)", "out"))[1])
        sidecars = {node: await start_sidecar(processes, nursery, here, load, port, node) for node in ("n2", "n3")}
        for node, sidecar in sidecars.items():
            await sidecar.only(f"{node} old")
        for node, number in (("n2", 2), ("n3", 3)):
            await roll(rollout, sidecars, node, number, order)
        for sidecar in sidecars.values():
            assert sidecar.errors == []
            assert sidecar.http.count > 100
        assert server.asked("list", apiserver.SLICES)[1:] == [{"limit": "500"}], "one list, and one watch of it"
        nursery.cancel_scope.cancel()


async def roll(rollout: Any, sidecars: Any, node: Any, number: Any, order: Any) -> None:
    """Replace one node's instance, watched from both nodes."""
    mine = sidecars[node]
    (other,) = (each for each in sidecars.values() if each is not mine)
    others_local = next(iter(set(other.http.last[-1:])))
    rest = {"n1", others_local}
    old = rollout.instances[f"127.77.{number}.10"]

    if order == "the event before the end":
        rollout.step()  # terminating, still serving
        # Nothing new goes to it while there are others (L4), though it would still serve.
        await mine.only(*rest)
        before = old.requests
        await trio.sleep(PAUSE)
        assert old.requests == before
        old.stop()
        await trio.sleep(PAUSE)
        rollout.step()  # gone
    else:
        # Between two TCP connections: one that the kernel took and the instance never accepts is reset (A5), whatever
        # stands before it. HTTP requests go on.
        async with mine.tcp.between(), other.tcp.between():
            old.stop()
            await old.closed.wait()
        await mine.only(*rest)
        rollout.step()
        await trio.sleep(PAUSE)
        rollout.step()
    await old.closed.wait()
    await mine.only(*rest)

    rollout.step()  # a new address, not ready: nobody listens there yet
    await trio.sleep(PAUSE)
    await mine.only(*rest)
    new = await rollout.start(f"127.77.{number}.20")
    await trio.sleep(PAUSE)
    assert new.requests == 0, "it listens, but is not ready"
    rollout.step()  # ready
    await mine.only(f"{node} new")
    await other.only(others_local)
    assert mine.errors + other.errors == []
