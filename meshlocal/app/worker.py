"""One of several processes that serve a proxy's listeners: what `meshlocal.app.workers` starts.

It is a whole proxy but for three things: its orders come through a channel instead of as signals, it says through the
same that it is ready, and its admin pages are served by the process above it. When that is gone, it drains and ends.
"""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from random import Random

import trio

from meshlocal.admin.messages import Response
from meshlocal.admin.metrics_page import import_metrics, measure
from meshlocal.admin.server import AsyncRoute, Route, answer
from meshlocal.app.proxy import ProxyProcess, freeze_garbage_collector
from meshlocal.app.proxy_pages import METRICS_MODULES, proxy_routes
from meshlocal.app.worker_channel import Answer, Beat, Call, Channel, Configure, Measure, Metrics, Ready, Show, Start
from meshlocal.net.log import get_log, label_process
from meshlocal.net.slices import in_slices

_log = get_log(__name__)


class Supervised:
    """The process above, as the proxy in a worker knows it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._answering = trio.Lock()

    def routes(self, process: ProxyProcess) -> Mapping[str, Route | AsyncRoute]:
        """None: the process above serves them."""
        return {}

    async def command(self, process: ProxyProcess, *, task_status: trio.TaskStatus[None]) -> None:
        """Follow orders as they come. Those that take their time hold up no other, a beat or a stop least of all."""
        routes = proxy_routes(process)
        task_status.started()
        async with trio.open_nursery() as nursery:
            while (message := await self._channel.receive()) is not None:
                if isinstance(message, Call):
                    nursery.start_soon(self._answer, process, message, routes)
                else:
                    process.stop.request()
            nursery.cancel_scope.cancel()
        if not process.stop.requested.is_set():
            _log.error("the process above is gone: draining")
            process.stop.request()

    async def _answer(self, process: ProxyProcess, call: Call, routes: Mapping[str, Route | AsyncRoute]) -> None:
        if isinstance(call.message, Beat):
            await self._send(Answer(call.number, True))
            return
        # One after the other: a page is to show what an order before it did.
        async with self._answering:
            try:
                value = await _answer(process, call.message, routes)
            except Exception:  # noqa: BLE001 - a page's fault must not end the connections that the worker serves
                _log.exception("worker cannot answer", asked=type(call.message).__name__)
                value = None
            await self._send(Answer(call.number, value))

    async def _send(self, message: Answer) -> None:
        with suppress(trio.BrokenResourceError):
            await self._channel.send(message)

    async def ready(self, process: ProxyProcess, admin: Sequence[str]) -> None:
        """Tell the supervisor that the proxy may be sent work."""
        with suppress(trio.BrokenResourceError):  # `command` finds out
            await self._channel.send(Ready(*process.standing()))

    def draining(self) -> None:
        """Nothing to say: it was the supervisor that ordered the drain."""


async def _answer(
    process: ProxyProcess, message: Configure | Show | Measure, routes: Mapping[str, Route | AsyncRoute]
) -> list[str] | Response | Metrics:
    match message:
        case Configure(config):
            return await process.import_and_apply(config)
        case Show(request):
            return await answer(routes[request.path], request)
        case Measure():
            await import_metrics(METRICS_MODULES)
            return await in_slices(measure(process.collectors()))


async def serve(sock: socket.socket) -> int:
    """Serve as the first message on the channel says; returns the exit status."""
    channel = Channel(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
    start = await channel.receive()
    if not isinstance(start, Start):
        return 1
    label_process(worker=start.number)
    process = ProxyProcess(lambda: start.config, Random(), Supervised(channel), worker=f"{start.number} of {start.of}")
    freeze_garbage_collector()
    return await process.run()


def main() -> None:
    """Run with the number of the channel's descriptor as the only argument."""
    # These are for the process above: it gives one order, however many processes a terminal or service manager signals.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    sys.exit(trio.run(serve, sock))


if __name__ == "__main__":
    main()
