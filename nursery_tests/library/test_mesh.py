"""`open_mesh` and what it gives: plans, watches, statistics, streams; on trio and, but for streams, on asyncio."""

from __future__ import annotations

import contextlib
import gc
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from trio.testing import MockClock

import meshlocal
from meshlocal import AttemptOverrides, AttemptPolicy, EjectionConfig, Outcome, Reason, RequestKey, ServiceConfig
from meshlocal.library.errors import tried
from meshlocal.policy.config_health import FailbackConfig, HealthCheckConfig
from meshlocal.policy.model import ServiceSnapshot
from meshlocal.policy.picker import Picker
from meshlocal.testing import FakeSource, Upstream, open_upstream, reset, silent

Run = Callable[[Callable[[], Awaitable[None]]], None]


@pytest.fixture
def autojump_clock() -> MockClock:
    """With time for bytes on their way over loopback."""
    return MockClock(autojump_threshold=0.01)


async def greeting(mesh: meshlocal.Mesh) -> str:
    async with await mesh.open_tcp_stream("b") as stream:
        return (await stream.receive_some(64)).decode().strip()


def publish(source: FakeSource, *upstreams: Upstream) -> None:
    source.set("b", *(each.instance for each in upstreams))


# Streams.


async def test_a_stream_goes_to_its_node_and_elsewhere_when_that_fails(autojump_clock: MockClock) -> None:
    """O1, A2, F1, R1: the local instance while it answers, another one within the same call while it does not."""
    source = FakeSource()
    async with open_upstream(node="n1") as near, open_upstream(node="n2") as far:
        publish(source, near, far)
        async with meshlocal.open_mesh(source, node_name="n1") as mesh:
            assert await greeting(mesh) == "n1"
            near.refuse()
            assert await greeting(mesh) == "n2"
            near.accept()
            assert await greeting(mesh) == "n1"
            counts = mesh.statistics().services["b"]
            assert counts.requests == {
                RequestKey("node", "", Outcome.SERVED): 2,
                RequestKey("other", Reason.LOCAL_FAILED, Outcome.SERVED): 1,
            }
            assert counts.attempts == {("node", "connected"): 2, ("node", "refused"): 1, ("other", "connected"): 1}
            assert counts.instances == {"node": 1, "other": 1}
            assert counts.waiting == 0


async def test_a_stream_is_trios_own(autojump_clock: MockClock) -> None:
    """What `open_tcp_stream` gives is what `trio.open_tcp_stream` gives, half-close included."""
    source = FakeSource()
    async with open_upstream(node="n1") as near:
        publish(source, near)
        async with meshlocal.open_mesh(source, node_name="n1") as mesh:
            stream = await mesh.open_tcp_stream("b")
            assert type(stream) is trio.SocketStream
            async with stream:
                await stream.send_all(b"x" * 100_000)
                await stream.send_eof()
                received = b"".join([bytes(part) async for part in stream])
            assert received == b"n1\n" + b"x" * 100_000


async def test_an_instance_that_hangs_costs_its_connect_timeout(autojump_clock: MockClock) -> None:
    """A1: 0.25 s for one of this node, 1 s for others, by default."""
    source = FakeSource()
    async with (
        open_upstream(node="n1") as near,
        open_upstream(node="n2") as far,
        open_upstream("last", labels={"zone": "z"}) as last,
    ):
        publish(source, near, far)
        near.hang()
        async with meshlocal.open_mesh(source, node_name="n1") as mesh:
            await mesh.wait_heard("b")
            start = trio.current_time()
            assert await greeting(mesh) == "n2"
            assert trio.current_time() - start == pytest.approx(0.25)
            far.hang()
            publish(source, near, far, last)
            last.refuse()
            start = trio.current_time()
            with pytest.raises(meshlocal.AttemptsFailedError) as caught:
                await mesh.open_tcp_stream("b")
            assert trio.current_time() - start == pytest.approx(1.25)
            assert sorted(each.error for each in caught.value.attempts) == ["refused", "timeout", "timeout"]


async def test_failed_attempts_are_told_with_instance_and_cause(autojump_clock: MockClock) -> None:
    """A6: one error, no group, with every attempt on it; it is an OSError, as trio's is."""
    source = FakeSource()
    async with open_upstream(node="n1") as near, open_upstream(node="n2") as far:
        publish(source, near, far)
        near.refuse()
        far.refuse()
        async with meshlocal.open_mesh(source, node_name="n1") as mesh:
            with pytest.raises(OSError, match="no instance connected") as caught:
                await mesh.open_tcp_stream("b")
            error = caught.value
            assert isinstance(error, meshlocal.AttemptsFailedError)
            assert error.service == "b"
            assert [(each.instance, each.tier, each.reason, each.error) for each in error.attempts] == [
                (near.instance, "node", None, "refused"),
                (far.instance, "other", Reason.LOCAL_FAILED, "refused"),
            ]
            assert error.instance is far.instance
            assert error.attempt is not None
            assert error.__cause__ is error.attempt.cause
            assert isinstance(error.__cause__, ConnectionRefusedError)
            assert f"127.0.0.1:{near.port} (node) refused" in str(error)
            assert mesh.statistics().services["b"].requests == {
                RequestKey("other", Reason.LOCAL_FAILED, Outcome.FAILED): 1
            }


async def test_the_deadline_is_over_all_attempts(autojump_clock: MockClock) -> None:
    """A1: the deadline ends the search; what was under way is told too."""
    source = FakeSource()
    async with open_upstream(node="n1") as near, open_upstream(node="n2") as far:
        publish(source, near, far)
        near.refuse()
        far.hang()
        policy = AttemptPolicy(deadline=0.5, connect_timeout=5)
        async with meshlocal.open_mesh(source, node_name="n1", attempts=policy) as mesh:
            await mesh.wait_heard("b")
            start = trio.current_time()
            with pytest.raises(TimeoutError) as caught:
                await mesh.open_tcp_stream("b")
            assert trio.current_time() - start == pytest.approx(0.5)
            assert isinstance(caught.value, meshlocal.DeadlineError)
            assert [each.error for each in caught.value.attempts] == ["refused", "abandoned"]


async def test_max_attempts(autojump_clock: MockClock) -> None:
    """O5: no more instances are tried than the policy of the service allows."""
    source = FakeSource()
    async with open_upstream(node="n1") as near, open_upstream(node="n2") as far:
        publish(source, near, far)
        near.refuse()
        services = {"b": ServiceConfig(attempts=AttemptOverrides(max_attempts=1))}
        async with meshlocal.open_mesh(source, node_name="n1", services=services) as mesh:
            with pytest.raises(meshlocal.AttemptsFailedError) as caught:
                await mesh.open_tcp_stream("b")
            assert len(caught.value.attempts) == 1
            assert far.accepted == 0


async def test_no_instance(autojump_clock: MockClock) -> None:
    """A6, A7: each way of there being none has its words."""
    source = FakeSource()
    source.set("empty")
    source.set("gone", meshlocal.make_instance("127.0.0.1", 9, conditions=meshlocal.Conditions(ready=False)))
    async with meshlocal.open_mesh(source, node_name="n1") as mesh:
        with pytest.raises(meshlocal.NoInstanceError, match="nobody: no registry knows it") as caught:
            await mesh.open_tcp_stream("nobody")
        assert caught.value.attempts == ()
        assert caught.value.attempt is None
        assert caught.value.instance is None
        assert caught.value.__cause__ is None
        with pytest.raises(meshlocal.NoInstanceError, match="empty: it has no instance"):
            await mesh.open_tcp_stream("empty")
        with pytest.raises(meshlocal.NoInstanceError, match="gone: no usable instance; 1 left out"):
            await mesh.open_tcp_stream("gone")
        source.go_away()
        start = trio.current_time()
        with pytest.raises(meshlocal.NoInstanceError, match="late: nothing was heard of it within 5 s"):
            await mesh.open_tcp_stream("late")
        assert trio.current_time() - start == pytest.approx(5)


async def test_a_first_use_waits_for_the_first_snapshot(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """A7: a request that comes before anything was heard waits."""
    source = FakeSource()
    source.go_away()
    async with open_upstream(node="n1") as near, meshlocal.open_mesh(source, node_name="n1") as mesh:
        answers: list[str] = []

        async def ask() -> None:
            answers.append(await greeting(mesh))

        nursery.start_soon(ask)
        await trio.sleep(3)
        assert mesh.statistics().services["b"].waiting == 1
        publish(source, near)
        source.come_back()
        await trio.sleep(1)
        assert answers == ["n1"]


async def test_a_reset_after_the_connect_is_the_callers(autojump_clock: MockClock) -> None:
    """A5: a stream that connected stays with its instance."""
    source = FakeSource()
    async with open_upstream(node="n1", behaviour=reset) as near, open_upstream(node="n2") as far:
        publish(source, near, far)
        async with meshlocal.open_mesh(source, node_name="n1") as mesh:
            with pytest.raises(trio.BrokenResourceError):
                await greeting(mesh)
            assert far.accepted == 0


@pytest.mark.parametrize("after", [0.0, 0.1, 0.3])
async def test_cancellation_leaves_nothing_behind(after: float, autojump_clock: MockClock) -> None:
    """A8: a caller that is cancelled, at its start or within an attempt, leaves no socket and is counted."""
    source = FakeSource()
    async with open_upstream(node="n1") as near, open_upstream(node="n2") as far:
        publish(source, near, far)
        near.hang()
        far.hang()
        async with meshlocal.open_mesh(source, node_name="n1") as mesh:
            await mesh.wait_heard("b")
            with trio.move_on_after(after) as scope:
                await mesh.open_tcp_stream("b")
            assert scope.cancelled_caught
            counts = mesh.statistics().services["b"]
            assert counts.waiting == 0
            assert sum(counts.requests.values()) == (1 if after else 0)
            if after:
                assert {key.outcome for key in counts.requests} == {Outcome.CLIENT_LEFT}


async def test_cancelled_before_it_began(autojump_clock: MockClock) -> None:
    """A call in a cancelled scope connects to nobody, however fast a connect would be."""
    source = FakeSource()
    async with open_upstream(node="n1", behaviour=silent) as near:
        publish(source, near)
        async with meshlocal.open_mesh(source, node_name="n1") as mesh:
            await mesh.wait_heard("b")
            with trio.CancelScope() as scope:
                scope.cancel()
                await mesh.open_tcp_stream("b")
            assert scope.cancelled_caught
            await trio.sleep(1)
            assert near.accepted == 0


def test_streams_are_trios_only() -> None:
    """On another loop the error says so, and nothing was tried."""

    async def main() -> None:
        source = FakeSource({"b": [meshlocal.make_instance("127.0.0.1", 9)]})
        async with meshlocal.open_mesh(source) as mesh:
            with pytest.raises(meshlocal.NotTrioError, match="not trio's"):
                await mesh.open_tcp_stream("b")
            assert mesh.statistics().services == {}

    anyio.run(main, backend="asyncio")


# Plans, watches and statistics, on both loops.


def test_plan_and_reasons(on_loop: Run) -> None:
    """R2, O1, L4: every step with its tier and reason, and what is in no plan."""
    local, other = meshlocal.make_instance("10.0.0.1", 1, labels={"node": "n1"}), meshlocal.make_instance("10.0.0.2", 1)
    unready = meshlocal.make_instance("10.0.0.3", 1, conditions=meshlocal.Conditions(ready=False))
    source = FakeSource({"b": [local, other, unready]})

    async def main() -> None:
        async with meshlocal.open_mesh(source, node_name="n1") as mesh:
            before = mesh.plan("b")
            assert not before.heard
            assert before.steps == ()
            assert "nothing heard yet" in str(before)
            await mesh.wait_heard("b")
            plan = mesh.plan("b")
            assert [(step.instance, step.tier, step.reason) for step in plan.steps] == [
                (local, "node", None),
                (other, "other", Reason.LOCAL_FAILED),
            ]
            assert plan.left_out == ((unready, meshlocal.LeftOut.NOT_READY),)
            assert (plan.heard, plan.known, plan.node, plan.tiers) == (True, True, "n1", ("node", "other"))
            assert str(plan).splitlines()[1:] == ["1. 10.0.0.1:1 node", "2. 10.0.0.2:1 other local_failed"]
            assert mesh.plan("b") == plan
            await mesh.wait_heard("nobody")
            assert "no registry knows it" in str(mesh.plan("nobody"))

    on_loop(main)


def test_tiers_by_labels(on_loop: Run) -> None:
    """L3, L6: tiers in the order of `prefer`; `within` leaves out what is outside."""
    instances = [
        meshlocal.make_instance(f"10.0.0.{number}", 1, labels=labels)
        for number, labels in enumerate(
            [{"zone": "z1"}, {"node": "n1", "zone": "z1"}, {"zone": "z2", "node": "n1"}, {"zone": "z1", "rack": "r1"}]
        )
    ]

    async def main() -> None:
        async with meshlocal.open_mesh(
            FakeSource({"b.shop": instances}),
            node_name="n1",
            prefer=("node", "rack"),
            labels={"rack": "r1", "zone": "z1"},
            within="zone",
            namespace="shop",
        ) as mesh:
            assert mesh.tiers == ("node", "rack", "other")
            await mesh.wait_heard("b")
            steps = mesh.plan("b").steps
            assert [(step.instance.key.address, step.tier) for step in steps] == [
                ("10.0.0.1", "node"),
                ("10.0.0.3", "rack"),
                ("10.0.0.0", "other"),
            ]

    on_loop(main)


def test_a_watch_gives_the_latest_state_and_no_queue(on_loop: Run) -> None:
    """D4: the present state first; a slow reader gets the latest one, once."""
    source = FakeSource()

    def ports(snapshot: meshlocal.ServiceSnapshot) -> list[int]:
        return sorted(key.port for key in snapshot.instances)

    async def main() -> None:
        async with meshlocal.open_mesh(source) as mesh:
            watch = mesh.watch("b")
            assert (await anext(watch)).unknown
            for port in range(1, 9):
                source.set("b", meshlocal.make_instance("10.0.0.1", port))
                await anyio.wait_all_tasks_blocked()
            assert ports(await anext(watch)) == [8]
            with anyio.move_on_after(0.05) as quiet:
                await anext(watch)
            assert quiet.cancelled_caught
            source.set("b", meshlocal.make_instance("10.0.0.1", 9))
            assert ports(await anext(watch)) == [9]
            source.remove("b")
            assert (await anext(watch)).unknown

    on_loop(main)


def test_a_watch_ends_with_its_mesh(on_loop: Run) -> None:
    """A task outside the block is told that the mesh is closed; so is every later call."""

    async def main() -> None:
        ended: list[type[Exception]] = []

        async def follow(mesh: meshlocal.Mesh) -> None:
            try:
                async for _ in mesh.watch("b"):
                    pass
            except meshlocal.MeshError as error:
                ended.append(type(error))

        async with anyio.create_task_group() as tasks, meshlocal.open_mesh(FakeSource()) as mesh:
            tasks.start_soon(follow, mesh)
            await anyio.wait_all_tasks_blocked()
        assert ended == [meshlocal.MeshClosedError]
        for use in (lambda: mesh.plan("b"), mesh.statistics):
            with pytest.raises(meshlocal.MeshClosedError, match="closed"):
                use()

    on_loop(main)


def test_an_outage_changes_nothing_but_the_age(on_loop: Run) -> None:
    """D1: what was known stays, and the statistics say how old it is."""
    source = FakeSource({"b": [meshlocal.make_instance("10.0.0.1", 1)]})

    async def main() -> None:
        async with meshlocal.open_mesh(source, node_name="n1") as mesh:
            await mesh.wait_heard("b")
            assert mesh.statistics().connected
            source.go_away("rebooting")
            await anyio.sleep(0.05)
            told = mesh.statistics()
            assert (told.connected, told.problem, told.reconnects, told.source) == (False, "rebooting", 1, "fake")
            assert told.age is not None
            assert told.age >= 0.05
            assert len(mesh.plan("b").steps) == 1
            assert told.node_unmatched

    on_loop(main)


def test_services_are_followed_on_demand_and_dropped_when_unused() -> None:
    """A service is followed from its first use, and no longer when it was not used for some minutes."""
    source = FakeSource()

    async def main() -> None:
        async with meshlocal.open_mesh(source) as mesh:
            assert source.followed == frozenset()
            mesh.plan("b")
            mesh.plan("c")
            assert source.followed == {"b", "c"}
            await anyio.sleep(400)
            mesh.plan("c")
            await anyio.sleep(400)
            assert source.followed == {"c"}
            await anyio.sleep(400)
            assert source.followed == frozenset()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_watched_service_is_in_use(on_loop: Run) -> None:
    """More services than a mesh follows: those that are waited on stay, and one more is refused."""

    async def main() -> None:
        source = FakeSource()
        async with anyio.create_task_group() as tasks, meshlocal.open_mesh(source) as mesh:

            async def follow(name: str) -> None:
                async for _ in mesh.watch(name):
                    pass

            for number in range(1000):
                tasks.start_soon(follow, f"s{number}")
            await anyio.wait_all_tasks_blocked()
            assert len(source.followed) == 1000
            with pytest.raises(meshlocal.TooManyServicesError, match="more: 1000 other services"):
                mesh.plan("more")
            tasks.cancel_scope.cancel()

    on_loop(main)


# Opening and closing.


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"sources": ()}, "sources: none is given"),
        ({"sources": ("http://x:1",)}, r"sources\[0\]: expected grpc://"),
        ({"sources": ("file:a", "grpc://b:1")}, r"sources\[0\]: an instances file stands alone"),
        ({"sources": (FakeSource(), "file:a")}, "sources: an InstanceSource stands alone"),
        ({"sources": ("file:a",), "prefer": ()}, "prefer: is empty"),
        ({"sources": ("file:a",), "labels": {"node": "n1"}}, "labels.node: is set by node_name"),
        ({"sources": ("file:a",), "within": "zone"}, "within: labels has no .zone."),
        ({"sources": ("file:a",), "prefer": "node"}, "prefer: expected label keys, got the string 'node'"),
        ({"sources": ("file:a",), "attempts": AttemptPolicy(deadline=-1)}, "attempts.deadline: expected"),
        ({"sources": ("file:a",), "services": {"b c": ServiceConfig()}}, "services.b c"),
        ({"sources": ("file:a",), "ejection": EjectionConfig(time=-1)}, "ejection.time: expected"),
        ({"sources": ("grpcs://b:1",), "ca_file": ""}, "ca_file: is empty"),
        ({"sources": ("file:a",), "cache_file": "c"}, "cache_file: an instances file needs none"),
        (
            {"sources": ("file:a",), "services": {"b": ServiceConfig(health_check=HealthCheckConfig(kind="tcp"))}},
            "services.b.health_check: a mesh learns from its own requests only",
        ),
        ({"sources": ("file:a",), "services": {"b": ServiceConfig(failback=FailbackConfig())}}, "services.b.failback"),
    ],
)
async def test_arguments_that_cannot_be_used(arguments: dict[str, Any], problem: str) -> None:
    """Bad input: the argument at fault and why, by the names that the caller knows."""
    sources = arguments.pop("sources")
    with pytest.raises(meshlocal.MeshConfigError, match=problem):
        async with meshlocal.open_mesh(*sources, **arguments):
            raise AssertionError("opened")


async def test_names_that_no_service_has() -> None:
    async with meshlocal.open_mesh(FakeSource()) as mesh:
        for use in (mesh.plan, mesh.watch):
            with pytest.raises(ValueError, match="'no good' is no service name"):
                use("no good")
        with pytest.raises(ValueError, match="'no good' is no service name"):
            await mesh.open_tcp_stream("no good")


@pytest.mark.parametrize(
    ("given", "variable", "node"), [("n1", "n2", "n1"), (None, "n2", "n2"), ("  ", "n2", "n2"), (None, " ", "")]
)
async def test_the_node_is_given_or_the_environments(
    given: str | None, variable: str, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L1: the argument, else NODE_NAME, else unknown; blank is unknown."""
    monkeypatch.setenv("NODE_NAME", variable)
    async with meshlocal.open_mesh(FakeSource(), node_name=given) as mesh:
        assert mesh.node == node


def test_what_the_block_raises_comes_out_as_it_is(on_loop: Run) -> None:
    """No group for a single failure, of an application's or of the mesh's own tasks."""

    class OwnSource:
        def feed(self, sink: meshlocal.SnapshotSink) -> meshlocal.Feed:
            return self

        status = meshlocal.FeedStatus()

        def follow(self, services: object) -> None:
            return

        async def run(self) -> None:
            await anyio.sleep(0.01)
            raise RuntimeError("a fault in a feed")

    async def main() -> None:
        with pytest.raises(KeyError, match="the application's"):
            async with meshlocal.open_mesh(FakeSource()):
                raise KeyError("the application's")
        with pytest.raises(KeyboardInterrupt):
            async with meshlocal.open_mesh(FakeSource()):
                raise KeyboardInterrupt
        with pytest.raises(RuntimeError, match="a fault in a feed"):
            async with meshlocal.open_mesh(OwnSource()):
                await anyio.sleep(100)
        with anyio.move_on_after(0.01) as scope:
            async with meshlocal.open_mesh(FakeSource()):
                await anyio.sleep(100)
        assert scope.cancelled_caught

    on_loop(main)


def test_of_two_failures_neither_is_lost(on_loop: Run) -> None:
    """The block fails while its mesh does: a group tells of both."""

    class Failing:
        status = meshlocal.FeedStatus()

        def feed(self, sink: meshlocal.SnapshotSink) -> meshlocal.Feed:
            return self

        def follow(self, services: object) -> None:
            return

        async def run(self) -> None:
            raise RuntimeError("a fault in a feed")

    async def block_and_mesh_fail() -> None:
        async with meshlocal.open_mesh(Failing()):
            try:
                await anyio.sleep(100)
            finally:
                raise KeyError("the application's")

    async def main() -> None:
        with pytest.raises(BaseExceptionGroup) as caught:
            await block_and_mesh_fail()
        assert caught.group_contains(KeyError, match="the application's")
        assert caught.group_contains(RuntimeError, match="a fault in a feed")

    on_loop(main)


async def test_when_every_attempt_fails_discovery_is_asked_again(autojump_clock: MockClock) -> None:
    """D5, H1: what failed for a while is asked for anew, and comes back; who fails is tried last of all."""
    source = FakeSource()
    async with open_upstream(node="n1") as near, open_upstream(node="n2") as far:
        publish(source, near)
        near.refuse()
        ejection = EjectionConfig(failures=1)
        async with meshlocal.open_mesh(source, node_name="n1", ejection=ejection) as mesh:
            for _ in range(4):
                with pytest.raises(meshlocal.AttemptsFailedError):
                    await greeting(mesh)
                assert source.refreshed == [] or trio.current_time() > 1
                await trio.sleep(0.4)
            assert source.refreshed == ["b"]
            publish(source, near, far)
            near.accept()
            first, last = mesh.plan("b").steps
            assert (first.instance, first.reason, last.instance) == (far.instance, Reason.LOCAL_EJECTED, near.instance)
            assert await greeting(mesh) == "n2"


def test_what_was_known_outlives_a_restart(tmp_path: Path) -> None:
    """D2: with a cache file a mesh begins with what was known, says that it is stale, and then what discovery says."""
    file = tmp_path / "cache"
    one, two = meshlocal.make_instance("10.0.0.1", 1), meshlocal.make_instance("10.0.0.2", 1)

    async def main() -> None:
        source = FakeSource({"b": [one]})
        async with meshlocal.open_mesh(source, cache_file=file) as mesh:
            await mesh.wait_heard("b")
            assert not mesh.statistics().stale
        source.go_away()
        source.set("b", two)
        async with meshlocal.open_mesh(source, cache_file=file) as mesh:
            assert [step.instance.key for step in mesh.plan("b").steps] == [one.key]
            assert not mesh.plan("c").heard
            told = mesh.statistics()
            assert (told.stale, told.connected) == (True, False)
            assert told.age is not None
            watch = mesh.watch("b")
            assert set((await anext(watch)).instances) == {one.key}
            source.come_back()
            assert set((await anext(watch)).instances) == {two.key}
            assert not mesh.statistics().stale
        async with meshlocal.open_mesh("grpc://127.0.0.1:1", cache_file=str(file)) as mesh:
            assert [step.instance.key for step in mesh.plan("b").steps] == [two.key]
            assert mesh.statistics().stale

    # A thread writes the file: no clock that jumps.
    for loop in ("trio", "asyncio"):
        file.unlink(missing_ok=True)
        anyio.run(main, backend=loop)


@pytest.mark.parametrize("content", [None, b"", b"junk" * 100])
async def test_a_cache_file_that_cannot_be_used_is_as_good_as_none(content: bytes | None, tmp_path: Path) -> None:
    """D2: whatever stands in it, and even if nothing can be written there, the mesh opens."""
    file = tmp_path / "cache" if content is not None else tmp_path / "missing" / "cache"
    if content is not None:
        file.write_bytes(content)
    async with meshlocal.open_mesh(
        FakeSource({"b": [meshlocal.make_instance("10.0.0.1", 1)]}), cache_file=file
    ) as mesh:
        await mesh.wait_heard("b")
        assert len(mesh.plan("b").steps) == 1


def test_from_a_file(on_loop: Run, tmp_path: Path) -> None:
    """The same without a server, on either loop; a change of the file is followed."""
    file = tmp_path / "instances.yaml"
    file.write_text("services: {b: [{address: 10.0.0.1, port: 1, labels: {node: n1}}]}")

    async def main() -> None:
        async with meshlocal.open_mesh(f"file:{file}", node_name="n1") as mesh:
            watch = mesh.watch("b")
            assert [key.port for key in (await anext(watch)).instances] == [1]
            file.write_text("services: {b: [{address: 10.0.0.1, port: 2222, labels: {node: n1}}]}")
            assert [key.port for key in (await anext(watch)).instances] == [2222]

    # A thread reads the file: no clock that jumps.
    anyio.run(main, backend="asyncio")
    file.write_text("services: {b: [{address: 10.0.0.1, port: 1, labels: {node: n1}}]}")
    anyio.run(main, backend="trio")


async def test_first_positions_are_by_the_random_source_given() -> None:
    """O4: an argument, so that a test can know the order."""
    instances = [meshlocal.make_instance(f"10.0.0.{number}", 1) for number in range(100)]

    async def order(seed: int) -> list[str]:
        async with meshlocal.open_mesh(FakeSource({"b": instances}), rng=random.Random(seed)) as mesh:
            await mesh.wait_heard("b")
            return [step.instance.key.address for step in mesh.plan("b").steps]

    assert await order(1) == await order(1)
    assert await order(1) != await order(2)


# Limits and spill, of streams for as long as they are open.


@asynccontextmanager
async def limited(**service: Any) -> AsyncIterator[tuple[meshlocal.Mesh, Upstream, Upstream]]:
    source = FakeSource()
    async with (
        open_upstream(node="n1") as near,
        open_upstream(node="n2") as far,
        meshlocal.open_mesh(source, node_name="n1", services={"b": meshlocal.ServiceConfig(**service)}) as mesh,
    ):
        source.set("b", near.instance, far.instance)
        await mesh.wait_heard("b")
        yield mesh, near, far


@pytest.mark.parametrize("what", ["connections", "requests"])
@pytest.mark.parametrize("how", ["aclose", "forcefully", "socket", "forgotten"])
async def test_a_stream_counts_until_it_is_closed(what: str, how: str) -> None:
    """Limits: in whatever way that happens. One too many is refused at once."""
    async with limited(limits=meshlocal.LimitsConfig(**{what: 2})) as (mesh, _, _):
        state = mesh.core.services[meshlocal.ServiceKey("b")]
        streams = [await mesh.open_tcp_stream("b") for _ in range(2)]
        with pytest.raises(meshlocal.LimitedError):
            await mesh.open_tcp_stream("b")
        assert state.statistics.open == 2
        stream = streams.pop()
        if how == "aclose":
            await stream.aclose()
        elif how == "forcefully":
            await trio.aclose_forcefully(stream)
        elif how == "socket":
            stream.socket.close()
        else:
            os.close(stream.socket.detach())
            del stream
            gc.collect()
        assert state.statistics.open == 1
        async with await mesh.open_tcp_stream("b"):
            assert state.statistics.open == 2
        await streams[0].aclose()
        await streams[0].aclose()
        assert (state.in_use, state.statistics.open, state.fitness.under_way) == (0, 0, {})
        assert set(state.circuit.now.values()) == {0}


async def test_an_open_stream_holds_no_snapshot() -> None:
    """P2: it may be open for days, and each change would leave one behind."""
    async with limited() as (mesh, _, _), contextlib.AsyncExitStack() as opened:
        state = mesh.core.services[meshlocal.ServiceKey("b")]
        for number in range(4):
            stream = await mesh.open_tcp_stream("b")
            opened.push_async_callback(stream.aclose)
            assert state.picker is not None
            known = state.picker.snapshot
            state.publish(ServiceSnapshot(known.service, f"v{number}", dict(known.instances)))
        gc.collect()
        held = [each for each in gc.get_objects() if type(each) is Picker and each.selector is state.selector]
        assert held == [state.picker]


async def test_open_streams_spill_to_the_next_tier() -> None:
    """F3: an instance is full of what is under way on it, and streams are, until they are closed."""
    async with limited(spill=2) as (mesh, near, far), contextlib.AsyncExitStack() as opened:
        streams = [await mesh.open_tcp_stream("b") for _ in range(3)]
        for stream in streams:
            opened.push_async_callback(stream.aclose)
        ports = [stream.socket.getpeername()[1] for stream in streams]
        assert ports == [near.port, near.port, far.port]
        await streams[0].aclose()
        async with await mesh.open_tcp_stream("b") as again:
            assert again.socket.getpeername()[1] == near.port


async def test_streams_that_wait_are_limited() -> None:
    """`limits.waiting`."""
    async with limited(
        limits=meshlocal.LimitsConfig(waiting=1),
        attempts=meshlocal.AttemptOverrides(connect_timeout_local=5.0, connect_timeout=5.0),
    ) as (mesh, near, far):
        near.hang()
        far.hang()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mesh.open_tcp_stream, "b")
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(meshlocal.LimitedError, match="wait for an instance"):
                await mesh.open_tcp_stream("b")
            nursery.cancel_scope.cancel()
        state = mesh.core.services[meshlocal.ServiceKey("b")]
        assert set(state.circuit.now.values()) == {0}


async def test_a_service_that_is_no_config_is_named() -> None:
    with pytest.raises(meshlocal.MeshConfigError, match=r"services\.web: expected a ServiceConfig, got a mapping"):
        async with meshlocal.open_mesh("grpc://127.0.0.1:1", services={"web": {"spill": 1}}):  # type: ignore[dict-item]  # wrong
            pass


def test_a_long_row_of_attempts_names_the_first_ones_too() -> None:
    """They are the nearest: why the local ones failed is what is asked first."""
    attempts = [
        meshlocal.Attempt(
            meshlocal.make_instance(f"10.0.0.{n}", 1), "node" if n == 1 else "other", None, "refused", None
        )
        for n in range(1, 11)
    ]
    told = tried(attempts)
    assert told.startswith("10.0.0.1:1 (node) refused, 10.0.0.2:1 (other) refused, ")
    assert "… 4 more …" in told
    assert told.endswith("10.0.0.10:1 (other) refused")
    assert tried(attempts[:6]).count("refused") == 6


async def test_a_fault_beside_the_data_path_leaves_the_application_alone(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """P1: the block of `open_mesh` goes on; what failed begins again."""
    source = FakeSource()
    failures = 0

    def broken(self: Any, now: float) -> float:
        nonlocal failures
        failures += 1
        raise KeyError("of ours")

    monkeypatch.setattr("meshlocal.client.services.ServiceTable.drop_unused", broken)
    async with meshlocal.open_mesh(source) as mesh:
        await trio.sleep(300)
        assert failures > 5
        assert mesh.core.supervision.failures["unused services"] == failures
