"""Instances without a discovery server: the hub and its sources inside the process that uses them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import anyio

from meshlocal.client.feed import FeedStatus, SnapshotSink
from meshlocal.discovery.hub import Hub, Watcher
from meshlocal.policy.model import ServiceKey


class EmbeddedFeed:
    """Joins a hub in this process to a sink, as `DiscoveryWatch` joins one in another.

    Args:
        hub: what is read.
        url: what operators call it.
        services: what to follow; `follow` changes it.
        sink: gets every new snapshot.
    """

    def __init__(self, hub: Hub, url: str, services: Iterable[ServiceKey], sink: SnapshotSink) -> None:
        self._hub = hub
        self._services = list(services)
        self._sink = sink
        self._followed = anyio.Event()
        self.status = FeedStatus(source=url)

    def follow(self, services: Iterable[ServiceKey]) -> None:
        """Follow these services from now on."""
        self._services = list(services)
        self._followed.set()

    async def run(self) -> None:
        """Run the hub and pass on what it holds, until cancelled."""
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._hub.run)
            while True:
                self._followed = anyio.Event()
                async with anyio.create_task_group() as following:
                    following.start_soon(self._follow_hub)
                    await self._followed.wait()
                    following.cancel_scope.cancel()

    async def _follow_hub(self) -> None:
        with self._hub.watch(dict.fromkeys(self._services, "")) as watcher:
            self._pass_on(watcher)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._follow_problems, watcher)
                while True:
                    await watcher.wait()
                    self._pass_on(watcher)

    async def _follow_problems(self, watcher: Watcher) -> None:
        while True:
            await self._hub.wait_told()
            self._pass_on(watcher)

    def _pass_on(self, watcher: Watcher) -> None:
        for update in watcher.take():
            self._sink.publish(update.latest, update.last)
        problems = [state.problem for state in self._hub.sources if state.problem is not None]
        connected = self._hub.in_sync and not problems
        self.status.problem = "; ".join(problems) or None
        if connected:
            # For as long as nothing is said against it.
            self.status.confirmed_at = math.inf
        elif self.status.connected:
            self.status.confirmed_at = anyio.current_time()
        self.status.connected = connected
