"""What is happening, request by request: `meshlocal tap` (R1).

A tap is there as long as somebody asks for what it holds, and costs nothing while nobody does: one that was not asked
for a while leaves with the next request. What it holds is bounded, and so is how much it takes of a busy service.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from meshlocal.admin.messages import Request, Response
from meshlocal.admin.streaming import LINES
from meshlocal.app.request_view import request_view
from meshlocal.client.ended import EndedRequest
from meshlocal.client.services import ServiceState

PER_SECOND = 200
"""Requests that a tap takes in a second at most; of the others it says how many there were."""

HELD = 1000
"""Requests that it holds until it is asked for them."""

PATIENCE = 5.0
"""Seconds after which a tap that nobody asks is gone."""

MOST = 16
"""Taps at once."""


class Tap:
    """Follows one service's requests for one reader.

    Args:
        state: the service.
        left: take those that left the first tier.
        failed: take those that failed, or an attempt of which did. With neither, all are taken.
        now: by the clock of requests, in seconds.

    Attributes:
        state: as given.
        until: when it is gone, unless it is asked before.
    """

    def __init__(self, state: ServiceState, now: float, *, left: bool, failed: bool) -> None:
        self.state = state
        self.until = now + PATIENCE
        self._left = left
        self._failed = failed
        self._held: deque[EndedRequest] = deque(maxlen=HELD)
        self._skipped = 0
        self._second = now
        self._taken = 0
        self._some = left or failed
        self._rests_until = now
        state.told.follow(self)

    def wants(self, now: float, reason: str, stumbled: bool) -> bool:
        """See `Follower.wants`."""
        if self._some and not ((self._left and reason) or (self._failed and stumbled)):
            if now > self.until:
                self.close()
            return False
        if now < self._rests_until:
            # Of a busy service most come here.
            self._skipped += 1
            return False
        if now > self.until:
            self.close()
            return False
        if now - self._second >= 1:
            self._second, self._taken = now, 0
        if len(self._held) >= HELD:
            self._skipped += 1
            return False
        self._taken += 1
        if self._taken >= PER_SECOND:
            self._rests_until = self._second + 1
        return True

    def ended(self, request: EndedRequest) -> None:
        """See `Follower.ended`."""
        self._held.append(request)

    def take(self, now: float) -> tuple[list[EndedRequest], int]:
        """What it holds, and how many were left out since it was last asked."""
        self.until = now + PATIENCE
        held, skipped = list(self._held), self._skipped
        self._held.clear()
        self._skipped = 0
        return held, skipped

    def close(self) -> None:
        """Follow no longer."""
        self.state.told.leave(self)


class Taps:
    """The taps of a proxy.

    Args:
        find: gives a service by what its name is asked for; None: there is none.
        clock: of requests, in seconds.
        wall: the time of day, in seconds since 1970.
    """

    def __init__(
        self, find: Callable[[str], ServiceState | None], clock: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        self._find = find
        self._clock = clock
        self._wall = wall
        self._taps: dict[str, Tap] = {}

    def page(self, request: Request) -> Response:
        """What ended since the same reader last asked, a line of JSON each: `?service=NAME&reader=WORD`, and `left` or
        `failed` for some of all."""
        name, reader = (next(iter(request.values(key)), "") for key in ("service", "reader"))
        state = self._find(name)
        if state is None:
            return Response.text(f"no such service: {name!r}", 404)
        now = self._clock()
        for gone in [each for each, tap in self._taps.items() if now > tap.until]:
            self._taps.pop(gone).close()
        tap = self._taps.get(reader)
        if tap is None or tap.state is not state:
            if tap is not None:
                tap.close()
            elif len(self._taps) >= MOST:
                return Response.text(f"{MOST} taps are open already", 503)
            left, failed = (next(iter(request.values(key)), "") == "1" for key in ("left", "failed"))
            tap = self._taps[reader] = Tap(state, now, left=left, failed=failed)
        held, skipped = tap.take(now)
        rows: list[dict[str, Any]] = [request_view(each, now, self._wall()) for each in held]
        if skipped:
            rows.append({"service": state.key, "skipped": skipped})
        return Response(200, LINES, b"".join(msgspec.json.encode(row, enc_hook=str) + b"\n" for row in rows))
