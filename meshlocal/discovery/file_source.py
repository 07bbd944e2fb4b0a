"""Instances from a file, read again whenever it changes.

What counts is a look at it: one `stat`, following symbolic links, so that an
atomic replacement by rename, a ConfigMap's swapped link, an edit in place and a
file that comes late are all seen alike, on every file system. The kernel's
hints that something happened make the next look come at once; without one there
is a look every 2.5 seconds, or twice a second where the kernel gives no hints.
A file that changed is read once it looks the same twice in a row and nobody has
it open for writing, so that a writer caught half-way is waited for: half a file
may well parse, and say that there are no instances.

All of it is done in a thread: a file system that hangs holds that one, and what was published before stays (P1).
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import anyio

from meshlocal.discovery.source import Publisher, Source, SourceContext
from meshlocal.net.blocking import BlockedError, Blocking
from meshlocal.net.file_hints import FileHints
from meshlocal.net.log import get_log
from meshlocal.policy.model import index
from meshlocal.policy.problems import Problem
from meshlocal.policy.sources import FileOptions
from meshlocal.wire.instances_file import InstancesFile, InstancesFileError, parse_instances_file

if TYPE_CHECKING:
    import trio

_log = get_log(__name__)

POLL_INTERVAL = 0.25
"""Seconds between two looks at a file that changes. A change is published once two of them saw the same."""

UNHINTED = 2
"""Intervals between two looks at a file that rests, where the kernel gives no hints."""

HINTED = 10
"""The same where it does: hints can be missing, as of what happens elsewhere on a network file system."""

LOOK_FOR = 20.0
"""Seconds that a thread looks for, before it comes back without a change. One that does not come back soon after that
tells of a file system that hangs."""

BLOCKED_PAUSE = 1.0
"""Seconds between two tries to look at a file whose file system does not answer."""

WRITER_LIMIT = 10.0
"""Seconds for which somebody who has the file open for writing is waited for."""

_Signature = tuple[int, int, int, int]


def open_file_source(options: object, context: SourceContext) -> Iterator[Source]:
    """The source that a `file:` URL names."""
    assert isinstance(options, FileOptions)
    yield FileSource(Path(options.path), zone=context.zone, cluster=context.cluster)


class FileSource:
    """A `Source` over an instances file.

    A file that is missing, unreadable or malformed is reported, with the line and the key at fault, and changes
    nothing: what was published before stays.

    Args:
        path: the file.
        zone: the `zone` label of instances for which the file gives none.
        cluster: the `cluster` label of its instances that have none.
        poll_interval: seconds between two looks at a file that changes.
    """

    def __init__(self, path: Path, *, zone: str = "", cluster: str = "", poll_interval: float = POLL_INTERVAL) -> None:
        self._path = path
        self._zone = zone
        self._cluster = cluster
        self._poll_interval = poll_interval
        self._files = Blocking()
        self._said_blocked = False

    @property
    def name(self) -> str:
        """`file:` and the path."""
        return f"file:{self._path}"

    def load(self) -> InstancesFile:
        """Read the file now. It blocks.

        Raises:
            InstancesFileError: it cannot be read, or is malformed; the text says where and why.
        """
        name = str(self._path)
        try:
            text = self._path.read_bytes().decode()
        except OSError as error:
            raise InstancesFileError([Problem("", f"cannot be read: {error.strerror or error}", name)]) from None
        except UnicodeDecodeError as error:
            raise InstancesFileError([Problem("", f"is not UTF-8 at byte {error.start}", name)]) from None
        return parse_instances_file(text, name, zone=self._zone, cluster=self._cluster)

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        """Publish the file's services, and again after each change. In sync once it was read."""
        in_sync = False
        settled: _Signature | str | None = None
        done: _Signature | str | None = None
        waited = 0.0
        while True:
            try:
                # A thread looks, and comes back when there is something to do: the loop is left alone meanwhile.
                before = settled
                settled = await self._wait_for_look(settled if settled == done else None)
                # The first look counts at once: at start there is no writer to wait for more often than not.
                fresh = settled != done and (settled == before or before is None)
                if fresh and waited < WRITER_LIMIT and await self._files.run(is_written_to, self._path):
                    waited += self._poll_interval
                elif fresh:
                    if waited >= WRITER_LIMIT:
                        _log.warning("somebody keeps the instances file open for writing", file=str(self._path))
                    waited = 0.0
                    done = settled
                    content = await self._read()
                    if await self._files.run(self._look) != settled:
                        # It was written to while it was read.
                        done = None
                    elif isinstance(content, InstancesFileError):
                        self._refuse(publisher, content, in_sync=in_sync)
                    else:
                        self._publish(publisher, content, in_sync=in_sync)
                        if not in_sync:
                            in_sync = True
                            task_status.started()
            except BlockedError as error:
                self._say_blocked(publisher, error)
                # Once it answers again, the file is read as if for the first time.
                settled = done = None
                await anyio.sleep(BLOCKED_PAUSE)
            if settled != done:
                await anyio.sleep(self._poll_interval)

    async def _wait_for_look(self, known: _Signature | str | None) -> _Signature | str:
        """Look at the file until it is not as it is known to be; at once if nothing is known of it.

        Raises:
            BlockedError: the file system does not answer.
        """
        while True:
            hints = FileHints(self._path)
            try:
                found = await self._files.run(self._look_until_changed, known, hints, waits=LOOK_FOR)
            finally:
                hints.stop()
            if found is not None:
                return found

    def _look_until_changed(self, known: _Signature | str | None, hints: FileHints) -> _Signature | str | None:
        """In a thread: look again and again; None if nothing changed for a while."""
        if known is None:
            return self._look()
        until = time.monotonic() + LOOK_FOR
        with hints:
            while True:
                pause = self._poll_interval * (HINTED if hints.arm() else UNHINTED)
                found = self._look()
                if found != known:
                    return found
                left = until - time.monotonic()
                if left <= 0 or not hints.wait(min(pause, left), min(self._poll_interval, left)):
                    return None

    async def _read(self) -> InstancesFile | InstancesFileError:
        try:
            return await self._files.run(self.load)
        except InstancesFileError as error:
            return error

    def _say_blocked(self, publisher: Publisher, error: BlockedError) -> None:
        publisher.report(f"{self._path}: {error}")
        if not self._said_blocked:
            self._said_blocked = True
            _log.error("instances file cannot be looked at; what it said before is served", problem=str(error))

    def _refuse(self, publisher: Publisher, error: InstancesFileError, *, in_sync: bool) -> None:
        publisher.report(str(error))
        served = "what it said before" if in_sync else "nothing yet"
        for problem in str(error).splitlines():
            _log.error("instances file refused", problem=problem, served=served)

    def _publish(self, publisher: Publisher, content: InstancesFile, *, in_sync: bool) -> None:
        publisher.report(None)
        self._said_blocked = False
        publisher.replace({service: index(listed) for service, listed in content.services.items()})
        if in_sync:
            _log.info("instances file read again", file=str(self._path), services=len(content.services))

    def _look(self) -> _Signature | str:
        """What tells one state of the file from the next; for a file that cannot be looked at, why."""
        try:
            found = os.stat(self._path)
        except OSError as error:
            return error.strerror or str(error)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def is_written_to(path: Path) -> bool:
    """Whether somebody has the file open for writing, as far as this process may know.

    The kernel grants a lease for reading only on a file that nobody writes to (fcntl(2), "Leases"). It is given back
    at once. Who opens the file in that moment waits for that, and the kernel tells of it by a signal, here by one that
    is ignored if nobody handles it. Only the file's owner and root are given leases, and not on every file system;
    where there is none, nobody is waited for.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    finally:
        os.close(descriptor)
    return False
