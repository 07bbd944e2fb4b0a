"""The standard health service, grpc.health.v1.

Not imported by the client: an application that has grpcio-health-checking registers the same messages.
"""

from __future__ import annotations

from collections.abc import Mapping

import anyio

from meshlocal.net.grpc.server import Routes, unary
from meshlocal.net.grpc.servercall import ServerCall
from meshlocal.wire.grpc.method import Method
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import health_pb2 as pb

CHECK = Method("/grpc.health.v1.Health/Check", pb.HealthCheckRequest, pb.HealthCheckResponse)
LIST = Method("/grpc.health.v1.Health/List", pb.HealthListRequest, pb.HealthListResponse)
WATCH = Method("/grpc.health.v1.Health/Watch", pb.HealthCheckRequest, pb.HealthCheckResponse, server_streaming=True)

UNKNOWN = pb.HealthCheckResponse.UNKNOWN
SERVING = pb.HealthCheckResponse.SERVING
NOT_SERVING = pb.HealthCheckResponse.NOT_SERVING
_SERVICE_UNKNOWN = pb.HealthCheckResponse.SERVICE_UNKNOWN


class HealthStatus:
    """What the health service says: a status by service name, where the empty name is the whole server."""

    def __init__(self) -> None:
        self._statuses: dict[str, pb.HealthCheckResponse.ServingStatus] = {}
        self._changed: anyio.Event | None = None

    @property
    def statuses(self) -> Mapping[str, pb.HealthCheckResponse.ServingStatus]:
        """The status of each service that was given one."""
        return self._statuses

    def set(self, service: str, status: pb.HealthCheckResponse.ServingStatus) -> None:
        """Set one service's status (SERVING, NOT_SERVING, UNKNOWN) and wake its watchers."""
        self._statuses[service] = status
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def changed(self) -> anyio.Event:
        """Set at the next `set`."""
        if self._changed is None:
            self._changed = anyio.Event()
        return self._changed

    def handlers(self) -> Routes:
        """The service's methods, for `GrpcServer`."""
        return {CHECK: unary(self._check), LIST: unary(self._list), WATCH: self._watch}

    async def _check(
        self, request: pb.HealthCheckRequest, call: ServerCall[pb.HealthCheckRequest, pb.HealthCheckResponse]
    ) -> pb.HealthCheckResponse:
        status = self._statuses.get(request.service)
        if status is None:
            raise GrpcError(StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        return pb.HealthCheckResponse(status=status)

    async def _list(
        self, request: pb.HealthListRequest, call: ServerCall[pb.HealthListRequest, pb.HealthListResponse]
    ) -> pb.HealthListResponse:
        statuses = {service: pb.HealthCheckResponse(status=status) for service, status in self._statuses.items()}
        return pb.HealthListResponse(statuses=statuses)

    async def _watch(self, call: ServerCall[pb.HealthCheckRequest, pb.HealthCheckResponse]) -> None:
        request = await call.receive()
        if request is None:
            raise GrpcError(StatusCode.INTERNAL, "the client sent no request")
        sent = None
        while True:
            changed = self.changed()
            status = self._statuses.get(request.service, _SERVICE_UNKNOWN)
            if status != sent:
                await call.send(pb.HealthCheckResponse(status=status))
                sent = status
            if call.draining.is_set():
                raise GrpcError(StatusCode.UNAVAILABLE, "the server is draining")
            await _wait_first(changed, call.draining)


async def _wait_first(*events: anyio.Event) -> None:
    async with anyio.create_task_group() as tasks:
        for event in events:
            tasks.start_soon(_cancel_after, event, tasks.cancel_scope)


async def _cancel_after(event: anyio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
