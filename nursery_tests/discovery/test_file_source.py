"""The file source: hot reload, and files that cannot be used (D3)."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from meshlocal.discovery import file_source
from meshlocal.discovery.file_source import FileSource, is_written_to
from meshlocal.discovery.hub import Hub
from meshlocal.net import file_hints
from meshlocal.net.blocking import Blocking
from meshlocal.policy.model import ServiceKey
from nursery_tests.logged import entry

B = ServiceKey("b")
LIMIT = 20


def content(*ports: int) -> str:
    rows = "".join(f"    - {{address: 127.0.0.1, port: {port}, labels: {{node: n1}}}}\n" for port in ports)
    return f"services:\n  b:\n{rows}" if rows else "services:\n  b: []\n"


def ports(hub: Hub) -> list[int] | None:
    snapshot = hub.snapshot(B)
    return None if snapshot is None else sorted(key.port for key in snapshot.instances)


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(LIMIT):
        while not holds():  # noqa: ASYNC110 - the source polls the file, so does its test
            await trio.sleep(0.005)


async def start(nursery: trio.Nursery, path: Path) -> Hub:
    hub = Hub([FileSource(path, zone="z1", cluster="c1", poll_interval=0.005)], random.Random(0))
    await nursery.start(hub.run)
    return hub


def replace(path: Path, text: str) -> None:
    """As editors and config management do it: write beside, then rename over."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)


def write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.parametrize("change", [replace, write])
async def test_changes_are_published(
    tmp_path: Path, nursery: trio.Nursery, change: Callable[[Path, str], None]
) -> None:
    """A file that is replaced by rename or written in place is read again, each time."""
    path = tmp_path / "instances.yaml"
    write(path, content(1))
    hub = await start(nursery, path)
    await until(lambda: hub.in_sync)
    assert ports(hub) == [1]
    for listed in ([1, 2], [2], [], [3]):
        change(path, content(*listed))
        await until(partial(lambda wanted: ports(hub) == wanted, listed))
    nursery.cancel_scope.cancel()


async def test_a_swapped_link_is_seen(tmp_path: Path, nursery: trio.Nursery) -> None:
    """A ConfigMap volume changes by a symbolic link to another folder: that is a change of the file."""
    for name, listed in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "instances.yaml", content(listed))
    (tmp_path / "data").symlink_to("one")
    hub = await start(nursery, tmp_path / "data" / "instances.yaml")
    await until(lambda: ports(hub) == [1])
    (tmp_path / "fresh").symlink_to("two")
    assert ports(hub) == [1], "the link is as it was"
    os.replace(tmp_path / "fresh", tmp_path / "data")
    await until(lambda: ports(hub) != [1])
    assert ports(hub) == [2]
    nursery.cancel_scope.cancel()


async def test_labels_of_the_file_and_its_place(tmp_path: Path, nursery: trio.Nursery) -> None:
    """Instances get the zone and cluster that the source was given, and the labels service and registry."""
    path = tmp_path / "instances.yaml"
    write(path, content(1))
    hub = await start(nursery, path)
    await until(lambda: hub.in_sync)
    (snapshot,) = hub.snapshots()
    (instance,) = snapshot.instances.values()
    assert instance.labels == {"node": "n1", "zone": "z1", "cluster": "c1", "service": "b", "registry": "file"}
    nursery.cancel_scope.cancel()


async def test_a_broken_file_changes_nothing_and_is_reported(
    tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    """D3: a broken file is reported with line and key, and what was served before stays; so with one that is gone."""
    path = tmp_path / "instances.yaml"
    write(path, content(1))
    hub = await start(nursery, path)
    await until(lambda: hub.in_sync)
    (state,) = hub.sources
    before = hub.snapshot(B)
    problems = []
    for broken in (content(70000), "services: {b: [", "services:\n"):
        write(path, broken)
        await until(lambda: state.problem is not None and state.problem not in problems)
        problems.append(state.problem)
        assert hub.snapshot(B) is before
    path.unlink()
    await until(lambda: "No such file" in (state.problem or ""))
    assert hub.snapshot(B) is before
    assert problems[0] == f"{path}:3: services.b[0].port: 70000 is not within 1 to 65535"
    assert all(problem.startswith(f"{path}:") for problem in problems if problem)
    write(path, content(2))
    await until(lambda: ports(hub) == [2])
    assert state.problem is None
    reported = [record for record in caplog.records if entry(record).event == "instances file refused"]
    assert len(reported) == 4, "each problem is said once, not at every look"
    nursery.cancel_scope.cancel()


async def test_a_file_that_comes_late_is_waited_for(tmp_path: Path, nursery: trio.Nursery) -> None:
    """D3: without its file a source is not in sync, and nothing is said of any service; it is, once the file comes."""
    path = tmp_path / "instances.yaml"
    hub = await start(nursery, path)
    (state,) = hub.sources
    await until(lambda: state.problem is not None)
    assert ports(hub) is None
    replace(path, content(1))
    await until(lambda: ports(hub) == [1])
    nursery.cancel_scope.cancel()


async def test_cancellation_while_reading(tmp_path: Path) -> None:
    """The task ends at once when it is cancelled, also while a thread reads a file that never ends."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)
    try:
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                hub = await start(nursery, path)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        assert nursery.cancel_scope.cancelled_caught
        assert not hub.in_sync
    finally:
        os.write(writer, b"done")
        os.close(writer)


def count_looks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with each look at a file."""
    looks: list[None] = []
    look = FileSource._look

    def counted(source: FileSource) -> object:
        looks.append(None)
        return look(source)

    monkeypatch.setattr(FileSource, "_look", counted)
    return looks


async def test_a_file_that_somebody_is_writing_to_is_waited_for(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D3: half a file may parse, and an instance that is not written yet has not gone."""
    looks = count_looks(monkeypatch)
    path = tmp_path / "instances.yaml"
    write(path, content(1, 2))
    hub = await start(nursery, path)
    await until(lambda: ports(hub) == [1, 2])
    with path.open("w") as file:
        file.write(content(1))
        file.flush()
        seen = len(looks)
        await until(lambda: len(looks) > seen + 20)
        assert ports(hub) == [1, 2]
        file.write(content(1, 3)[len(content(1)) :])
    await until(lambda: ports(hub) == [1, 3])


async def test_a_file_that_is_being_written_at_the_start_is_waited_for(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = count_looks(monkeypatch)
    path = tmp_path / "instances.yaml"
    hub = Hub([FileSource(path, poll_interval=0.005)], random.Random(0))
    with path.open("w") as file:
        file.write(content(1))
        file.flush()
        nursery.start_soon(hub.run)
        await until(lambda: len(looks) > 20)
        assert ports(hub) is None
        file.write(content(1, 2)[len(content(1)) :])
    await until(lambda: ports(hub) == [1, 2])


class Stepped:
    """A source whose looks at the file come one at a time, and whose reads happen within them.

    Attributes:
        after_read: called with the file's path after each read, before anything comes of it.
    """

    interval = 1.0

    def __init__(self, path: Path, clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.after_read: Callable[[Path], object] = lambda path: None
        source = FileSource(path, poll_interval=self.interval)
        self.hub = Hub([source], random.Random(0))
        self._clock = clock

        async def run(work: Callable[..., object], *arguments: Any, waits: float = 0.0) -> object:
            await trio.lowlevel.checkpoint()
            if work == source._look_until_changed:
                (known, _) = arguments
                if known is not None:
                    await trio.sleep(self.interval)
                found = source._look()
                return found if known is None or found != known else None
            try:
                return work(*arguments)
            finally:
                if work == source.load:
                    self.after_read(path)

        monkeypatch.setattr(source._files, "run", run)

    async def start(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self.hub.run)
        await trio.testing.wait_all_tasks_blocked()

    async def look(self) -> list[int] | None:
        """Let it look once more; returns what is served then."""
        self._clock.jump(self.interval)
        await trio.testing.wait_all_tasks_blocked()
        return ports(self.hub)


@pytest.fixture
def stepped(tmp_path: Path, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> Stepped:
    return Stepped(tmp_path / "instances.yaml", mock_clock, monkeypatch)


async def test_a_file_that_grows_is_read_once_it_rests(
    stepped: Stepped, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """D3: also where its writer closes it between two pieces, each of which parses."""
    write(stepped.path, content(1, 2, 3))
    await stepped.start(nursery)
    assert ports(stepped.hub) == [1, 2, 3]
    for listed in ([], [4], [4, 5], [4, 5, 6]):
        write(stepped.path, content(*listed))
        assert await stepped.look() == [1, 2, 3]
    assert await stepped.look() == [4, 5, 6]


@pytest.mark.parametrize("change", [replace, write])
async def test_a_file_that_changes_while_it_is_read_is_read_again(
    stepped: Stepped, nursery: trio.Nursery, mock_clock: MockClock, change: Callable[[Path, str], None]
) -> None:
    """D3: what was read of it may be half of it."""
    write(stepped.path, content(1, 2))
    await stepped.start(nursery)
    write(stepped.path, content(3))
    stepped.after_read = lambda path: change(path, content(3, 4))
    assert await stepped.look() == [1, 2]
    assert await stepped.look() == [1, 2], "it was read, and had changed"
    stepped.after_read = lambda path: None
    served = [await stepped.look() for _ in range(2)]
    assert served == [[1, 2], [3, 4]]


async def test_a_file_that_was_away_while_it_was_read_is_read_again(
    stepped: Stepped, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """D3: though it is as it was before."""
    write(stepped.path, content(1))
    await stepped.start(nursery)
    aside = stepped.path.with_name("aside")
    write(stepped.path, content(2, 3))
    stepped.after_read = lambda path: path.rename(aside)
    assert [await stepped.look() for _ in range(2)] == [[1], [1]]
    stepped.after_read = lambda path: None
    assert await stepped.look() == [1], "it is not there"
    aside.rename(stepped.path)
    assert [await stepped.look() for _ in range(2)] == [[1], [2, 3]]


async def test_a_file_that_changes_while_it_is_first_read_is_no_sync(
    stepped: Stepped, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """D3."""
    write(stepped.path, content(1))
    stepped.after_read = lambda path: write(path, content(1, 2))
    await stepped.start(nursery)
    assert not stepped.hub.in_sync
    stepped.after_read = lambda path: None
    assert [await stepped.look() for _ in range(2)] == [None, [1, 2]]


def test_a_question_about_a_file_leaves_nothing_open(tmp_path: Path) -> None:
    """Whatever the answer: it is asked for as long as the process lives."""
    path = tmp_path / "instances.yaml"
    write(path, content(1))
    with path.open("a"):
        before = os.listdir("/proc/self/fd")
        assert is_written_to(path)
        assert os.listdir("/proc/self/fd") == before
    before = os.listdir("/proc/self/fd")
    for asked in (path, tmp_path, tmp_path / "missing", Path("/dev/null")):
        assert not is_written_to(asked)
    assert os.listdir("/proc/self/fd") == before


async def test_who_never_closes_it_is_not_waited_for_for_ever(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("meshlocal.discovery.file_source.WRITER_LIMIT", 0.1)
    path = tmp_path / "instances.yaml"
    write(path, content(1))
    hub = await start(nursery, path)
    await until(lambda: ports(hub) == [1])
    with path.open("w") as file:
        file.write(content(2))
        file.flush()
        await until(lambda: ports(hub) == [2])
    assert "somebody keeps the instances file open" in caplog.text


def test_a_file_that_cannot_be_asked_about_is_not_waited_for(tmp_path: Path) -> None:
    """Such as one that is not there, or has no leases."""
    assert not is_written_to(tmp_path / "missing")
    assert not is_written_to(tmp_path)
    assert not is_written_to(Path("/dev/null"))


async def test_a_file_system_that_hangs_holds_nobody_up(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P1: what was read before is served, the problem is told, and once it answers the file is read anew."""
    path = tmp_path / "instances.yaml"
    write(path, content(1))
    released, hanging = threading.Event(), threading.Event()
    stat = os.stat

    def stat_that_hangs(where: Any, **options: Any) -> os.stat_result:
        if where == path and hanging.is_set():
            released.wait(LIMIT)
        return stat(where, **options)

    source = FileSource(path, poll_interval=0.005)
    source._files = Blocking(limit=0.05)
    monkeypatch.setattr(file_source, "LOOK_FOR", 0.02)
    monkeypatch.setattr(file_source, "BLOCKED_PAUSE", 0.005)
    monkeypatch.setattr(os, "stat", stat_that_hangs)
    hub = Hub([source], random.Random(0))
    try:
        await nursery.start(hub.run)
        await hub.wait_in_sync()
        hanging.set()
        turns = 0
        with trio.fail_after(LIMIT):
            while hub.sources[0].problem is None:
                await trio.sleep(0.001)
                turns += 1
        assert "the file system" in (hub.sources[0].problem or "")
        assert turns > 5
        assert ports(hub) == [1]
        replace(path, content(1, 2))
        hanging.clear()
        released.set()
        await until(lambda: ports(hub) == [1, 2])
        assert hub.sources[0].problem is None
    finally:
        released.set()
    nursery.cancel_scope.cancel()


async def test_a_quiet_file_leaves_the_loop_alone(tmp_path: Path, nursery: trio.Nursery) -> None:
    """P3: a thread does the looking, and wakes the loop for a change."""
    path = tmp_path / "instances.yaml"
    write(path, content(1))
    hub = await start(nursery, path)
    await hub.wait_in_sync()
    steps: list[str] = []

    class Steps(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            steps.append(task.name)

    await trio.sleep(0.1)
    counting = Steps()
    trio.lowlevel.add_instrument(counting)
    await trio.sleep(0.3)  # sixty looks
    trio.lowlevel.remove_instrument(counting)
    assert len([name for name in steps if "FileSource" in name or "_supervise" in name]) <= 2
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("change", [replace, write])
async def test_a_hint_makes_the_next_look_come_at_once(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, str], None]
) -> None:
    """P3: looks without one are rare."""
    monkeypatch.setattr(file_source, "HINTED", 1_000_000)
    looks = count_looks(monkeypatch)
    path = tmp_path / "instances.yaml"
    write(path, content(1))
    hub = await start(nursery, path)
    await hub.wait_in_sync()
    await trio.sleep(0.05)  # ten intervals
    assert len(looks) <= 4
    change(path, content(1, 2))
    await until(lambda: ports(hub) == [1, 2])
    nursery.cancel_scope.cancel()


async def test_without_hints_it_is_looked_at_more_often(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a user's instances of inotify are used up."""
    monkeypatch.setattr(file_source, "HINTED", 1_000_000)
    monkeypatch.setattr(file_hints, "_init", lambda: -1)
    path = tmp_path / "instances.yaml"
    write(path, content(1))
    hub = await start(nursery, path)
    await hub.wait_in_sync()
    replace(path, content(1, 2))
    await until(lambda: ports(hub) == [1, 2])
    nursery.cancel_scope.cancel()
