"""Long work in slices, between which everybody else has a turn (behaviour rule P1)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import anyio.lowlevel

from meshlocal.policy.steps import Steps

T = TypeVar("T")

SLICE = 0.0005
"""Seconds that work goes on for before others have their turn: a tenth of what may hold up traffic at most, since what
passes through needs several turns."""

PIECE = 64
"""Things that a step of work on many things handles."""


async def in_slices(steps: Steps[T], longest: float = SLICE, pause: float = 0.0) -> T:
    """Do the steps, and let other tasks go on after each that ends a slice.

    Args:
        steps: what is to be done.
        longest: seconds of a slice; 0: each step is one.
        pause: seconds between two slices, of work that nobody waits for; 0: others have one turn.

    Returns what the steps return, and raises what they raise.
    """
    began = time.perf_counter()
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result
        if time.perf_counter() - began >= longest:
            if pause:
                await anyio.sleep(pause)
            else:
                await anyio.lowlevel.checkpoint()
            began = time.perf_counter()


def pieces(things: Iterable[T], size: int = PIECE) -> Iterator[list[T]]:
    """The things in lists of `size`, the last of which may be shorter."""
    piece: list[T] = []
    for thing in things:
        piece.append(thing)
        if len(piece) == size:
            yield piece
            piece = []
    if piece:
        yield piece
