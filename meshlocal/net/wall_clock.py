"""The time of day: for what people read, and for what certificates are valid by. Nothing is timed by it."""

from __future__ import annotations

import datetime
import time


def wall_clock() -> float:
    """Seconds since 1970."""
    return datetime.datetime.now(datetime.UTC).timestamp()


def utc_text(seconds: float, *, milliseconds: bool = False) -> str:
    """A time for people (RFC 3339).

    Args:
        seconds: since 1970.
        milliseconds: tell them too.
    """
    try:
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.0f}"
    return f"{text}.{int(seconds % 1 * 1000):03d}Z" if milliseconds else f"{text}Z"
