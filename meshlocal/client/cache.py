"""The last snapshots, kept in a file over a restart (behaviour rule D2).

The cache stands between the feed and its sink, and writes what passes. A file is replaced whole: written beside,
flushed to the disk, renamed. Its time of modification is when what it holds was last known to be current, so that a
proxy that starts from it can say how old that is.

What is read from it is *stale* until discovery confirms it. A file that is not whole is reported, and as good as none;
so is a disk that takes no writes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread

from meshlocal.client.feed import FeedStatus, SnapshotSink
from meshlocal.net.blocking import BlockedError, Blocking
from meshlocal.net.log import get_log
from meshlocal.net.wall_clock import wall_clock
from meshlocal.policy.model import ServiceChange, ServiceKey, ServiceSnapshot
from meshlocal.wire.snapshot_cache import MAX_SIZE, CachedSnapshot, CacheError, decode_cache, encode_cache

_log = get_log(__name__)

DELAY = 1.0
"""Seconds from a change to its write: what changes meanwhile is written with it."""

CONFIRM_INTERVAL = 30.0
"""Seconds between two notes that what is held is still current; between tries, where writing fails."""

KEEP = 86400.0
"""Seconds for which a service is kept that nobody follows any more: a request may name it again."""

KEEP_SERVICES = 256
KEEP_INSTANCES = 20_000
"""Of such services and their instances, at most: a few megabytes, whatever names requests make up."""

WRITE_LIMIT = 30.0
"""Seconds that a write may take, before the file system is said to hang."""

SPARE = 20.0
"""How many times longer than a write took it is waited before the next."""

LAST_WRITE = 2.0
"""Seconds that the last write may take, when the proxy ends."""


class SnapshotCache:
    """A sink that remembers over restarts.

    Args:
        path: the file; each proxy has its own.
        sink: where snapshots go on to.
        followed: the services that are followed now.
        clock: seconds since 1970.

    Attributes:
        status: the feed's, once there is one.
    """

    def __init__(
        self,
        path: Path,
        sink: SnapshotSink,
        followed: Callable[[], Iterable[ServiceKey]],
        clock: Callable[[], float] = wall_clock,
    ) -> None:
        self._path = path
        self._sink = sink
        self._followed = followed
        self._clock = clock
        self._held: dict[ServiceKey, CachedSnapshot] = {}
        self._from_file: set[ServiceKey] = set()
        self._before: set[ServiceKey] = set()
        """What was followed when it was last asked."""
        self._passed_on = False
        self._age = 0.0
        self._most = KEEP_SERVICES
        """Services held from which on it is looked which may be forgotten."""
        self._took = 0.0
        self._files = Blocking(limit=WRITE_LIMIT)
        self._changes = 0
        self._written = 0
        self._writing = threading.Lock()
        self._dirty = anyio.Event()
        self._problem = ""
        self.status = FeedStatus()

    def load(self) -> list[ServiceSnapshot]:
        """Read the file, which blocks, and pass on what it holds of the services that are followed.

        Returns:
            What was passed on.
        """
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_SIZE + 1)
                written = os.fstat(file.fileno()).st_mtime
            if len(data) > MAX_SIZE:
                raise CacheError(f"is larger than {MAX_SIZE} bytes")
            cached = decode_cache(data)
        except FileNotFoundError:
            return []
        except OSError as error:
            _log.error("cache file ignored", path=str(self._path), problem=error.strerror or str(error))
            return []
        except CacheError as error:
            _log.error("cache file ignored", path=str(self._path), problem=str(error))
            return []
        # A clock that was set back must not make the file younger than new.
        self._age = max(0.0, self._clock() - written)
        self._held = {each.snapshot.service: each for each in cached}
        self._from_file = set(self._held)
        return self.recall(self._followed())

    def try_path(self) -> None:
        """Report at once if the file cannot be written, not when it would be. It blocks."""
        beside = self._path.with_name(self._path.name + ".tmp")
        try:
            with beside.open("wb"):
                pass
            beside.unlink()
        except OSError as error:
            self._report(error.strerror or str(error))

    def recall(self, services: Iterable[ServiceKey]) -> list[ServiceSnapshot]:
        """Pass on what the file had of these services, each once. Returns what was passed on.

        While discovery is away, also what it said itself of a service that is followed again: nobody else can say it.
        """
        services = list(services)
        new = set(services) - self._before
        now = self._clock()
        for service in self._before.difference(services):
            # Followed to this moment: it is from now on that its age counts.
            held = self._held.get(service)
            if held is not None:
                self._held[service] = CachedSnapshot(held.snapshot, now)
        self._before = set(services)
        away = not self.status.connected
        found = [
            self._held[service].snapshot
            for service in services
            if service in self._from_file or (away and service in new and service in self._held)
        ]
        for snapshot in found:
            self._from_file.discard(snapshot.service)
            self._sink.publish(snapshot)
        if found:
            self._passed_on = True
            _log.warning(
                "starting from the cache file", path=str(self._path), services=len(found), age=round(self._age)
            )
        return found

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        """See `SnapshotSink`."""
        return self._sink.prepare(snapshot)

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        """See `SnapshotSink`: what comes from the feed."""
        self._from_file.discard(snapshot.service)
        self._before.add(snapshot.service)
        self._held[snapshot.service] = CachedSnapshot(snapshot, self._clock())
        if len(self._held) > self._most:
            self._prune(self._clock())
        self._changes += 1
        self._dirty.set()
        self._sink.publish(snapshot, change)

    def _prune(self, now: float) -> None:
        """Forget what nobody follows any more: what no registry knew, what is old, and what is too much (P2)."""
        followed = set(self._followed())
        left: list[CachedSnapshot] = []
        kept: dict[ServiceKey, CachedSnapshot] = {}
        for key, each in self._held.items():
            if key in followed:
                kept[key] = each
            elif not each.snapshot.unknown and now - each.followed_at < KEEP:
                left.append(each)
        # The longest unused go first.
        left.sort(key=lambda each: each.followed_at, reverse=True)
        room = KEEP_INSTANCES
        for each in left[:KEEP_SERVICES]:
            if len(each.snapshot.instances) > room:
                continue
            room -= len(each.snapshot.instances)
            kept[each.snapshot.service] = each
        self._held = kept
        self._from_file &= kept.keys()
        self._most = len(kept) + KEEP_SERVICES

    def mark_stale(self) -> None:
        """What is known came from the file: so old is it, until discovery says more."""
        if self.status.confirmed_at is None:
            self.status.confirmed_at = anyio.current_time() - self._age
            self.status.stale = True

    async def run(self) -> None:
        """Write what changed, until cancelled; then once more."""
        if self._passed_on:
            self.mark_stale()
        try:
            while True:
                with anyio.move_on_after(CONFIRM_INTERVAL):
                    await self._dirty.wait()
                    # The file is written whole: where that takes its time, it is done less often.
                    await anyio.sleep(max(DELAY, min(self._took * SPARE, CONFIRM_INTERVAL / 2)))
                self._dirty = anyio.Event()
                if self._changes != self._written:
                    await self._write()
                elif self.status.connected and not self.status.stale:
                    with suppress(BlockedError):
                        await self._files.run(self._touch)
        finally:
            if self._changes != self._written:
                with anyio.move_on_after(LAST_WRITE, shield=True):
                    await self._write(last=True)

    async def _write(self, *, last: bool = False) -> None:
        now = self._clock()
        for service in self._followed():
            held = self._held.get(service)
            if held is not None:
                self._held[service] = CachedSnapshot(held.snapshot, now)
        self._prune(now)
        cached = list(self._held.values())
        changes = self._changes
        began = anyio.current_time()
        try:
            if last:
                # It waits for one that was given up when this task was cancelled.
                await anyio.to_thread.run_sync(self._replace, cached, abandon_on_cancel=True)
            else:
                await self._files.run(self._replace, cached)
        except BlockedError as error:
            self._report(str(error))
        except OSError as error:
            self._report(error.strerror or str(error))
        else:
            self._written = changes
            self._report("")
        self._took = anyio.current_time() - began

    def _report(self, problem: str) -> None:
        # Said once, not once a try.
        if problem and problem != self._problem:
            _log.error("cache file cannot be written", path=str(self._path), problem=problem)
        self._problem = problem

    def _replace(self, cached: list[CachedSnapshot]) -> None:
        # A write that was abandoned, as the proxy ends, must not meet the last one.
        with self._writing:
            self._replace_alone(cached)

    def _replace_alone(self, cached: list[CachedSnapshot]) -> None:
        beside = self._path.with_name(self._path.name + ".tmp")
        try:
            with beside.open("wb") as file:
                file.write(encode_cache(cached))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _touch(self) -> None:
        with suppress(OSError):
            os.utime(self._path)
