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
_CUT_ID = frozenset({b"x-request-id"})


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

    def fields(self, number: int) -> tuple[bytes, bytes]:
        """The field that tells an instance of its attempt."""
        return b"traceparent", TraceParent(self.trace_id, self.attempt_id(number), self.flags).format()


class Mark:
    """What one request gets.

    Attributes:
        request_id: made here; empty: it came with one, or is not to have one.
        trace: None: it is not recorded.
    """

    __slots__ = ("_told", "request_id", "trace")

    def __init__(self, request_id: bytes, trace: Trace | None, *, told: bool) -> None:
        self.request_id = request_id
        self.trace = trace
        self._told = told

    def fields(self, attempt: int) -> OwnFields:
        """What an instance gets with an attempt, the first of which has the number 1."""
        add: tuple[tuple[bytes, bytes], ...] = ()
        cut: frozenset[bytes] = frozenset()
        if self._told and self.request_id:
            add, cut = ((b"x-request-id", self.request_id),), _CUT_ID
        if self.trace is not None:
            add = (*add, self.trace.fields(attempt))
            # What vendors say of a trace goes on with it (Trace Context, 3.3); one that begins here has none.
            cut |= _CUT_PARENT if self.trace.parent_id else _CUT_STATE
        return OwnFields(add, cut)


class Marker:
    """Marks requests as they begin.

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
        self.needed = makes_ids or sampled is not None

    def mark(self, head: RequestHead) -> Mark | None:
        """What a request gets as it begins; None: nothing."""
        trace = self._trace(head) if self._sampled is not None else None
        if self._makes_ids and not head.request_id:
            return Mark(self.new_id(), trace, told=True)
        return Mark(b"", trace, told=False) if trace is not None else None

    def identify(self, mark: Mark | None) -> Mark:
        """The same for a request that was not to have an id, and is to be told of with one."""
        return Mark(self.new_id(), mark.trace if mark is not None else None, told=False)

    def new_id(self) -> bytes:
        """A request's id: 32 digits."""
        return b"%032x" % self._rng.getrandbits(128)

    def _trace(self, head: RequestHead) -> Trace | None:
        parent = parse_traceparent(head.trace_parent) if head.trace_parent else None
        rng = self._rng
        if parent is not None:
            return Trace(parent.trace_id, parent.parent_id, self._span(), parent.flags) if parent.is_sampled else None
        if self._sampled is None or rng.random() >= self._sampled:
            return None
        return Trace(rng.getrandbits(128) or 1, 0, self._span(), SAMPLED)

    def _span(self) -> int:
        return self._rng.getrandbits(64) or 1
