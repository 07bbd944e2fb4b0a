"""`bypass`: what is pinned of it, without a proxy."""

from __future__ import annotations

from meshlocal.app.query import QueryError
from meshlocal.cli.tables import table
from meshlocal.policy.addresses import format_host_port
from meshlocal.proxy.bypass.kernel import detach_pinned, read_pinned


def status(pin: str) -> str:
    """The lists that are pinned in a folder, as a table.

    Raises:
        QueryError: nothing is, or it may not be read.
    """
    try:
        found = read_pinned(pin)
    except OSError as error:
        raise QueryError(f"no bypass is pinned to {pin}: {error.strerror or error}") from None
    rows = [
        (format_host_port(*each.listener), format_host_port(*place), connects, each.counts.missed, each.here)
        for each in sorted(found)
        for place, connects in each.counts.connects.items()
    ]
    if not rows:
        return f"a bypass is pinned to {pin}, and has no lists: all connects reach a proxy"
    return table(("LISTENER", "INSTANCE", "CONNECTS", "FOUND NONE", "THIS NAMESPACE"), rows)


def detach(pin: str) -> str:
    """Take away what is pinned in a folder.

    Raises:
        QueryError: nothing is, or it may not be taken away.
    """
    try:
        detach_pinned(pin)
    except OSError as error:
        raise QueryError(f"no bypass is detached from {pin}: {error.strerror or error}") from None
    return f"detached: connects reach the proxy again; {pin} is gone"
