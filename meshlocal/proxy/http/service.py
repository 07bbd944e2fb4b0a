"""What is kept of one service for http listeners, and what its connections to instances are lent by."""

from __future__ import annotations

from meshlocal.client.services import ServiceState
from meshlocal.net.relay_loop import current_loop
from meshlocal.policy.config_http import HttpConfig
from meshlocal.policy.model import HostPort, ServiceSnapshot
from meshlocal.policy.picker import Pick
from meshlocal.policy.retry import RetryBudget
from meshlocal.proxy.http.pool import Pool, Upstream
from meshlocal.proxy.http.statistics import HttpStatistics


class HttpService:
    """A service, as http listeners see it.

    Attributes:
        state: its picker, policy and counts, shared with all listeners.
        pool: unused connections to its instances.
        budget: how many retries after an answer there may be.
        pool_size: unused connections to one instance at most.
        statistics: counts of requests.
    """

    __slots__ = ("budget", "pool", "pool_size", "state", "statistics")

    def __init__(self, state: ServiceState, config: HttpConfig) -> None:
        self.state = state
        self.pool = Pool(current_loop.get())
        self.pool.on_unasked = self._on_unasked
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
        self.pool_size = config.pool_size

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

    def _on_snapshot(self, snapshot: ServiceSnapshot) -> None:
        self.pool.keep_only({key[:2] for key in snapshot.instances})

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
