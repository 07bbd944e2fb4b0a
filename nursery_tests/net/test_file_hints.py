"""Hints that a file changed (P3): which changes give one, and how a thread's wait for one ends."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from meshlocal.net import file_hints
from meshlocal.net.file_hints import FileHints, folders_of

LIMIT = 20
FOR_EVER = 3600.0


class Waiting:
    """A thread that waits for a hint about a file, or to be stopped."""

    def __init__(self, path: Path, longest: float = FOR_EVER, shortest: float = 0.0) -> None:
        self.hints = FileHints(path)
        self.told: bool | None = None
        self.went_on: bool | None = None
        self._times = longest, shortest
        self._armed = threading.Event()
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()
        assert self._armed.wait(LIMIT)

    def _wait(self) -> None:
        with self.hints:
            self.told = self.hints.arm()
            self._armed.set()
            self.went_on = self.hints.wait(*self._times)

    def ended(self, limit: float = LIMIT) -> bool:
        self._thread.join(limit)
        return not self._thread.is_alive()


@contextmanager
def waiting(path: Path, longest: float = FOR_EVER, shortest: float = 0.0) -> Iterator[Waiting]:
    found = Waiting(path, longest, shortest)
    try:
        yield found
    finally:
        found.hints.stop()
        assert found.ended()


def rename_over(path: Path) -> None:
    beside = path.with_name("beside")
    beside.write_text("new")
    os.replace(beside, path)


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("more")


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [rename_over, append, touch, remove])
def test_a_change_of_a_file_gives_a_hint(tmp_path: Path, change: Callable[[Path], None]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with waiting(path) as found:
        assert found.told
        change(path)
        assert found.ended()
    assert found.went_on


def test_a_file_that_comes_late_gives_a_hint(tmp_path: Path) -> None:
    with waiting(tmp_path / "late") as found:
        assert found.told
        (tmp_path / "late").write_text("here")
        assert found.ended()


def test_what_is_written_by_another_name_gives_a_hint(tmp_path: Path) -> None:
    """A file may be in two folders, as one that is mounted into a container."""
    (tmp_path / "elsewhere").mkdir()
    path, other = tmp_path / "file", tmp_path / "elsewhere" / "other"
    path.write_text("old")
    os.link(path, other)
    with waiting(path) as found:
        append(other)
        assert found.ended()


def test_a_swapped_link_gives_a_hint(tmp_path: Path) -> None:
    """As of a ConfigMap's volume: file → ..data/file, ..data → ..one, which becomes ..two."""
    for name in ("..one", "..two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "..data").symlink_to("..one")
    (tmp_path / "file").symlink_to("..data/file")
    with waiting(tmp_path / "file") as found:
        (tmp_path / "fresh").symlink_to("..two")
        assert found.ended(), "a change in a folder on the way"
    with waiting(tmp_path / "file") as found:
        os.replace(tmp_path / "fresh", tmp_path / "..data")
        assert found.ended()
    with waiting(tmp_path / "file") as found:
        append(tmp_path / "..two" / "file")
        assert found.ended()


def test_a_wait_is_armed_anew_after_a_hint(tmp_path: Path) -> None:
    """The way may lead through other folders then."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "data"
    link.symlink_to(tmp_path / "one")
    with FileHints(link / "file") as hints:
        assert hints.arm()
        (tmp_path / "links" / "fresh").symlink_to(tmp_path / "two")
        os.replace(tmp_path / "links" / "fresh", link)
        assert hints.wait(FOR_EVER, 0.0)
        assert hints.arm()
        append(tmp_path / "two" / "file")
        assert hints.wait(FOR_EVER, 0.0)


@pytest.mark.parametrize("shortest", [0.0, FOR_EVER])
def test_a_stop_ends_a_wait(tmp_path: Path, shortest: float) -> None:
    """Also the rest that follows a hint."""
    with waiting(tmp_path / "file", shortest=shortest) as found:
        if shortest:
            (tmp_path / "other").write_text("noise")
            assert not found.ended(0.05), "in a folder where much goes on it rests between two looks"
        found.hints.stop()
        assert found.ended()
    assert found.went_on is False


def test_a_stop_before_the_wait_ends_it_too(tmp_path: Path) -> None:
    hints = FileHints(tmp_path / "file")
    hints.stop()
    with hints:
        assert not hints.wait(FOR_EVER, 0.0)
    hints.stop()


def test_nothing_is_left_open(tmp_path: Path) -> None:
    hints = FileHints(tmp_path / "file")
    before = os.listdir("/proc/self/fd")
    for _ in range(2):
        with hints:
            hints.arm()
    assert os.listdir("/proc/self/fd") == before


def test_who_waits_is_told_where_there_are_no_hints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users have 128 instances of inotify each, as it comes; a folder that does not exist has nothing to tell."""
    with FileHints(tmp_path / "none" / "file") as hints:
        assert not hints.arm()
        assert hints.wait(0.0, 0.0)
    monkeypatch.setattr(file_hints, "_init", lambda: -1)
    with FileHints(tmp_path / "file") as hints:
        assert not hints.arm()
        assert hints.wait(0.0, 0.0)
        hints.stop()
        assert not hints.wait(FOR_EVER, 0.0)


def test_the_way_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "data").symlink_to("real")
    (tmp_path / "absolute").symlink_to(tmp_path / "data" / "file")
    (tmp_path / "up").symlink_to("real/../real")
    here, real = str(tmp_path), str(tmp_path / "real")
    for path, expected in (
        ("file", [here]),
        ("data/file", [here, real]),
        ("absolute", [here, here, real]),
        ("up/file", [here, f"{real}/../real"]),
        ("none/file", [f"{here}/none"]),
    ):
        assert list(folders_of(f"{here}/{path}")) == expected
    (tmp_path / "circle").symlink_to("circle")
    assert set(folders_of(f"{here}/circle")) == {here}


def test_who_has_no_descriptor_to_spare_waits_without_hints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at a file takes none."""

    def refuse() -> tuple[int, int]:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "pipe", refuse)
    with FileHints(tmp_path / "file") as hints:
        assert not hints.arm()
        assert hints.wait(0.0, 0.0)
    with waiting(tmp_path / "file") as found:
        assert not found.told
        found.hints.stop()
        assert found.ended()
    assert found.went_on is False
