"""Structured logging over the standard library's: an event, and fields beside it.

    log = get_log(__name__)
    log.warning("accept failed", listener="127.0.0.1:80", errno="EMFILE")

`configure_logging` chooses between a format for people and JSON lines. In both a
record is one line whatever its fields hold: control characters, line separators
and unprintable characters are escaped, so that nobody can forge a record
or drive a terminal with what he sends.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, TextIO

from meshlocal.net.log_writer import LineWriter

Format = Literal["auto", "text", "json"]

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_COLOURS = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_BOLD, _DIM, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"
_FIELDS = "meshlocal_fields"
_MAX_DEPTH = 6
_LARGEST_INT = 2**64

_common: dict[str, object] = {}


def label_process(**fields: object) -> None:
    """Put these fields into every record from now on: which of several processes it comes from."""
    _common.update(fields)


class _Event:
    """A record's message: with its fields where an application's own formatter shows it, which knows of none."""

    __slots__ = ("event", "fields")

    def __init__(self, event: str, fields: Mapping[str, object]) -> None:
        self.event = event
        self.fields = fields

    def __str__(self) -> str:
        return " ".join((self.event, *_pairs(self.fields.items())))


FLOOD = 20
"""Warnings and errors of one event that are logged within `FLOOD_TIME`; the others are counted."""

FLOOD_TIME = 10.0
"""Seconds."""


class _Flow:
    """How often an event came lately."""

    __slots__ = ("_count", "_since", "_suppressed")

    def __init__(self) -> None:
        self._since = -math.inf
        self._count = 0
        self._suppressed = 0

    def take(self, now: float, more: int) -> tuple[int, bool] | None:
        """Take one.

        Args:
            now: in seconds.
            more: how many it stands for beside itself, that somebody else left out.

        Returns:
            How many were left out since the last that passed, `more` among them, and whether it is the last for a
            while; None: it is left out too.
        """
        if now - self._since >= FLOOD_TIME:
            self._since, self._count = now, 0
        self._suppressed += more
        if self._count >= FLOOD:
            self._suppressed += 1
            return None
        self._count += 1
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed, self._count == FLOOD


_flows: dict[tuple[str, str], _Flow] = {}
"""By logger and event, of which there are as many as the code has."""


class Log:
    """Where a module's events go. `event` is a fixed phrase; what varies goes into fields.

    Nobody can flood it with warnings: of one event, at most `FLOOD` are logged within `FLOOD_TIME`. The last of them
    says so in its field `limited`, and the next one after that how many were left out, in `suppressed`.
    """

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, /, **fields: object) -> None:
        """Log what only a developer wants to see."""
        self.log(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: object) -> None:
        """Log a normal change of state."""
        self.log(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: object) -> None:
        """Log what is wrong, but is coped with."""
        self.log(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: object) -> None:
        """Log what somebody has to repair."""
        self.log(logging.ERROR, event, fields)

    def exception(self, event: str, /, **fields: object) -> None:
        """Log an error with the exception that is being handled."""
        self.log(logging.ERROR, event, fields, exc_info=True)

    @property
    def tells_all(self) -> bool:
        """Whether it logs what only a developer wants to see: for who would have to make that up first."""
        return self._logger.isEnabledFor(logging.DEBUG)

    def log(self, level: int, event: str, fields: Mapping[str, object], *, exc_info: bool = False) -> None:
        """Log at a level of the standard library (`logging.INFO`, ...)."""
        if self._logger.isEnabledFor(level):
            if level >= logging.WARNING:
                key = self._logger.name, event
                flow = _flows.get(key) or _flows.setdefault(key, _Flow())
                before = fields.get("suppressed")
                taken = flow.take(time.monotonic(), before if isinstance(before, int) else 0)
                if taken is None:
                    return
                suppressed, last = taken
                if suppressed:
                    fields = {**fields, "suppressed": suppressed}
                if last:
                    fields = {**fields, "limited": f"others of this event are left out for {FLOOD_TIME:g} s"}
            told = _Event(event, {**fields, **_common})
            self._logger.log(level, told, exc_info=exc_info, extra={_FIELDS: told.fields}, stacklevel=3)


def get_log(name: str) -> Log:
    """The log of a module (`__name__`)."""
    return Log(logging.getLogger(name))


_OWN = "meshlocal"
"""The logger above all of this package's."""


class RateLimited:
    """One event that may come thousands of times a second, logged at most once in `interval` seconds.

    The next record that passes has the number of those left out since the last in its field `suppressed`.
    """

    __slots__ = ("_event", "_interval", "_level", "_log", "_next", "_suppressed")

    def __init__(self, log: Log, level: int, event: str, *, interval: float) -> None:
        self._log = log
        self._level = level
        self._event = event
        self._interval = interval
        self._next = -math.inf
        self._suppressed = 0

    def __call__(self, now: float, /, **fields: object) -> bool:
        """Log the event unless it was just logged. `now` is in seconds of any monotonic clock. Tells whether it did."""
        if now < self._next:
            self._suppressed += 1
            return False
        if self._suppressed:
            fields["suppressed"] = self._suppressed
        self._next = now + self._interval
        self._suppressed = 0
        self._log.log(self._level, self._event, fields)
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a record: ts (RFC 3339, UTC), level, logger, event, then the fields, flat.

    A field that has the name of one of these gets an underscore after it. ASCII only, so that no
    encoding of the stream and no reader's idea of a line break can hurt it.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line without its end."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, object] = {
            "ts": f"{seconds}.{int(record.msecs):03d}Z",
            "level": _level_word(record),
            "logger": record.name,
            "event": _message(record),
        }
        if record.exc_info and record.exc_info[1] is not None:
            entry["exception"] = _traceback(record.exc_info[1])
        for name, value in _fields(record):
            while name in entry:
                name += "_"
            entry[name] = _jsonable(value)
        return json.dumps(entry, ensure_ascii=True, separators=(",", ":"))


class TextFormatter(logging.Formatter):
    """For people: local time, level, logger, event, key=value; an exception as its chain and where it was raised.

    Fields without a value (None) are left out.
    """

    def __init__(self, *, colour: bool = False) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line without its end."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        stamp = f"{clock}.{int(record.msecs):03d}"
        level = _level_word(record)
        shown_level = f"{level:7}"
        name = record.name.removeprefix("meshlocal.")
        event = _escape(_message(record))
        if self._colour:
            stamp, name = f"{_DIM}{stamp}{_PLAIN}", f"{_DIM}{name}{_PLAIN}"
            shown_level = f"{_COLOURS[level]}{shown_level}{_PLAIN}"
            event = f"{_BOLD}{event}{_PLAIN}"
        parts = [stamp, shown_level, name, event]
        parts += _pairs(_fields(record), *((_DIM, _PLAIN) if self._colour else ()))
        if record.exc_info and record.exc_info[1] is not None:
            parts.append(f"exception={_quote(_exception_line(record.exc_info[1]))}")
        return " ".join(parts)


class _Handler(logging.Handler):
    """Formats records, and has them written by whoever never waits (`meshlocal.net.log_writer`).

    The first record that fits again after some were dropped is followed by one that says how many.
    """

    def __init__(self, stream: TextIO, writer: LineWriter | None = None) -> None:
        super().__init__()
        self.stream = stream
        self.writer = writer or LineWriter(stream)
        self._told = self.writer.dropped

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - what cannot be formatted must not harm who logs it
            self.handleError(record)
            return
        dropped = self.writer.dropped
        if self.writer.write(line) and dropped > self._told:
            lost, self._told = dropped - self._told, dropped
            fields = {"lines": lost, **_common}
            self.writer.write(
                self.format(
                    logging.makeLogRecord(
                        {
                            "name": __name__,
                            "levelno": logging.WARNING,
                            "msg": "log lines were dropped: nobody read them in time",
                            _FIELDS: fields,
                        }
                    )
                )
            )


def dropped_lines() -> int:
    """How many lines this process could not log, because nobody read them in time."""
    return sum(each.writer.dropped for each in logging.getLogger().handlers if isinstance(each, _Handler))


def set_level(level: str, logger: str = "") -> None:
    """Log from this level on, until it is set again or logging is configured.

    Args:
        level: debug, info, warning or error.
        logger: of which; empty: all of this package's, and from `info` on those of libraries.

    Raises:
        ValueError: the level is none.
    """
    number = _LEVELS.get(level.lower())
    if number is None:
        raise ValueError(f"log level {level!r} is none of {', '.join(_LEVELS)}")
    if logger and logger != _OWN:
        _own_levels[logger] = level.lower()
        logging.getLogger(logger).setLevel(number)
    else:
        logging.getLogger().setLevel(max(number, logging.INFO))
        logging.getLogger(_OWN).setLevel(number)


def levels() -> dict[str, object]:
    """The levels in force: `level`, and `levels` of loggers that have their own."""
    return {"level": logging.getLevelName(logging.getLogger(_OWN).level).lower(), "levels": dict(_own_levels)}


_own_levels: dict[str, str] = {}


def configure_logging(
    level: str = "info",
    format: Format = "auto",
    stream: TextIO | None = None,
    levels: Mapping[str, str] | None = None,
) -> None:
    """Send every logger's records to a stream (default: stderr). Calling it again replaces what it set before.

    What libraries say at the level debug is not among them unless `levels` names them: some print whole headers, and
    with those what a client proves itself by.

    `auto` means text on a terminal and JSON elsewhere. Colour needs a terminal, and NO_COLOR unset or empty.

    Raises:
        ValueError: a level is none of debug, info, warning and error, or the format none of auto, text and json.
    """
    if level.lower() not in _LEVELS:
        raise ValueError(f"log level {level!r} is none of {', '.join(_LEVELS)}")
    if format not in ("auto", "text", "json"):
        raise ValueError(f"log format {format!r} is none of auto, text, json")
    stream = stream if stream is not None else sys.stderr
    terminal = stream.isatty()
    root = logging.getLogger()
    before = [each for each in root.handlers if isinstance(each, _Handler)]
    # A stream keeps its writer: what waits for it stays in order, and is bounded once.
    kept = next((each.writer for each in before if each.stream is stream), None)
    handler = _Handler(stream, kept)
    if format == "text" or (format == "auto" and terminal):
        handler.setFormatter(TextFormatter(colour=terminal and not os.environ.get("NO_COLOR")))
    else:
        handler.setFormatter(JsonFormatter())
    for old in before:
        root.removeHandler(old)
        if old.writer is kept:
            handler._told = old._told
        else:
            # What it dropped was dropped by this process all the same.
            handler.writer.dropped += old.writer.dropped
            handler._told = handler.writer.dropped
            old.writer.close()
    root.addHandler(handler)
    for name in _own_levels:
        logging.getLogger(name).setLevel(logging.NOTSET)
    _own_levels.clear()
    set_level(level)
    for name, each in (levels or {}).items():
        set_level(each, name)


def _level_word(record: logging.LogRecord) -> str:
    if record.levelno >= logging.ERROR:
        return "error"
    if record.levelno >= logging.WARNING:
        return "warning"
    return "info" if record.levelno >= logging.INFO else "debug"


def _pairs(fields: Iterable[tuple[str, object]], before: str = "", behind: str = "") -> Iterator[str]:
    """Fields for people: key=value, those without a value left out."""
    for key, value in fields:
        if value is not None:
            yield f"{before}{_quote(key)}={behind}{_quote(_text(value))}"


def _message(record: logging.LogRecord) -> str:
    if isinstance(record.msg, _Event):
        return record.msg.event
    try:
        return record.getMessage()
    except Exception as error:  # noqa: BLE001 - another library's bad format string must not cost us the record
        return f"{record.msg!r} ({type(error).__name__} in its arguments)"


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, object]]:
    fields = getattr(record, _FIELDS, None)
    return iter(fields.items()) if isinstance(fields, Mapping) else iter(())


def _text(value: object) -> str:
    """Any value as text. Never raises: what a field holds must not break who logs it."""
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8", "backslashreplace")
        if isinstance(value, BaseException):
            return f"{type(value).__name__}: {value}"
        if isinstance(value, int) and abs(value) >= _LARGEST_INT:
            return hex(value)  # str() refuses more than 4300 digits
        return str(value)
    except Exception as error:  # noqa: BLE001 - a field's own __str__ may raise anything
        return f"<{type(value).__name__}: {type(error).__name__} in __str__>"


def _jsonable(value: object, depth: int = 0) -> object:
    if value is None or isinstance(value, bool):
        return value
    if type(value) is str:
        return value
    if type(value) is int and abs(value) < _LARGEST_INT:
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if depth < _MAX_DEPTH:
        if type(value) is dict:
            return {_text(key): _jsonable(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple, set, frozenset):
            assert isinstance(value, Iterable)
            return [_jsonable(item, depth + 1) for item in value]
    return _text(value)


def _escape(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode("ascii")
        for char in text
    )


def _quote(text: str) -> str:
    if text and text.isprintable() and not any(char in ' "=\\' for char in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_escape(escaped)}"'


def _traceback(error: BaseException) -> str:
    """As Python prints it, but for the lines of source: they would be read from files, here and now (P1)."""
    told = traceback.TracebackException.from_exception(error, lookup_lines=False)
    queue = [told]
    while queue:
        link = queue.pop()
        link.stack = traceback.StackSummary.from_list(
            [(frame.filename, frame.lineno or 0, frame.name, "") for frame in link.stack]
        )
        queue += [each for each in (link.__cause__, link.__context__, *(link.exceptions or ())) if each is not None]
    return "".join(told.format()).rstrip()


def _exception_line(error: BaseException) -> str:
    """An exception, its causes and a group's members, each with the innermost frames, on one line."""
    seen: set[int] = set()
    links: list[str] = []
    queue: list[BaseException] = [error]
    while queue and len(links) < 8:
        link = queue.pop(0)
        if id(link) in seen:
            continue
        seen.add(id(link))
        frames = list(traceback.walk_tb(link.__traceback__))[-3:]
        where = " > ".join(
            f"{os.path.basename(frame.f_code.co_filename)}:{line} {frame.f_code.co_name}" for frame, line in frames
        )
        links.append(f"{_text(link)} ({where})" if where else _text(link))
        if isinstance(link, BaseExceptionGroup):
            queue.extend(link.exceptions)
        if link.__cause__ is not None:
            queue.append(link.__cause__)
        elif link.__context__ is not None and not link.__suppress_context__:
            queue.append(link.__context__)
    return " <- ".join(links)
