"""Unix sockets with real processes: a proxy that is started, reloaded and stopped, and the library."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from signal import SIGHUP, SIGTERM
from typing import Any

import httpx
import pytest
import trio

import meshlocal
from meshlocal.httpx import MeshTransport
from nursery_tests.ports import free_port

LIMIT = 20

INSTANCES = """\
services:
  b:
    - {{address: 127.0.0.1, port: {port}, labels: {{node: n1, socket: b.sock}}}}
    - {{address: 127.0.0.1, port: 1, labels: {{node: n1, socket: ../b.sock}}, ready: false}}
"""
CONFIG = """\
proxy:
  node_name: n1
  admin: 127.0.0.1:0
  socket_folder: {folder}
  listen: [{listen}]
  discovery: {{urls: ["file:instances.yaml"]}}
  services: {{b: {{health_check: {{kind: tcp, interval: 0.1, timeout: 0.1}}}}}}
"""


async def answer(stream: trio.SocketStream) -> None:
    """An HTTP/1.1 server that says where it was reached."""
    # A tcp check resets its connection.
    with suppress(trio.BrokenResourceError):
        await _answer(stream)


async def _answer(stream: trio.SocketStream) -> None:
    async with stream:
        received = b""
        async for part in stream:
            received += part
            while b"\r\n\r\n" in received:
                _, _, received = received.partition(b"\r\n\r\n")
                where = b"socket" if stream.socket.family == socket.AF_UNIX else b"port"
                await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(where), where))


@asynccontextmanager
async def served(folder: Path, port: int) -> AsyncIterator[trio.CancelScope]:
    """An instance at a socket and a port; the scope ends what it has at the socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(folder / "b.sock"))
    sock.listen(10)
    by_socket = trio.CancelScope()

    async def serve_socket() -> None:
        with by_socket:
            await trio.serve_listeners(answer, [trio.SocketListener(trio.socket.from_stdlib_socket(sock))])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_socket)
        nursery.start_soon(trio.serve_tcp, answer, port)
        yield by_socket
        nursery.cancel_scope.cancel()


def over(path: Path) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path)), timeout=LIMIT)


async def test_a_proxy_on_unix_sockets(processes: Any, here: Any, tmp_path: Path) -> None:
    """From a socket, to a socket, and to the port once that is gone; a reload brings a socket and takes one; nothing is
    left at the end."""
    port = free_port()
    first, second = tmp_path / "first", tmp_path / "second"
    processes.write("instances.yaml", INSTANCES.format(port=port))
    processes.write("proxy.yaml", CONFIG.format(folder=tmp_path, listen=f"http://unix:{first}=b"))
    # What a proxy that was killed left behind.
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(first))
    proxy = await processes.meshlocal("proxy", "--config", "proxy.yaml")
    ready = await proxy.printed(rf"ready: node=n1 http://unix:{first}=b admin=http://127.0.0.1:(\d+)\n", "out")
    admin = int(ready[1])
    async with served(tmp_path, port) as by_socket:
        async with over(first) as client:
            assert (await client.get("http://b/")).text == "socket"
            metrics = await here.metrics(admin)
            assert metrics("unix_connects_total", service="b") == 1
            _, explained = await here.get(admin, "/explain?service=b")
            assert f'"instance":"127.0.0.1:{port}","path":"{tmp_path}/b.sock","problem":null' in explained
            assert f"'../b.sock' is no path within {tmp_path}" in explained
            # A reload: the second comes; what is open at the first goes on.
            listen = f"http://unix:{first}=b, tcp://unix:{second}=b"
            processes.write("proxy.yaml", CONFIG.format(folder=tmp_path, listen=listen))
            proxy.signal(SIGHUP)
            await proxy.printed("config applied")
            assert (await client.get("http://b/")).text == "socket"
            # The file is lost: a reload makes it anew, and clients that are connected go on.
            os.unlink(second)
            start = len(proxy.err)
            proxy.signal(SIGHUP)
            await proxy.printed("config applied", start=start)
            async with over(second) as other:
                assert (await other.get("http://b/")).text == "socket"
            assert (await client.get("http://b/")).text == "socket"
        by_socket.cancel()
        os.unlink(tmp_path / "b.sock")
        async with over(second) as client:
            assert (await client.get("http://b/")).text == "port"
        await here.measured(admin, lambda found: found("health_checks_total", service="b", outcome="passed"))
        start = len(proxy.err)
        processes.write("proxy.yaml", CONFIG.format(folder=tmp_path, listen=f"tcp://unix:{second}=b"))
        proxy.signal(SIGHUP)
        await proxy.printed("config applied", start=start)
        with trio.fail_after(LIMIT):
            while first.exists():  # noqa: ASYNC110 - another process removes it
                await trio.sleep(0.01)
        # One that cannot be listened on: nothing changes, and nothing is left.
        start = len(proxy.err)
        listen = f"tcp://unix:{second}=b, tcp://unix:{first}=b, tcp://unix:{tmp_path}/none/x=b"
        processes.write("proxy.yaml", CONFIG.format(folder=tmp_path, listen=listen))
        proxy.signal(SIGHUP)
        await proxy.printed(f"proxy.listen.2.: cannot listen on unix:{tmp_path}/none/x", start=start)
        assert not first.exists()
        async with over(second) as client:
            assert (await client.get("http://b/")).text == "port"
    proxy.signal(SIGTERM)
    assert await proxy.exited() == 0
    assert not second.exists()


async def test_a_path_that_is_taken_is_told(processes: Any, tmp_path: Path) -> None:
    path = tmp_path / "taken"
    processes.write("instances.yaml", "services: {}")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        listen = f"tcp://127.0.0.1:0=b, tcp://unix:{tmp_path}/free=b, tcp://unix:{path}=b"
        processes.write("proxy.yaml", CONFIG.format(folder=tmp_path, listen=listen))
        proxy = await processes.meshlocal("proxy", "--config", "proxy.yaml")
        assert await proxy.exited() == 1
    assert f"proxy.listen[2]: cannot listen on unix:{path}: Address already in use" in proxy.err
    assert path.exists()
    assert not (tmp_path / "free").exists()


async def test_the_library_uses_sockets(tmp_path: Path) -> None:
    """For streams as for HTTP; without a folder, or once the socket is gone, the port."""
    port = free_port()
    (tmp_path / "instances.yaml").write_text(INSTANCES.format(port=port))
    source = f"file:{tmp_path}/instances.yaml"
    async with served(tmp_path, port) as by_socket:
        async with (
            meshlocal.open_mesh(source, node_name="n1", socket_folder=tmp_path) as mesh,
            httpx.AsyncClient(transport=MeshTransport(mesh), timeout=LIMIT) as client,
        ):
            response = await client.get("http://b/")
            assert response.text == "socket"
            assert response.extensions["meshlocal"].instance.key.port == port
            async with await mesh.open_tcp_stream("b") as stream:
                await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
                assert (await stream.receive_some()).endswith(b"socket")
            # The label is taken back: kept connections that it led to are not used again.
            (tmp_path / "instances.yaml").write_text(INSTANCES.format(port=port).replace(", socket: b.sock", ""))
            with trio.fail_after(LIMIT):
                while (await client.get("http://b/")).text != "port":  # noqa: ASYNC110 - the file is looked at
                    await trio.sleep(0.01)
            (tmp_path / "instances.yaml").write_text(INSTANCES.format(port=port))
            with trio.fail_after(LIMIT):
                while (await client.get("http://b/")).text != "socket":  # noqa: ASYNC110 - likewise
                    await trio.sleep(0.01)
            by_socket.cancel()
            os.unlink(tmp_path / "b.sock")
            async with await mesh.open_tcp_stream("b") as stream:
                await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
                assert (await stream.receive_some()).endswith(b"port")
        async with meshlocal.open_mesh(source, node_name="n1") as mesh, await mesh.open_tcp_stream("b") as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
            assert (await stream.receive_some()).endswith(b"port")


@pytest.mark.parametrize("folder", ["sockets", "./sockets"])
async def test_a_folder_of_a_mesh_is_an_absolute_path(folder: str) -> None:
    with pytest.raises(meshlocal.MeshConfigError, match=f"socket_folder: expected an absolute path, got '{folder}'"):
        async with meshlocal.open_mesh("file:instances.yaml", socket_folder=folder):
            pass
