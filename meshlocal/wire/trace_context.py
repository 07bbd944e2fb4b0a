"""The field that carries a trace from hop to hop (W3C Trace Context, https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import re
from typing import NamedTuple

SAMPLED = 0x01
"""The flag that says that whoever called records the trace."""

_KNOWN_FLAGS = 0x03
"""Sampled, and random (level 2): what a sender may set."""

_FORM = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceParent(NamedTuple):
    """What `traceparent` says.

    Attributes:
        trace_id: 128 bits, not 0.
        parent_id: of the caller's span; 64 bits, not 0.
        flags: those that are known.
    """

    trace_id: int
    parent_id: int
    flags: int

    @property
    def is_sampled(self) -> bool:
        """Whether the caller records the trace."""
        return bool(self.flags & SAMPLED)

    def format(self) -> bytes:
        """The field's value, version 00."""
        return b"00-%032x-%016x-%02x" % self


def parse_traceparent(value: bytes) -> TraceParent | None:
    """Read the field; None: it is none that can be used, which the standard has ignored (section 3.2.2.3).

    A version above 00 is read as far as 00 goes (section 4).
    """
    match = _FORM.fullmatch(value)
    if match is None:
        return None
    version, trace_id, parent_id, flags, more = match.groups()
    if version == b"ff" or (more is not None and version == b"00"):
        return None
    found = TraceParent(int(trace_id, 16), int(parent_id, 16), int(flags, 16) & _KNOWN_FLAGS)
    return found if found.trace_id and found.parent_id else None
