"""A source that its test publishes through."""

from __future__ import annotations

import trio

from meshlocal.discovery.source import Publisher
from meshlocal.policy import model
from meshlocal.policy.model import Instance, ServiceKey


class HeldSource:
    """In sync once its test says so.

    Args:
        name: of the source.
        service: the only one that it may know; None: any.
    """

    def __init__(self, name: str = "held", service: str | None = None) -> None:
        self.name = name
        self.publisher: Publisher | None = None
        self.sync = trio.Event()
        self._service = service

    def may_know(self, service: ServiceKey) -> bool:
        return self._service in (None, service)

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        self.publisher = publisher
        await self.sync.wait()
        task_status.started()
        await trio.sleep_forever()

    def update(self, service: str, *instances: Instance) -> None:
        """Publish a service's instances: these, and no others."""
        assert self.publisher is not None
        self.publisher.update(ServiceKey(service), model.index(instances))

    def remove(self, service: str) -> None:
        """Know a service no longer."""
        assert self.publisher is not None
        self.publisher.update(ServiceKey(service), None)
