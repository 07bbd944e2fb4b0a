"""When to send one more long-lived connection back to the local tier (behaviour rule F2).

Theory of operation. One `Failback` belongs to one service, and is asked every so often. It waits until the local tier
has been fit for `after` seconds without a break, up to half as much again by chance; then it lets one connection go
every `interval` seconds, between half and one and a half of that. So neither one proxy's connections nor those of a
thousand proxies come back at once, and a local instance that flaps gets none of them.
"""

from __future__ import annotations

from meshlocal.policy.backoff import UniformSource
from meshlocal.policy.config_health import FailbackConfig


class Failback:
    """The pace of one service's return. Times are seconds of one monotonic clock.

    Args:
        config: how long and how fast.
        rng: for the jitter.
    """

    __slots__ = ("_next", "_rng", "config")

    def __init__(self, config: FailbackConfig, rng: UniformSource) -> None:
        self.config = config
        self._rng = rng
        self._next: float | None = None

    def may_return(self, now: float, *, fit: bool) -> bool:
        """Whether a connection may be let go now, if there is one. `fit`: the local tier has room for it now."""
        if not fit:
            self._next = None
        elif self._next is None:
            self._next = now + self.config.after * self._rng.uniform(1.0, 1.5)
        return self._next is not None and now >= self._next

    def returned(self, now: float) -> None:
        """Note that a connection was let go: the next may go an interval later."""
        self._next = now + self.config.interval * self._rng.uniform(0.5, 1.5)
