"""How long something took, in fixed buckets: bounded, and as cheap to count as to add up."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds in seconds."""


class Exemplar(NamedTuple):
    """One that can be looked at: a request that is traced.

    Attributes:
        trace_id: of its trace, in 32 digits.
        seconds: how long it took.
        at: when it ended, by the clock of requests.
    """

    trace_id: str
    seconds: float
    at: float


class Latency:
    """Times of one kind.

    Attributes:
        counts: how many fell into each bucket, and those beyond the last.
        total: all of them together, in seconds.
        exemplars: the last request of a bucket that is traced, by the bucket's number; None: there never was one.
    """

    __slots__ = ("counts", "exemplars", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0
        self.exemplars: dict[int, Exemplar] | None = None

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def show(self, exemplar: Exemplar) -> None:
        """Keep one that was counted, as an example of its bucket."""
        if self.exemplars is None:
            self.exemplars = {}
        self.exemplars[bisect_left(BUCKETS, exemplar.seconds)] = exemplar

    def since(self, before: Sequence[int]) -> Latency:
        """Those that came after `counts` were so; its total is unknown, and 0.

        Args:
            before: as `counts`; empty: there were none.
        """
        found = Latency()
        found.counts = [now - then for now, then in zip(self.counts, before or found.counts, strict=True)]
        return found

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """The time that so many of a hundred took at most, in seconds, as far as buckets can tell: between two bounds
        it is taken to rise evenly. None: there were none. What lies beyond the last bound counts as that bound.

        Args:
            share: in percent.
        """
        count = self.count
        if not count:
            return None
        rank = count * share / 100
        before = 0
        for number, size in enumerate(self.counts[:-1]):
            if size and before + size >= rank:
                lower = BUCKETS[number - 1] if number else 0.0
                return lower + (BUCKETS[number] - lower) * max(rank - before, 0) / size
            before += size
        return BUCKETS[-1]

    def buckets(self) -> list[tuple[str, float]]:
        """How many took at most so long: upper bound and count, the last without a bound; as Prometheus has it."""
        bounds = [*map(str, BUCKETS), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))
