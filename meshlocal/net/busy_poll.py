"""Looking again and again for a short while, instead of sleeping, where something is likely to come at once.

A process that sleeps has to be woken, and often its processor too: that costs time before anything is done, and CPU.
Who looks again for as long as that costs, before it sleeps, pays at most twice what the best choice would have (Karlin,
Li, Manasse, Owicki: Empirical studies of competitive spinning, 1991). Who looks for longer trades CPU for time.

Whether something will come is predicted from what came of the waits before, as processors predict branches (Yeh, Patt:
Two-level adaptive training branch prediction, 1991): for each pattern of the last waits, short or long, a counter
remembers what followed it. So requests in a steady ping-pong are waited for awake; of those at a fixed rate, the
answer of the instance, but not the next request of the client. A wait that stays awake raises its counter by one if
something came within the limit, and else lowers it by two. How long a wait took that slept tells little, as to be woken
takes a while; so each 61st of those (a prime, for no rhythm of the traffic to hide from it) stays awake to find out.
Waits in vain are about a third of all at most, whatever comes when.
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

_TRIED = 61
"""One in so many waits that would sleep stays awake."""


class BusyPoll:
    """Waits for events, awake where that pays.

    Args:
        poll: waits for events, for at most so many seconds and as many events; 0 seconds: looks whether there are any.
        clock: seconds, of which only differences count.
        give_way: lets others run that have nowhere else to, as the one that is waited for may be among them.

    Attributes:
        limit: seconds to look again and again for; 0: never.
        found: seconds in all, by the clock, that were spent so until something came.
        in_vain: seconds in all, by the clock, that were spent so for nothing.
    """

    __slots__ = ("_clock", "_give_way", "_history", "_poll", "_scores", "_slept", "found", "in_vain", "limit")

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
        self._slept = 0
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
            self._slept += 1
        if score < _WORTH and self._slept % _TRIED:
            events = poll(timeout, most)
            short = bool(events) and clock() - start < limit
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
                scores[history] = min(max(score + 1, _WORTH), _MOST)
            else:
                scores[history] = max(score - _IN_VAIN, 0)
        self._history = (2 * history + short) % _PATTERNS
        return events
