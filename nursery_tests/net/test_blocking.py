"""net/blocking: a call that hangs holds its caller for a bounded time, and nobody else at all (P1)."""

from __future__ import annotations

import threading

import pytest
import trio

from meshlocal.net.blocking import BlockedError, Blocking


async def test_results_and_errors_come_back() -> None:
    blocking = Blocking()
    assert await blocking.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await blocking.run(divmod, 7, 0)
    assert not blocking.hanging


async def test_a_call_that_hangs_is_given_up_and_further_ones_fail_at_once() -> None:
    """One thread at the most hangs, however often its owner asks again."""
    released = threading.Event()
    calls: list[int] = []

    def hang() -> None:
        calls.append(1)
        released.wait(20)

    blocking = Blocking("the disk", limit=0.05)
    try:
        with trio.fail_after(10):
            with pytest.raises(BlockedError, match=r"the disk does not answer within 0\.05 s"):
                await blocking.run(hang)
            for _ in range(100):
                with pytest.raises(BlockedError, match="the disk still does not answer"):
                    await blocking.run(hang)
        assert blocking.hanging
        assert calls == [1]
    finally:
        released.set()
    with trio.fail_after(10):
        while blocking.hanging:  # noqa: ASYNC110 - the thread has no way to tell
            await trio.sleep(0.001)
    assert await blocking.run(divmod, 7, 2) == (3, 1)


async def test_calls_wait_for_each_other() -> None:
    """Two that are quick are no hang: the second has its turn after the first."""
    blocking = Blocking()
    inside: list[int] = []
    most: list[int] = []

    def call() -> None:
        inside.append(1)
        most.append(len(inside))
        inside.pop()

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(blocking.run, call)
    assert most == [1] * 20


async def test_cancellation_leaves_at_once() -> None:
    released = threading.Event()
    blocking = Blocking()
    try:
        with trio.fail_after(10), trio.move_on_after(0.01) as scope:
            await blocking.run(released.wait, 20)
        assert scope.cancelled_caught
        assert blocking.hanging
    finally:
        released.set()
