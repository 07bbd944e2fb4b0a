"""The health service."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from meshlocal.net.grpc.health import CHECK, LIST, NOT_SERVING, SERVING, WATCH, HealthStatus
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import health_pb2 as pb


async def test_check_and_list(connect: Any) -> None:
    health = HealthStatus()
    health.set("", SERVING)
    health.set("a.B", NOT_SERVING)
    async with connect(health.handlers()) as link:
        assert (await link.channel.unary(CHECK, pb.HealthCheckRequest())).status == SERVING
        assert (await link.channel.unary(CHECK, pb.HealthCheckRequest(service="a.B"))).status == NOT_SERVING
        with pytest.raises(GrpcError, match=r"a\.C") as caught:
            await link.channel.unary(CHECK, pb.HealthCheckRequest(service="a.C"))
        assert caught.value.code is StatusCode.NOT_FOUND
        statuses = (await link.channel.unary(LIST, pb.HealthListRequest())).statuses
        assert {name: each.status for name, each in statuses.items()} == {"": SERVING, "a.B": NOT_SERVING}


async def test_watch_tells_changes_only_and_ends_at_drain(connect: Any) -> None:
    health = HealthStatus()
    async with connect(health.handlers()) as link, link.channel.call(WATCH) as call:
        await call.send(pb.HealthCheckRequest(service="a.B"), end=True)
        assert (await call.receive()).status == pb.HealthCheckResponse.SERVICE_UNKNOWN
        health.set("other", SERVING)
        await wait_all_tasks_blocked()
        health.set("a.B", SERVING)
        assert (await call.receive()).status == SERVING
        health.set("a.B", SERVING)
        await wait_all_tasks_blocked()
        health.set("a.B", NOT_SERVING)
        assert (await call.receive()).status == NOT_SERVING
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.server.drain)
            with pytest.raises(GrpcError, match="draining") as caught:
                await call.receive()
        assert caught.value.code is StatusCode.UNAVAILABLE
