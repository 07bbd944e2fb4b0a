"""An application as a type checker sees it. It is checked, never run; `test_typing.py` says what of."""

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import assert_type

import httpx
import trio

import meshlocal
import meshlocal.httpx
import meshlocal.testing


async def uses(mesh: meshlocal.Mesh) -> None:
    assert_type(await mesh.open_tcp_stream("b"), trio.SocketStream)
    assert_type(mesh.node, str)
    assert_type(mesh.tiers, tuple[str, ...])
    assert_type(await mesh.wait_heard("b"), None)
    async for snapshot in assert_type(mesh.watch("b"), meshlocal.ServiceWatch):
        assert_type(snapshot, meshlocal.ServiceSnapshot)
        assert_type(snapshot.instances, Mapping[meshlocal.EndpointKey, meshlocal.Instance])
        assert_type(snapshot.unknown, bool)


def plans(mesh: meshlocal.Mesh) -> None:
    plan = assert_type(mesh.plan("b"), meshlocal.ServicePlan)
    for step in plan.steps:
        assert_type(step.instance, meshlocal.Instance)
        assert_type(step.instance.key.port, int)
        assert_type(step.reason, meshlocal.Reason | None)
    assert_type(plan.left_out, tuple[tuple[meshlocal.Instance, meshlocal.LeftOut], ...])


def counts(mesh: meshlocal.Mesh) -> None:
    told = assert_type(mesh.statistics(), meshlocal.MeshStatistics)
    assert_type(told.age, float | None)
    assert_type(told.stale, bool)
    of = assert_type(told.services["b"], meshlocal.ServiceStatistics)
    for key, count in of.requests.items():
        assert_type(key, meshlocal.RequestKey)
        assert_type(count, int)


def errors(error: meshlocal.ServiceError) -> None:
    caught: OSError = error
    assert_type(error.attempts, tuple[meshlocal.Attempt, ...])
    assert_type(error.instance, meshlocal.Instance | None)
    assert caught is error
    if error.attempt is not None:
        assert_type(error.attempt.cause, Exception | None)
        assert_type(error.attempt.reason, meshlocal.Reason | None)
    timeout: TimeoutError = meshlocal.DeadlineError("", "b")
    both: httpx.TransportError = meshlocal.httpx.HttpReadError("", "b")
    assert isinstance(timeout, Exception)
    assert isinstance(both, Exception)


class OwnSource:
    """What `InstanceSource` and `Feed` ask of an application's own."""

    def feed(self, sink: meshlocal.SnapshotSink) -> meshlocal.Feed:
        return OwnFeed(sink)


class OwnFeed:
    status = meshlocal.FeedStatus()

    def __init__(self, sink: meshlocal.SnapshotSink) -> None:
        self._sink = sink

    def follow(self, services: Sequence[meshlocal.ServiceKey]) -> None: ...

    async def run(self) -> None:
        instance = meshlocal.make_instance("10.0.0.1", 1, labels={"node": "n1"})
        instances = {instance.key: instance}
        self._sink.publish(meshlocal.ServiceSnapshot(meshlocal.ServiceKey("b"), "1", instances))


async def opens() -> None:
    opened: AbstractAsyncContextManager[meshlocal.Mesh] = meshlocal.open_mesh("grpc://10.0.0.1:7070", "ws://[::1]:1")
    meshlocal.open_mesh(OwnSource())
    meshlocal.open_mesh(meshlocal.testing.FakeSource(), rng=random.Random(0))
    meshlocal.open_mesh(
        "grpcs://10.0.0.1:7070",
        node_name="n1",
        prefer=("node", "zone"),
        labels={"zone": "z1"},
        within="zone",
        namespace="shop",
        attempts=meshlocal.AttemptPolicy(connect_timeout=0.5, max_attempts=3),
        ejection=meshlocal.EjectionConfig(failures=5),
        services={"b": meshlocal.ServiceConfig(limits=meshlocal.LimitsConfig(requests=10))},
        ca_file="ca.pem",
        token_file="token",
        cache_file=Path("cache"),
    )
    async with opened as mesh:
        assert_type(mesh, meshlocal.Mesh)
        transport = meshlocal.httpx.MeshTransport(mesh, limits=httpx.Limits(max_connections=5))
        async with httpx.AsyncClient(transport=transport) as client:
            assert_type(await client.get("http://b/"), httpx.Response)


async def tests() -> None:
    async with meshlocal.testing.open_upstream(node="n1", behaviour=meshlocal.testing.http()) as upstream:
        assert_type(upstream, meshlocal.testing.Upstream)
        assert_type(upstream.requests, list[meshlocal.testing.HttpRequest])
        upstream.behave(meshlocal.testing.reset, times=2)
        upstream.behave(meshlocal.testing.http(lambda request: meshlocal.testing.HttpResponse(503)))
        upstream.behave(meshlocal.testing.answer(b"bye"))

    async def main(number: int) -> str:
        return str(number)

    assert_type(meshlocal.testing.run(main, 1), str)


async def mistakes(mesh: meshlocal.Mesh) -> None:
    """Each line is an error that a checker must find: one that it does not find is an unused ignore, and fails."""
    meshlocal.open_mesh(1)  # type: ignore[arg-type]
    meshlocal.open_mesh("file:a", node="n1")  # type: ignore[call-arg]
    meshlocal.open_mesh("file:a", prefer=1)  # type: ignore[arg-type]
    meshlocal.AttemptPolicy(retries=3)  # type: ignore[call-arg]
    mesh.plan(b"b")  # type: ignore[arg-type]
    mesh.open_tcp_stream("b")  # type: ignore[unused-coroutine]
    mesh.statistics().node = ""  # type: ignore[misc]
    mesh.plan("b").steps.append(None)  # type: ignore[attr-defined]
    meshlocal.testing.open_upstream("n1", "n1")  # type: ignore[call-arg]
    meshlocal.testing.http(503)  # type: ignore[arg-type]
    meshlocal.nonsense  # type: ignore[attr-defined]  # noqa: B018
