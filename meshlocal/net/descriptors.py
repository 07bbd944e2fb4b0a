"""How many files this process may have open: each connection of a client takes two."""

from __future__ import annotations

import resource
import sys

from meshlocal.net.log import get_log

_log = get_log(__name__)

ENOUGH = 4096
"""Descriptors; with fewer than these the log says so."""

_RESERVED = 256
"""Descriptors that clients' connections leave for probes, discovery and connects under way; of few, a quarter."""


def raise_limit() -> int:
    """Allow this process as many descriptors as the system lets it have (RLIMIT_NOFILE); returns how many.

    Shells and service managers set a low limit, such as 1,024, for programs that use select(2), and a high one that
    others may take.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:  # a hard limit above what the kernel takes now (fs.nr_open)
            _log.warning("the limit of open files stays as it is", limit=soft, wanted=hard, problem=error)
            hard = soft
    if hard < ENOUGH and hard != resource.RLIM_INFINITY:
        _log.warning("few files may be open; each connection takes two", limit=hard, wanted=ENOUGH)
    else:
        _log.debug("limit of open files", limit=hard, before=soft)
    return hard


def connections_ceiling() -> int:
    """The descriptor from which on no connection of a client is taken: the kernel gives the lowest that is free."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return limit - min(_RESERVED, limit // 4)
