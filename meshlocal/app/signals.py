"""How a process is told to stop and to read its config again (behaviour rules S1 and S2)."""

from __future__ import annotations

import signal
from collections.abc import Callable

import trio

from meshlocal.net.log import get_log

_log = get_log(__name__)


class Stop:
    """The two stages of stopping.

    Attributes:
        requested: drain, and then end.
        now: end at once, whatever is still under way.
    """

    def __init__(self) -> None:
        self.requested = trio.Event()
        self.now = trio.Event()

    def request(self) -> None:
        """The first call asks for a drain, the second for the end."""
        if self.requested.is_set():
            self.now.set()
        self.requested.set()


async def handle_signals(
    stop: Stop,
    reload: Callable[[], None] | None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """SIGTERM and SIGINT stop, SIGHUP reloads, until cancelled. Started once signals are caught."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
        task_status.started()
        async for number in received:
            if number == signal.SIGHUP:
                if reload is None:
                    _log.warning("SIGHUP ignored: nothing to read again")
                else:
                    reload()
            else:
                _log.info("stopping now" if stop.requested.is_set() else "draining", signal=signal.Signals(number).name)
                stop.request()


async def cancel_when_set(event: trio.Event, scope: trio.CancelScope) -> None:
    """Cancel the scope once the event is set."""
    await event.wait()
    scope.cancel()
