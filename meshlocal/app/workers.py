"""A proxy of several processes: workers that share its listeners, and the one above that keeps them running.

    supervisor            signals · admin server · one task per worker, which starts it again when it ends
      N workers             a whole proxy each (`meshlocal.app.proxy`), on sockets of its own on the same addresses

The kernel spreads new connections over the workers (SO_REUSEPORT). The supervisor moves no bytes. It keeps the
addresses bound, so that nobody else gets them while a worker is away, and a port that the system chose stays the same.
It alone reads the configuration and hears signals, and passes both on: either all workers apply a configuration or none
(S2). A worker that ends on its own takes its connections with it, and no others; another takes its place, with
exponential backoff. When the supervisor is gone, its workers drain and end.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from random import Random
from typing import TypeAlias

import msgspec
import trio

from meshlocal.admin.access import AdminAccess
from meshlocal.admin.server import AdminServer, AsyncRoute, Route
from meshlocal.app.certificates import expiring_now
from meshlocal.app.config_loader import LoadConfig
from meshlocal.app.followed_pages import streams
from meshlocal.app.log_page import LOG
from meshlocal.app.operator import Operator
from meshlocal.app.proxy import CONFIG_LIMIT, read_again
from meshlocal.app.readiness import Readiness, tell_exposures
from meshlocal.app.signals import Stop, handle_signals
from meshlocal.app.worker_channel import Answer, Beat, Call, Channel, Configure, Measure, Ready, Show, Start, StopOrder
from meshlocal.net.blocking import Blocking
from meshlocal.net.descriptors import raise_limit
from meshlocal.net.following import FileProblemError, Following
from meshlocal.net.listen import ListenError, open_tcp_listeners, wanted_by
from meshlocal.net.log import configure_logging, get_log
from meshlocal.net.sockets import close, format_address
from meshlocal.net.supervision import Supervision
from meshlocal.policy.backoff import Backoff
from meshlocal.policy.config import Config, ProxyConfig
from meshlocal.policy.config_build import ConfigError
from meshlocal.policy.exposure import of_proxy
from meshlocal.policy.problems import Problem
from meshlocal.proxy.bound import BoundAddress, keep, service_key

_log = get_log(__name__)

BACKOFF_INITIAL = 0.1
BACKOFF_MAX = 15.0
"""Seconds before a worker is started again, before jitter."""

STEADY = 30.0
"""Seconds that a worker must live for the next backoff to begin anew."""

ANSWER_LIMIT = 10.0
"""Seconds that a worker may take to answer."""

BEAT_INTERVAL = 2.0
"""Seconds between two questions to a worker whether its event loop runs."""

BEAT_LIMIT = 10.0
"""Seconds that the answer may take. Then the worker hangs: it is killed, and another takes its place."""

STOP_GRACE = 10.0
"""Seconds that workers may take to end, beyond what the drain allows them."""


_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)
"""What a channel raises whose other end has gone, or whose own was closed as its worker ended."""


class WorkerGoneError(Exception):
    """A worker ended, or did not answer in time."""


class Worker:
    """One worker process that lives.

    Attributes:
        number: 1 or more.
        announced: what it said when it was ready; None before that.
    """

    def __init__(self, number: int, process: trio.Process, channel: Channel) -> None:
        self.number = number
        self.process = process
        self.announced: Ready | None = None
        self._channel = channel
        self._calls = 0
        self._stops = 0
        self._waiting: dict[int, tuple[trio.Event, list[object]]] = {}

    async def start(self, message: Start) -> None:
        """Tell it what it is; one that has gone need not hear it."""
        with suppress(*_GONE):
            await self._channel.send(message)

    async def order(self, stop: Stop) -> None:
        """Tell it to stop as far as was asked for, if it was not told already."""
        with suppress(*_GONE):
            while self._stops < stop.requested.is_set() + stop.now.is_set():
                self._stops += 1
                await self._channel.send(StopOrder())

    async def ask(self, message: Configure | Show | Measure | Beat, limit: float = ANSWER_LIMIT) -> object:
        """Send a message that is answered, and wait for the answer, for `limit` seconds at most.

        Raises:
            WorkerGoneError: there is none, or not in time.
        """
        self._calls += 1
        call = Call(self._calls, message)
        answered, values = self._waiting[call.number] = trio.Event(), []
        try:
            with trio.move_on_after(limit):
                await self._channel.send(call)
                await answered.wait()
        except _GONE:
            raise WorkerGoneError(f"worker {self.number} has ended") from None
        finally:
            del self._waiting[call.number]
        if not values or values[0] is None:
            raise WorkerGoneError(f"worker {self.number} does not answer")
        return values[0]

    async def hear(self, on_ready: Callable[[], None]) -> None:
        """Pass on what it says, until it has gone."""
        while (message := await self._channel.receive()) is not None:
            if isinstance(message, Ready):
                self.announced = message
                on_ready()
            elif isinstance(message, Answer) and (waiting := self._waiting.get(message.number)) is not None:
                waiting[1].append(message.value)
                waiting[0].set()
        self.end()

    def end(self) -> None:
        """Note that the worker has gone: nobody need wait for its answers."""
        for answered, _ in self._waiting.values():
            answered.set()


MakeRoutes: TypeAlias = "Callable[[Supervisor], Mapping[str, Route | AsyncRoute]]"


class Supervisor:
    """What runs instead of a `ProxyProcess` where there are several workers.

    Args:
        load: reads the configuration again, on SIGHUP.
        config: what it gave first.
        rng: for backoff.
        operator: who started this.
        routes: makes the pages of the admin address.

    Attributes:
        count: how many workers there are to be.
        restarts: how often one ended, and another took its place.
        workers: the workers that live, by number.
        on_end: called with the number of each that ends.
    """

    def __init__(self, load: LoadConfig, config: Config, rng: Random, operator: Operator, routes: MakeRoutes) -> None:
        self._load = load
        self._routes = routes
        self._files = Blocking(limit=CONFIG_LIMIT)
        self.supervision = Supervision(rng)
        self._rng = rng
        self._operator = operator
        self.config = config
        try:
            self._access = AdminAccess(config.proxy.admin_access, "proxy")
        except FileProblemError as error:
            raise ConfigError([Problem("proxy.admin_access", str(error), "")]) from None
        self.count = config.proxy.workers
        self.readiness = Readiness(f"waiting for {self.count} workers")
        self.stop = Stop()
        self.restarts = 0
        self.workers: dict[int, Worker] = {}
        self.on_end: Callable[[int], None] = lambda _: None
        self._addresses: list[BoundAddress] = []
        self._admin: list[str] = []
        self._changing = trio.Lock()
        """Held while a configuration is applied, and while a worker is given its first."""
        self._was_ready = False
        self._status = 0

    async def run(self) -> int:
        """Serve until told to stop; returns the exit status, 0 if no connection was cut.

        Raises:
            ListenError: an address cannot be listened on.
        """
        configure_logging(self.config.log.level, self.config.log.format, levels=self.config.log.levels)
        raise_limit()
        with ExitStack() as opened:
            where = self.config.proxy.admin
            with wanted_by("proxy.admin"):
                admin_sockets = [] if where is None else open_tcp_listeners(where.host, where.port)
            for sock in admin_sockets:
                opened.callback(close, sock)
            self._admin = [format_address(sock.getsockname()) for sock in admin_sockets]
            opened.callback(lambda: _release(self._addresses))
            self._addresses = self._reserve(self.config.proxy)
            async with trio.open_nursery() as lifetime:
                keep = self.supervision.keep
                await lifetime.start(self._take_orders)
                if admin_sockets:
                    routes = self._routes(self)
                    admin = AdminServer(routes, self._access, streams=streams(routes), changing=[LOG])
                    serve = partial(admin.serve, admin_sockets)
                    tell_exposures(of_proxy(self.config.proxy))
                    followed = self._access.followed
                    following = Following(followed, partial(expiring_now, followed))
                    if any(True for _ in followed()):
                        lifetime.start_soon(keep, "files", following.run)
                    lifetime.start_soon(keep, "admin server", serve)
                async with trio.open_nursery() as workers:
                    for number in range(1, self.count + 1):
                        run = partial(keep, f"worker {number}", self._keep_running, number, may_end=True)
                        workers.start_soon(run)
                    await self.stop.requested.wait()
                    self.readiness.drain()
                    self._operator.draining()
                    drain = self.config.proxy.drain
                    workers.cancel_scope.deadline = trio.current_time() + drain.delay + drain.timeout + STOP_GRACE
                    lifetime.start_soon(self._order_stop)
                if workers.cancel_scope.cancelled_caught:
                    _log.error("workers did not end in time, and were killed")
                    self._status = 1
                lifetime.cancel_scope.cancel()
        return self._status

    async def _take_orders(self, *, task_status: trio.TaskStatus[None]) -> None:
        await self.supervision.start("orders", handle_signals, self.stop, self.reload, task_status=task_status)

    # Addresses

    def _reserve(self, config: ProxyConfig) -> list[BoundAddress]:
        """Bind what is not bound yet, without listening."""
        found: list[BoundAddress] = []
        kept = keep(self._addresses, config)
        try:
            for position, (configured, there) in enumerate(zip(config.listen, kept, strict=True)):
                if there is None:
                    with wanted_by(f"proxy.listen[{position}]"):
                        sockets = open_tcp_listeners(configured.host, configured.port, None)
                    there = BoundAddress(configured, service_key(config, configured), sockets)
                found.append(there)
        except BaseException:
            _release(address for address in found if address not in self._addresses)
            raise
        return found

    def _of_worker(self, config: Config, addresses: list[BoundAddress], number: int) -> Config:
        """A worker's configuration: with the ports that were chosen, and nothing that can be only once."""
        proxy = config.proxy
        listen = tuple(
            msgspec.structs.replace(configured, port=address.sockets[0].getsockname()[1])
            for configured, address in zip(proxy.listen, addresses, strict=True)
        )
        discovery = proxy.discovery
        if discovery.cache_file is not None and number > 1:
            discovery = msgspec.structs.replace(discovery, cache_file=f"{discovery.cache_file}.{number}")
        proxy = msgspec.structs.replace(proxy, listen=listen, admin=None, discovery=discovery)
        return msgspec.structs.replace(config, proxy=proxy)

    # Workers

    async def _keep_running(self, number: int) -> None:
        backoff = Backoff(BACKOFF_INITIAL, BACKOFF_MAX, self._rng)
        while not self.stop.requested.is_set():
            began = trio.current_time()
            try:
                status: object = await self._run_worker(number)
            except OSError as error:  # no process could be started: memory or descriptors ran out
                status = error
            if self.stop.requested.is_set():
                return
            if not self._was_ready:
                # What does not start the first time is for whoever started it to see.
                _log.error("worker ended before the proxy was ready: stopping", worker=number, status=status)
                self._status = 1
                self.stop.request()
                return
            if trio.current_time() - began >= STEADY:
                backoff.reset()
            delay = backoff.next()
            _log.error("worker ended: starting another", worker=number, status=status, seconds=round(delay, 3))
            self.restarts += 1
            with trio.move_on_after(delay):
                await self.stop.requested.wait()

    async def _run_worker(self, number: int) -> int:
        """Run one worker to its end; returns its status."""
        ours, theirs = socket.socketpair()
        with theirs:
            channel = Channel(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
            try:
                process = await _start(theirs)
            except BaseException:
                ours.close()
                raise
        worker = Worker(number, process, channel)
        try:
            async with trio.open_nursery() as nursery:
                async with self._changing:
                    self.workers[number] = worker
                    config = self._of_worker(self.config, self._addresses, number)
                    await worker.start(Start(number, self.count, config))
                await worker.order(self.stop)
                nursery.start_soon(worker.hear, self._see_whether_ready)
                nursery.start_soon(self._kill_when_hung, worker)
                await process.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.workers.pop(number, None)
            worker.end()
            self.on_end(number)
            self._see_whether_ready()
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                status = await process.wait()
                await channel.aclose()
        # A signal to all processes of the proxy may meet one that does not pass it over yet, and has nothing to lose.
        early = worker.announced is None and -status in _STOPPING
        if status and self.stop.requested.is_set() and not early:
            self._status = 1
        return status

    async def _kill_when_hung(self, worker: Worker) -> None:
        """End a worker whose event loop stands still: it would go on to be given connections, and serve none."""
        while True:
            await trio.sleep(BEAT_INTERVAL)
            if worker.announced is None:
                continue
            try:
                await worker.ask(Beat(), BEAT_LIMIT)
            except WorkerGoneError:
                if worker.process.returncode is None:
                    _log.error("worker hangs, and is killed", worker=worker.number, seconds=BEAT_LIMIT)
                    worker.process.kill()
                return

    async def _order_stop(self) -> None:
        for event in (self.stop.requested, self.stop.now):
            await event.wait()
            async with trio.open_nursery() as nursery:
                for worker in self.workers.values():
                    nursery.start_soon(worker.order, self.stop)

    def _see_whether_ready(self) -> None:
        missing = [number for number in range(1, self.count + 1) if not self._is_ready(number)]
        if missing:
            self.readiness.wait_for(f"waiting for worker {', '.join(map(str, missing))} of {self.count}")
            return
        self.readiness.set_ready()
        if not self._was_ready:
            self._was_ready = True
            announced = [said for number in sorted(self.workers) if (said := self.workers[number].announced)]
            facts = [
                *announced[0].facts,
                f"workers={self.count}",
                *(f"admin={self._access.scheme}://{bound}" for bound in self._admin),
            ]
            # What one of them has not heard yet is worth a note.
            notes = dict.fromkeys(note for said in announced for note in said.notes)
            self._operator.say_ready([*facts, *notes])

    def _is_ready(self, number: int) -> bool:
        worker = self.workers.get(number)
        return worker is not None and worker.announced is not None

    # Configuration

    async def reload(self) -> None:
        """Read the configuration again and apply it in all workers, whole or not at all (S2)."""
        async with self._changing:
            config, problems = await read_again(self._files, self._load, self.config, self.stop)
            if config is not None:
                problems = await self._apply(config)
            for problem in problems:
                _log.error("config not applied", problem=problem)
            if not problems:
                _log.info("config applied to all workers", workers=self.count)

    async def _apply(self, config: Config) -> list[str]:
        try:
            addresses = self._reserve(config.proxy)
        except ListenError as error:
            return [f"proxy.listen: {error}"]
        told: list[Worker] = []
        for worker in list(self.workers.values()):
            told.append(worker)
            problems = await self._configure(worker, config, addresses)
            if problems:
                for each in told:
                    await self._configure(each, self.config, self._addresses)
                _release(address for address in addresses if address not in self._addresses)
                return [f"worker {worker.number}: {problem}" for problem in problems]
        _release(address for address in self._addresses if address not in addresses)
        for configured, address in zip(config.proxy.listen, addresses, strict=True):
            address.reconfigure(config.proxy, configured)
        self.config, self._addresses = config, addresses
        configure_logging(config.log.level, config.log.format, levels=config.log.levels)
        return []

    async def _configure(self, worker: Worker, config: Config, addresses: list[BoundAddress]) -> list[str]:
        try:
            problems = await worker.ask(Configure(self._of_worker(config, addresses, worker.number)))
        except WorkerGoneError as error:
            # The one in its place is started with what holds then.
            return [str(error)] if self.workers.get(worker.number) is worker else []
        assert isinstance(problems, list)
        return problems


_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def _start(channel: socket.socket) -> trio.Process:
    """Start a worker that has this end of a channel."""
    # What this process can import, a worker must, and nothing else: -P keeps the working directory out.
    flags = ["-P"] if os.getcwd() not in sys.path else []
    fd = channel.fileno()
    return await trio.lowlevel.open_process(
        [sys.executable, *flags, "-m", "meshlocal.app.worker", str(fd)],
        stdin=subprocess.DEVNULL,
        pass_fds=[fd],
        # Away from the terminal, whose interrupt is for the supervisor.
        start_new_session=True,
    )


def _release(addresses: Iterable[BoundAddress]) -> None:
    for address in addresses:
        address.close()
