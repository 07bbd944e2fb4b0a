"""net/log: one record is one line in both formats, and no field can break it."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.net.log import (
    FLOOD,
    FLOOD_TIME,
    JsonFormatter,
    Log,
    RateLimited,
    TextFormatter,
    configure_logging,
    get_log,
    levels,
    set_level,
)
from nursery_tests.logged import entry


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _root_logger_restored() -> Iterator[None]:
    root = logging.getLogger()
    own = logging.getLogger("meshlocal")
    handlers, level, own_level = root.handlers[:], root.level, own.level
    yield
    root.handlers[:], root.level = handlers, level
    own.level = own_level
    root.manager._clear_cache()  # type: ignore[attr-defined]  # isEnabledFor caches what the level was


def record(event: str, /, exc_info: Any = None, **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "meshlocal.net.x", "levelno": logging.WARNING, "msg": event, "meshlocal_fields": fields}
    )
    made.created, made.msecs, made.exc_info = 1700000000.25, 250.0, exc_info
    return made


def test_json_has_time_level_logger_event_and_fields() -> None:
    line = JsonFormatter().format(record("accept failed", errno="EMFILE", count=3, ok=True, none=None))
    assert json.loads(line) == {
        "ts": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "logger": "meshlocal.net.x",
        "event": "accept failed",
        "errno": "EMFILE",
        "count": 3,
        "ok": True,
        "none": None,
    }


def test_json_field_of_a_reserved_name_keeps_both() -> None:
    entry = json.loads(JsonFormatter().format(record("e", level="high", event="x", event_="y")))
    assert (entry["level"], entry["level_"]) == ("warning", "high")
    assert (entry["event"], entry["event_"], entry["event__"]) == ("e", "x", "y")


class Unprintable:
    def __str__(self) -> str:
        raise ZeroDivisionError


def strict(line: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        pytest.param(10**5000, hex(10**5000), id="more digits than str() takes"),
        (b"a\xff\n", "a\\xff\n"),
        (Unprintable(), "<Unprintable: ZeroDivisionError in __str__>"),
        ({1: {"b": (1, 2)}}, {"1": {"b": [1, 2]}}),
        (ValueError("bad"), "ValueError: bad"),
    ],
)
def test_json_never_fails_on_odd_values(value: object, shown: object) -> None:
    assert strict(JsonFormatter().format(record("e", value=value)))["value"] == shown
    assert len(TextFormatter().format(record("e", value=value)).splitlines()) == 1


def test_json_survives_a_value_that_holds_itself() -> None:
    loop: list[object] = []
    loop.append(loop)
    assert "[...]" in json.dumps(strict(JsonFormatter().format(record("e", value=loop))))


odd_text = st.text(st.characters(), max_size=20)  # surrogates and control characters included


@given(odd_text, st.dictionaries(odd_text, odd_text, max_size=4))
def test_one_record_is_one_line_and_json_gives_it_back(event: str, fields: dict[str, str]) -> None:
    made = record(event)
    made.meshlocal_fields = fields
    line = JsonFormatter().format(made)
    assert line.isascii()
    assert line.isprintable()
    entry = strict(line)
    assert entry["event"] == event
    assert set(fields.values()) <= set(entry.values())
    text = TextFormatter().format(made)
    assert text.isprintable()
    assert len(text.splitlines()) == 1


def test_text_quotes_what_would_be_ambiguous() -> None:
    text = TextFormatter().format(record("it broke", a="plain", b="two words", c="", d='say "x"', e="a=b", f="l\n2"))
    assert text.endswith('warning net.x it broke a=plain b="two words" c="" d="say \\"x\\"" e="a=b" f="l\\n2"')


def raised() -> Any:
    try:
        try:
            raise KeyError("inner\nforged")
        except KeyError as inner:
            raise ExceptionGroup("several", [ValueError("one")]) from inner
    except ExceptionGroup:
        return sys.exc_info()


def test_exceptions_stay_on_the_line_with_causes_and_members() -> None:
    text = TextFormatter().format(record("failed", exc_info=raised()))
    assert text.isprintable()
    for part in ("ExceptionGroup: several", "ValueError: one", "KeyError", "test_log.py"):
        assert part in text
    entry = json.loads(JsonFormatter().format(record("failed", exc_info=raised())))
    assert "Traceback (most recent call last)" in entry["exception"]
    assert "ValueError: one" in entry["exception"]


def test_configure_chooses_by_terminal_and_replaces_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    log = get_log("meshlocal.sample")
    piped, terminal, plain = io.StringIO(), Terminal(), Terminal()
    configure_logging("info", stream=piped)
    log.info("first", n=1)
    log.debug("not shown")
    configure_logging("debug", "auto", terminal)
    log.debug("second")
    monkeypatch.setenv("NO_COLOR", "1")
    configure_logging("warning", "auto", plain)
    log.info("not shown")
    log.error("third", n=3)
    assert [json.loads(line)["event"] for line in piped.getvalue().splitlines()] == ["first"]
    assert "second" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()
    assert plain.getvalue().endswith("error   sample third n=3\n")
    assert plain.getvalue().count("\n") == 1


def test_text_off_a_terminal_has_no_colour_and_json_may_be_forced_on_one() -> None:
    piped, terminal = io.StringIO(), Terminal()
    configure_logging("info", "text", piped)
    get_log("meshlocal.sample").info("text", a=1)
    configure_logging("info", "json", terminal)
    get_log("meshlocal.sample").info("json", a=1)
    assert piped.getvalue().endswith("info    sample text a=1\n")
    assert "\x1b" not in piped.getvalue()
    assert json.loads(terminal.getvalue())["event"] == "json"


def test_levels_of_single_loggers_change_while_running() -> None:
    """What a library says at debug is told only if it is asked for by name; the next configuration forgets it."""
    stream = io.StringIO()
    library = logging.getLogger("some_library.part")

    def told() -> list[str]:
        stream.seek(0)
        stream.truncate()
        library.debug("of a library")
        get_log("meshlocal.client.sample").debug("of a part")
        get_log("meshlocal.proxy.sample").debug("of another")
        return [json.loads(line)["event"] for line in stream.getvalue().splitlines()]

    configure_logging("debug", "json", stream)
    assert told() == ["of a part", "of another"]
    configure_logging("info", "json", stream, {"some_library": "debug", "meshlocal.client": "debug"})
    assert levels() == {"level": "info", "levels": {"some_library": "debug", "meshlocal.client": "debug"}}
    assert told() == ["of a library", "of a part"]
    set_level("info", "some_library")
    set_level("DEBUG")
    assert told() == ["of a part", "of another"]
    set_level("error")
    assert told() == ["of a part"]
    configure_logging("info", "json", stream)
    assert (told(), levels()) == ([], {"level": "info", "levels": {}})
    for wrong in ("loud", ""):
        with pytest.raises(ValueError, match=f"log level '{wrong}' is none of"):
            set_level(wrong)


def test_configure_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="log level 'loud' is none of debug, info, warning, error"):
        configure_logging("loud")
    with pytest.raises(ValueError, match="log format 'xml'"):
        configure_logging("info", "xml")  # type: ignore[arg-type]  # a config value may be anything


def test_other_libraries_records_are_formatted_too() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    logging.getLogger("other").warning("%s and %s", "this", "that")
    bad = logging.makeLogRecord({"msg": "%d", "args": ("no number",), "levelno": logging.INFO})
    assert json.loads(stream.getvalue())["event"] == "this and that"
    assert json.loads(JsonFormatter().format(bad))["event"] == "'%d' (TypeError in its arguments)"


@pytest.mark.parametrize("shape", ["json", "text"])
def test_an_exception_is_told_without_reading_a_file(shape: Literal["json", "text"]) -> None:
    """P1: the lines of source would be read by the event loop, from a disk that may hang."""
    # In a process of its own: an audit hook cannot be taken away, and no source was read there before.
    script = f"""
import io, json, sys
from meshlocal.net.log import configure_logging, get_log
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
stream = io.StringIO()
configure_logging(format={shape!r}, stream=stream)
try:
    try:
        json.loads("one")
    except ValueError as error:
        raise ExceptionGroup("all", [KeyError("k")]) from error
except ExceptionGroup:
    get_log("x").exception("it failed")
text = stream.getvalue()
assert "KeyError" in text and "Expecting value" in text and "decoder.py" in text, text
print(opened)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_exception_takes_the_one_being_handled() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    try:
        raise ValueError("gone")
    except ValueError:
        get_log("x").exception("it failed", who="me")
    entry = json.loads(stream.getvalue())
    assert (entry["event"], entry["who"], entry["level"]) == ("it failed", "me", "error")
    assert entry["exception"].endswith("ValueError: gone")


def test_fields_show_in_the_message_of_an_applications_own_format() -> None:
    """An application that uses the library may have set up no logging at all, or its own."""
    told: list[logging.LogRecord] = []
    logger = logging.getLogger("meshlocal.library.x")
    handler = logging.Handler()
    handler.addFilter(lambda record: told.append(record) or False)
    logger.addHandler(handler)
    try:
        get_log(logger.name).warning("instances file refused", file="a b.yaml", problem="line 3\nis bad", seconds=None)
    finally:
        logger.removeHandler(handler)
    plain = logging.Formatter("%(levelname)s %(message)s").format(told[0])
    assert plain == r'WARNING instances file refused file="a b.yaml" problem="line 3\nis bad"'
    assert TextFormatter().format(told[0]).endswith(plain.removeprefix("WARNING "))
    entry = json.loads(JsonFormatter().format(told[0]))
    assert (entry["event"], entry["file"], entry["seconds"]) == ("instances file refused", "a b.yaml", None)


def test_rate_limit_logs_once_an_interval_and_counts_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimited(Log(logging.getLogger("x")), logging.WARNING, "accept failed", interval=5)
    assert [limited(now, at=now) for now in (100.0, 100.1, 104.9, 105.0, 105.1, 120.0)] == [
        True,
        False,
        False,
        True,
        False,
        True,
    ]
    fields = [getattr(entry, "meshlocal_fields") for entry in caplog.records]  # noqa: B009 - set by `extra`
    assert fields == [{"at": 100.0}, {"at": 105.0, "suppressed": 2}, {"at": 120.0, "suppressed": 1}]


def test_what_libraries_say_at_debug_is_never_written() -> None:
    """They print whole headers, with what a client proves itself by; our own debug lines are asked for."""
    stream = io.StringIO()
    configure_logging("debug", "text", stream)
    logging.getLogger("hpack.hpack").debug("Decoded (authorization, Bearer s3cret)")
    logging.getLogger("hpack.hpack").info("informed")
    get_log("meshlocal.net.x").debug("ours")
    configure_logging("info", "text", stream)
    get_log("meshlocal.net.x").debug("not asked for")
    for handler in logging.getLogger().handlers:
        handler.flush()
    lines = stream.getvalue()
    assert "s3cret" not in lines
    assert "informed" in lines
    assert "ours" in lines
    assert "not asked for" not in lines


def test_nobody_floods_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """P2: of one event so many within so long; others, and other levels, have their own room; none is forgotten."""
    now = 100.0
    monkeypatch.setattr("meshlocal.net.log.time.monotonic", lambda: now)
    log = Log(logging.getLogger("meshlocal.flooded"))
    caplog.set_level(logging.INFO, "meshlocal.flooded")
    for number in range(FLOOD + 7):
        log.warning("frame refused", number=number)
    log.warning("another event")
    for _ in range(FLOOD + 7):
        log.info("served")
    said = [entry(each).event for each in caplog.records]
    assert said.count("frame refused") == FLOOD
    assert said.count("another event") == 1
    assert said.count("served") == FLOOD + 7
    last = [entry(each).fields for each in caplog.records if entry(each).event == "frame refused"][-1]
    assert last == {"number": FLOOD - 1, "limited": "others of this event are left out for 10 s"}
    caplog.clear()
    now += FLOOD_TIME
    log.warning("frame refused", number=1)
    log.warning("frame refused", number=2)
    told = [entry(each).fields for each in caplog.records]
    assert told == [{"number": 1, "suppressed": 7}, {"number": 2}]


def test_what_two_limits_left_out_is_added_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("meshlocal.net.log.time.monotonic", lambda: now)
    log = Log(logging.getLogger("meshlocal.flooded"))
    limited = RateLimited(log, logging.WARNING, "accept failed", interval=5)
    for _ in range(FLOOD + 3):
        log.warning("accept failed")
    limited(0.0)
    limited(1.0)
    limited(5.0)
    now += FLOOD_TIME
    limited(10.0)
    [*_, last] = caplog.records
    # Three at first, those at 0 and 5, and the one that was left out before 5.
    assert entry(last).fields == {"suppressed": 6}
