"""Which instances a request passes over at first: those ejected, and local ones that are full (H1, O5, F3)."""

from __future__ import annotations

from collections.abc import Mapping

from meshlocal.policy.health import Health
from meshlocal.policy.model import HostPort
from meshlocal.policy.picker import PassedOver


class Admission:
    """A `Gate` of one request.

    Args:
        health: which instances are ejected.
        now: the time, on the clock of `health`.
        spill: requests under way on an instance of the first tier from which on it is full; None: never (F3).
        under_way: requests under way by instance.
    """

    __slots__ = ("_health", "_now", "_spill", "_under_way")

    def __init__(self, health: Health, now: float, spill: int | None, under_way: Mapping[HostPort, int]) -> None:
        self._health = health
        self._now = now
        self._spill = spill
        self._under_way = under_way

    def passed_over(self, place: HostPort, tier: int) -> PassedOver | None:
        """See `Gate`. An instance whose ejection is over is let through once, for its trial."""
        if not self._health.is_admitted(place):
            return None if self._health.claim(place, self._now) else PassedOver.EJECTED
        return self._full(place, tier)

    def would_pass_over(self, place: HostPort, tier: int) -> PassedOver | None:
        """See `Gate`."""
        if not self._health.is_admitted(place):
            return None if self._health.is_due(place, self._now) else PassedOver.EJECTED
        return self._full(place, tier)

    def _full(self, place: HostPort, tier: int) -> PassedOver | None:
        if tier or self._spill is None or self._under_way.get(place, 0) < self._spill:
            return None
        return PassedOver.FULL
