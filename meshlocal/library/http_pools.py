"""The pools of one transport: made when an instance is first tried, closed when it leaves (H2)."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio

from meshlocal.library.core import MeshCore
from meshlocal.library.http_kind import HttpKind
from meshlocal.library.http_pool import InstancePool
from meshlocal.policy.model import EndpointKey, ServiceKey, ServiceSnapshot

if TYPE_CHECKING:
    import httpx

_SWEEP_SHORTEST = 1.0


class InstancePools:
    """Connections by instance.

    Args:
        core: tells which instances left, and has the background tasks.
        kind: httpx, or httpx2.
        body: makes the stream of a response.
        ssl_context: for https.
        limits: on the connections to one instance.
    """

    def __init__(
        self,
        core: MeshCore,
        kind: HttpKind,
        body: Callable[..., object],
        ssl_context: ssl.SSLContext | None,
        limits: httpx.Limits,
    ) -> None:
        self.kind = kind
        self.body = body
        self.closed = False
        self._core = core
        self._ssl_context = ssl_context
        self._limits = limits
        self._pools: dict[EndpointKey, InstancePool] = {}
        self._members: dict[ServiceKey, set[EndpointKey]] = {}
        self._sweeping: anyio.CancelScope | None = None
        core.listeners[self._on_snapshot] = None
        # Of services that were heard of before this, too, it must be seen when an instance leaves.
        for state in core.services:
            if state.picker is not None:
                self._members[state.key] = set(state.picker.snapshot.instances)

    def __len__(self) -> int:
        return len(self._pools)

    def pool(self, key: EndpointKey, path: str | None) -> InstancePool:
        """The instance's pool.

        Args:
            key: the instance's.
            path: of its Unix socket; None: it has none. Connections that were made when it had another are not used.

        Raises:
            RuntimeError: the transport was closed.
        """
        if self.closed:
            raise RuntimeError("the transport was closed, as its client was")
        pool = self._pools.get(key)
        if pool is not None and pool.path != path:
            self._leave(key)
            pool = None
        if pool is None:
            pool = self._pools[key] = InstancePool(self.kind, self._ssl_context, self._limits, path)
            self._start_sweep()
        return pool

    async def tidy(self, pool: InstancePool) -> None:
        """Close what a request leaves of a pool whose instance has gone."""
        if pool.retired and not pool.in_use:
            with anyio.CancelScope(shield=True):
                await pool.aclose()

    async def aclose(self) -> None:
        """Close every connection of every pool."""
        self.closed = True
        self._core.listeners.pop(self._on_snapshot, None)
        if self._sweeping is not None:
            self._sweeping.cancel()
        pools = list(self._pools.values())
        self._pools.clear()
        with anyio.CancelScope(shield=True):
            for pool in pools:
                pool.retired = True
                await pool.aclose()

    def _on_snapshot(self, snapshot: ServiceSnapshot) -> None:
        """Retire the pools of instances that left, or that nobody follows; what is under way goes on (H2)."""
        now = set(snapshot.instances)
        left = self._members.get(snapshot.service, set()) - now
        for service in list(self._members):
            if self._core.services.get(service) is None:
                # Nobody follows it any more: what becomes of its instances is not told.
                left |= self._members.pop(service)
        self._members[snapshot.service] = now
        for key in left:
            if any(key in members for members in self._members.values()):
                continue
            self._leave(key)

    def _leave(self, key: EndpointKey) -> None:
        """Use connections to an instance no more; what is under way goes on."""
        pool = self._pools.pop(key, None)
        if pool is not None:
            pool.retired = True
            if self._core.tasks is not None:
                self._core.tasks.start_soon(self._retire, pool)

    async def _retire(self, pool: InstancePool) -> None:
        await pool.close_idle()
        await self.tidy(pool)

    def _start_sweep(self) -> None:
        expiry, tasks = self._limits.keepalive_expiry, self._core.tasks
        if self._sweeping is None and expiry is not None and tasks is not None:
            self._sweeping = anyio.CancelScope()
            tasks.start_soon(self._close_expired, self._sweeping, expiry)

    async def _close_expired(self, scope: anyio.CancelScope, expiry: float) -> None:
        """Close connections that no request came for."""
        with scope:
            while True:
                await anyio.sleep(max(expiry / 2, _SWEEP_SHORTEST))
                for pool in list(self._pools.values()):
                    await pool.close_idle(anyio.current_time() - expiry)
