"""Gentle return of long-lived tcp connections (F1, F2)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import trio

from meshlocal.client.statistics import Outcome, RequestKey
from meshlocal.policy.addresses import ListenAddress
from meshlocal.policy.config import ProxyConfig, ServiceConfig
from meshlocal.policy.config_health import FailbackConfig
from meshlocal.policy.model import ServiceKey
from meshlocal.proxy.returning import Returning

B = ServiceKey("b")
LIMIT = 20
QUICK = FailbackConfig(after=0.02, interval=0.02, quiet=0.01)


def configure(proxy: Any, failback: FailbackConfig | None = QUICK, **service: Any) -> None:
    proxy.config = ProxyConfig(
        listen=(ListenAddress.parse("tcp://127.0.0.1:0=b"),),
        services={B: ServiceConfig(failback=failback, **service)},
    )
    proxy.table.reconfigure(proxy.config, proxy.table.locality)


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT):
        while not holds():  # noqa: ASYNC110 - the counts are plain numbers, with no event to wait for
            await trio.sleep(0.001)


class Caller:
    """A client as they should be: it keeps its connection, and makes another when that ends."""

    def __init__(self, proxy: Any) -> None:
        self._proxy = proxy
        self.served_by = ""
        self.connects = 0

    async def run(self) -> None:
        while True:
            try:
                async with await self._proxy.connect() as stream:
                    self.connects += 1
                    self.served_by = (await stream.receive_some(64)).decode().strip()
                    await stream.receive_some(64)
            except trio.BrokenResourceError:
                continue


@pytest.fixture
async def callers(proxy: Any, upstream: Any, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ten callers with connections to another node, as the local instance was not there yet."""
    monkeypatch.setattr("meshlocal.proxy.returning.LOOK", 0.005)
    remote = await upstream("remote", "n2")
    proxy.publish([remote])
    made = [Caller(proxy) for _ in range(10)]
    for caller in made:
        nursery.start_soon(caller.run)
    await until(lambda: all(caller.served_by == "remote" for caller in made))
    nursery.start_soon(Returning(proxy.table, lambda: proxy.forwarder, random.Random(0)).run)
    local = await upstream("local", "n1")
    proxy.publish([local, remote])
    return made


def served(callers: list[Caller]) -> Counter[str]:
    return Counter(caller.served_by for caller in callers)


async def test_they_come_back_one_by_one(proxy: Any, callers: Any, nursery: trio.Nursery) -> None:
    """F2: each has its connection ended once, and is served next door from then on."""
    configure(proxy)
    seen = set()

    def all_back() -> bool:
        seen.add(served(callers)["local"])
        return served(callers) == {"local": 10}

    await until(all_back)
    assert len(seen) > 5
    assert [caller.connects for caller in callers] == [2] * 10
    assert proxy.requests == {RequestKey("other", "no_local", Outcome.RETURNED): 10}
    nursery.cancel_scope.cancel()


async def test_off_by_default_they_stay(proxy: Any, callers: Any, nursery: trio.Nursery) -> None:
    """F2, F1: open connections stay, new ones are local."""
    configure(proxy, None)
    await trio.sleep(0.2)
    assert served(callers) == {"remote": 10}
    assert await proxy.ask() == "local"
    nursery.cancel_scope.cancel()


async def test_a_connection_that_is_busy_is_left_alone(proxy: Any, upstream: Any, nursery: trio.Nursery) -> None:
    """F2: it is ended only once it was silent."""
    configure(proxy, FailbackConfig(after=0.01, interval=0.01, quiet=20.0))
    remote = await upstream("remote", "n2")
    proxy.publish([remote])
    async with await proxy.connect() as stream:
        assert await stream.receive_some(64) == b"remote\n"
        returning = Returning(proxy.table, lambda: proxy.forwarder, random.Random(0))
        proxy.publish([await upstream("local", "n1"), remote])
        returning.look(trio.current_time())
        (connection,) = proxy.forwarder
        active = connection.counters.last_activity
        for later in (1.0, 10.0, 19.9):
            returning.look(active + later)
            assert not connection.cut
        returning.look(active + 20.1)
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(64)
    nursery.cancel_scope.cancel()


async def test_none_return_to_a_tier_that_is_ejected_or_full(proxy: Any, callers: Any, nursery: trio.Nursery) -> None:
    """F2, F3, H1: they would not be served there."""
    configure(proxy, spill=3)
    await until(lambda: served(callers)["local"] == 3)
    await trio.sleep(0.2)
    assert served(callers) == {"local": 3, "remote": 7}
    local = next(each for each in proxy.table[B].picker.snapshot.instances.values() if each.node == "n1")
    for _ in range(3):
        proxy.table[B].fitness.failed(local, "refused")
    configure(proxy)
    await trio.sleep(0.2)
    assert served(callers) == {"local": 3, "remote": 7}
    nursery.cancel_scope.cancel()


LATER = 1000.0
"""Seconds by which every wait is over."""


async def connected(proxy: Any, name: bytes, count: int) -> list[tuple[trio.SocketStream, Any]]:
    """Clients whose connections an instance of that name serves, with what the proxy knows of each."""
    made = []
    for _ in range(count):
        known = set(proxy.forwarder)
        stream = await proxy.connect()
        assert await stream.receive_some(64) == name + b"\n"
        (connection,) = set(proxy.forwarder) - known
        made.append((stream, connection))
    return made


async def close(made: list[tuple[trio.SocketStream, Any]]) -> None:
    for stream, _ in made:
        await stream.aclose()


async def test_those_that_were_silent_longest_come_back_first(proxy: Any, upstream: Any) -> None:
    """F2: each of them once, whatever order they were made in; those that are served next door never."""
    configure(proxy)
    remote = await upstream("remote", "n2")
    proxy.publish([remote])
    away = await connected(proxy, b"remote", 3)
    proxy.publish([await upstream("local", "n1"), remote])
    here = await connected(proxy, b"local", 1)
    for number in (1, 2, 0):
        await away[number][0].send_all(b"x")
        assert await away[number][0].receive_some(1) == b"x"
    returning = Returning(proxy.table, lambda: proxy.forwarder, random.Random(0))
    now = trio.current_time()
    returning.look(now)
    order = []
    for _ in range(5):
        before = [connection for _, connection in away + here if connection.cut]
        now += LATER
        returning.look(now)
        order += [number for number, (_, each) in enumerate(away + here) if each.cut and each not in before]
    assert order == [1, 2, 0]
    await close(away + here)


async def test_the_pace_is_kept_between_two_looks(proxy: Any, upstream: Any) -> None:
    """F2: `interval` begins with a connection that is ended, not with a look that finds none silent for long enough."""
    configure(proxy, FailbackConfig(after=10.0, interval=100.0, quiet=50.0))
    remote = await upstream("remote", "n2")
    proxy.publish([remote])
    away = await connected(proxy, b"remote", 2)
    proxy.publish([await upstream("local", "n1"), remote])
    returning = Returning(proxy.table, lambda: proxy.forwarder, random.Random(0))
    now = trio.current_time()

    def ended_at(seconds: float) -> int:
        returning.look(now + seconds)
        return sum(bool(connection.cut) for _, connection in away)

    assert [ended_at(seconds) for seconds in (0, 20, 45, 55, 60, 100, 210, 215)] == [0, 0, 0, 1, 1, 1, 2, 2]
    await close(away)


@pytest.mark.parametrize("between", [None, FailbackConfig(after=20.0, interval=1.0, quiet=1.0)])
async def test_a_reload_begins_the_wait_anew(proxy: Any, upstream: Any, between: FailbackConfig | None) -> None:
    """F2, S2: switched off and on again, or changed."""
    config = FailbackConfig(after=10.0, interval=1.0, quiet=1.0)
    configure(proxy, config)
    remote = await upstream("remote", "n2")
    proxy.publish([remote])
    away = await connected(proxy, b"remote", 1)
    proxy.publish([await upstream("local", "n1"), remote])
    returning = Returning(proxy.table, lambda: proxy.forwarder, random.Random(0))
    now = trio.current_time()
    returning.look(now)
    configure(proxy, between)
    returning.look(now + 5)
    configure(proxy, config)
    returning.look(now + LATER)
    returning.look(now + LATER + 9)
    assert [connection.cut for _, connection in away] == [""]
    returning.look(now + LATER + 16)
    assert [connection.cut for _, connection in away] == ["returned"]
    await close(away)
