"""When to ask discovery again because nothing that it named works (behaviour rule D5)."""

from __future__ import annotations

from meshlocal.policy.backoff import UniformSource

PATIENCE = 1.0
"""Seconds for which every attempt must have failed."""

ENOUGH = 3
"""Attempts that must have failed in that time."""

INTERVAL = 10.0
"""Seconds between two questions at least; up to half as much again by chance, as others ask for the same reason."""


class Feedback:
    """Watches one service's attempts. Times are seconds of one monotonic clock.

    Args:
        rng: for the jitter.

    Attributes:
        asked: how often it was time to ask.
        failures: attempts that failed since one succeeded.
    """

    __slots__ = ("_next", "_rng", "_since", "asked", "failures")

    def __init__(self, rng: UniformSource) -> None:
        self._rng = rng
        self._since = 0.0
        self.failures = 0
        self._next = 0.0
        self.asked = 0

    @property
    def failing(self) -> bool:
        """Whether the last attempt failed."""
        return self.failures > 0

    def succeeded(self) -> None:
        """Note that an attempt succeeded."""
        self.failures = 0

    def failed(self, now: float) -> bool:
        """Note that an attempt failed; returns whether to ask now."""
        if not self.failures:
            self._since = now
        self.failures += 1
        if self.failures < ENOUGH or now - self._since < PATIENCE or now < self._next:
            return False
        self._next = now + INTERVAL * self._rng.uniform(1.0, 1.5)
        self.asked += 1
        return True
