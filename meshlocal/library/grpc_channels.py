"""Connections to instances over gRPC: one each, which all calls share.

One is made when a call wants it, and closed when it was idle for long or its instance left (H2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from meshlocal.library.core import MeshCore
from meshlocal.library.errors import MeshClosedError
from meshlocal.net.grpc.client import Channel, open_channel
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.policy.model import EndpointKey, HostPort, ServiceSnapshot
from meshlocal.wire.grpc.status import GrpcError, StatusCode

IDLE = 60.0
"""Seconds that a connection without calls is kept open."""


class _Held:
    """One connection, from before it is made.

    Attributes:
        channel: once it is made.
        error: why it could not be made; None if it could.
        calls: under way on it.
        retired: it takes no more calls, and ends with the last one.
        idle_since: when its last call ended.
        scope: its cancellation closes it.
    """

    def __init__(self, now: float) -> None:
        self.channel: Channel | None = None
        self.error: GrpcError | None = None
        self.known = anyio.Event()
        self.calls = 0
        self.retired = False
        self.idle_since = now
        self.scope = anyio.CancelScope()

    @property
    def is_open(self) -> bool:
        """Whether it takes calls, now or once it is made."""
        return not self.retired and self.error is None and (self.channel is None or self.channel.closed_reason is None)


class InstanceChannels:
    """Connections by instance, of all gRPC channels of a mesh.

    Args:
        core: tells which instances left, and has the background tasks.
        options: of all connections.
    """

    def __init__(self, core: MeshCore, options: GrpcOptions) -> None:
        self._core = core
        self._options = options
        self._held: dict[HostPort, _Held] = {}
        self._members: dict[str, set[HostPort]] = {}
        core.listeners[self._on_snapshot] = None
        for state in core.services:
            if state.picker is not None:
                self._members[state.key] = {key[:2] for key in state.picker.snapshot.instances}

    def __len__(self) -> int:
        return len(self._held)

    async def channel(self, key: EndpointKey, limit: float) -> _Held:
        """The connection to an instance.

        Args:
            key: the instance.
            limit: seconds for making it.

        Raises:
            GrpcError: UNAVAILABLE, it could not be made.
            MeshClosedError: the mesh's block was left.
        """
        place = key[:2]
        held = self._held.get(place)
        if held is None or not held.is_open:
            tasks = self._core.tasks
            if tasks is None:
                raise MeshClosedError("the mesh is closed: the block of its open_mesh was left")
            held = self._held[place] = _Held(anyio.current_time())
            tasks.start_soon(self._keep, place, held)
        if held.channel is None:
            held.calls += 1
            try:
                with anyio.move_on_after(limit) as scope:
                    await held.known.wait()
            finally:
                held.calls -= 1
                if not (held.calls or held.known.is_set()):
                    # Nobody waits for it any more.
                    self._forget(place, held)
                    held.scope.cancel()
            if scope.cancelled_caught:
                raise GrpcError(StatusCode.UNAVAILABLE, "timeout", unprocessed=True)
        if held.error is not None:
            raise held.error
        return held

    @contextmanager
    def using(self, held: _Held) -> Iterator[None]:
        """A call is under way on a connection for as long as this is open."""
        held.calls += 1
        try:
            yield
        finally:
            held.calls -= 1
            held.idle_since = anyio.current_time()
            if held.retired and not held.calls:
                held.scope.cancel()

    async def _keep(self, place: HostPort, held: _Held) -> None:
        """Make a connection, and keep it until it ends, is idle for long, or is closed."""
        host, port = place
        try:
            with held.scope:
                async with open_channel(host, port, options=self._options) as channel:
                    held.channel = channel
                    held.known.set()
                    while channel.closed_reason is None:
                        with anyio.move_on_after(IDLE):
                            await channel.wait_closing()
                        if not held.calls and held.idle_since + IDLE <= anyio.current_time():
                            held.retired = True
                            return
                    self._forget(place, held)
                    # Its calls go on to their end.
                    await channel.wait_closed()
        except GrpcError as error:
            held.error = error
        finally:
            self._forget(place, held)
            if held.channel is None and held.error is None:
                held.error = GrpcError(StatusCode.UNAVAILABLE, "closed", unprocessed=True)
            held.known.set()

    def _forget(self, place: HostPort, held: _Held) -> None:
        if self._held.get(place) is held:
            del self._held[place]

    def _on_snapshot(self, snapshot: ServiceSnapshot) -> None:
        """Retire the connections to instances that left; calls under way go on (H2)."""
        now = {key[:2] for key in snapshot.instances}
        left = self._members.get(snapshot.service, set()) - now
        self._members[snapshot.service] = now
        for place in left:
            if any(place in members for members in self._members.values()):
                continue
            held = self._held.pop(place, None)
            if held is not None:
                held.retired = True
                if not held.calls:
                    held.scope.cancel()
