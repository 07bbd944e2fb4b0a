"""Exponential backoff with jitter, as a pure sequence of delays (D1)."""

from __future__ import annotations

from typing import Protocol


class UniformSource(Protocol):
    """What a backoff needs of `random.Random`."""

    def uniform(self, a: float, b: float, /) -> float:
        """A number between `a` and `b`."""
        ...


class Backoff:
    """Delays whose ceiling doubles from `initial` to `maximum` seconds, each drawn from between a part of it and all.

    The jitter keeps a fleet that lost one server at the same moment from returning at the same moment. By default a
    delay is at least half of its ceiling, which keeps a single client from hammering. Where thousands wait for one
    server, `least` 0 spreads them over all of the ceiling ("full jitter"), so that its first clients are back at once.

    Args:
        initial: seconds, of the first ceiling.
        maximum: seconds, of the last.
        rng: for the jitter.
        least: of a ceiling, that each delay takes at least; from 0 to 1.
    """

    __slots__ = ("_ceiling", "_initial", "_least", "_maximum", "_rng")

    def __init__(self, initial: float, maximum: float, rng: UniformSource, *, least: float = 0.5) -> None:
        self._initial = initial
        self._maximum = max(initial, maximum)
        self._rng = rng
        self._least = least
        self._ceiling = initial

    def next(self) -> float:
        """The seconds to wait before the next try."""
        delay = self._rng.uniform(self._ceiling * self._least, self._ceiling)
        self._ceiling = min(self._ceiling * 2, self._maximum)
        return delay

    def reset(self) -> None:
        """Start again from `initial`: a try succeeded."""
        self._ceiling = self._initial
