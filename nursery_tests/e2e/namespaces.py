"""Sockets in other network namespaces than this process's own."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_CLONE_NEWNET = 0x40000000

_OWN_NETWORK = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def inside_namespace(namespace: int) -> Iterator[None]:
    """For synchronous code only: sockets made here belong to the namespace, of which this is a descriptor."""
    _enter(namespace)
    try:
        yield
    finally:
        _enter(_OWN_NETWORK)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET):  # os.setns is there from Python 3.12 on
        raise OSError(ctypes.get_errno(), "setns")
