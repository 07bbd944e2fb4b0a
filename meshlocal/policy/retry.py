"""What to do about an attempt that failed (behaviour rules A2 to A4), and how many retries there may be.

Theory of operation. What matters is what may have happened at the instance, and that is known from three things: what
became of the connection, whether a byte of the response came, and what kind of request it was. `decide` is a table of
these; it knows nothing of plans and deadlines, which may still stop what it allows.

    what happened                        not sent   sent, repeatable   sent, not repeatable
    no connection                        next       -                  -
    kept-alive connection was closed     same       same               answer
    connection ended without a byte      next       next               answer
    no response in time                  next       next               answer
    refused unprocessed (HTTP/2)         next       next               next, if the body is held
    stream reset without a byte          next       next               answer
    an answer with a `retry_on` status   -          next, by budget    answer
    broken after its first byte          -          answer             answer

A request is *repeatable* if its method is idempotent (RFC 9110, 9.2.2) or it carries an Idempotency-Key, and all of
its body that was read from the client is still held. One whose body is not held can be sent to nobody else, whatever
happened.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

IDEMPOTENT_METHODS = frozenset(
    {b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE", b"PROPFIND", b"SEARCH", b"QUERY"}
)
"""Methods that may be repeated: those of RFC 9110, 9.2.2, and those that the IANA registry marks idempotent."""


class Failure(StrEnum):
    """What became of an attempt."""

    CONNECT = "connect"
    """No connection; nothing was sent."""
    STALE = "stale"
    """A kept-alive connection turned out closed before one byte of response (A4)."""
    NO_RESPONSE = "no_response"
    """A fresh connection ended before one byte of response."""
    TIMEOUT = "timeout"
    """No response in the attempt's time."""
    REFUSED = "refused"
    """The upstream says that it did not process the request."""
    RESET = "reset"
    """The upstream reset the request's stream before one byte of response (HTTP/2)."""
    STATUS = "status"
    """The instance answered with a status of `retry_on`."""
    BROKEN = "broken"
    """The connection ended, or made no sense, within the response's head."""


class Decision(StrEnum):
    """What a search does after a failed attempt."""

    NEXT = "next"
    """Try the next instance."""
    SAME = "same"
    """Try the same instance on a fresh connection; that is no new attempt (A4)."""
    ANSWER = "answer"
    """Tell the client: the request may have been processed."""


def decide(failure: Failure, *, sent: bool, idempotent: bool, held: bool) -> Decision:
    """What to do about a failed attempt.

    Args:
        failure: what happened.
        sent: at least one byte of the request may have reached the instance.
        idempotent: by its method, or its Idempotency-Key.
        held: all of the body that was read from the client is still there to be sent again.
    """
    if not held:
        return Decision.ANSWER
    if failure is Failure.STALE:
        return Decision.SAME if idempotent or not sent else Decision.ANSWER
    if failure is Failure.BROKEN:
        return Decision.ANSWER
    if failure is Failure.REFUSED or failure is Failure.CONNECT or not sent or idempotent:
        return Decision.NEXT
    return Decision.ANSWER


class Verdict(StrEnum):
    """What a failed attempt shows of its instance (H1)."""

    FAILS = "fails"
    """The instance fails: it could not be connected, or ended a fresh connection before it said a word."""
    WORKS = "works"
    """The instance works: it takes a live one to give an answer, whatever the answer is."""
    NOTHING = "nothing"
    """Nothing: it may have been slow, or been asked on a connection that was too old."""


_VERDICTS = {
    Failure.CONNECT: Verdict.FAILS,
    Failure.NO_RESPONSE: Verdict.FAILS,
    Failure.STATUS: Verdict.WORKS,
    Failure.REFUSED: Verdict.WORKS,
    Failure.RESET: Verdict.WORKS,
    Failure.STALE: Verdict.NOTHING,
    Failure.TIMEOUT: Verdict.NOTHING,
    Failure.BROKEN: Verdict.NOTHING,
}


def verdict(failure: Failure) -> Verdict:
    """What a failure shows of the instance, to whoever tried it: the proxy and the library judge by this table."""
    return _VERDICTS[failure]


class RetryBudget:
    """How many requests may be repeated after an answer: a share of those of the last `WINDOW` seconds, and a floor.

    Retries of what no instance answered are not counted here: they add no load to instances that are up. Those after
    an answer do, and when all instances answer 503 because there is too much load, they would add to it.

    Args:
        share: of the requests, 0 to 1.
        floor: retries in a window that are always allowed.

    Attributes:
        refused: retries that it did not allow, in all.
    """

    WINDOW = 10.0
    _SLOTS = 10

    __slots__ = ("_current", "_floor", "_requests", "_retries", "_share", "_slot_end", "_slots", "refused")

    def __init__(self, share: float, floor: int) -> None:
        self.refused = 0
        self._share = share
        self._floor = floor
        self._slots: deque[list[int]] = deque()
        self._current = [0, 0]
        self._slot_end = 0.0
        self._requests = 0
        self._retries = 0

    def request(self, now: float) -> None:
        """Count a request. `now` is in seconds of a monotonic clock."""
        if now >= self._slot_end:
            self._roll(now)
        self._current[0] += 1

    def retry(self, now: float) -> bool:
        """Count a retry if there may be one more; tells whether there may."""
        if now >= self._slot_end:
            self._roll(now)
        requests = self._requests + self._current[0]
        retries = self._retries + self._current[1]
        if retries >= self._floor and retries + 1 > requests * self._share:
            self.refused += 1
            return False
        self._current[1] += 1
        return True

    def _roll(self, now: float) -> None:
        """Begin a new slot, and forget those that the window has left behind."""
        step = self.WINDOW / self._SLOTS
        gone = int((now - self._slot_end) / step) + 1
        if gone > self._SLOTS:
            self._slots.clear()
            self._requests = self._retries = 0
            self._slot_end = now
        else:
            for slot in [self._current, *([0, 0] for _ in range(gone - 1))]:
                self._slots.append(slot)
                self._requests += slot[0]
                self._retries += slot[1]
            while len(self._slots) >= self._SLOTS:
                requests, retries = self._slots.popleft()
                self._requests -= requests
                self._retries -= retries
            self._slot_end += (gone - 1) * step
        self._slot_end += step
        self._current = [0, 0]
