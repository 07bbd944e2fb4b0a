"""Circuit limits on tcp listeners, and spill (F3, R1)."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
import trio

from meshlocal.client.statistics import Outcome, RequestKey
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.config import AttemptPolicy, ProxyConfig, ServiceConfig
from meshlocal.policy.config_health import LimitsConfig
from meshlocal.policy.limits import Limit
from meshlocal.policy.model import ServiceKey, make_instance

B = ServiceKey("b")
LIMIT = 20
REFUSED = RequestKey("", "", Outcome.LIMITED)


def configure(proxy: Any, service: ServiceConfig | None = None, **keys: Any) -> None:
    listen = (ListenAddress.parse("tcp://127.0.0.1:0=b"),)
    proxy.config = ProxyConfig(listen=listen, services={B: service or ServiceConfig()}, **keys)
    proxy.table.reconfigure(proxy.config, proxy.table.locality)


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT):
        while not holds():  # noqa: ASYNC110 - the counts are plain numbers, with no event to wait for
            await trio.sleep(0.001)


async def finish(proxy: Any) -> None:
    await until(lambda: not len(proxy.forwarder))


@pytest.mark.parametrize("what", [Limit.CONNECTIONS, Limit.REQUESTS])
@pytest.mark.parametrize("whole", [False, True])
async def test_beyond_the_limit_a_connection_is_reset_at_once(
    proxy: Any, upstream: Any, what: Limit, whole: bool
) -> None:
    """No instance hears of it; one that ends makes room."""
    local = await upstream("local", "n1")
    limits = LimitsConfig(**{what.value: 2})
    configure(proxy, **({"limits": limits} if whole else {"service": ServiceConfig(limits=limits)}))
    proxy.publish([local])
    held = [await proxy.connect() for _ in range(2)]
    for stream in held:
        assert await stream.receive_some(64) == b"local\n"
    assert [await proxy.ask() for _ in range(3)] == [""] * 3
    await until(lambda: len(proxy.forwarder) == 2)
    assert proxy.requests == {REFUSED: 3}
    assert local.accepted == 2
    circuit = proxy.table.circuit if whole else proxy.table[B].circuit
    assert circuit.refused[what] == 3
    await held[0].aclose()
    await until(lambda: len(proxy.forwarder) == 1)
    assert await proxy.ask() == "local"
    await held[1].aclose()
    await finish(proxy)
    assert set(proxy.table.circuit.now.values()) == {0}


async def test_only_so_many_wait_for_an_instance(proxy: Any) -> None:
    """What waits is bounded, and whoever leaves makes room (A8)."""
    configure(
        proxy,
        ServiceConfig(limits=LimitsConfig(waiting=2)),
        attempts=AttemptPolicy(connect_timeout_local=LIMIT, deadline=LIMIT),
    )
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        proxy.publish([make_instance("127.0.0.1", full.getsockname()[1], labels={"node": "n1"})])
        waiting = [await proxy.connect() for _ in range(2)]
        await until(lambda: proxy.table[B].statistics.connecting == 2)
        assert await proxy.ask() == ""
        assert proxy.requests == {REFUSED: 1}
        for stream in waiting:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await stream.aclose()
        await finish(proxy)
        assert proxy.table[B].circuit.now[Limit.WAITING] == 0
        for filler in fillers:
            filler.close()


async def test_a_full_local_instance_spills(proxy: Any, upstream: Any) -> None:
    """F3, R1: no more than N connections at once on it, the rest goes on; and back once it has room (F1)."""
    local, remote = await upstream("local", "n1"), await upstream("remote", "n2")
    configure(proxy, ServiceConfig(spill=2))
    proxy.publish([local, remote])
    held, served = [], []
    for _ in range(5):  # one after another: tasks that are ready at once run in any order
        held.append(await proxy.connect())
        served.append((await held[-1].receive_some(64)).decode().strip())
    assert served == ["local", "local", "remote", "remote", "remote"]
    assert dict(proxy.table[B].statistics.picks) == {("node", ""): 2, ("other", "spill"): 3}
    await held[0].aclose()
    await until(lambda: len(proxy.forwarder) == 4)
    assert await proxy.ask() == "local"
    for stream in held[1:]:
        await stream.aclose()
    await finish(proxy)
    assert not proxy.table[B].fitness.under_way


async def test_a_full_instance_is_used_when_nothing_else_is_left(proxy: Any, upstream: Any) -> None:
    """F3, O1: spill refuses nobody."""
    local = await upstream("local", "n1")
    configure(proxy, ServiceConfig(spill=1))
    proxy.publish([local])
    held = [await proxy.connect() for _ in range(3)]
    for stream in held:
        assert await stream.receive_some(64) == b"local\n"
        await stream.aclose()
    await finish(proxy)
