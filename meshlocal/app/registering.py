"""`meshlocal register`: a service on a machine without an orchestrator, in etcd for as long as it works (H3, S1).

Theory of operation. The command is started, and checked. Once it works its instance is written under a lease, which
this process keeps alive; while it does not work the instance is there and not ready. On SIGTERM it is marked as
terminating first, so that nobody new comes; then its clients have a while; then the command is stopped, and the lease
revoked. Whatever else happens to the command, its input and output are its own, signals are passed on, and its status
is this process's.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Mapping, Sequence
from random import Random
from typing import Literal, NamedTuple, cast

import trio

from meshlocal.client.place import LABEL_UNKNOWN
from meshlocal.discovery.etcd.client import Cluster
from meshlocal.discovery.etcd.registration import Registration
from meshlocal.net.log import configure_logging, get_log
from meshlocal.policy import source_forms
from meshlocal.policy.addresses import AddressError
from meshlocal.policy.backoff import UniformSource
from meshlocal.policy.config_build import ConfigError
from meshlocal.policy.config_health import HealthCheckConfig
from meshlocal.policy.etcd_options import EtcdOptions
from meshlocal.policy.model import NODE, REGISTRY, SERVICE, ModelError, ServiceKey, make_instance, parse_service_key
from meshlocal.policy.problems import Problem, quote
from meshlocal.policy.sources import SourceUrl
from meshlocal.proxy.checkers import Check, CheckFailed, make_check
from meshlocal.wire.etcd_keys import instance_key

_log = get_log(__name__)

PASSED_ON = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
STOPPING = (signal.SIGTERM, signal.SIGINT)

SAID_LIMIT = 2.0
"""Seconds that a stop waits for etcd to hear that the instance is terminating."""

_FIRST_CHECKS = 0.2
"""Seconds between two checks of what was not healthy yet."""


class RegisterError(Exception):
    """What was asked for cannot be registered. The text says why."""


class Registered(NamedTuple):
    """What is registered.

    Attributes:
        options: where.
        service: whose instance it is.
        name: the last part of its key.
        address: where it listens.
        port: likewise.
        labels: its own, `node` among them.
        health: how it is checked; None: it is not.
        command: is started; empty: it is there already.
        lease: seconds.
        drain: seconds between the word that it ends and its end.
        patience: seconds that the command may take to end, before it is killed.
    """

    options: EtcdOptions
    service: ServiceKey
    name: str
    address: str
    port: int
    labels: Mapping[str, str]
    health: HealthCheckConfig | None
    command: Sequence[str]
    lease: int
    drain: float
    patience: float

    def value(self, *, ready: bool, terminating: bool) -> bytes:
        """What its key holds."""
        said: dict[str, object] = {"address": self.address, "port": self.port, "labels": dict(self.labels)}
        if not ready:
            said["ready"] = False
        if terminating:
            said["terminating"] = True
        return json.dumps(said, sort_keys=True).encode()

    def check(self) -> None:
        """See that it can be registered.

        Raises:
            RegisterError: it cannot.
        """
        try:
            make_instance(self.address, self.port, labels=self.labels)
        except ModelError as error:
            raise RegisterError(f"{error.where}: {error.what}") from None
        if not self.name or "/" in self.name:
            raise RegisterError(f"--name: {self.name!r} cannot be part of a key")


def own_address(options: EtcdOptions) -> str:
    """The address that this machine has towards etcd. May block.

    Raises:
        RegisterError: there is none that others could use.
    """
    host, port = options.endpoints[0]
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            # Nothing is sent: the kernel only chooses a route.
            sock.connect(address)
            found: str = sock.getsockname()[0]
    except OSError as error:
        raise RegisterError(f"no way to {host} is known ({error}): give --address") from None
    if found.startswith("127.") or found == "::1":
        raise RegisterError("etcd is on this very machine: give the --address at which others reach the instance")
    return found


async def register(what: Registered, rng: UniformSource) -> int:
    """Register it until it ends, or this process is told to stop; returns the exit status.

    Raises:
        RegisterError: the command cannot be started.
    """
    registration = Registration(
        Cluster(what.options), instance_key(what.options.prefix, what.service, what.name), what.lease, rng
    )
    status = 0
    problem = ""
    async with trio.open_nursery() as outer:
        # Caught to the very end: a lease that is not revoked outlives this process.
        signals = await outer.start(_signals)
        process = None
        try:
            if what.command:
                process = await trio.lowlevel.open_process(list(what.command), stdin=None)
        except OSError as error:
            problem = f"{what.command[0]}: {error.strerror or error}"
        else:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(registration.run)
                    status = await _Run(what, registration, process, signals).until_end()
                    nursery.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    await registration.revoke()
        outer.cancel_scope.cancel()
    if problem:
        raise RegisterError(problem)
    return status


async def _signals(*, task_status: trio.TaskStatus[trio.MemoryReceiveChannel[int]]) -> None:
    sender, receiver = trio.open_memory_channel[int](64)
    with trio.open_signal_receiver(*STOPPING, *PASSED_ON) as received:
        task_status.started(receiver)
        async for number in received:
            try:
                sender.send_nowait(number)
            except trio.WouldBlock:
                continue


class _Run:
    def __init__(
        self,
        what: Registered,
        registration: Registration,
        process: trio.Process | None,
        signals: trio.MemoryReceiveChannel[int],
    ) -> None:
        self._what = what
        self._registration = registration
        self._process = process
        self._signals = signals
        self._stop = trio.Event()
        self._again = trio.Event()

    async def until_end(self) -> int:
        """Until the command has ended, or, without one, until told to stop; the exit status."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hear)
            nursery.start_soon(self._watch)
            try:
                if self._process is None:
                    await self._stop.wait()
                    await self._drain()
                    return 0
                nursery.start_soon(self._end_when_told, self._process)
                status = await self._process.wait()
            finally:
                if self._process is not None and self._process.returncode is None:
                    self._process.kill()
                nursery.cancel_scope.cancel()
        # As a shell has it: a program that a signal ended has 128 and the signal's number.
        return 128 - status if status < 0 else status

    async def _hear(self) -> None:
        async for number in self._signals:
            if number not in STOPPING:
                if self._process is not None:
                    self._process.send_signal(signal.Signals(number))
            elif self._stop.is_set():
                self._again.set()
            else:
                self._stop.set()

    async def _drain(self) -> None:
        """Say that it ends, and leave its clients a while; told again, there is none."""
        self._registration.say(self._what.value(ready=True, terminating=True))
        _log.info("draining", service=self._what.service, seconds=self._what.drain)
        with trio.move_on_after(self._what.drain):
            async with trio.open_nursery() as nursery:

                async def hurried() -> None:
                    await self._again.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(hurried)
                with trio.move_on_after(SAID_LIMIT):
                    await self._registration.said()
                await trio.sleep(self._what.drain)

    async def _end_when_told(self, process: trio.Process) -> None:
        await self._stop.wait()
        if self._registration.registered.is_set():
            await self._drain()
        process.terminate()
        with trio.move_on_after(self._what.patience):
            await trio.sleep_forever()
        _log.warning("the command did not end in time, and is killed", seconds=self._what.patience)
        process.kill()

    async def _watch(self) -> None:
        """Check it, and say what it is, until it ends."""
        what, health = self._what, self._what.health
        if health is None:
            self._registration.say(what.value(ready=True, terminating=False))
            return
        check = make_check(health)
        failures, ready = 0, False
        while not self._stop.is_set():
            problem = await self._check(check, health)
            failures = 0 if problem is None else failures + 1
            if problem is None and not ready:
                ready = True
                self._say(ready=True)
            elif problem is not None and ready and failures >= health.failures:
                ready = False
                _log.warning("the instance fails its health check", service=what.service, problem=problem)
                self._say(ready=False)
            with trio.move_on_after(health.interval if ready else min(_FIRST_CHECKS, health.interval)):
                await self._stop.wait()

    def _say(self, *, ready: bool) -> None:
        if not self._stop.is_set():
            self._registration.say(self._what.value(ready=ready, terminating=False))

    async def _check(self, check: Check, health: HealthCheckConfig) -> str | None:
        try:
            with trio.fail_after(health.timeout):
                await check(self._what.address, health.port or self._what.port)
        except CheckFailed as error:
            return str(error)
        except trio.TooSlowError:
            return "no answer in time"
        return None


def run_register(
    *,
    registry: str,
    service: str,
    port: int,
    address: str | None,
    labels: Mapping[str, str],
    node_name: str,
    name: str | None,
    health: str,
    health_path: str,
    health_interval: float,
    lease: int,
    drain: float,
    patience: float,
    log_level: str,
    log_format: str,
    command: Sequence[str],
) -> int:
    """`meshlocal register`: see its help. Returns the exit status.

    Raises:
        ConfigError: what was given makes no sense, each with its flag.
    """
    problems: list[Problem] = []
    options: EtcdOptions | None = None
    try:
        url = SourceUrl.parse(registry)
        if not isinstance(url.options, EtcdOptions):
            raise AddressError(f"expected {source_forms.ETCD}, got {quote(registry)}")
        options = url.options
    except AddressError as error:
        problems.append(Problem("--registry", str(error)))
    key = ServiceKey(service)
    try:
        key = parse_service_key(service)
    except ModelError as error:
        problems.append(Problem("--service", error.what))
    set_by = {NODE: "--node-name", SERVICE: "--service", REGISTRY: "--registry"}
    problems += [Problem("--label", f"{label} is set by {flag}") for label, flag in set_by.items() if label in labels]
    checked = None
    if health != "none":
        interval, timeout = health_interval, min(1.0, health_interval)
        kind = cast("Literal['tcp', 'http', 'grpc']", health)
        checked = HealthCheckConfig(kind=kind, interval=interval, timeout=timeout, path=health_path)
    if not health_path.startswith("/"):
        problems.append(Problem("--health-path", f"expected a path such as /healthz, got {quote(health_path)}"))
    if problems or options is None:
        raise ConfigError(problems)
    shape = cast("Literal['auto', 'text', 'json']", log_format)
    configure_logging(cast("Literal['debug', 'info', 'warning', 'error']", log_level), shape)
    all_labels = {**labels, **({NODE: node_name} if node_name else {})}
    if not node_name:
        _log.warning(LABEL_UNKNOWN, problem="neither --node-name nor NODE_NAME: no proxy can tell that it is local")
    try:
        where = address or own_address(options)
        called = name or f"{socket.gethostname()}-{port}"
        what = Registered(options, key, called, where, port, all_labels, checked, command, lease, drain, patience)
        what.check()
        return trio.run(register, what, Random())
    except RegisterError as error:
        raise ConfigError([Problem("register", str(error))]) from None
