"""Keeps the kernel's lists as the pickers have them, whatever changes: within one turn of the loop (B1, B2)."""

from __future__ import annotations

import ipaddress
import math
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from typing import NamedTuple, Protocol

import trio

from meshlocal.client.services import ServiceState, ServiceTable
from meshlocal.net.blocking import BlockedError, Blocking
from meshlocal.net.log import get_log
from meshlocal.net.routes import Routes
from meshlocal.net.sock_diag import SocketDiagnosis
from meshlocal.policy.addresses import format_host_port
from meshlocal.policy.bypass import LATER, WHY_NOT, Decision, NoBypass, decide, is_crowded
from meshlocal.policy.config_health import LimitsConfig
from meshlocal.policy.model import HostPort, ServiceKey
from meshlocal.proxy.bypass.kernel import SLOTS, Counts, Kernel
from meshlocal.proxy.listeners import Listener

_log = get_log(__name__)

QUEUES_BUSY, QUEUES_AT_REST = 0.1, 1.0
"""Seconds between two looks at the instances' accept queues: while there are connects, and while there are none."""

CGROUP_LOOK = 10.0
"""Seconds between two looks at whether the cgroup is there, and the same one."""

KERNEL_LIMIT = 30.0
"""Seconds that it may take to load the program."""


class Lists(Protocol):
    """What the bypass needs of `Kernel`."""

    def set(self, listener: HostPort, instances: tuple[HostPort, ...]) -> None:
        """See `Kernel.set`."""
        ...

    def remove(self, listener: HostPort) -> None:
        """See `Kernel.remove`."""
        ...

    def forget(self, listener: HostPort) -> None:
        """See `Kernel.forget`."""
        ...

    def counts(self, listener: HostPort) -> Counts:
        """See `Kernel.counts`."""
        ...

    @property
    def cgroup(self) -> int:
        """See `Kernel.cgroup`."""
        ...

    def adopted(self) -> dict[HostPort, tuple[HostPort, ...]]:
        """See `Kernel.adopted`."""
        ...

    def close(self) -> None:
        """See `Kernel.close`."""
        ...


class Bypassed(NamedTuple):
    """One address of a listener, as the bypass has it.

    Attributes:
        listener: its address and port.
        service: that it is for.
        instances: where connects go in turn; none: to the proxy.
        why_not: why they do.
    """

    listener: HostPort
    service: ServiceKey
    instances: tuple[HostPort, ...]
    why_not: NoBypass | None


class Bypass:
    """The bypass of one proxy.

    Args:
        cgroup: the folder of the cgroup whose processes' connects are looked at.
        services: what their pickers say is what counts.
        listeners: the current ones.
        pin: where it stays when the proxy ends, and goes on from; None: it ends with it.
        load: makes the kernel's part.

    Attributes:
        problem: why there is none; None: there is, or it was not tried yet.
    """

    def __init__(
        self,
        cgroup: str,
        services: ServiceTable,
        listeners: Callable[[], Iterable[Listener]],
        pin: str | None = None,
        load: Callable[[str, str | None], Lists] = Kernel,
    ) -> None:
        self._cgroup = cgroup
        self._pin = pin
        self._services = services
        self._listeners = listeners
        self._load = load
        self._kernel: Lists | None = None
        self._files = Blocking(limit=KERNEL_LIMIT)
        self._wake = trio.Event()
        self._now: dict[HostPort, Bypassed] = {}
        self._said: dict[HostPort, object] = {}
        self._diagnosis: SocketDiagnosis | None = None
        self._routes: Routes | None = None
        self._own: dict[str, bool] = {}
        self._draining = False
        self._crowded: set[HostPort] = set()
        self._connects = 0
        self.problem: str | None = None
        services.on_refit = self.wake

    def wake(self) -> None:
        """Look again, in the next turn of the loop."""
        self._wake.set()

    async def run(self) -> None:
        """Keep the lists until cancelled; then connects are the proxy's alone.

        Without the kernel's consent, say so, and try again from time to time: a cgroup may come later, or be another.
        """
        while True:
            try:
                kernel = await self._attach()
            except (OSError, BlockedError) as error:
                if self.problem != (problem := str(error)):
                    self.problem = problem
                    _log.warning("no bypass; the proxy serves without", cgroup=self._cgroup, problem=problem)
                await trio.sleep(CGROUP_LOOK)
                continue
            self.problem = None
            try:
                with closing(SocketDiagnosis()) as self._diagnosis, closing(Routes()) as self._routes:
                    await self._keep(kernel)
            finally:
                self._kernel = None
                self._now.clear()
                self._said.clear()
                kernel.close()

    async def _attach(self) -> Lists:
        """Load the program, in a thread. One that comes when nobody waits for it any more is let go at once.

        Raises:
            OSError, BlockedError: it cannot be loaded.
        """
        lock = threading.Lock()
        loaded: list[Lists] = []
        given_up = False

        def load() -> Lists:
            kernel = self._load(self._cgroup, self._pin)
            with lock:
                if not given_up:
                    loaded.append(kernel)
                    return kernel
            kernel.close()
            return kernel

        try:
            return await self._files.run(load)
        except BaseException:
            # It may be loaded already, and only its way here was cut off.
            with lock:
                given_up = True
            for kernel in loaded:
                kernel.close()
            raise

    async def _keep(self, kernel: Lists) -> None:
        """Keep the lists, until the cgroup is another one."""
        self._kernel = kernel
        # Of the proxy before this one, if it is pinned: whose they are is not known yet.
        self._now = {
            place: Bypassed(place, ServiceKey(""), instances, None) for place, instances in kernel.adopted().items()
        }
        _log.info("bypass is attached", cgroup=self._cgroup)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_cgroup, nursery.cancel_scope, kernel.cgroup)
            while True:
                self._wake = trio.Event()
                again = min(self.look(trio.current_time()), self._look_at_queues())
                with trio.move_on_after(again):
                    await self._wake.wait()

    async def _watch_cgroup(self, keeping: trio.CancelScope, attached: int) -> None:
        """Notice that the folder is another cgroup, or none: service managers remove those that are empty.

        Args:
            keeping: ended then.
            attached: the number of the cgroup that the program is at.
        """
        while True:
            await trio.sleep(CGROUP_LOOK)
            try:
                now = await self._files.run(_number, self._cgroup)
            except BlockedError:
                continue
            if now != attached:
                _log.warning("no bypass; the proxy serves without", cgroup=self._cgroup, problem="it is another cgroup")
                keeping.cancel()

    def drain(self) -> None:
        """The proxy takes no more connections, and neither do its instances for it (S1); what is pinned stays."""
        self._draining = True
        self.wake()

    def _look_at_queues(self) -> float:
        """See which instances' accept queues are full; returns the seconds until the next look.

        A connect to one would be tried again by the kernel after seconds, where the proxy goes on after a quarter of
        one.
        """
        assert self._diagnosis is not None
        places = {place for each in self._now.values() for place in each.instances} | self._crowded
        if not places:
            return math.inf
        crowded = set()
        for place in places:
            queue = self._diagnosis.accept_queue(*place)
            if queue is not None and is_crowded(*queue, place in self._crowded):
                crowded.add(place)
        if crowded != self._crowded:
            self._crowded = crowded
            self.look(trio.current_time())
        connects = sum(sum(counts.connects.values()) + counts.missed for _, counts in self.counts())
        busy, self._connects = bool(crowded) or connects != self._connects, connects
        return QUEUES_BUSY if busy else QUEUES_AT_REST

    def look(self, now: float) -> float:
        """Bring the lists up to date; returns the seconds until time alone may change one."""
        kernel = self._kernel
        assert kernel is not None
        if self._draining:
            if self._pin is None:
                for place, was in self._now.items():
                    if was.instances:
                        kernel.remove(place)
                        self._now[place] = was._replace(instances=(), why_not=NoBypass.DRAINING)
            return math.inf
        again = math.inf
        self._own.clear()
        found: dict[HostPort, Bypassed] = {}
        for listener in self._listeners():
            if listener.service is None or (state := self._services.get(listener.service)) is None:
                continue
            for place in _places(listener):
                decision = self._decide(listener, state, place, now)
                before = self._now.get(place)
                if before is not None and before.service not in ("", listener.service):
                    # What was counted is the other service's.
                    kernel.forget(place)
                    before = None
                if decision.why_not is NoBypass.NO_SNAPSHOT and before is not None and before.instances:
                    # What the proxy before this one had goes on until there is a word of the service.
                    found[place] = before._replace(service=listener.service)
                    continue
                if decision.instances:
                    decision = self._list(kernel, place, decision, before)
                elif before is not None and before.instances:
                    kernel.remove(place)
                again = min(again, decision.again if decision.again is not None else math.inf)
                found[place] = Bypassed(place, listener.service, decision.instances, decision.why_not)
                self._say(found[place])
        for gone in self._now.keys() - found.keys():
            kernel.forget(gone)
            self._said.pop(gone, None)
        self._now = found
        return again

    def _decide(self, listener: Listener, state: ServiceState, place: HostPort, now: float) -> Decision:
        config = self._services.config
        service = config.service(state.key)
        if listener.configured.scheme != "tcp":
            return Decision((), NoBypass.KIND)
        address = ipaddress.ip_address(place[0])
        # The program does not see which link a link-local address is of.
        if address.is_unspecified or address.is_link_local:
            return Decision((), NoBypass.ADDRESS)
        if state.security is not None:
            return Decision((), NoBypass.TLS)
        if service.spill is not None:
            return Decision((), NoBypass.SPILL)
        if service.limits != LimitsConfig() or config.limits != LimitsConfig():
            return Decision((), NoBypass.LIMITS)
        return decide(state.picker, state.fitness.health, now, place, self._is_own, SLOTS, self._crowded)

    def _list(self, kernel: Lists, place: HostPort, decision: Decision, before: Bypassed | None) -> Decision:
        if before is not None and before.instances == decision.instances:
            return decision
        try:
            kernel.set(place, decision.instances)
        except OSError as error:
            if self._said.get(place) is not NoBypass.KERNEL:
                _log.error("bypass of a listener failed", listener=format_host_port(*place), problem=str(error))
            with suppress(OSError):
                kernel.remove(place)
            return Decision((), NoBypass.KERNEL, LATER)
        return decision

    def _is_own(self, host: str) -> bool:
        """Whether an address is one of this network namespace's own; asked once in a look."""
        found = self._own.get(host)
        if found is None:
            assert self._routes is not None
            found = self._own[host] = self._routes.is_own(host)
        return found

    def _say(self, bypassed: Bypassed) -> None:
        """Note what changed, for people; not of each instance."""
        told = bypassed.why_not or True
        if self._said.get(bypassed.listener) == told:
            return
        self._said[bypassed.listener] = told
        listener, service = format_host_port(*bypassed.listener), bypassed.service
        if bypassed.why_not is None:
            instances = ",".join(format_host_port(*place) for place in bypassed.instances)
            _log.info("listener is bypassed", listener=listener, service=service, instances=instances)
        else:
            _log.info("listener is not bypassed", listener=listener, service=service, problem=WHY_NOT[bypassed.why_not])

    def listed(self, service: ServiceKey | None = None) -> Iterator[Bypassed]:
        """The listeners' addresses, of a service or of all."""
        return (each for each in self._now.values() if service is None or each.service == service)

    def counts(self) -> Iterator[tuple[ServiceKey, Counts]]:
        """What was counted at each of them, with its service."""
        if self._kernel is not None:
            for each in self._now.values():
                yield each.service, self._kernel.counts(each.listener)


def _number(cgroup: str) -> int:
    """A cgroup's number, which is that of its folder; 0: it is gone."""
    try:
        return os.stat(cgroup).st_ino
    except OSError:
        return 0


def _places(listener: Listener) -> Iterator[HostPort]:
    for sock in listener.sockets:
        if sock.fileno() >= 0 and sock.family != socket.AF_UNIX:
            host, port, *_ = sock.getsockname()
            yield host, port
