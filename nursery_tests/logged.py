"""What the package's log says, as the log's own entries."""

from __future__ import annotations

from collections.abc import Iterable
from logging import LogRecord
from typing import Any


def entry(record: LogRecord) -> Any:
    """What was logged: `event`, and `fields` by name."""
    return record.msg


def events(records: Iterable[LogRecord]) -> list[str]:
    """What happened, in order."""
    return [entry(record).event for record in records]
