"""A hub in the process that uses it: what its feed says of itself (D1, D3)."""

from __future__ import annotations

import random
from collections.abc import Iterator

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from meshlocal.discovery.embedded import EmbeddedFeed
from meshlocal.discovery.hub import Hub
from meshlocal.policy.model import ServiceChange, ServiceKey, ServiceSnapshot, make_instance
from nursery_tests.discovery.held import HeldSource

B = ServiceKey("b")


class Sink:
    def __init__(self) -> None:
        self.published: list[ServiceSnapshot] = []

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        yield from ()

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        self.published.append(snapshot)


async def test_a_feed_is_as_current_as_its_sources(nursery: trio.Nursery, mock_clock: MockClock) -> None:
    """D1: while a source is in trouble what it said ages, and what is held stays."""
    source, sink = HeldSource(), Sink()
    feed = EmbeddedFeed(Hub([source], random.Random(0)), "held:", [B], sink)
    nursery.start_soon(feed.run)
    await wait_all_tasks_blocked()
    assert (feed.status.connected, feed.status.age(trio.current_time())) == (False, None)
    source.sync.set()
    source.update("b", make_instance("10.0.0.1", 80))
    await wait_all_tasks_blocked()
    assert [len(snapshot.instances) for snapshot in sink.published] == [1]
    mock_clock.jump(100)
    assert (feed.status.connected, feed.status.age(trio.current_time())) == (True, 0)
    assert source.publisher is not None
    source.publisher.report("it is away")
    await wait_all_tasks_blocked()
    mock_clock.jump(7)
    assert (feed.status.connected, feed.status.problem) == (False, "it is away")
    assert feed.status.age(trio.current_time()) == 7
    source.publisher.report("it is still away")
    await wait_all_tasks_blocked()
    assert feed.status.age(trio.current_time()) == 7, "as of when the trouble began"
    source.publisher.report(None)
    await wait_all_tasks_blocked()
    assert (feed.status.connected, feed.status.problem) == (True, None)
    assert feed.status.age(trio.current_time()) == 0
    assert len(sink.published) == 1


async def test_a_feed_without_news_does_nothing(nursery: trio.Nursery, mock_clock: MockClock) -> None:
    """P3: it has no timer."""
    source, sink = HeldSource(), Sink()
    feed = EmbeddedFeed(Hub([source], random.Random(0)), "held:", [B], sink)
    nursery.start_soon(feed.run)
    await wait_all_tasks_blocked()
    source.sync.set()
    await wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().seconds_to_next_deadline > 1e6
