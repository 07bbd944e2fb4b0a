"""Time that passes when everybody waits for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
import trio.testing

T = TypeVar("T")

THRESHOLD = 0.01
"""Seconds of real time without an event after which the clock jumps: enough for bytes on their way over loopback."""


def virtual_clock() -> trio.testing.MockClock:
    """A clock for `trio.run` that jumps to the next deadline whenever every task waits.

    A test of timeouts then takes milliseconds. Waits for other processes and hosts are cut short by it: it is for
    tests whose peers are tasks of the same run, as an `Upstream`'s are.
    """
    return trio.testing.MockClock(autojump_threshold=THRESHOLD)


def run(function: Callable[..., Awaitable[T]], *args: object) -> T:
    """`trio.run` by a `virtual_clock`."""
    return trio.run(function, *args, clock=virtual_clock())
