"""How much is under way, and whether there may be more: circuit limits.

Counts stand in a tree of two levels: each service's own, and those of the whole proxy. What enters counts in both, and
is refused if either is full. A refusal costs nothing but itself: nothing waits for room.
"""

from __future__ import annotations

from enum import StrEnum

from meshlocal.policy.config_health import LimitsConfig


class Limit(StrEnum):
    """What is limited."""

    CONNECTIONS = "connections"
    REQUESTS = "requests"
    WAITING = "waiting"


class Circuit:
    """The counts of one service, or of the whole proxy.

    Args:
        limits: what may be under way.
        whole: the proxy's, of a service's.

    Attributes:
        now: what is under way.
        refused: what was refused because of the limits here.
    """

    __slots__ = ("_limits", "_most", "now", "refused", "whole")

    def __init__(self, limits: LimitsConfig, whole: Circuit | None = None) -> None:
        self.limits = limits
        self.whole = whole
        self.now = dict.fromkeys(Limit, 0)
        self.refused = dict.fromkeys(Limit, 0)

    @property
    def limits(self) -> LimitsConfig:
        """What may be under way. May be replaced at any time; what is under way stays."""
        return self._limits

    @limits.setter
    def limits(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._most: dict[Limit, int | None] = {what: getattr(limits, what) for what in Limit}

    def enter(self, what: Limit) -> bool:
        """Count one more, here and in the whole; False if there is no room. Each True wants a `leave`."""
        most = self._most[what]
        if most is not None and self.now[what] >= most:
            self.refused[what] += 1
            return False
        whole = self.whole
        if whole is not None:
            # Not by a call of its own: every request passes here.
            most = whole._most[what]
            if most is not None and whole.now[what] >= most:
                whole.refused[what] += 1
                return False
            whole.now[what] += 1
        self.now[what] += 1
        return True

    def has_room(self, what: Limit) -> bool:
        """What `enter` would say, for something that is over at once; False counts as a refusal, too."""
        most = self._most[what]
        if most is not None and self.now[what] >= most:
            self.refused[what] += 1
            return False
        return self.whole is None or self.whole.has_room(what)

    def leave(self, what: Limit) -> None:
        """Count one less; undoes one `enter` that returned True."""
        self.now[what] -= 1
        if self.whole is not None:
            self.whole.now[what] -= 1
