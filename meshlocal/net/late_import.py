"""Imports of what most processes never need, once one does: an import reads files, and may hang (P1)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable

from meshlocal.net.blocking import Blocking

_files = Blocking()


async def import_late(names: Iterable[str]) -> None:
    """Import modules in a thread; those that are imported already cost nothing.

    Raises:
        BlockedError: the file system does not answer.
    """
    missing = [name for name in names if name not in sys.modules]
    if missing:
        await _files.run(_import, missing)


def _import(names: Iterable[str]) -> None:
    for name in names:
        importlib.import_module(name)
