"""The services that the proxy knows: for each its picker, its cursors and its counts.

`ServiceTable` is where snapshots arrive and where connections ask. It is
synchronous but for the wait for a first snapshot (A7); a snapshot that arrives
swaps the service's picker whole, and requests under way keep the one that they
began with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import trio

from meshlocal.net.log import get_log
from meshlocal.policy.config import AttemptPolicy, ProxyConfig
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import ServiceKey, ServiceSnapshot, diff
from meshlocal.policy.picker import Cursors, Picker, Plan, RandomSource
from meshlocal.proxy.statistics import ServiceStatistics

_log = get_log(__name__)


class ServiceState:
    """One service as the proxy sees it.

    Attributes:
        key: its name in the registry.
        policy: how its requests are tried.
        picker: what the latest snapshot says; None before the first (A7).
        cursors: where its rotations stand; they outlive pickers (O3).
        first_snapshot: set once a snapshot has come.
        statistics: its counts.
    """

    __slots__ = ("_warned_ports", "cursors", "first_snapshot", "key", "picker", "policy", "selector", "statistics")

    def __init__(self, key: ServiceKey, selector: Selector, policy: AttemptPolicy, rng: RandomSource) -> None:
        self.key = key
        self.policy = policy
        self.selector = selector
        self.picker: Picker | None = None
        self.cursors = Cursors(rng)
        self.first_snapshot = trio.Event()
        self.statistics = ServiceStatistics()
        self._warned_ports: frozenset[str] = frozenset()

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers' names, nearest first."""
        return self.selector.tiers

    def plan(self) -> Plan | None:
        """The next request's plan; None before the first snapshot."""
        return self.picker.plan(self.cursors) if self.picker is not None else None

    def publish(self, snapshot: ServiceSnapshot) -> None:
        """Swap in the picker of a snapshot."""
        before = self.picker
        if before is None:
            self.picker = Picker.build(self.selector, snapshot)
            self.first_snapshot.set()
        else:
            self.picker = before.updated(snapshot, diff(before.snapshot, snapshot))
        if snapshot.unknown and (before is None or not before.snapshot.unknown):
            _log.warning("no registry knows the service", service=self.key)
        ports = self.picker.port_names()
        if len(ports) > 1 and ports != self._warned_ports:
            self._warned_ports = ports
            _log.warning(
                "instances with several port names; set port_name",
                service=self.key,
                port_names=",".join(sorted(ports)),
                config_key=f"proxy.services.{self.key}.port_name",
            )

    def reselect(self, selector: Selector, policy: AttemptPolicy) -> None:
        """Apply another place or policy to what is known. The cursors stay."""
        self.policy = policy
        self.selector = selector
        if self.picker is not None:
            self.picker = Picker.build(selector, self.picker.snapshot)


class ServiceTable:
    """All services that listeners name. A `SnapshotSink`.

    Args:
        config: the proxy's section.
        locality: where the proxy stands.
        rng: for the cursors (O4).
    """

    def __init__(self, config: ProxyConfig, locality: Locality, rng: RandomSource) -> None:
        self._rng = rng
        self.config = config
        self._states: dict[ServiceKey, ServiceState] = {}
        self._said_unmatched = False
        self.locality = locality
        self.reconfigure(config, locality)

    def __iter__(self) -> Iterator[ServiceState]:
        return iter(self._states.values())

    def __getitem__(self, key: ServiceKey) -> ServiceState:
        return self._states[key]

    def get(self, key: ServiceKey) -> ServiceState | None:
        """The service's state, if a listener names it."""
        return self._states.get(key)

    @property
    def keys(self) -> list[ServiceKey]:
        """The services to watch."""
        return list(self._states)

    def reconfigure(self, config: ProxyConfig, locality: Locality) -> None:
        """Apply another config (S2). Services that it no longer names are forgotten; counts of the others go on."""
        moved = locality != self.locality
        self.config = config
        self.locality = locality
        wanted = dict.fromkeys(config.service_key(listen.service) for listen in config.listen)
        for key in self._states.keys() - wanted.keys():
            del self._states[key]
        for key in wanted:
            selector = Selector(locality, config.service(key).port_name)
            policy = config.attempts_for(key)
            state = self._states.get(key)
            if state is None:
                self._states[key] = ServiceState(key, selector, policy, self._rng)
            else:
                state.reselect(selector, policy)
        if moved:
            self._said_unmatched = False
        self._check_node()

    def publish(self, snapshot: ServiceSnapshot) -> None:
        """See `SnapshotSink.publish`. A service that no listener names is passed over."""
        state = self._states.get(snapshot.service)
        if state is not None:
            state.publish(snapshot)
            self._check_node()

    @property
    def node_unknown(self) -> bool:
        """The proxy does not know its node (L1, L5)."""
        return not self.locality.node

    @property
    def node_unmatched(self) -> bool:
        """The proxy's node is known, every service's instances are too, and none is on the node (L5)."""
        if self.node_unknown or not self._states:
            return False
        pickers = [state.picker for state in self._states.values()]
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
