"""Looking again and again for a short while, instead of sleeping, where something is likely to come at once.

A process that sleeps has to be woken, and often its processor too: that costs time before anything is done, and about
as much CPU as doing it. Who looks again for as long as that would cost pays at most twice what the best choice would
have (Karlin, Li, Manasse, Owicki: Empirical studies of competitive spinning, 1991), and nothing more than that best if
it only does so where something does come.

Whether it will is predicted from what came of the waits before, as processors predict branches (Yeh, Patt: Two-level
adaptive training branch prediction, 1991): for each pattern of the last waits, short or long, a counter remembers what
followed it. So requests in a steady ping-pong are all waited for awake; of those at a fixed rate, the answer of the
instance, but not the next request of the client. Each wait in vain lowers its counter by two, and each short one raises
it by one, so that waits in vain are at most a third of all, whatever comes when.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

Events = list[tuple[int, int]]
"""File descriptors and their events, as `select.epoll.poll` gives them."""

_PATTERNS = 8
"""The last three waits, each short or long."""

_MOST = 7
_WORTH = 4
_IN_VAIN = 2


class BusyPoll:
    """Waits for events, awake where that pays.

    Args:
        poll: waits for events, for at most so many seconds and as many events; 0 seconds: looks whether there are any.
        clock: seconds, of which only differences count.
        give_way: lets others run that have nowhere else to, as the one that is waited for may be among them.

    Attributes:
        limit: seconds to look again and again for; 0: never.
        found: seconds in all that were spent so until something came.
        in_vain: seconds in all that were spent so for nothing.
    """

    __slots__ = ("_clock", "_give_way", "_history", "_poll", "_scores", "found", "in_vain", "limit")

    def __init__(
        self,
        poll: Callable[[float, int], Events],
        *,
        clock: Callable[[], float] = time.perf_counter,
        give_way: Callable[[], object] = os.sched_yield,
    ) -> None:
        self.limit = 0.0
        self.found = 0.0
        self.in_vain = 0.0
        self._poll = poll
        self._clock = clock
        self._give_way = give_way
        self._history = 0
        self._scores = [_WORTH] * _PATTERNS

    def wait(self, timeout: float, most: int) -> Events:
        """Events, `most` at most; none if none came within `timeout` seconds."""
        limit = self.limit
        poll = self._poll
        if not 0 < limit < timeout:
            return poll(timeout, most)
        clock = self._clock
        scores = self._scores
        history = self._history
        score = scores[history]
        start = now = clock()
        if score < _WORTH:
            events = poll(timeout, most)
            # To be woken takes a while as well.
            short = clock() - start < 2 * limit
        else:
            events = poll(0, most)
            end = start + limit
            while not events and now < end:
                self._give_way()
                events = poll(0, most)
                now = clock()
            short = now < end
            if events:
                self.found += now - start
            else:
                self.in_vain += now - start
                events = poll(max(0.0, timeout - (now - start)), most)
        if short:
            scores[history] = min(score + 1, _MOST)
        else:
            scores[history] = max(score - _IN_VAIN, 0)
        self._history = (2 * history + short) % _PATTERNS
        return events
