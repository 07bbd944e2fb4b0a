"""Whether the process may be sent work, and the one line that it prints when it first may."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress

from meshlocal.net.log import get_log
from meshlocal.policy.exposure import Exposure

_log = get_log(__name__)


class Readiness:
    """Why the process is not ready; empty while it is. Starts as not ready."""

    def __init__(self, waiting_for: str) -> None:
        self.reason = waiting_for
        self.draining = False

    @property
    def ready(self) -> bool:
        """Whether the process may be sent work."""
        return not self.reason

    def set_ready(self) -> None:
        """Ready from now on, unless it drains already."""
        if not self.draining:
            self.reason = ""

    def wait_for(self, waiting_for: str) -> None:
        """Not ready for now, for this reason, unless it drains already."""
        if not self.draining:
            self.reason = waiting_for

    def fail(self, problem: str) -> None:
        """Never ready again: a part without which nobody is served is dead (P1)."""
        self.draining = True
        self.reason = f"dead: {problem}"

    def drain(self) -> None:
        """Never ready again (S1)."""
        self.draining = True
        self.reason = "draining"


def tell_exposures(exposures: Iterable[Exposure]) -> None:
    """Say at the start what is open beyond this machine."""
    for each in exposures:
        _log.warning("open beyond this machine", problem=str(each))


def announce(line: str) -> None:
    """Print the line, and flush it: who started the process may wait for it through a pipe. Nobody has to read it."""
    with suppress(OSError):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def notify_service_manager(environment: Mapping[str, str], state: str) -> None:
    """Tell systemd (sd_notify(3)) a state such as `READY=1`. Nothing happens where no service manager listens."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.sendto(state.encode(), address)
