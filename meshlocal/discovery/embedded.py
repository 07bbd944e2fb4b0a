"""Instances without a discovery server: the hub and its sources inside the process that uses them."""

from __future__ import annotations

from collections.abc import Iterable

import anyio

from meshlocal.client.feed import FeedStatus, SnapshotSink
from meshlocal.discovery.hub import Hub
from meshlocal.policy.model import ServiceKey

_LOOK = 1.0
"""Seconds between two looks at whether the sources are current."""


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
            while True:
                for update in watcher.take():
                    self._sink.publish(update.latest, update.last)
                self._note_state()
                with anyio.move_on_after(_LOOK):
                    await watcher.wait()

    def _note_state(self) -> None:
        problems = [state.problem for state in self._hub.sources if state.problem is not None]
        self.status.problem = "; ".join(problems) or None
        self.status.connected = self._hub.in_sync and not problems
        if self.status.connected:
            self.status.confirmed_at = anyio.current_time()
