"""What became of a proxy's requests in the last ten minutes, for its page: counts go on for ever, these do not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from weakref import WeakKeyDictionary

import trio

from meshlocal.app.views import summary
from meshlocal.client.latency import Latency
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import ServiceStatistics
from meshlocal.net.slices import in_slices
from meshlocal.policy.steps import Steps

INTERVAL = 10.0
"""Seconds that a sample is of."""

SAMPLES = 60
"""Samples that are kept: ten minutes'."""

_LATENCY_SAMPLES = 6
"""Samples after which latencies begin anew: what is shown of them is of the last one to two minutes."""


Sample = tuple[int, int, int]
"""How many requests ended in one interval: in the first tier, on an instance that took them; in another tier, likewise;
and the others."""

_NOTHING = (0, 0, 0)


class Recent:
    """One service's last ten minutes.

    Attributes:
        samples: the latest comes last; at most `SAMPLES`.
    """

    __slots__ = ("_before", "_count", "_marks", "samples")

    def __init__(self, statistics: ServiceStatistics, first: str) -> None:
        self.samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._before = totals(statistics, first)
        self._marks = (_marks(statistics), _marks(statistics))
        self._count = 0

    def sample(self, statistics: ServiceStatistics, first: str) -> None:
        """Note what ended since the last time."""
        change = self.since(statistics, first)
        self._before = totals(statistics, first)
        self.samples.append(change if any(change) else _NOTHING)
        self._count += 1
        if self._count % _LATENCY_SAMPLES == 0:
            self._marks = (self._marks[1], _marks(statistics))

    def since(self, statistics: ServiceStatistics, first: str) -> Sample:
        """What ended since the last sample."""
        # A first tier by another name (S2) makes others near: that is no number of requests.
        near, away, failed = totals(statistics, first)
        before = self._before
        return max(0, near - before[0]), max(0, away - before[1]), max(0, failed - before[2])

    def latency(self, statistics: ServiceStatistics, kind: str) -> dict[str, Latency]:
        """Times of the last one to two minutes, by tier; those without any are left out.

        Args:
            statistics: of the same service.
            kind: `connects` or `responses`.
        """
        before = self._marks[0][kind]
        current: Mapping[str, Latency] = getattr(statistics, kind)
        found = {tier: latency.since(before.get(tier, ())) for tier, latency in current.items()}
        return {tier: latency for tier, latency in found.items() if latency.count}


def totals(statistics: ServiceStatistics, first: str) -> Sample:
    """The same of all requests so far; `first` is the first tier's name."""
    done = summary(statistics.requests, first)
    return done.near, done.reached - done.near, done.total - done.reached


def _marks(statistics: ServiceStatistics) -> dict[str, dict[str, list[int]]]:
    return {
        kind: {tier: latency.counts.copy() for tier, latency in getattr(statistics, kind).items()}
        for kind in ("connects", "responses")
    }


class History:
    """The last ten minutes of each service. What a service counted before it is first looked at is not in it.

    Args:
        services: gives those that there are.
    """

    def __init__(self, services: Callable[[], Iterable[ServiceState]]) -> None:
        self._services = services
        self._recent: WeakKeyDictionary[ServiceState, Recent] = WeakKeyDictionary()

    def of(self, service: ServiceState) -> Recent:
        """One service's."""
        found = self._recent.get(service)
        if found is None:
            found = self._recent[service] = Recent(service.statistics, service.tiers[0])
        return found

    async def run(self) -> None:
        """Take a sample from time to time, until cancelled."""
        await in_slices(self.sample())
        due = trio.current_time()
        while True:
            # As of when the last was due: intervals that drift would not be ten minutes.
            due = max(due + INTERVAL, trio.current_time())
            await trio.sleep_until(due)
            await in_slices(self.sample())

    def sample(self) -> Steps[None]:
        """Take one, in steps."""
        for service in list(self._services()):
            if service in self._recent:
                self._recent[service].sample(service.statistics, service.tiers[0])
            else:
                self.of(service)
            yield
