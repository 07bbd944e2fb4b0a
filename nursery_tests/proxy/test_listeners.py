"""proxy/listeners: opened together, and changed without losing one that stays (S2)."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

from meshlocal.client.services import ServiceTable
from meshlocal.net.listen import ListenError
from meshlocal.net.pipe import Pipe
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.locality import Locality
from meshlocal.proxy.http.forwarder import HttpForwarder
from meshlocal.proxy.listeners import Listener, Listeners
from meshlocal.proxy.tcp.forwarder import TcpForwarder
from nursery_tests.logged import events
from nursery_tests.ports import free_port


@pytest.fixture(autouse=True)
def _descriptors_stay_level() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


def config(*listen: str, namespace: str | None = None) -> ProxyConfig:
    return ProxyConfig(listen=tuple(map(ListenAddress.parse, listen)), namespace=namespace)


@pytest.fixture
async def listeners() -> AsyncIterator[Listeners]:
    table = ServiceTable(config(), Locality({}), random.Random(1))
    made = Listeners({"tcp": TcpForwarder(table), "http": HttpForwarder(table, config())})
    yield made
    for listener in made.current:
        listener.close()


def adopt(listeners: Listeners, wanted: ProxyConfig) -> list[Listener]:
    listeners.adopt(listeners.prepare(wanted), wanted)
    return listeners.current


def connect(port: int) -> trio.SocketStream:
    """Connected before anything else runs: trio's own connect can find that the connection was reset already."""
    client = socket.create_connection(("127.0.0.1", port))
    client.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(client))


async def test_every_address_is_bound(listeners: Listeners) -> None:
    one, two, both = adopt(listeners, config("tcp://127.0.0.1:0=b", "tcp://[::1]:0=c", "http://localhost:0"))
    assert [each.service for each in (one, two, both)] == ["b", "c", None]
    assert one.bound[0].startswith("127.0.0.1:")
    assert two.bound[0].startswith("[::1]:")
    ports = {bound.rpartition(":")[2] for bound in both.bound}
    assert len(both.bound) == 2
    assert len(ports) == 1
    assert "0" not in ports


async def test_what_stays_keeps_its_sockets_also_with_another_service(listeners: Listeners) -> None:
    port = free_port()
    (before,) = adopt(listeners, config(f"tcp://127.0.0.1:{port}=b"))
    sockets = before.sockets
    (after,) = adopt(listeners, config(f"http://127.0.0.1:{port}=c", namespace="ns"))
    assert after is before
    assert after.sockets is sockets
    assert (after.service, after.configured.scheme) == ("c.ns", "http")


async def test_listeners_on_any_free_port_are_told_apart(listeners: Listeners) -> None:
    """A reload of the same config moves no port, though all of them have the same address in it."""
    listen = ["tcp://127.0.0.1:0=b", "tcp://127.0.0.1:0=c", "tcp://127.0.0.1:0=b"]
    before = adopt(listeners, config(*listen))
    bound = [each.bound for each in before]
    assert adopt(listeners, config(*listen)) == before
    assert [each.bound for each in listeners.current] == bound
    # In another order each goes with its service.
    assert adopt(listeners, config(listen[1], listen[0], listen[2])) == [before[1], before[0], before[2]]
    # One more is one more; which of the others stay does not change.
    more = adopt(listeners, config("tcp://127.0.0.1:0=d", *listen))
    assert more[1:] == before
    assert more[0] not in before


async def test_one_that_cannot_be_opened_leaves_everything_as_it_was(listeners: Listeners) -> None:
    port = free_port()
    before = list(adopt(listeners, config(f"tcp://127.0.0.1:{port}=b")))
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ListenError, match=r"192\.0\.2\.1:1"):
        listeners.prepare(config(f"tcp://127.0.0.1:{port}=b", "tcp://127.0.0.1:0=c", "tcp://192.0.2.1:1=d"))
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert listeners.current == before
    assert before[0].sockets[0].fileno() != -1


async def test_what_was_prepared_and_not_adopted_is_closed(listeners: Listeners) -> None:
    port = free_port()
    (staying,) = adopt(listeners, config(f"tcp://127.0.0.1:{port}=b"))
    prepared = listeners.prepare(config(f"tcp://127.0.0.1:{port}=b", "tcp://127.0.0.1:0=c"))
    listeners.discard(prepared)
    assert staying.sockets[0].fileno() != -1
    assert prepared[1].sockets[0].fileno() == -1


async def test_listeners_that_go_stop_accepting_and_close(listeners: Listeners) -> None:
    async with trio.open_nursery() as connections, trio.open_nursery() as acceptors:
        staying, going = adopt(listeners, config("tcp://127.0.0.1:0=b", "tcp://127.0.0.1:0=c"))
        listeners.start(acceptors, connections)
        port = going.sockets[0].getsockname()[1]
        await connect(port).aclose()
        adopt(listeners, config("tcp://127.0.0.1:0=b"))
        await trio.testing.wait_all_tasks_blocked()
        assert going.sockets[0].fileno() == -1
        with pytest.raises(OSError, match="connect"):
            await trio.open_tcp_stream("127.0.0.1", port)
        assert staying.sockets[0].fileno() != -1
        acceptors.cancel_scope.cancel()
    assert staying.sockets[0].fileno() == -1


@pytest.mark.parametrize("end", ["drain", "reload"])
async def test_who_waits_in_the_queue_of_a_listener_that_goes_is_served(
    listeners: Listeners, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """S1, S2: its client knows no better than that it is connected."""
    served: list[object] = []
    gone = trio.Event()

    async def serve(_: object, service: object, client: Pipe, peer: object) -> None:
        served.append(service)
        await gone.wait()
        client.write(b"served")
        client.close()

    monkeypatch.setattr(HttpForwarder, "serve", serve)
    (listener,) = adopt(listeners, config("http://127.0.0.1:0"))
    port = listener.sockets[0].getsockname()[1]
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as acceptors:
            listeners.start(acceptors, connections)
            await trio.testing.wait_all_tasks_blocked()
            clients = [connect(port) for _ in range(3)]
            # Nothing has run since that could have accepted them.
            if end == "reload":
                adopt(listeners, config())
            else:
                acceptors.cancel_scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert listener.sockets[0].fileno() == -1
            acceptors.cancel_scope.cancel()
        gone.set()
        for client in clients:
            with trio.fail_after(10):
                assert await client.receive_some(10) == b"served"
            await client.aclose()
    assert len(served) == 3


async def test_a_connection_whose_service_is_gone_is_reset(listeners: Listeners) -> None:
    """Accepted while the config lost it: nothing is known that it could be forwarded by."""
    async with trio.open_nursery() as connections, trio.open_nursery() as acceptors:
        (listener,) = adopt(listeners, config("tcp://127.0.0.1:0=b"))
        listeners.start(acceptors, connections)
        async with connect(listener.sockets[0].getsockname()[1]) as stream:
            with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
        acceptors.cancel_scope.cancel()


async def test_accept_errors_are_counted_and_said(listeners: Listeners, caplog: pytest.LogCaptureFixture) -> None:
    (listener,) = adopt(listeners, config("tcp://127.0.0.1:0=b"))
    for _ in range(3):
        listener.on_accept_error(OSError(24, "Too many open files"))
    assert listener.accept_errors == 3
    assert events(caplog.records) == ["cannot accept; trying again"]
