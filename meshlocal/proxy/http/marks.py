"""Which request one is, and of which trace: what it came with, and what it gets (behaviour rules R3, R4).

A request that is traced has a span here, and each of its attempts one more, whose parent that is. An instance is told
its attempt's, so that what it records itself hangs below the attempt that reached it. The spans' numbers follow each
other: that of the request is drawn, and attempt n has the n-th after it. So nothing is kept of an attempt for its span.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from meshlocal.wire.http1.fields import OwnFields
from meshlocal.wire.http1.request import RequestHead
from meshlocal.wire.trace_context import SAMPLED, TraceParent, parse_traceparent

_SPANS = 2**64 - 1

ID_TOLD = 128
"""Bytes of a request's id that are told: a client may give any."""

_CUT_PARENT = frozenset({b"traceparent"})
_CUT_STATE = frozenset({b"traceparent", b"tracestate"})
_ID_NAME = b"x-request-id"
_ID = _ID_NAME + b": "
_CUT_ID = frozenset({_ID_NAME})
_NO_CUT: frozenset[bytes] = frozenset()


class RandomBits(Protocol):
    """What is needed of `random.Random`."""

    def random(self) -> float:
        """A number from 0 to 1, without 1."""
        ...

    def getrandbits(self, k: int, /) -> int:
        """A number of `k` bits."""
        ...


class Trace(NamedTuple):
    """The trace of a request that is recorded.

    Attributes:
        trace_id: 128 bits.
        parent_id: the caller's span; 0: the trace begins here.
        span_id: the request's own, 64 bits.
        flags: of the trace.
    """

    trace_id: int
    parent_id: int
    span_id: int
    flags: int

    def attempt_id(self, number: int) -> int:
        """The span of an attempt, the first of which has the number 1."""
        return (self.span_id + number) & _SPANS or 1

    def line(self, number: int) -> bytes:
        """The field line that tells an instance of its attempt."""
        return b"traceparent: %b\r\n" % TraceParent(self.trace_id, self.attempt_id(number), self.flags).format()


class Mark(OwnFields):
    """What one request gets.

    Attributes:
        trace: None: it is not recorded.
    """

    __slots__ = ("_id_line", "trace")

    def __init__(self, id_line: bytes, trace: Trace | None, told: bool) -> None:
        """`id_line` has the id that was made here, empty: none was; `told`: instances get it."""
        # Every request passes here that gets an id: no more is done than has to be.
        self._id_line = id_line
        self.trace = trace
        if told:
            self.lines = id_line
            self.cut = _CUT_ID
        else:
            self.lines = b""
            self.cut = _NO_CUT
        if trace is not None:
            # What vendors say of a trace goes on with it (Trace Context, 3.3); one that begins here has none.
            self.cut |= _CUT_PARENT if trace.parent_id else _CUT_STATE

    @property
    def request_id(self) -> bytes:
        """The id that was made here; empty: it came with one, or is not to have one."""
        return self._id_line[len(_ID) : -2]

    def at(self, attempt: int) -> OwnFields:
        """What an instance gets with an attempt, the first of which has the number 1; until that is asked again."""
        if self.trace is not None:
            told = self._id_line if _ID_NAME in self.cut else b""
            self.lines = told + self.trace.line(attempt)
        return self


class Marker:
    """Marks requests as they begin.

    An id has 32 digits: 20 that are drawn once, and a count. That is quicker than to draw each, and as unlikely to be
    another's.

    Args:
        sampled: the share of requests without a trace whose trace begins here, from 0 to 1; None: nothing is recorded,
            not even of a request whose caller does.
        makes_ids: a request without an id gets one.
        rng: draws numbers.

    Attributes:
        needed: `mark` may give something.
    """

    def __init__(self, sampled: float | None, rng: RandomBits, *, makes_ids: bool) -> None:
        self._sampled = sampled
        self._makes_ids = makes_ids
        self._rng = rng
        self._random = rng.random
        self._id_lines = _ID + b"%020x%%012x\r\n" % rng.getrandbits(80)
        self._made = 0
        self.needed = makes_ids or sampled is not None

    def mark(self, head: RequestHead) -> Mark | None:
        """What a request gets as it begins; None: nothing."""
        trace = None
        # Every request passes here.
        if self._sampled is not None and (head.trace_parent or self._random() < self._sampled):
            trace = self._trace(head, self._sampled)
        if self._makes_ids and not head.request_id:
            self._made = made = self._made + 1
            return Mark(self._id_lines % made, trace, True)
        return Mark(b"", trace, False) if trace is not None else None

    def identify(self, mark: Mark | None) -> Mark:
        """The same for a request that was not to have an id, and is to be told of with one."""
        self._made += 1
        return Mark(self._id_lines % self._made, mark.trace if mark is not None else None, False)

    def _trace(self, head: RequestHead, sampled: float) -> Trace | None:
        """What is recorded: a trace that its caller records, or one that begins here; None: nothing."""
        rng = self._rng
        if head.trace_parent:
            parent = parse_traceparent(head.trace_parent)
            if parent is not None:
                own = self._span()
                return Trace(parent.trace_id, parent.parent_id, own, parent.flags) if parent.is_sampled else None
            if rng.random() >= sampled:
                return None
        return Trace(rng.getrandbits(128) or 1, 0, self._span(), SAMPLED)

    def _span(self) -> int:
        return self._rng.getrandbits(64) or 1
