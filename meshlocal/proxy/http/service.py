"""What is kept of one service for http listeners, and what its connections to instances are lent by."""

from __future__ import annotations

from collections.abc import Callable

from meshlocal.client.services import ServiceState
from meshlocal.net.relay_loop import current_loop
from meshlocal.policy.config_http import HttpConfig
from meshlocal.policy.model import HostPort, ServiceSnapshot
from meshlocal.policy.picker import Pick
from meshlocal.policy.retry import RetryBudget
from meshlocal.proxy.http.links import SharedLinks, UpstreamLink
from meshlocal.proxy.http.pool import Pool, Upstream
from meshlocal.proxy.http.statistics import HttpStatistics


class HttpService:
    """A service, as http listeners see it.

    Args:
        state: see below.
        config: what holds for http listeners.
        keep: has a shared connection served, in a task of its own.

    Attributes:
        state: its picker, policy and counts, shared with all listeners.
        config: what holds for http listeners.
        pool: unused connections to its instances, in HTTP/1.1.
        links: connections to its instances in HTTP/2, which requests share.
        budget: how many retries after an answer there may be.
        pool_size: unused connections to one instance at most.
        statistics: counts of requests.
    """

    __slots__ = ("budget", "config", "links", "pool", "pool_size", "state", "statistics")

    def __init__(self, state: ServiceState, config: HttpConfig, keep: Callable[[UpstreamLink], None]) -> None:
        self.state = state
        self.config = config
        self.links = SharedLinks(current_loop.get(), keep)
        self.pool = Pool(current_loop.get())
        self.pool.on_unasked = self._on_unasked
        self._renew()
        self.statistics = HttpStatistics()
        self.budget = _budget(config)
        self.pool_size = config.pool_size
        if state.picker is not None:
            self._on_snapshot(state.picker.snapshot)
        state.changed = self._on_snapshot

    def reconfigure(self, config: HttpConfig) -> None:
        """Apply another configuration; the budget begins anew."""
        refused = self.budget.refused
        self.budget = _budget(config)
        self.budget.refused = refused
        self.config = config
        self.pool_size = config.pool_size
        if self.state.security is not self.pool.security:
            self._renew()
        if self.state.picker is not None:
            self._follow_paths(self.state.picker.snapshot)

    def _renew(self) -> None:
        self.pool.renew(self.state.security)
        self.links.renew(self.state.security)

    def reuse(self, pick: Pick, *, sure: bool) -> Upstream | None:
        """A connection to the instance that waits for a request; None if there is none. It is the caller's.

        Args:
            pick: the instance.
            sure: it is looked at once more: what is to be sent on it cannot be sent again (A4).
        """
        upstream = self.pool.take(pick.instance.key[:2], sure=sure)
        if upstream is not None:
            self.statistics.connections_reused += 1
        return upstream

    def close(self) -> None:
        """The service is followed no longer."""
        self.state.changed = None
        self.pool.close()
        self.links.close()

    def _on_snapshot(self, snapshot: ServiceSnapshot) -> None:
        places = {key[:2] for key in snapshot.instances}
        self.pool.keep_only(places)
        self.links.keep_only(places)
        self._follow_paths(snapshot)

    def _follow_paths(self, snapshot: ServiceSnapshot) -> None:
        """What was connected by another Unix socket than an instance has now, or by none, is not used again."""
        sockets, before = self.state.sockets, self.pool.paths
        if sockets is None and not before:
            return
        now: dict[HostPort, str] = {}
        if sockets is not None:
            paths = ((instance.key[:2], sockets.of(instance)) for instance in snapshot.instances.values())
            now = {place: path for place, path in paths if path is not None}
        self.pool.paths = self.links.paths = now
        changed = [place for place in before.keys() | now.keys() if before.get(place) != now.get(place)]
        self.pool.drop_places(changed)
        self.links.retire(changed)

    def path(self, pick: Pick) -> str | None:
        """The path of an instance's Unix socket; None: it has none here."""
        return self.pool.paths.get(pick.instance.key[:2])

    def _on_unasked(self, place: HostPort) -> None:
        """An instance said something that nobody had asked for. Had it come a moment later, on a connection that waits
        for an answer, it would have been taken for that: HTTP/1.1 has nothing to tell them apart by."""
        picker = self.state.picker
        found = picker.snapshot.instances.values() if picker is not None else ()
        instance = next((each for each in found if each.key[:2] == place), None)
        if instance is not None:
            self.state.fitness.misbehaved(instance, "a response that nobody asked for")


def _budget(config: HttpConfig) -> RetryBudget:
    return RetryBudget(config.retry_percent / 100, config.retry_floor)
