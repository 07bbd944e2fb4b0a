"""Instances from a file, read again whenever it changes.

The file is looked at, not watched: one `stat` an interval, following symbolic
links, so that an atomic replacement by rename, a ConfigMap's swapped link, an
edit in place and a file that comes late are all seen alike, on every file
system. A file that changed is read once it looks the same twice in a row, so
that a writer caught half-way is waited for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from meshlocal.discovery.source import Publisher
from meshlocal.net.log import get_log
from meshlocal.policy.model import index
from meshlocal.policy.problems import Problem
from meshlocal.wire.instances_file import InstancesFile, InstancesFileError, parse_instances_file

if TYPE_CHECKING:
    import trio

_log = get_log(__name__)

POLL_INTERVAL = 0.25
"""Seconds between two looks at the file. A change is published after one to two of them."""

_Signature = tuple[int, int, int, int]


class FileSource:
    """A `Source` over an instances file.

    A file that is missing, unreadable or malformed is reported, with the line and the key at fault, and changes
    nothing: what was published before stays.

    Args:
        path: the file.
        zone: the `zone` label of instances for which the file gives none.
        cluster: the `cluster` label, likewise.
        poll_interval: seconds between two looks.
    """

    def __init__(self, path: Path, *, zone: str = "", cluster: str = "", poll_interval: float = POLL_INTERVAL) -> None:
        self._path = path
        self._zone = zone
        self._cluster = cluster
        self._poll_interval = poll_interval

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
        while True:
            before, settled = settled, self._look()
            # The first look counts at once: at start there is no writer to wait for more often than not, and a
            # half-written file that parses would be read again when it settles.
            if settled != done and (settled == before or before is None):
                done = settled
                if await self._publish(publisher, in_sync=in_sync) and not in_sync:
                    in_sync = True
                    task_status.started()
            await anyio.sleep(self._poll_interval)

    async def _publish(self, publisher: Publisher, *, in_sync: bool) -> bool:
        """Read the file and publish what it says; false if it cannot be used."""
        try:
            content = await anyio.to_thread.run_sync(self.load, abandon_on_cancel=True)
        except InstancesFileError as error:
            publisher.report(str(error))
            served = "what it said before" if in_sync else "nothing yet"
            for problem in str(error).splitlines():
                _log.error("instances file refused", problem=problem, served=served)
            return False
        publisher.report(None)
        publisher.replace({service: index(listed) for service, listed in content.services.items()})
        if in_sync:
            _log.info("instances file read again", file=str(self._path), services=len(content.services))
        return True

    def _look(self) -> _Signature | str:
        """What tells one state of the file from the next; for a file that cannot be looked at, why."""
        try:
            found = os.stat(self._path)
        except OSError as error:
            return error.strerror or str(error)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
