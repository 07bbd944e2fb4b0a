"""net/log_writer: lines reach who reads them, and who does not read holds nobody up (P1)."""

from __future__ import annotations

import json
import logging
import os
import select
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import pytest
import trio

from meshlocal.net import log_writer
from meshlocal.net.log import configure_logging, dropped_lines, get_log
from meshlocal.net.log_writer import LineWriter


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """A pipe: its reading end, and its writing end as a stream."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        yield reader, stream
        os.close(reader)


def log_threads() -> int:
    """Threads of writers that wait for lines."""
    return sum(each.name == "meshlocal log" for each in threading.enumerate())


def read_all(reader: int, until: bytes) -> bytes:
    """What comes out of a pipe, up to something that it ends with."""
    found = b""
    while not found.endswith(until):
        piece = os.read(reader, 65536)
        assert piece
        found += piece
    return found


def test_lines_are_there_at_once_where_there_is_room(pipe: tuple[int, TextIO]) -> None:
    """No thread is needed, and none is started."""
    reader, stream = pipe
    writer = LineWriter(stream)
    assert writer.write("one")
    assert os.read(reader, 100) == b"one\n"
    assert writer._thread is None


def test_a_stuck_pipe_holds_nobody_and_loses_no_line_that_fits(pipe: tuple[int, TextIO]) -> None:
    """What was queued comes out in order once somebody reads; what did not fit is counted."""
    reader, stream = pipe
    writer = LineWriter(stream)
    lines = [f"{number:06} " + "x" * 500 for number in range(3 * log_writer.MOST_LINES)]
    taken = [line for line in lines if writer.write(line)]
    assert log_writer.MOST_LINES <= len(taken) < len(lines)
    assert writer.dropped == len(lines) - len(taken)
    assert read_all(reader, taken[-1].encode() + b"\n") == "".join(line + "\n" for line in taken).encode()
    assert writer.flush(10)
    assert writer.write("after")
    assert os.read(reader, 100) == b"after\n"


def test_the_queue_is_bounded_in_bytes_too(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    writer = LineWriter(stream)
    large = "y" * (1 << 20)
    taken = sum(writer.write(large) for _ in range(20))
    assert taken <= log_writer.MOST_BYTES // len(large) + 2  # the first ones are with the thread
    assert writer.dropped == 20 - taken
    assert len(read_all(reader, b"y\n")) <= taken * (len(large) + 1)


def test_files_are_written_by_a_thread(tmp_path: Path) -> None:
    """A disk that hangs is said to be ready, and is not."""
    with (tmp_path / "log").open("w") as stream:
        writer = LineWriter(stream)
        for number in range(100):
            assert writer.write(f"line {number}")
        assert writer._thread is not None
        assert writer.flush(10)
    assert (tmp_path / "log").read_text().splitlines() == [f"line {number}" for number in range(100)]


def test_a_reader_that_has_gone_is_no_error(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    writer = LineWriter(stream)
    other = os.dup(reader)
    os.close(reader)
    os.close(other)
    try:
        assert writer.write("to nobody")
    finally:
        os.dup2(os.open(os.devnull, os.O_RDONLY), reader)


async def test_the_log_says_how_many_lines_it_dropped(
    pipe: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1: the loop goes on while nobody reads standard error; afterwards the loss is told, and counted."""
    monkeypatch.setattr(log_writer, "MOST_LINES", 300)
    reader, stream = pipe
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    before = dropped_lines()
    try:
        configure_logging("info", "json", stream)
        log = get_log("meshlocal.sample")
        with trio.fail_after(10):
            for number in range(3 * log_writer.MOST_LINES):
                log.info("busy", number=number, filler="z" * 400)
            await trio.lowlevel.checkpoint()
        lost = dropped_lines() - before
        assert lost > 0
        handler: Any = root.handlers[-1]  # The one that was just made.
        writer = handler.writer
        os.set_blocking(reader, False)
        found = b""
        with trio.fail_after(10):
            while b"again" not in found:
                try:
                    found += os.read(reader, 1 << 20)
                except BlockingIOError:
                    if writer.flush(0):
                        log.info("again")
                    await trio.sleep(0.001)
        found += os.read(reader, 1 << 20) if b"nobody read them" not in found else b""
        (told,) = [json.loads(line) for line in found.splitlines() if b"nobody read them" in line]
        assert told["lines"] == lost == dropped_lines() - before
        assert told["level"] == "warning"
    finally:
        root.handlers[:], root.level = handlers, level
        root.manager._clear_cache()  # type: ignore[attr-defined]  # isEnabledFor caches what the level was


def test_a_terminal_is_written_by_a_thread() -> None:
    """P1: it is ready while there is room for one byte, and holds who writes more."""
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as stream:
        writer = LineWriter(stream)
        lines = sum(writer.write("x" * 1000) for _ in range(100))
        assert lines == 100
        assert writer._thread is not None
        while not writer.flush(0.001):
            if select.select([leader], [], [], 0)[0]:
                os.read(leader, 65536)
    os.close(leader)


def test_another_process_that_fills_the_pipe_holds_nobody(pipe: tuple[int, TextIO]) -> None:
    """P1: several workers write to one pipe; what one saw to be free may be taken before it writes."""
    reader, stream = pipe
    writer = LineWriter(stream)
    assert writer._send is not None
    other = os.open(f"/proc/self/fd/{stream.fileno()}", os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(other, b"y" * 4096)
    with pytest.raises(BlockingIOError):
        writer._send(b"x\n")
    assert writer.write("x")
    os.close(other)
    assert read_all(reader, b"x\n").endswith(b"yx\n")


def test_a_stream_that_is_configured_again_keeps_its_writer(pipe: tuple[int, TextIO], tmp_path: Path) -> None:
    """P2: each reload made a thread and a queue of its own, for ever."""
    reader, stream = pipe
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    threads = log_threads()
    try:
        with (tmp_path / "log").open("w") as file:
            for _ in range(5):
                configure_logging("info", "json", file)
                get_log("x").info("said")
            assert log_threads() == threads + 1
            configure_logging("info", "json", stream)
            with_time = time.monotonic() + 10
            while log_threads() > threads and time.monotonic() < with_time:
                time.sleep(0.001)
            assert log_threads() == threads
        assert (tmp_path / "log").read_text().count("said") == 5
        get_log("x").info("last")
        assert b"last" in os.read(reader, 1000)
    finally:
        for each in root.handlers[:]:
            if each not in before:
                root.removeHandler(each)
        root.setLevel(level)
