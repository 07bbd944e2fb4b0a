"""The hub: merging, versions, watchers (D1, D3, D4)."""

from __future__ import annotations

import random

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from meshlocal.client.services import ServiceState
from meshlocal.discovery.hub import HISTORY, Hub, Update, Watcher
from meshlocal.discovery.service import EncodedEvents
from meshlocal.discovery.source import Instances, Publisher
from meshlocal.policy import model
from meshlocal.policy.config import AttemptPolicy
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import Instance, ServiceChange, ServiceKey, ServiceSnapshot, apply, diff, make_instance

B, C = ServiceKey("b"), ServiceKey("c")


class ScriptedSource:
    """A source that does what its test tells it to, step by step."""

    def __init__(self, name: str = "scripted") -> None:
        self.name = name
        self.runs = 0
        self._publisher: Publisher | None = None
        self._task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
        self._failure: Exception | None = None
        self._fail = trio.Event()

    @property
    def publisher(self) -> Publisher:
        assert self._publisher is not None
        return self._publisher

    def started(self) -> None:
        self._task_status.started()

    def fail(self, failure: Exception) -> None:
        self._failure = failure
        self._fail.set()

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        self.runs += 1
        self._publisher, self._task_status, self._fail = publisher, task_status, trio.Event()
        await self._fail.wait()
        assert self._failure is not None
        raise self._failure


def at(last: int, **labels: str) -> Instance:
    return make_instance(f"10.0.0.{last}", 9000, labels=labels)


def listed(*instances: Instance) -> Instances:
    return model.index(instances)


def addresses(snapshot: ServiceSnapshot | None) -> list[str]:
    assert snapshot is not None
    return sorted(each.key.address for each in snapshot.instances.values())


async def start(nursery: trio.Nursery, *sources: ScriptedSource) -> Hub:
    hub = Hub(sources, random.Random(0))
    await nursery.start(hub.run)
    await wait_all_tasks_blocked()
    return hub


async def test_a_source_out_of_sync_publishes_nothing(nursery: trio.Nursery) -> None:
    """D3: what a source says before it is in sync is not served, and no service is said to be unknown."""
    source = ScriptedSource()
    hub = await start(nursery, source)
    with hub.watch({B: "", C: ""}) as watcher:
        source.publisher.replace({B: listed(at(1))})
        assert not hub.in_sync
        assert hub.snapshot(B) is None
        assert watcher.take() == []
        assert watcher.pending == {B, C}
        source.started()
        assert hub.in_sync
        told = {update.latest.service: update.latest for update in watcher.take()}
        assert addresses(told[B]) == ["10.0.0.1"]
        assert told[C].unknown
        assert watcher.pending == set()
    nursery.cancel_scope.cancel()


async def test_one_source_out_of_sync_holds_up_only_what_nobody_else_knows(nursery: trio.Nursery) -> None:
    """D3: while one of two sources is not in sync, the other's services are served, and absence is not claimed."""
    first, second = ScriptedSource("first"), ScriptedSource("second")
    hub = await start(nursery, first, second)
    first.publisher.replace({B: listed(at(1))})
    first.started()
    with hub.watch({B: "", C: ""}) as watcher:
        (update,) = watcher.take()
        assert update.latest.service == B
        assert watcher.pending == {C}
        second.publisher.replace({C: listed(at(2))})
        second.started()
        (update,) = watcher.take()
        assert update.latest.service == C
        assert not update.latest.unknown
    nursery.cancel_scope.cancel()


async def test_a_service_that_a_source_leaves_out_is_served_no_longer(nursery: trio.Nursery) -> None:
    """D1: what a source's next full statement does not name is gone, for watchers, questions and lists alike."""
    source = ScriptedSource()
    hub = await start(nursery, source)
    source.publisher.replace({B: listed(at(1)), C: listed(at(2))})
    source.started()
    with hub.watch({B: "", C: ""}) as watcher:
        watcher.take()
        source.publisher.replace({C: listed(at(2))})
        (update,) = watcher.take()
        assert (update.latest.service, update.latest.unknown) == (B, True)
        answer = hub.snapshot(B)
        assert answer is not None
        assert answer.unknown
        assert [each.service for each in hub.snapshots()] == [C]
    nursery.cancel_scope.cancel()


async def test_what_a_restarted_source_knows_no_longer_goes(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """D3: what went while a source was away is served until the source is in sync again, and no longer."""
    source = ScriptedSource()
    hub = await start(nursery, source)
    source.publisher.replace({B: listed(at(1)), C: listed(at(2))})
    source.started()
    source.fail(RuntimeError("registry on fire"))
    await trio.sleep(60)
    source.publisher.replace({C: listed(at(2))})
    assert [each.service for each in hub.snapshots()] == [B, C]
    source.started()
    assert [each.service for each in hub.snapshots()] == [C]
    nursery.cancel_scope.cancel()


async def test_absence_is_claimed_by_all_sources_or_by_none(nursery: trio.Nursery) -> None:
    """D3: while one source is not in sync, a service that another stops to know is not said to be unknown."""
    first, second = ScriptedSource("first"), ScriptedSource("second")
    hub = await start(nursery, first, second)
    first.publisher.replace({B: listed(at(1))})
    first.started()
    with hub.watch({B: "", C: ""}) as watcher:
        (update,) = watcher.take()
        assert addresses(update.latest) == ["10.0.0.1"]
        first.publisher.update(B, None)
        first.publisher.update(C, None)
        assert watcher.take() == []
        assert watcher.pending == {C}
        # Nor is it told to anybody else any more, as who said it takes it back.
        assert hub.snapshot(B) is None
        second.publisher.replace({B: listed(at(2))})
        second.started()
        told = {update.latest.service: update.latest for update in watcher.take()}
        assert addresses(told[B]) == ["10.0.0.2"]
        assert told[C].unknown
    nursery.cancel_scope.cancel()


async def test_what_went_before_all_sources_were_in_sync_goes_once_they_are(nursery: trio.Nursery) -> None:
    """D3: a service that one source stopped to know is unknown as soon as the last source, which has none, says so."""
    first, second = ScriptedSource("first"), ScriptedSource("second")
    hub = await start(nursery, first, second)
    first.publisher.replace({B: listed(at(1))})
    first.started()
    with hub.watch({B: ""}) as watcher:
        watcher.take()
        first.publisher.update(B, None)
        second.started()
        assert [update.latest.unknown for update in watcher.take()] == [True]
        assert hub.snapshots() == []
    nursery.cancel_scope.cancel()


async def test_names_that_come_and_go_are_not_kept_for_a_source_that_never_answers(nursery: trio.Nursery) -> None:
    """P2: one source is denied for ever, and the other's services change their names."""
    first, second = ScriptedSource("first"), ScriptedSource("second")
    hub = await start(nursery, first, second)
    first.publisher.replace({B: listed(at(1))})
    first.started()
    for number in range(50):
        name = ServiceKey(f"preview-{number}")
        first.publisher.update(name, listed(at(2)))
        first.publisher.update(name, None)
    assert list(hub._services) == [B]
    nursery.cancel_scope.cancel()


async def test_sources_merge_the_first_winning(nursery: trio.Nursery) -> None:
    """Two sources of one service: the union, and of one endpoint the first source's word."""
    first, second = ScriptedSource("first"), ScriptedSource("second")
    hub = await start(nursery, first, second)
    second.publisher.replace({B: listed(at(1, node="wrong"), at(2))})
    second.started()
    first.publisher.replace({B: listed(at(1, node="n1"))})
    first.started()
    snapshot = hub.snapshot(B)
    assert addresses(snapshot) == ["10.0.0.1", "10.0.0.2"]
    assert snapshot is not None
    assert snapshot.instances[at(1).key].node == "n1"
    first.publisher.update(B, None)
    snapshot = hub.snapshot(B)
    assert snapshot is not None
    assert snapshot.instances[at(1).key].node == "wrong"
    nursery.cancel_scope.cancel()


async def test_a_failed_source_keeps_its_last_state_and_is_started_again(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """D3: a source that raises loses nothing; what it says next counts once it is in sync again."""
    source = ScriptedSource()
    hub = await start(nursery, source)
    source.publisher.replace({B: listed(at(1))})
    source.started()
    source.fail(RuntimeError("registry on fire"))
    await wait_all_tasks_blocked()
    assert hub.sources[0].problem == "RuntimeError: registry on fire"
    assert addresses(hub.snapshot(B)) == ["10.0.0.1"]
    await trio.sleep(60)
    assert source.runs == 2
    source.publisher.replace({})
    assert addresses(hub.snapshot(B)) == ["10.0.0.1"]
    source.publisher.replace({B: listed(at(2))})
    source.started()
    assert addresses(hub.snapshot(B)) == ["10.0.0.2"]
    assert hub.sources[0].problem is None
    nursery.cancel_scope.cancel()


async def test_a_slow_watcher_gets_the_latest_state_in_one_step(nursery: trio.Nursery) -> None:
    """D4: a thousand changes that a watcher did not look at are one update, from what it holds to the latest."""
    source = ScriptedSource()
    hub = await start(nursery, source)
    source.publisher.replace({B: listed(at(1))})
    source.started()
    with hub.watch({B: ""}) as watcher:
        (first,) = watcher.take()
        for i in range(1000):
            source.publisher.update(B, listed(at(1), at(2 + i % 200)))
        (update,) = watcher.take()
        assert update.base is first.latest
        assert addresses(update.latest) == ["10.0.0.1", "10.0.0.201"]
        assert watcher.take() == []
    nursery.cancel_scope.cancel()


async def test_resuming(nursery: trio.Nursery) -> None:
    """D1: a watcher that holds the current version is sent nothing, an older known one a change, another the whole."""
    source = ScriptedSource()
    hub = await start(nursery, source)
    source.publisher.replace({B: listed(at(1))})
    source.started()
    old = hub.snapshot(B)
    source.publisher.update(B, listed(at(1), at(2)))
    new = hub.snapshot(B)
    assert old is not None
    assert new is not None

    def resume(version: str) -> list[Update]:
        with hub.watch({B: version}) as watcher:
            return watcher.take()

    assert resume(new.version) == []
    last = hub.last_change(B)
    assert resume(old.version) == [Update(old, new, last)]
    assert resume("some other server's") == [Update(None, new, last)]
    assert resume("") == [Update(None, new, last)]
    assert last is not None
    assert apply(old, last) == new
    nursery.cancel_scope.cancel()


async def test_a_change_is_computed_once(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub to what goes over the wire, and to the picker of a proxy that has the hub within it."""
    computed: list[tuple[ServiceSnapshot | None, ServiceSnapshot]] = []

    def counts(old: ServiceSnapshot | None, new: ServiceSnapshot) -> ServiceChange:
        computed.append((old, new))
        return diff(old, new)

    for module in ("meshlocal.discovery.hub", "meshlocal.client.services"):
        monkeypatch.setattr(f"{module}.diff", counts)
    source = ScriptedSource()
    hub = await start(nursery, source)
    instances = [at(number) for number in range(1, 20)]
    source.publisher.replace({B: listed(*instances)})
    source.started()
    state = ServiceState(B, Selector(Locality({"node": "n1"})), AttemptPolicy(), random.Random(1))
    with hub.watch({B: ""}) as watcher:
        (first,) = watcher.take()
        state.publish(first.latest, first.last)
        computed.clear()
        for number in range(20, 25):
            instances.append(at(number))
            source.publisher.update(B, listed(*instances))
            (update,) = watcher.take()
            EncodedEvents().encode(update)
            state.publish(update.latest, update.last)
            assert state.picker is not None
            assert len(state.picker) == number
        assert len(computed) == 5
        # Two at once for who was slow: that is another way, from where it was.
        source.publisher.update(B, listed(*instances[1:]))
        source.publisher.update(B, listed(*instances[2:]))
        (update,) = watcher.take()
        state.publish(update.latest, update.last)
        latest = state.picker
        assert latest is not None
        assert len(latest) == len(instances) - 2
    nursery.cancel_scope.cancel()


async def test_versions_are_the_same_on_every_server(nursery: trio.Nursery) -> None:
    """D1: two servers that got to equal instances by different ways agree on the version."""
    sources = [ScriptedSource(), ScriptedSource()]
    hubs = [await start(nursery, source) for source in sources]
    sources[0].publisher.replace({B: listed(at(1), at(2, node="n2"))})
    sources[0].started()
    sources[1].publisher.replace({B: listed(at(3), at(2))})
    sources[1].started()
    sources[1].publisher.update(B, listed(at(2, node="n2"), at(3)))
    sources[1].publisher.update(B, listed(at(2, node="n2"), at(1)))
    one, other = hubs[0].snapshot(B), hubs[1].snapshot(B)
    assert one is not None
    assert one == other
    nursery.cancel_scope.cancel()


async def test_nothing_changed_is_no_change(nursery: trio.Nursery) -> None:
    """A source that publishes again what it said wakes no watcher."""
    source = ScriptedSource()
    hub = await start(nursery, source)
    source.publisher.replace({B: listed(at(1, node="n1"))})
    source.started()
    with hub.watch({B: ""}) as watcher:
        watcher.take()
        before = hub.changes
        source.publisher.replace({B: listed(at(1, node="n1"))})
        assert hub.changes == before
        assert watcher.take() == []
    nursery.cancel_scope.cancel()


async def test_a_service_comes_empties_and_goes(nursery: trio.Nursery) -> None:
    """A service without instances is another thing than one that no registry knows."""
    source = ScriptedSource()
    hub = await start(nursery, source)
    source.started()
    with hub.watch({B: ""}) as watcher:
        seen = []
        for instances in (None, listed(), listed(at(1)), listed(), None):
            source.publisher.update(B, instances)
            seen += [(update.latest.unknown, len(update.latest.instances)) for update in watcher.take()]
        assert seen == [(True, 0), (False, 0), (False, 1), (False, 0), (True, 0)]
    nursery.cancel_scope.cancel()


async def test_unknown_names_and_history_are_bounded(nursery: trio.Nursery) -> None:
    """Names that nobody knows leave nothing behind, and a service keeps only so many past snapshots."""
    source = ScriptedSource()
    hub = await start(nursery, source)
    source.started()
    for i in range(100):
        with hub.watch({ServiceKey(f"no-{i}"): ""}) as watcher:
            watcher.take()
    assert not hub._services
    for i in range(1, 100):
        source.publisher.update(B, listed(at(i)))
    assert len(hub._services[B].history) == HISTORY
    source.publisher.update(B, None)
    assert not hub._services
    assert hub.watcher_count == 0
    nursery.cancel_scope.cancel()


async def test_a_wait_that_is_cancelled_loses_nothing(nursery: trio.Nursery) -> None:
    """A change that comes while a watcher's wait is cancelled is there at the next look."""
    source = ScriptedSource()
    hub = await start(nursery, source)
    source.publisher.replace({B: listed(at(1))})
    source.started()
    with hub.watch({B: ""}) as watcher:
        watcher.take()
        with trio.CancelScope() as scope:
            scope.cancel()
            await watcher.wait()
        source.publisher.update(B, listed(at(2)))
        with trio.fail_after(20):
            await watcher.wait()
        assert len(watcher.take()) == 1
    nursery.cancel_scope.cancel()


async def test_a_push_spares_a_waiting_watcher_its_waking_up(nursery: trio.Nursery) -> None:
    """D4: what there is to take is passed on while the watcher waits, the latest only, until it cannot be."""
    source = ScriptedSource()
    hub = await start(nursery, source)
    source.publisher.replace({B: listed(at(1))})
    source.started()
    pushed: list[tuple[bool, list[Update]]] = []
    woken = 0

    async def follow(watcher: Watcher, results: list[bool]) -> None:
        nonlocal woken

        def push() -> bool:
            pushed.append((results[0], watcher.take() if results[0] else []))
            return results.pop(0)

        while results:
            await watcher.wait(push)
            woken += 1
            watcher.take()

    with hub.watch({B: ""}) as watcher:
        (first,) = watcher.take()
        nursery.start_soon(follow, watcher, [True, True, False])
        await wait_all_tasks_blocked()
        for rounds in ((2, 3, 4), (5,)):
            for last in rounds:
                source.publisher.update(B, listed(at(last)))
            assert not pushed[1:] or len(rounds) == 1, "nothing is passed on by the one who publishes"
            await wait_all_tasks_blocked()
        assert woken == 0
        ((_, (one,)), (_, (two,))) = pushed
        assert one.base is first.latest
        assert two.base is one.latest
        assert [addresses(each.latest) for each in (one, two)] == [["10.0.0.4"], ["10.0.0.5"]]
        source.publisher.update(B, listed(at(6)))
        await wait_all_tasks_blocked()
        assert (woken, len(pushed)) == (1, 3)
        # Nobody waits any more: no push, and nothing is left that would call one.
        source.publisher.update(B, listed(at(7)))
        await wait_all_tasks_blocked()
        assert len(pushed) == 3
        assert [addresses(each.latest) for each in watcher.take()] == [["10.0.0.7"]]
    assert hub.watcher_count == 0
    nursery.cancel_scope.cancel()


async def test_a_push_in_time_with_a_wait_that_ends_loses_nothing(nursery: trio.Nursery) -> None:
    """A watcher that stops waiting after it was marked, before its turn, finds the change itself."""
    source = ScriptedSource()
    hub = await start(nursery, source)
    source.publisher.replace({B: listed(at(1))})
    source.started()
    with hub.watch({B: ""}) as watcher:
        watcher.take()
        with trio.CancelScope() as scope:
            nursery.start_soon(watcher.wait)
            await wait_all_tasks_blocked()
            scope.cancel()
            source.publisher.update(B, listed(at(2)))
            await watcher.wait(lambda: pytest.fail("it does not wait any more"))
        assert [addresses(each.latest) for each in watcher.take()] == [["10.0.0.2"]]
    nursery.cancel_scope.cancel()


@given(st.lists(st.tuples(st.sampled_from([B, C]), st.none() | st.sets(st.integers(1, 4))), max_size=30), st.data())
def test_any_watcher_ends_up_with_what_the_hub_holds(
    steps: list[tuple[ServiceKey, set[int] | None]], data: st.DataObject
) -> None:
    """D1, D4: whatever changed between its looks, a watcher that applies its updates holds the hub's state."""

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            source = ScriptedSource()
            hub = await start(nursery, source)
            source.started()
            with hub.watch({B: "", C: ""}) as watcher:
                held: dict[ServiceKey, ServiceSnapshot] = {}
                for service, numbers in steps:
                    instances = None if numbers is None else listed(*(at(i) for i in numbers))
                    source.publisher.update(service, instances)
                    if data.draw(st.booleans()):
                        _follow(watcher, held)
                _follow(watcher, held)
                for service in (B, C):
                    assert held[service] == hub.snapshot(service)
            nursery.cancel_scope.cancel()

    trio.run(run)


def _follow(watcher: Watcher, held: dict[ServiceKey, ServiceSnapshot]) -> None:
    for base, latest, _ in watcher.take():
        if base is None:
            held[latest.service] = latest
        else:
            assert held[latest.service] == base
            held[latest.service] = apply(base, diff(base, latest))


async def test_who_resumes_is_told_of_no_half(nursery: trio.Nursery) -> None:
    """D8: after a restart one source is in sync before the other; who holds what both said keeps it until both say."""
    first, second = ScriptedSource("first"), ScriptedSource("second")
    hub = await start(nursery, first, second)
    first.publisher.replace({B: listed(at(1))})
    first.started()
    with hub.watch({B: "of before"}) as resuming, hub.watch({B: ""}) as fresh, hub.watch({C: "of before"}) as other:
        assert resuming.take() == []
        assert resuming.pending == {B}
        # Who has nothing is better off with a part.
        assert [addresses(update.latest) for update in fresh.take()] == [["10.0.0.1"]]
        assert other.take() == []
        assert other.pending == {C}
        second.publisher.replace({B: listed(at(2))})
        second.started()
        (update,) = resuming.take()
        assert addresses(update.latest) == ["10.0.0.1", "10.0.0.2"]
        assert resuming.pending == set()
        assert [update.latest.unknown for update in other.take()] == [True]
    nursery.cancel_scope.cancel()


async def test_who_resumes_at_the_latest_is_current_at_once(nursery: trio.Nursery) -> None:
    """D1: whatever the other source is about to say, nothing of it is out of date now."""
    first, second = ScriptedSource("first"), ScriptedSource("second")
    hub = await start(nursery, first, second)
    first.publisher.replace({B: listed(at(1))})
    first.started()
    latest = hub.snapshot(B)
    assert latest is not None
    with hub.watch({B: latest.version}) as watcher:
        assert watcher.take() == []
        assert watcher.pending == set()
    nursery.cancel_scope.cancel()


class OfOneNamespace(ScriptedSource):
    def may_know(self, service: ServiceKey) -> bool:
        return service.endswith(".shop")


async def test_a_source_that_cannot_know_a_service_is_not_waited_for(nursery: trio.Nursery) -> None:
    """D3, D8: a namespace that may not be read holds up its own services, and no others."""
    first, denied = ScriptedSource("first"), OfOneNamespace("denied")
    hub = await start(nursery, first, denied)
    ours, theirs = ServiceKey("cache.ours"), ServiceKey("cache.shop")
    first.publisher.replace({ours: listed(at(1))})
    with hub.watch({ours: "of before", theirs: "of before", C: ""}) as watcher:
        assert watcher.take() == []
        first.started()
        told = {update.latest.service: update.latest for update in watcher.take()}
        assert addresses(told[ours]) == ["10.0.0.1"]
        assert told[C].unknown
        assert watcher.pending == {theirs}
        assert hub.snapshot(theirs) is None
        denied.publisher.replace({theirs: listed(at(2))})
        denied.started()
        (update,) = watcher.take()
        assert addresses(update.latest) == ["10.0.0.2"]
    nursery.cancel_scope.cancel()


async def test_who_follows_the_services_is_told_which_come_and_go(nursery: trio.Nursery) -> None:
    """And, while a source is not in sync, of none that is gone: it may know those that others no longer do (D3)."""
    first, second = ScriptedSource("first"), ScriptedSource("second")
    hub = await start(nursery, first, second)
    with hub.watch_services() as watcher:
        assert (watcher.take(), watcher.complete) == (([], []), False)
        first.publisher.replace({B: listed(at(1)), C: listed(at(2))})
        first.started()
        await watcher.wait()
        assert (watcher.take(), watcher.complete) == (([B, C], []), False)
        first.publisher.update(C, None)
        assert watcher.take() == ([], [])
        second.publisher.update(ServiceKey("d"), listed(at(3)))
        second.started()
        await watcher.wait()
        assert (watcher.take(), watcher.complete) == ((["d"], [C]), True)
        first.publisher.update(B, listed(at(1), at(4)))
        with trio.move_on_after(0) as waited:
            await watcher.wait()
        assert waited.cancelled_caught, "that other instances serve it is no news"
        second.publisher.update(B, listed(at(5)))
        first.publisher.update(B, None)
        assert watcher.take() == ([], [])
        second.publisher.replace({C: listed(at(2))})
        await watcher.wait()
        assert watcher.take() == ([C], [B, "d"])
        with hub.watch_services() as late:
            assert late.take() == ([C], [])
    with hub.watch({B: ""}) as asked, hub.watch_services() as watcher:
        assert (watcher.take(), [each.latest.unknown for each in asked.take()]) == (([C], []), [True])


@given(
    st.lists(
        st.sampled_from(
            [(number, name, there) for number in (0, 1) for name in "abc" for there in (True, False)]
            + [(0, "sync", True), (1, "sync", True), (0, "take", True)]
        ),
        max_size=30,
    )
)
def test_who_takes_what_there_is_of_the_services_holds_what_the_hub_does(steps: list[tuple[int, str, bool]]) -> None:
    """Whenever it is taken, and in whatever order the sources say what they know (D4, D8)."""

    async def play() -> None:
        sources = ScriptedSource("0"), ScriptedSource("1")
        async with trio.open_nursery() as nursery:
            hub = await start(nursery, *sources)
            held: set[ServiceKey] = set()
            synced: set[int] = set()
            with hub.watch_services() as watcher:

                def take() -> None:
                    added, removed = watcher.take()
                    assert held.isdisjoint(added)
                    assert held.issuperset(removed)
                    held.difference_update(removed)
                    held.update(added)

                for number, what, there in [*steps, (0, "sync", True), (1, "sync", True), (0, "take", True)]:
                    if what == "take":
                        take()
                        assert held >= {each.service for each in hub.snapshots()}
                    elif what == "sync":
                        if number not in synced:
                            synced.add(number)
                            sources[number].started()
                    else:
                        sources[number].publisher.update(ServiceKey(what), listed(at(1)) if there else None)
                assert watcher.complete
                assert held == {each.service for each in hub.snapshots()}
            nursery.cancel_scope.cancel()

    trio.run(play)


async def test_a_watcher_may_follow_more_and_less(nursery: trio.Nursery) -> None:
    """What it follows anew it is given whole; what it gives up it hears no more of, and nothing of it is kept."""
    source = ScriptedSource()
    hub = await start(nursery, source)
    source.publisher.update(B, listed(at(1)))
    source.publisher.update(C, listed(at(2)))
    with hub.watch({B: ""}) as watcher:
        watcher.follow(C)
        assert watcher.pending == {B, C}
        source.started()
        assert [(update.latest.service, update.base) for update in watcher.take()] == [(B, None), (C, None)]
        watcher.follow(C)
        assert watcher.take() == []
        source.publisher.update(C, listed(at(3)))
        watcher.unfollow(C)
        watcher.unfollow(C)
        assert set(watcher.services) == {B}
        source.publisher.update(C, listed(at(4)))
        assert watcher.take() == []
        watcher.follow(C)
        [update] = watcher.take()
        assert (update.base, addresses(update.latest)) == (None, ["10.0.0.4"])
        watcher.follow(ServiceKey("nobody"))
        [update] = watcher.take()
        assert update.latest.unknown
        watcher.unfollow(ServiceKey("nobody"))
        assert ServiceKey("nobody") not in hub._services
        watcher.follow(ServiceKey("nobody"))
    assert hub._services.keys() == {B, C}
    assert all(not state.watchers for state in hub._services.values())
    assert hub.watcher_count == 0


async def test_a_wait_may_be_ended_by_others(nursery: trio.Nursery) -> None:
    source = ScriptedSource()
    hub = await start(nursery, source)
    with hub.watch({}) as watcher:
        nursery.start_soon(watcher.wait)
        await wait_all_tasks_blocked()
        watcher.wake()
        await wait_all_tasks_blocked()
        assert not watcher.take()
        waited = trio.Event()

        async def wait() -> None:
            await watcher.wait()
            waited.set()

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert not waited.is_set()
        watcher.wake()
        await waited.wait()
