"""The field of a trace, as W3C Trace Context has it (rule R3)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.wire.trace_context import TraceParent, parse_traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("text", "flags", "sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", 1, True),
        (f"00-{TRACE}-{SPAN}-00", 0, False),
        (f"00-{TRACE}-{SPAN}-03", 3, True),
        (f"00-{TRACE}-{SPAN}-fe", 2, False),
        (f"01-{TRACE}-{SPAN}-01", 1, True),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", 1, True),
    ],
)
def test_read(text: str, flags: int, sampled: bool) -> None:
    """Flags that nobody knows are dropped; a later version is read as far as this one goes (section 4)."""
    found = parse_traceparent(text.encode())
    assert found == TraceParent(int(TRACE, 16), int(SPAN, 16), flags)
    assert found.is_sampled == sampled


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01 ",
        f"ff-{TRACE}-{SPAN}-01",
        f"0-{TRACE}-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01.more",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_what_cannot_be_used(text: str) -> None:
    """Section 3.2.2.3: it counts as none."""
    assert parse_traceparent(text.encode()) is None


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 3))
def test_what_is_written_is_read(trace: int, span: int, flags: int) -> None:
    parent = TraceParent(trace, span, flags)
    assert parse_traceparent(parent.format()) == parent


@given(st.binary(max_size=80))
def test_nothing_raises(value: bytes) -> None:
    found = parse_traceparent(value)
    assert found is None or parse_traceparent(found.format()) == found
