"""How a process is told to stop and to read its config again (behaviour rules S1 and S2)."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

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


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


async def handle_signals(
    stop: Stop,
    reload: Callable[[], Awaitable[None]] | None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """SIGTERM and SIGINT stop, SIGHUP reloads, until cancelled. Started once signals are caught.

    A reload that takes its time holds up no stop. Those that are asked for meanwhile become one.

    Once a stop was asked for, nothing else is expected of the process but its end: from this function's end on, these
    signals are ignored. There is no moment in between at which Python would raise KeyboardInterrupt.
    """
    token = trio.lowlevel.current_trio_token()
    sender, received = trio.open_memory_channel[int](64)
    wanted = trio.Event()

    def on_signal(number: int, _: object) -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(pass_on, number)

    def pass_on(number: int) -> None:
        # So many that are not handled yet need not become more.
        with suppress(trio.WouldBlock, trio.BrokenResourceError):
            sender.send_nowait(number)

    async def reload_when_wanted() -> None:
        nonlocal wanted
        assert reload is not None
        while True:
            await wanted.wait()
            wanted = trio.Event()
            try:
                await reload()
            except Exception:  # noqa: BLE001 - signals go on to be caught: the next one would end the process
                _log.exception("config not applied, by a fault of this program")

    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        async with trio.open_nursery() as nursery:
            if reload is not None:
                nursery.start_soon(reload_when_wanted)
            task_status.started()
            with received:
                async for number in received:
                    if number != signal.SIGHUP:
                        name = signal.Signals(number).name
                        if stop.requested.is_set():
                            _log.info("stopping now", signal=name)
                        else:
                            _log.info("draining", signal=name)
                        stop.request()
                    elif reload is None:
                        _log.warning("SIGHUP ignored: nothing to read again")
                    else:
                        wanted.set()
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if stop.requested.is_set() else handler)


async def cancel_when_set(event: trio.Event, scope: trio.CancelScope) -> None:
    """Cancel the scope once the event is set."""
    await event.wait()
    scope.cancel()
