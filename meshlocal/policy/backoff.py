"""Exponential backoff with jitter, as a pure sequence of delays (D1)."""

from __future__ import annotations

from typing import Protocol


class UniformSource(Protocol):
    """What a backoff needs of `random.Random`."""

    def uniform(self, a: float, b: float, /) -> float:
        """A number between `a` and `b`."""
        ...


class Backoff:
    """Delays that double from `initial` to `maximum` seconds, each drawn from its upper half.

    The jitter keeps a fleet that lost one server at the same moment from returning at the same moment; the lower
    bound keeps a single client from hammering.
    """

    __slots__ = ("_ceiling", "_initial", "_maximum", "_rng")

    def __init__(self, initial: float, maximum: float, rng: UniformSource) -> None:
        self._initial = initial
        self._maximum = max(initial, maximum)
        self._rng = rng
        self._ceiling = initial

    def next(self) -> float:
        """The seconds to wait before the next try."""
        delay = self._rng.uniform(self._ceiling / 2, self._ceiling)
        self._ceiling = min(self._ceiling * 2, self._maximum)
        return delay

    def reset(self) -> None:
        """Start again from `initial`: a try succeeded."""
        self._ceiling = self._initial
