"""The cache file between a feed and its sink (D2)."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from meshlocal.client.cache import CONFIRM_INTERVAL, DELAY, KEEP, KEEP_INSTANCES, KEEP_SERVICES, SnapshotCache
from meshlocal.client.feed import FeedStatus
from meshlocal.policy import model
from meshlocal.policy.model import Instance, ServiceChange, ServiceKey, ServiceSnapshot, make_instance
from nursery_tests.logged import events

B, C = ServiceKey("b"), ServiceKey("c")
NOW = 2_000_000_000.0


class Sink:
    def __init__(self) -> None:
        self.published: list[ServiceSnapshot] = []

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        return iter(())

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        self.published.append(snapshot)


class Setup:
    """One proxy's cache after the other, over one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = NOW
        self.followed = [B]
        self.sink = Sink()

    def start(self) -> SnapshotCache:
        self.sink = Sink()
        made = SnapshotCache(self.path, self.sink, lambda: self.followed, lambda: self.now)
        made.status = FeedStatus()
        return made


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path / "snapshots")


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No threads: a clock that jumps while nothing runs on this one would jump while they work."""

    async def run_sync(work: Any, *args: Any, abandon_on_cancel: bool) -> None:
        await trio.lowlevel.checkpoint()
        work(*args)

    monkeypatch.setattr("anyio.to_thread.run_sync", run_sync)


def at(*lasts: int, service: ServiceKey = B) -> ServiceSnapshot:
    instances: list[Instance] = [make_instance(f"10.0.0.{last}", 9000, labels={"node": "n1"}) for last in lasts]
    return ServiceSnapshot(service, f"v{lasts}", model.index(instances))


async def written(setup: Setup, *snapshots: ServiceSnapshot) -> None:
    """What a proxy that saw these snapshots leaves behind."""
    cache = setup.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.run)
        for snapshot in snapshots:
            cache.publish(snapshot)
        nursery.cancel_scope.cancel()


async def test_what_was_known_outlives_a_restart(setup: Setup) -> None:
    """D2: and the feed can resume from it."""
    await written(setup, at(1), at(1, 2))
    cache = setup.start()
    assert cache.load() == [at(1, 2)]
    assert setup.sink.published == [at(1, 2)]


async def test_what_passes_reaches_the_sink(setup: Setup) -> None:
    cache = setup.start()
    cache.publish(at(1))
    assert setup.sink.published == [at(1)]


async def test_it_is_stale_and_as_old_as_the_file(setup: Setup, inline: None, autojump_clock: MockClock) -> None:
    """D1, D2: until discovery confirms it."""
    await written(setup, at(1))
    os.utime(setup.path, (NOW - 500, NOW - 500))
    cache = setup.start()
    cache.load()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.run)
        await trio.sleep(10)
        assert cache.status.stale
        assert cache.status.age(trio.current_time()) == pytest.approx(510)
        nursery.cancel_scope.cancel()


async def test_without_a_file_nothing_is_stale(setup: Setup, inline: None, autojump_clock: MockClock) -> None:
    cache = setup.start()
    assert cache.load() == []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.run)
        await trio.sleep(10)
        assert (cache.status.stale, cache.status.confirmed_at) == (False, None)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("content", [b"", b"garbage", b"meshlocal snapshots 2 crc32 00000000\n", None])
async def test_a_corrupt_file_is_reported_and_ignored(
    setup: Setup, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    """D2: and replaced by the next whole one."""
    await written(setup, at(1))
    setup.path.write_bytes(setup.path.read_bytes()[:-5] if content is None else content)
    assert setup.start().load() == []
    assert events(caplog.records) == ["cache file ignored"]
    await written(setup, at(3))
    assert setup.start().load() == [at(3)]


async def test_changes_are_written_together_soon(setup: Setup, inline: None, autojump_clock: MockClock) -> None:
    """D2: a crash loses a second at most, and a storm of changes is one write."""
    cache = setup.start()
    writes = []
    replace = cache._replace
    cache._replace = lambda cached: (writes.append(len(cached)), replace(cached))[1]  # type: ignore[method-assign]  # a spy
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.run)
        for number in range(100):
            cache.publish(at(number + 1))
        await trio.sleep(DELAY + 0.1)
        await trio.sleep(5)
        assert writes == [1]
        nursery.cancel_scope.cancel()
    assert writes == [1]
    assert setup.start().load() == [at(100)]


async def test_the_file_says_when_what_it_holds_was_current(
    setup: Setup, inline: None, autojump_clock: MockClock
) -> None:
    """D2: only discovery's word makes it younger."""
    await written(setup, at(1))
    os.utime(setup.path, (1000, 1000))
    cache = setup.start()
    cache.load()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.run)
        await trio.sleep(3 * CONFIRM_INTERVAL)
        assert setup.path.stat().st_mtime == 1000
        cache.status.connected, cache.status.stale = True, False
        await trio.sleep(3 * CONFIRM_INTERVAL)
        assert setup.path.stat().st_mtime > 1000
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("connected", "stale", "younger"),
    [(False, False, False), (False, True, False), (True, True, False), (True, False, True)],
)
async def test_the_file_grows_younger_only_while_discovery_confirms_it(
    setup: Setup, inline: None, autojump_clock: MockClock, connected: bool, stale: bool, younger: bool
) -> None:
    """D2: a feed that lost its server, or has not heard its first word, leaves the file as old as what it holds."""
    await written(setup, at(1))
    os.utime(setup.path, (1000, 1000))
    cache = setup.start()
    cache.load()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.run)
        await trio.sleep(1)
        cache.status.connected, cache.status.stale = connected, stale
        await trio.sleep(3 * CONFIRM_INTERVAL)
        assert (setup.path.stat().st_mtime > 1000) == younger
        nursery.cancel_scope.cancel()
    assert (setup.path.stat().st_mtime > 1000) == younger


async def test_a_disk_that_takes_no_writes_is_said_once_and_tried_again(
    setup: Setup, inline: None, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """D2: traffic goes on."""
    setup.path = setup.path.parent / "absent" / "snapshots"
    cache = setup.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.run)
        cache.publish(at(1))
        await trio.sleep(5 * CONFIRM_INTERVAL)
        assert events(caplog.records) == ["cache file cannot be written"]
        setup.path.parent.mkdir()
        await trio.sleep(2 * CONFIRM_INTERVAL)
        nursery.cancel_scope.cancel()
    assert setup.start().load() == [at(1)]


async def test_a_write_that_fails_leaves_the_old_file(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """D2: atomic, and nothing is left beside it."""
    await written(setup, at(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        await written(setup, at(2))
    assert setup.start().load() == [at(1)]
    assert [path.name for path in setup.path.parent.iterdir()] == [setup.path.name]


async def test_services_that_requests_name_later_are_recalled_once(setup: Setup) -> None:
    """D2: what nobody follows yet waits in the cache."""
    setup.followed = [B, C]
    await written(setup, at(1), at(2, service=C))
    setup.followed = [B]
    cache = setup.start()
    assert cache.load() == [at(1)]
    assert cache.recall([B, C]) == [at(2, service=C)]
    assert cache.recall([B, C]) == []


async def test_what_discovery_said_is_not_overwritten_from_the_file(setup: Setup) -> None:
    """D2."""
    setup.followed = [B, C]
    await written(setup, at(1), at(2, service=C))
    setup.followed = [B]
    cache = setup.start()
    cache.load()
    cache.publish(at(3, service=C))
    assert cache.recall([C]) == []


async def test_what_nobody_follows_is_dropped_after_a_day(setup: Setup) -> None:
    setup.followed = [B, C]
    await written(setup, at(1), at(2, service=C))
    setup.followed = [B]
    setup.now += KEEP / 2
    cache = setup.start()
    cache.load()
    for after, expected in ((0.0, [at(2, service=C)]), (KEEP, [])):
        setup.now += after
        cache = setup.start()
        cache.load()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cache.run)
            cache.publish(at(random.randrange(1, 250)))
            nursery.cancel_scope.cancel()
        again = setup.start()
        again.load()
        assert again.recall([C]) == expected


async def test_a_cancelled_write_is_finished_by_the_last_one(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """D2: at the proxy's end the latest state is written, whatever was being written."""
    monkeypatch.setattr("meshlocal.client.cache.DELAY", 0.0)
    cache = setup.start()
    replace: Any = cache._replace_alone
    started = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def slow(cached: Any) -> None:
        trio.from_thread.run_sync(started.set, trio_token=token)
        replace(cached)

    monkeypatch.setattr(cache, "_replace_alone", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.run)
        cache.publish(at(1))
        with trio.fail_after(20):
            await started.wait()
        cache.publish(at(2))
        nursery.cancel_scope.cancel()
    assert setup.start().load() == [at(2)]


async def test_names_that_requests_make_up_do_not_fill_it(setup: Setup) -> None:
    """P2: of what nobody follows any more, nothing is kept that no registry knew, and little of what one did."""
    cache = setup.start()
    for number in range(5000):
        setup.followed = [B, ServiceKey(f"made-up-{number}")]
        cache.publish(ServiceSnapshot(setup.followed[1], "unknown", {}, unknown=True))
        assert len(cache._held) <= KEEP_SERVICES + 2
    for number in range(2 * KEEP_SERVICES):
        setup.now += 1
        setup.followed = [B, ServiceKey(f"real-{number}")]
        cache.publish(at(number % 250, service=setup.followed[1]))
    cache.publish(at(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cache.run)
        nursery.cancel_scope.cancel()
    again = setup.start()
    again.load()
    names = set(again._held)
    assert {B, setup.followed[1]} <= names
    assert len(names) <= KEEP_SERVICES + 2
    assert not any(name.startswith("made-up") for name in names - set(setup.followed))
    # Those that were followed last are kept.
    assert ServiceKey(f"real-{2 * KEEP_SERVICES - 2}") in names
    assert ServiceKey("real-0") not in names


async def test_what_is_kept_is_bounded_by_instances_too(setup: Setup) -> None:
    """P2."""
    cache = setup.start()
    crowd = model.index(make_instance(f"10.{n >> 8}.{n & 255}.1", 1) for n in range(KEEP_INSTANCES // 2))
    for number in range(6):
        setup.now += 1
        setup.followed = [ServiceKey(f"large-{number}")]
        cache.publish(ServiceSnapshot(setup.followed[0], "v", crowd))
    cache._prune(setup.now)
    assert sorted(cache._held) == ["large-3", "large-4", "large-5"]


async def test_while_discovery_is_away_what_it_said_is_said_again(setup: Setup) -> None:
    """D7: of a service that is followed anew, from what is held, whether or not it came from the file."""
    cache = setup.start()
    cache.publish(at(1))
    setup.followed = [C]
    assert cache.recall([C]) == []
    assert cache.recall([B, C]) == [at(1)]
    assert cache.recall([B, C]) == []
    assert setup.sink.published == [at(1), at(1)]
    cache.status.connected = True
    cache.recall([C])
    assert cache.recall([B, C]) == []


async def test_a_service_is_as_old_as_its_last_use(setup: Setup) -> None:
    """D7: followed for days, without a change, and dropped a moment ago."""
    setup.followed = [B, C]
    cache = setup.start()
    cache.recall([B, C])
    cache.publish(at(2, service=C))
    setup.now += 3 * KEEP
    setup.followed = [B]
    cache.recall([B])
    cache._prune(setup.now + 1)
    assert C in cache._held


async def test_one_that_is_too_large_costs_no_other(setup: Setup) -> None:
    """P2: the longest unused goes first, of those that there is room for."""
    cache = setup.start()
    setup.followed = []
    cache.publish(at(2, service=C))
    setup.now += 1
    crowd = model.index(make_instance(f"10.{n >> 8}.{n & 255}.1", 1) for n in range(KEEP_INSTANCES + 1))
    cache.publish(ServiceSnapshot(B, "v", crowd))
    cache._prune(setup.now)
    assert list(cache._held) == [C]
