"""The hub: merges the sources, versions every change, and hands watchers the latest state.

Theory of operation. Each source has its own table of services. A service's
merged instances are the union over the sources, the first source winning where
two publish one endpoint. Whenever a merge differs from the one before, the
service gets a new immutable snapshot, whose version follows from its content
(`meshlocal.policy.version`), and every watcher of the service is marked.

A watcher holds no queue: only which of its services are marked, and which
snapshot of each it was given last. When it gets round to it, it is given the
way from that snapshot to the latest in one step (D4). The hub remembers a few
past snapshots of each service, which share all instances that did not change,
so that a watcher that resumes from one of them is sent a change too (D1).

A watcher that waits may leave a function behind that passes on what there is, at
once and without waiting. One task of the hub calls those of all that are marked, a
few at a time; what changes meanwhile reaches those whose turn is yet to come in the
same step. That spares thousands of tasks their waking up, which costs more than what
they would do.

A service can be spoken of when some source in sync knows it, or when all
sources that may know it are in sync and none does (D3). To who holds something
of it from before already, it is spoken of only when they all are: a part would
take away what the others have (D8).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import anyio
import anyio.lowlevel
import msgspec

from meshlocal.discovery.source import Instances, PartialSource, Source
from meshlocal.net.log import get_log
from meshlocal.net.supervision import Supervision
from meshlocal.policy import version
from meshlocal.policy.backoff import Backoff, UniformSource
from meshlocal.policy.model import ServiceChange, ServiceKey, ServiceSnapshot, diff

if TYPE_CHECKING:
    import trio

_log = get_log(__name__)

HISTORY = 16
"""Past snapshots of a service that a watcher can resume from."""

_SOMETHING = "?"
"""In place of a version: whoever resumes from it holds something that no version is known of."""

_RESTART_INITIAL = 0.5
_RESTART_MAXIMUM = 30.0
_SWEEP = 16

Push = Callable[[], bool]
"""Passes on what a watcher has to take, without waiting; False: the watcher's own task is to do it."""


class Update(NamedTuple):
    """One step for a watcher.

    Attributes:
        base: the snapshot that it holds; None: nothing.
        latest: the one that it gets.
        last: the last change of the service, which led to `latest`; None: that was its first snapshot.
    """

    base: ServiceSnapshot | None
    latest: ServiceSnapshot
    last: ServiceChange | None = None

    @property
    def change(self) -> ServiceChange:
        """What leads from the one to the other."""
        if self.last is not None and self.base is not None and self.last.base_version == self.base.version:
            return self.last
        return diff(self.base, self.latest)


class _Service:
    __slots__ = ("change", "history", "snapshot", "total", "watchers")

    def __init__(self) -> None:
        self.snapshot: ServiceSnapshot | None = None
        self.change: ServiceChange | None = None
        """What led to it from the one before."""
        self.total = 0
        # Plain, as many names that clients made up may be watched; its order is that of insertion all the same.
        self.history: dict[str, ServiceSnapshot] = {}
        # A dict for its order: who came first is told first.
        self.watchers: dict[Watcher, None] = {}


class SourceState:
    """One source as the hub sees it. Its methods are the source's `Publisher`."""

    def __init__(self, hub: Hub, source: Source) -> None:
        self._hub = hub
        self.source = source
        self.in_sync = False
        self.problem: str | None = None
        self.services: Mapping[ServiceKey, Instances] = {}
        self._staged: dict[ServiceKey, Instances] | None = {}

    def replace(self, services: Mapping[ServiceKey, Instances]) -> None:
        """See `Publisher.replace`."""
        if self._staged is not None:
            self._staged = dict(services)
            return
        gone = [service for service in self.services if service not in services]
        self.services = dict(services)
        self._hub._merge([*services, *gone])

    def update(self, service: ServiceKey, instances: Instances | None) -> None:
        """See `Publisher.update`."""
        services = self.services if self._staged is None else self._staged
        assert isinstance(services, dict)
        if instances is None:
            services.pop(service, None)
        else:
            services[service] = instances
        if self._staged is None:
            self._hub._merge([service])

    def report(self, problem: str | None) -> None:
        """See `Publisher.report`."""
        if problem != self.problem:
            self.problem = problem
            self._hub._source_told()

    def _restarting(self) -> None:
        """What was published stays; what comes next counts once the source is in sync again."""
        self._staged = {}

    def _started(self) -> None:
        staged, self._staged = self._staged, None
        first = not self.in_sync
        self.in_sync = True
        self.replace(staged or {})
        if first:
            self._hub._source_in_sync()


class _InSync:
    """The `task_status` that a source reports to."""

    def __init__(self, state: SourceState, backoff: Backoff) -> None:
        self._state = state
        self._backoff = backoff

    def started(self, value: None = None) -> None:
        """The source is in sync: what it has published is served from now on."""
        self._state._started()
        self._state.report(None)
        self._backoff.reset()
        _log.info("source in sync", source=self._state.source.name, services=len(self._state.services))


class Hub:
    """Merges sources and serves watchers. All methods but `run` and the waits are synchronous.

    Args:
        sources: in order of precedence.
        rng: for the jitter of a failed source's restart.
        supervision: of what passes changes on, which is vital.
    """

    def __init__(self, sources: Sequence[Source], rng: UniformSource, supervision: Supervision | None = None) -> None:
        self._supervision = supervision or Supervision(rng)
        self.sources = [SourceState(self, source) for source in sources]
        self._rng = rng
        self._services: dict[ServiceKey, _Service] = {}
        self._synced = anyio.Event()
        self._told = anyio.Event()
        self._marked: OrderedDict[Watcher, None] = OrderedDict()
        self._some_marked = anyio.Event()
        self._pushing = False
        self._services_watchers: dict[ServicesWatcher, None] = {}
        self.changes = 0
        self.watcher_count = 0

    @property
    def in_sync(self) -> bool:
        """Whether every source has been in sync once."""
        return self._synced.is_set()

    def speaks_of(self, service: ServiceKey) -> bool:
        """Whether every source that may know the service has been in sync once."""
        return self.in_sync or all(state.in_sync or not _may_know(state.source, service) for state in self.sources)

    async def wait_in_sync(self) -> None:
        """Wait until every source has been in sync once."""
        await self._synced.wait()

    async def wait_told(self) -> None:
        """Wait until a source is in sync for the first time, or says what keeps it from being current, or no more."""
        await self._told.wait()

    def _source_told(self) -> None:
        self._told.set()
        self._told = anyio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run every source, for ever. Started at once: watchers may come before the sources are in sync."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(self._supervision.keep, "pass changes on", self._push, vital=True))
            for state in self.sources:
                tasks.start_soon(self._supervise, state)
            task_status.started()
            if not self.sources:
                self._synced.set()
                await anyio.sleep_forever()

    async def _push(self) -> None:
        """Pass on what watchers have to take."""
        self._pushing = True
        try:
            while True:
                while self._marked:
                    for _ in range(min(_SWEEP, len(self._marked))):
                        self._marked.popitem(last=False)[0]._pass_on()
                    await anyio.lowlevel.checkpoint()
                self._some_marked = anyio.Event()
                await self._some_marked.wait()
        finally:
            self._pushing = False
            for watcher in self._marked:
                watcher._wake.set()

    def _enqueue(self, watcher: Watcher) -> bool:
        if not self._pushing:
            return False
        self._marked[watcher] = None
        self._some_marked.set()
        return True

    async def _supervise(self, state: SourceState) -> None:
        backoff = Backoff(_RESTART_INITIAL, _RESTART_MAXIMUM, self._rng)
        while True:
            state._restarting()
            try:
                await state.source.run(state, task_status=_InSync(state, backoff))
                problem = "it returned"
            except Exception as exc:  # noqa: BLE001 - one registry's failure, of any kind, must not stop the others
                problem = f"{type(exc).__name__}: {exc}"
            state.report(problem)
            delay = backoff.next()
            _log.error("source failed", source=state.source.name, problem=problem, retry_in=round(delay, 3))
            await anyio.sleep(delay)

    def snapshot(self, service: ServiceKey) -> ServiceSnapshot | None:
        """The latest state of a service; None while nobody in sync can speak of it (D3)."""
        known = self._services.get(service)
        if known is not None and known.snapshot is not None:
            return known.snapshot
        return ServiceSnapshot(service, version.UNKNOWN, {}, unknown=True) if self.speaks_of(service) else None

    def snapshots(self) -> list[ServiceSnapshot]:
        """The latest state of every service that some registry knows, by name."""
        current = (state.snapshot for state in self._services.values())
        return sorted(
            (each for each in current if each is not None and not each.unknown), key=lambda each: each.service
        )

    @contextmanager
    def watch(self, subscriptions: Mapping[ServiceKey, str]) -> Iterator[Watcher]:
        """Follow services, each from the version that the watcher holds (empty: none)."""
        watcher = Watcher(self, subscriptions)
        self.watcher_count += 1
        for service in subscriptions:
            self._add_watcher(service, watcher)
        try:
            yield watcher
        finally:
            self.watcher_count -= 1
            for service in watcher.services:
                self._remove_watcher(service, watcher)

    def _add_watcher(self, service: ServiceKey, watcher: Watcher) -> None:
        self._services.setdefault(service, _Service()).watchers[watcher] = None

    def _remove_watcher(self, service: ServiceKey, watcher: Watcher) -> None:
        state = self._services[service]
        del state.watchers[watcher]
        self._forget_if_idle(service, state)

    @contextmanager
    def watch_services(self) -> Iterator[ServicesWatcher]:
        """Follow which services there are."""
        watcher = ServicesWatcher(self)
        self._services_watchers[watcher] = None
        try:
            yield watcher
        finally:
            del self._services_watchers[watcher]

    def last_change(self, service: ServiceKey) -> ServiceChange | None:
        """What led to the service's snapshot from the one before; None if that was its first, or there is none."""
        state = self._services.get(service)
        return state.change if state is not None else None

    def _merge(self, services: Iterable[ServiceKey]) -> None:
        for service in services:
            tables = [
                instances
                for source in self.sources
                if source.in_sync and (instances := source.services.get(service)) is not None
            ]
            if not tables:
                if self.speaks_of(service):
                    self._publish(service, {}, unknown=True)
                elif (known := self._services.get(service)) is not None:
                    # Who knew it no longer does, and others may: until they have said, nobody can speak of it.
                    known.snapshot, known.change, known.total = None, None, 0
                    self._forget_if_idle(service, known)
                continue
            merged = tables[0]
            if len(tables) > 1:
                union = dict(tables[-1])
                for table in reversed(tables[:-1]):
                    union.update(table)
                merged = union
            self._publish(service, merged, unknown=False)

    def _publish(self, service: ServiceKey, instances: Instances, *, unknown: bool) -> None:
        state = self._services.setdefault(service, _Service())
        before = state.snapshot
        change = diff(before, ServiceSnapshot(service, "", instances, unknown))
        if before is not None and not change and before.unknown == unknown:
            return
        held: Instances = before.instances if before is not None else {}
        gone = [held[key] for key in change.removed]
        gone += [held[instance.key] for instance in change.upserted if instance.key in held]
        state.total = version.changed(state.total, gone, change.upserted)
        latest = ServiceSnapshot(service, version.UNKNOWN if unknown else version.text(state.total), instances, unknown)
        state.snapshot = latest
        state.change = msgspec.structs.replace(change, version=latest.version) if before is not None else None
        state.history.pop(latest.version, None)
        state.history[latest.version] = latest
        while len(state.history) > HISTORY:
            del state.history[next(iter(state.history))]
        self.changes += 1
        if before is None or before.unknown != unknown:
            for follower in self._services_watchers:
                follower._mark(service)
        for watcher in state.watchers:
            watcher._mark(service)
        self._forget_if_idle(service, state)

    def _source_in_sync(self) -> None:
        """A source was in sync for the first time: more services can be spoken of than before."""
        if not self._synced.is_set() and all(source.in_sync for source in self.sources):
            self._synced.set()
        for follower in self._services_watchers:
            follower._mark_all()
        for service, state in list(self._services.items()):
            if not self.speaks_of(service):
                continue
            if state.snapshot is None:
                self._publish(service, {}, unknown=True)
            for watcher in state.watchers:
                if service in watcher.pending:
                    watcher._mark(service)
        self._source_told()

    def _forget_if_idle(self, service: ServiceKey, state: _Service) -> None:
        """Names that no registry knows are kept only while somebody watches them: anybody may ask for any."""
        if not state.watchers and (state.snapshot is None or state.snapshot.unknown):
            self._services.pop(service, None)

    def _recall(self, service: ServiceKey, held: str) -> ServiceSnapshot | None:
        state = self._services.get(service)
        return state.history.get(held) if state is not None else None


def _may_know(source: Source, service: ServiceKey) -> bool:
    return not isinstance(source, PartialSource) or source.may_know(service)


class Watcher:
    """One watcher's place. Made by `Hub.watch`.

    Attributes:
        pending: its services of which nobody in sync can speak yet.
    """

    __slots__ = ("_held", "_hub", "_marked", "_push", "_resume", "_wake", "pending")

    def __init__(self, hub: Hub, subscriptions: Mapping[ServiceKey, str]) -> None:
        self._hub = hub
        self._resume = dict(subscriptions)
        self._held: dict[ServiceKey, ServiceSnapshot] = {}
        self._marked = dict.fromkeys(subscriptions)
        self._wake = anyio.Event()
        self._push: Push | None = None
        self.pending = set(subscriptions)

    @property
    def services(self) -> Collection[ServiceKey]:
        """What it watches."""
        return self._resume.keys() | self._held.keys()

    def versions(self) -> dict[ServiceKey, str]:
        """Of each of its services, the version that it holds, as far as it was told or says so itself; empty: none."""
        return {**self._resume, **{service: held.version for service, held in self._held.items()}}

    def held(self, service: ServiceKey) -> ServiceSnapshot | None:
        """What it was given last of a service; None: nothing yet."""
        return self._held.get(service)

    def follow(self, service: ServiceKey, *, holds: bool = False) -> None:
        """Watch one service more; what is there of it can be taken at once.

        Args:
            service: which.
            holds: it has something of it from before, nobody knows what: a part would take away the rest (D8).
        """
        if service in self._held:
            return
        followed = service in self._resume
        if holds or not followed:
            self._resume[service] = _SOMETHING if holds else ""
        if not followed:
            self.pending.add(service)
            self._hub._add_watcher(service, self)
            self._mark(service)

    def unfollow(self, service: ServiceKey) -> None:
        """Watch one service less. What it held of it is forgotten."""
        if service in self._resume or service in self._held:
            self._resume.pop(service, None)
            self._held.pop(service, None)
            self._marked.pop(service, None)
            self.pending.discard(service)
            self._hub._remove_watcher(service, self)

    def wake(self) -> None:
        """End a wait, though there may be nothing to take."""
        self._wake.set()

    def _mark(self, service: ServiceKey) -> None:
        self._marked[service] = None
        if self._push is None or not self._hub._enqueue(self):
            self._wake.set()

    def _pass_on(self) -> None:
        if self._push is None or not self._push():
            self._wake.set()

    async def wait(self, push: Push | None = None) -> None:
        """Wait until there may be something to take; or, with a `push`, until that returns False.

        `push` is called when there may be something to take, as long as this waits, by a task of the hub's. It must
        neither wait nor raise.
        """
        self._push = push
        try:
            await self._wake.wait()
        finally:
            self._push = None
            self._hub._marked.pop(self, None)

    def take(self) -> list[Update]:
        """The way from what the watcher holds to the latest state, for each service that changed.

        What is returned counts as held from now on.
        """
        # One that is not set may be waited for at this moment, by a watcher whose `push` calls this.
        if self._wake.is_set():
            self._wake = anyio.Event()
        marked, self._marked = self._marked, {}
        updates: list[Update] = []
        for service in marked:
            latest = self._hub.snapshot(service)
            if latest is None:
                continue
            base = self._held.get(service)
            if base is None and self._resume[service] not in ("", latest.version) and not self._hub.speaks_of(service):
                # It holds more than those who are in sync may know.
                continue
            self.pending.discard(service)
            if base is None:
                resume = self._resume.pop(service)
                self._held[service] = latest
                if resume == latest.version:
                    continue
                base = self._hub._recall(service, resume) if resume else None
            else:
                if base.version == latest.version:
                    continue
                self._held[service] = latest
            updates.append(Update(base, latest, self._hub.last_change(service)))
        return updates


class ServicesWatcher:
    """The place of one who follows which services there are. Made by `Hub.watch_services`."""

    __slots__ = ("_hub", "_known", "_marked", "_wake")

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._known: set[ServiceKey] = set()
        self._marked = dict.fromkeys(each.service for each in hub.snapshots())
        self._wake = anyio.Event()

    @property
    def complete(self) -> bool:
        """Whether every source has said which services it knows (D3)."""
        return self._hub.in_sync

    def _mark(self, service: ServiceKey) -> None:
        self._marked[service] = None
        self._wake.set()

    def _mark_all(self) -> None:
        """More can be spoken of than before: what is known may turn out to be gone."""
        self._marked |= dict.fromkeys(self._known)
        self._wake.set()

    def wake(self) -> None:
        """End a wait, though there may be nothing to take."""
        self._wake.set()

    async def wait(self) -> None:
        """Wait until there may be something to take."""
        await self._wake.wait()

    def take(self) -> tuple[list[ServiceKey], list[ServiceKey]]:
        """The services that there are now and were not at the last call, and those that there were; by name."""
        self._wake = anyio.Event()
        marked, self._marked = self._marked, {}
        added: list[ServiceKey] = []
        removed: list[ServiceKey] = []
        for service in sorted(marked):
            latest = self._hub.snapshot(service)
            # Where nobody can speak of it, it is not gone.
            if latest is None or latest.unknown != (service in self._known):
                continue
            (removed if latest.unknown else added).append(service)
        self._known.difference_update(removed)
        self._known.update(added)
        return added, removed
