"""The services that the proxy knows: for each its picker, its cursors and its counts.

`ServiceTable` is where snapshots arrive and where connections ask. It is
synchronous but for the wait for a first snapshot (A7); a snapshot that arrives
swaps the service's picker whole, and requests under way keep the one that they
began with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import anyio

from meshlocal.client.ended import Told
from meshlocal.client.fitness import Fitness
from meshlocal.client.security import Security
from meshlocal.client.statistics import ServiceStatistics
from meshlocal.net.log import RateLimited, get_log
from meshlocal.policy.addresses import fixed_place
from meshlocal.policy.backoff import UniformSource
from meshlocal.policy.config import AttemptPolicy, ProxyConfig, ServiceConfig
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.feedback import INTERVAL
from meshlocal.policy.limits import Circuit
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import (
    NODE,
    ServiceChange,
    ServiceKey,
    ServiceSnapshot,
    diff,
    index,
    is_fixed,
    make_instance,
)
from meshlocal.policy.picker import Cursors, Pick, Picker, Plan, RandomSource
from meshlocal.policy.steps import Steps
from meshlocal.policy.unix_sockets import UnixSockets

_log = get_log(__name__)


_WARNING_INTERVAL = 5.0

_AWAY_LOOK = 10.0
"""Seconds until it is looked again whether services that nobody uses may be forgotten, while discovery is away."""


class Randomness(RandomSource, UniformSource, Protocol):
    """What a service needs of `random.Random`: first positions of cursors (O4), jitter of ejections (H1)."""


class ServiceState:
    """One service as the proxy sees it.

    Args:
        key: its name in the registry.
        selector: places its instances.
        policy: how its requests are tried.
        rng: for the cursors and for ejections.
        ejection: when an instance is ejected, and for how long.
        config: what holds for it only.
        whole: the limits of the whole proxy.

    Attributes:
        key: its name in the registry.
        policy: how its requests are tried.
        protocol: which version of HTTP its instances are spoken to in; None: as they say, or as the client does.
        security: how connections to its instances are secured; None: not at all.
        sockets: where its instances have Unix sockets; None: nowhere.
        picker: what the latest snapshot says; None before the first (A7).
        cursors: where its rotations stand; they outlive pickers (O3).
        fitness: what was found out about its instances; it outlives pickers too.
        circuit: how much of it is under way, and may be.
        first_snapshot: set once a snapshot has come.
        statistics: its counts.
        told: what is told of its requests, one by one.
        changed: called with each snapshot, once the picker knows it: for who keeps connections to instances.
        refit: called when which of its instances are to be picked first may be otherwise.
        on_demand: it is followed because a request named it.
        last_used: when a request last came for it, if it is on demand.
        in_use: requests under way, if it is on demand.
    """

    __slots__ = (
        "__weakref__",
        "_ports",
        "_prepared",
        "_warned_ports",
        "changed",
        "circuit",
        "cursors",
        "first_snapshot",
        "fitness",
        "in_use",
        "key",
        "last_used",
        "on_demand",
        "picker",
        "policy",
        "protocol",
        "refit",
        "security",
        "selector",
        "sockets",
        "statistics",
        "told",
    )

    def __init__(
        self,
        key: ServiceKey,
        selector: Selector,
        policy: AttemptPolicy,
        rng: Randomness,
        ejection: EjectionConfig | None = None,
        config: ServiceConfig | None = None,
        whole: Circuit | None = None,
    ) -> None:
        config = config or ServiceConfig()
        self.key = key
        self.policy = policy
        self.protocol = config.protocol
        self.security: Security | None = None
        self.sockets: UnixSockets | None = None
        self.selector = selector
        self.picker: Picker | None = None
        self.cursors = Cursors(rng)
        self.fitness = Fitness(key, ejection or EjectionConfig(), config.spill, rng)
        self.circuit = Circuit(config.limits, whole)
        self.first_snapshot = anyio.Event()
        self.statistics = ServiceStatistics()
        self.told = Told()
        self.changed: Callable[[ServiceSnapshot], None] | None = None
        self.refit: Callable[[], None] = self._nobody
        self.on_demand = False
        self.last_used = 0.0
        self.in_use = 0
        self._warned_ports: frozenset[str] = frozenset()
        self._ports: frozenset[str] = frozenset()
        self._prepared: Picker | None = None

    @staticmethod
    def _nobody() -> None:
        """Whom nobody wants to hear."""

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers' names, nearest first."""
        return self.selector.tiers

    def plan(self) -> Plan | None:
        """The next request's plan; None before the first snapshot."""
        # As Picker.plan does, without a call of Python's own: every request passes here.
        return Plan(self.picker, self.cursors, self.fitness.gate()) if self.picker is not None else None

    def preview(self) -> Iterator[Pick]:
        """The picks of the next request's plan if every attempt fails (R2); none before the first snapshot."""
        return self.picker.preview(self.cursors, self.fitness.gate()) if self.picker is not None else iter(())

    def prepare(self, snapshot: ServiceSnapshot) -> Steps[None]:
        """Make a snapshot's picker, in steps, for `publish` to swap in."""
        self._prepared = yield from Picker.in_steps(self.selector, snapshot)

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        """Swap in the picker of a snapshot; see `SnapshotSink.publish`."""
        before = self.picker
        look_at_ports = True
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared.snapshot is snapshot and prepared.selector is self.selector:
            self.picker = prepared
        elif before is None:
            self.picker = Picker.build(self.selector, snapshot)
        else:
            if change is None or change.base_version != before.snapshot.version:
                change = diff(before.snapshot, snapshot)
            self.picker = before.updated(snapshot, change)
            # To look through all instances for other names costs as much as all else that a small change takes.
            look_at_ports = not self._ports.issuperset(instance.key.port_name for instance in change.upserted)
        if before is None:
            self.first_snapshot.set()
        else:
            self.fitness.retain(snapshot.instances)
            if change is None or change.removed:
                self.statistics.retain(snapshot.instances)
            if self.fitness.health.unfit:
                self._look_for_ready_again(before.snapshot, snapshot)
        if self.changed is not None:
            self.changed(snapshot)
        self.refit()
        if not look_at_ports:
            return
        ports = self._ports = self.picker.port_names()
        if len(ports) > 1 and ports != self._warned_ports:
            self._warned_ports = ports
            _log.warning(
                "instances with several port names; set port_name",
                service=self.key,
                port_names=",".join(sorted(ports)),
                config_key=f"proxy.services.{self.key}.port_name",
            )

    def _look_for_ready_again(self, before: ServiceSnapshot, after: ServiceSnapshot) -> None:
        unfit = self.fitness.health.unfit
        for key, instance in after.instances.items():
            if key[:2] in unfit and instance.conditions.ready:
                was = before.instances.get(key)
                if was is not None and not was.conditions.ready:
                    self.fitness.ready_again(key)

    def reselect(
        self, selector: Selector, policy: AttemptPolicy, ejection: EjectionConfig, config: ServiceConfig
    ) -> None:
        """Apply another place or policy to what is known. The cursors stay, and what was found out about instances."""
        self.policy = policy
        self.protocol = config.protocol
        self.selector = selector
        self.fitness.health.policy = ejection
        self.fitness.spill = config.spill
        self.circuit.limits = config.limits
        self._ports = frozenset()
        if self.picker is not None:
            self.picker = Picker.build(selector, self.picker.snapshot)
        self.refit()


class ServiceTable:
    """All services that listeners name, and those that requests asked for. A `SnapshotSink`.

    Args:
        config: the proxy's section.
        locality: where the proxy stands.
        rng: for the cursors (O4), and for the jitter of ejections.

    Attributes:
        on_followed: called with `keys` whenever a request, or the lack of requests, changed them. `reconfigure` does
            not call it.
        on_refit: called when which instances of some service are to be picked first may be otherwise.
        on_failing: called with a service of which every attempt has failed for a while (D5).
        is_away: whether discovery is, so that nothing could be fetched again.
        security_of: how connections to a service's instances are secured; asked for each service at `reconfigure`, and
            once it is followed.
        circuit: how much is under way in all, and may be.
    """

    def __init__(self, config: ProxyConfig, locality: Locality, rng: Randomness) -> None:
        self._rng = rng
        self.circuit = Circuit(config.limits)
        self.config = config
        self._states: dict[ServiceKey, ServiceState] = {}
        self._said_unmatched = False
        self._failing: dict[ServiceKey, None] = {}
        self._next_question = 0.0
        self._unknown = RateLimited(_log, logging.WARNING, "no registry knows the service", interval=_WARNING_INTERVAL)
        self.on_followed: Callable[[list[ServiceKey]], None] | None = None
        self.on_failing: Callable[[ServiceKey], None] | None = None
        self.on_refit: Callable[[], None] | None = None
        self.is_away: Callable[[], bool] = lambda: False
        self.security_of: Callable[[ServiceKey], Security | None] = lambda key: None
        self.locality = locality
        self.reconfigure(config, locality)

    def __iter__(self) -> Iterator[ServiceState]:
        return iter(self._states.values())

    def __getitem__(self, key: ServiceKey) -> ServiceState:
        return self._states[key]

    def get(self, key: ServiceKey) -> ServiceState | None:
        """The service's state, if it is followed."""
        return self._states.get(key)

    def demand(self, key: ServiceKey, now: float) -> ServiceState | None:
        """The state of a service that a request names, which is followed from now on.

        Returns:
            None if it was not followed, and there are `max_services` of its kind already, all of them with requests
            under way.
        """
        state = self._states.get(key)
        if state is None:
            on_demand = [each for each in self._states.values() if each.on_demand]
            if len(on_demand) >= self.config.http.max_services:
                unused = [each for each in on_demand if not each.in_use]
                if not unused:
                    return None
                # What nobody knows goes first, then what was not heard of yet, then what is longest unused (D7).
                oldest = min(unused, key=lambda each: (_worth(each), each.last_used))
                del self._states[oldest.key]
            state = self._states[key] = self._make(key)
            state.on_demand = True
            state.last_used = now
            self._tell_followed()
        state.last_used = now
        return state

    def drop_unused(self, now: float) -> float:
        """Follow no longer what no request asked for in `service_idle_timeout`; returns the seconds until the next.

        While discovery is away, what is known stays, however long it is unused: nobody could say it again (D7).
        """
        limit = self.config.http.service_idle_timeout
        wait = limit
        away = self.is_away()
        dropped = False
        for state in list(self._states.values()):
            if state.on_demand and not state.in_use:
                left = state.last_used + limit - now
                if left <= 0 and away and _is_known(state):
                    wait = min(wait, _AWAY_LOOK)
                elif left <= 0:
                    del self._states[state.key]
                    dropped = True
                else:
                    wait = min(wait, left)
        if dropped:
            self._tell_followed()
            self._check_node()
        return wait

    def _tell_failing(self, key: ServiceKey) -> None:
        """Ask discovery about a service that fails, and all others that failed meanwhile: seldom, as each question is
        a new connection, and in a partition every proxy has the same ones (D5)."""
        self._failing[key] = None
        now = anyio.current_time()
        if self.on_failing is None or now < self._next_question:
            return
        self._next_question = now + INTERVAL * self._rng.uniform(1.0, 1.5)
        failing, self._failing = self._failing, {}
        for each in failing:
            if each in self._states:
                self.on_failing(each)

    def _tell_followed(self) -> None:
        if self.on_followed is not None:
            self.on_followed(self.keys)

    @property
    def keys(self) -> list[ServiceKey]:
        """The services to watch."""
        return [key for key in self._states if not is_fixed(key)]

    def reconfigure(self, config: ProxyConfig, locality: Locality) -> None:
        """Apply another config (S2).

        Services that it no longer names are forgotten, except those that requests asked for; counts of the others go
        on.
        """
        moved = locality != self.locality
        self.config = config
        self.locality = locality
        self.circuit.limits = config.limits
        wanted = dict.fromkeys(
            config.service_key(listen.service) for listen in config.listen if listen.service is not None
        )
        for key, state in list(self._states.items()):
            if key in wanted:
                state.on_demand = False
            elif not state.on_demand:
                del self._states[key]
                continue
            service = config.service(key)
            selector = Selector(locality, service.port_name)
            state.reselect(selector, config.attempts_for(key), config.ejection, service)
            state.security = self.security_of(key)
            state.sockets = self._sockets
            self._publish_fixed(state)
        for key in wanted:
            if key not in self._states:
                self._states[key] = self._make(key)
        if moved:
            self._said_unmatched = False
        self._check_node()

    def _make(self, key: ServiceKey) -> ServiceState:
        config = self.config.service(key)
        state = ServiceState(
            key,
            Selector(self.locality, config.port_name),
            self.config.attempts_for(key),
            self._rng,
            self.config.ejection,
            config,
            self.circuit,
        )
        state.security = self.security_of(key)
        state.sockets = self._sockets
        self._publish_fixed(state)
        state.fitness.on_failing = self._tell_failing
        state.refit = state.fitness.health.on_change = self._tell_refit
        return state

    @property
    def _sockets(self) -> UnixSockets | None:
        folder = self.config.socket_folder
        return UnixSockets(folder, self.locality.node) if folder is not None else None

    def _tell_refit(self) -> None:
        if self.on_refit is not None:
            self.on_refit()

    def _publish_fixed(self, state: ServiceState) -> None:
        """The one address of a listener that has but one is known at once, and is on this node."""
        place = fixed_place(state.key)
        if place is None:
            return
        labels = {NODE: self.locality.node} if self.locality.node else {}
        instance = make_instance(place.host, place.port, labels=labels)
        state.publish(ServiceSnapshot(state.key, "fixed", index([instance])))

    def prepare(self, snapshot: ServiceSnapshot) -> Iterator[None]:
        """See `SnapshotSink.prepare`."""
        state = self._states.get(snapshot.service)
        return iter(()) if state is None else state.prepare(snapshot)

    def publish(self, snapshot: ServiceSnapshot, change: ServiceChange | None = None) -> None:
        """See `SnapshotSink.publish`. A service that is not followed is passed over."""
        state = self._states.get(snapshot.service)
        if state is not None:
            before = state.picker
            state.publish(snapshot, change)
            if snapshot.unknown and (before is None or not before.snapshot.unknown):
                # Requests can name whatever they like.
                self._unknown(anyio.current_time(), service=snapshot.service)
            self._check_node()

    @property
    def node_unknown(self) -> bool:
        """The proxy does not know its node, or its own value of the label that it prefers to all others (L5, R1), and
        would need it."""
        return self.is_selecting and not self._knows_its_place

    @property
    def is_selecting(self) -> bool:
        """Whether there are, or may be, services whose instances are told apart: not with fixed addresses only."""
        listen = self.config.listen
        return not listen or any(each.service is None or not is_fixed(each.service) for each in listen)

    @property
    def _knows_its_place(self) -> bool:
        return bool(self.locality.node) and bool(self.locality.own(self.locality.prefer[0]))

    @property
    def node_unmatched(self) -> bool:
        """The proxy's node is known, every service's instances are too, and none is on the node (L5)."""
        if not self.locality.node or not self.keys:
            return False
        pickers = [state.picker for state in self._states.values() if not is_fixed(state.key)]
        return all(picker is not None and not picker.matching for picker in pickers)

    def waiting(self) -> Iterable[ServiceKey]:
        """The services whose first snapshot has not come."""
        return [state.key for state in self._states.values() if state.picker is None]

    def _check_node(self) -> None:
        """Say once, until it is mended, that no instance is on this node (L5)."""
        if not self.node_unmatched:
            self._said_unmatched = False
        elif not self._said_unmatched:
            self._said_unmatched = True
            _log.warning(
                "no instance of any watched service is on this node; every request leaves it",
                node=self.locality.node,
            )


def _worth(state: ServiceState) -> int:
    """How much is lost with it: 0, nobody knows it; 1, nothing was heard of it yet; 2, its instances are known."""
    if state.picker is None:
        return 1
    return 0 if state.picker.snapshot.unknown else 2


def _is_known(state: ServiceState) -> bool:
    return state.picker is not None and not state.picker.snapshot.unknown
