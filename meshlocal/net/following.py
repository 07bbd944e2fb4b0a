"""What is made of files, and made anew when they change: certificates, authorities, tokens (rule T3).

To make something and to look at its files may block, so that neither may happen in the event loop (P1): `Following`
does it in a thread, and whoever makes a `Followed` calls that in one, or before the loop runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

import anyio

from meshlocal.net.blocking import BlockedError, Blocking
from meshlocal.net.log import get_log

_log = get_log(__name__)

INTERVAL = 5.0
"""Seconds between two looks at files."""

T = TypeVar("T")


class FileProblemError(Exception):
    """A file cannot be used.

    Attributes:
        file: its path.
        cause: why.
    """

    def __init__(self, file: str, cause: OSError | ValueError) -> None:
        super().__init__(f"{file}: {why(cause)}")
        self.file = file
        self.cause = cause


def why(error: Exception) -> str:
    """What is wrong with a file, in the system's words where it has some."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


class Followed(Generic[T]):
    """Something made of files.

    Args:
        files: that `make` reads, and what else it goes by.
        make: gives it.

    Raises:
        FileProblemError: a file cannot be used.

    Attributes:
        current: what was made of the files as they were when they could last be used, and how often it was made anew.
    """

    def __init__(self, files: Iterable[str | Versioned | None], make: Callable[[], T]) -> None:
        self._files = tuple(file for file in files if file is not None)
        self._make = make
        self._made_of = _stamps(self._files)
        self.current: tuple[T, int] = make(), 0

    def read(self) -> tuple[T, tuple[object, ...]] | None:
        """What the files make now, for `adopt`; None: they are as they were.

        Raises:
            FileProblemError: one cannot be used.
        """
        made_of = _stamps(self._files)
        return (self._make(), made_of) if made_of != self._made_of else None

    def adopt(self, found: tuple[T, tuple[object, ...]]) -> None:
        """Have what `read` gave from now on."""
        # Both at once: who looks at the files is another thread.
        self.current = found[0], self.current[1] + 1
        self._made_of = found[1]

    def look(self) -> bool:
        """Look at the files; whether something else is made of them now.

        Raises:
            FileProblemError: one cannot be used; nothing changes.
        """
        found = self.read()
        if found is None:
            return False
        self.adopt(found)
        return True


class Versioned(Protocol):
    """Something beside files that may change."""

    version: int


def _stamps(files: Iterable[str | Versioned]) -> tuple[object, ...]:
    """What changes when files do: also where a link leads, as volumes of Kubernetes swap one."""
    stamps: list[object] = []
    for file in files:
        if not isinstance(file, str):
            stamps.append(file.version)
            continue
        try:
            found = os.stat(file)
        except OSError as error:
            raise FileProblemError(file, error) from None
        stamps.append((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
    return tuple(stamps)


class Looks:
    """Looks at the files of several, time and again.

    Args:
        followed: gives them, each time.
    """

    def __init__(self, followed: Callable[[], Iterable[Followed[Any]]]) -> None:
        self._followed = followed
        self._problems: dict[str, None] = {}

    def look(self) -> tuple[int, list[str]]:
        """How many are made anew, and what is wrong that was not the time before."""
        made = 0
        problems: dict[str, None] = {}
        for followed in self._followed():
            try:
                made += followed.look()
            except FileProblemError as error:
                problems[str(error)] = None
        fresh = [problem for problem in problems if problem not in self._problems]
        self._problems = problems
        return made, fresh


class Following:
    """Has what is made of files follow them. What cannot be used is said in the log, once.

    Args:
        followed: gives what is to be looked at, each time.
        warnings: what is to be said of it then; also once, as long as it stays the same.
    """

    def __init__(
        self, followed: Callable[[], Iterable[Followed[Any]]], warnings: Callable[[], Iterable[str]] = tuple
    ) -> None:
        self._looks = Looks(followed)
        self._warnings = warnings
        self._files = Blocking()
        self._blocked = False
        self._warned: set[str] = set()

    async def run(self) -> None:
        """Look every few seconds, until cancelled."""
        while True:
            await anyio.sleep(INTERVAL)
            await self.look()

    async def look(self) -> None:
        """Look now."""
        try:
            made, problems = await self._files.run(self._looks.look)
            self._blocked = False
        except BlockedError as error:
            # Said once, however long it hangs.
            made, problems = 0, [] if self._blocked else [str(error)]
            self._blocked = True
        for problem in problems:
            _log.error("file not read again", problem=problem)
        if made:
            _log.info("files read again")
        told = set(self._warnings())
        for warning in sorted(told - self._warned):
            _log.warning("certificate ends soon", problem=warning)
        self._warned = told
