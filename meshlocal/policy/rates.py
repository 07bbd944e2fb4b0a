"""How often something may happen: a token bucket, on the caller's clock."""

from __future__ import annotations


class TokenBucket:
    """Holds up to `burst` tokens, and gets `rate` of them a second. It begins full.

    Args:
        rate: tokens a second, more than 0.
        burst: tokens at most.
        now: the time, in seconds, on the clock of all later calls.
    """

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at = now

    def _refill(self, now: float) -> None:
        # A clock that goes back adds nothing, and takes nothing away.
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._at) * self._rate)
        self._at = now

    def take(self, now: float) -> bool:
        """Take one token; False if there is none, which costs nothing."""
        self._refill(now)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def spend(self, amount: float, now: float) -> float:
        """Take tokens, also those that are not there yet; returns the seconds until none is owed."""
        self._refill(now)
        self._tokens -= amount
        return max(0.0, -self._tokens / self._rate)
