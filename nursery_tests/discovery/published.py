"""A `Publisher` that keeps what a source publishes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from meshlocal.discovery.source import Instances
from meshlocal.policy.model import ServiceKey

LIMIT = 30.0


class Published:
    """What a source publishes.

    Attributes:
        services: as they are.
        calls: how often something was published.
        problem: what it reports.
    """

    def __init__(self) -> None:
        self.services: dict[ServiceKey, Instances] = {}
        self.calls = 0
        self.problem: str | None = None
        self._news = trio.Event()

    def replace(self, services: Mapping[ServiceKey, Instances]) -> None:
        self.services = dict(services)
        self._tell()

    def update(self, service: ServiceKey, instances: Instances | None) -> None:
        if instances is None:
            self.services.pop(service, None)
        else:
            self.services[service] = instances
        self._tell()

    def report(self, problem: str | None) -> None:
        self.problem = problem
        self._news.set()
        self._news = trio.Event()

    def _tell(self) -> None:
        self.calls += 1
        self._news.set()
        self._news = trio.Event()

    @property
    def addresses(self) -> dict[str, list[str]]:
        return {service: sorted(key.address for key in found) for service, found in self.services.items()}

    async def until(self, holds: Callable[[], object]) -> None:
        with trio.move_on_after(LIMIT):
            while not holds():
                await self._news.wait()
        assert holds(), (self.addresses, self.problem)
