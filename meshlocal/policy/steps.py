"""Work on many instances, done in steps: whoever drives it can let others go on in between.

A function that works so is a generator that yields after each step, and returns its result. `finish` drives it to its
end at once; a task drives it with a checkpoint after each step, so that a service of ten thousand instances keeps no
connection waiting for longer than a step takes.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

Steps = Generator[None, None, T]

STEP = 128
"""Instances that a step handles: well below a millisecond."""


def finish(steps: Steps[T]) -> T:
    """Do all of it now."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result
