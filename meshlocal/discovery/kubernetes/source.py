"""A cluster's services, from its API server, as a source of the discovery server.

    run
      choose          EndpointSlices, or v1 Endpoints where the API has no slices
      nodes           list and watch of the nodes' labels, if they may be read
      one a namespace list and watch of slices (one for all namespaces together)

The source is in sync when every list was complete once. Until then nothing is published (D3). From then on each
change of an object publishes its service, and nothing but a change does: not an outage, and not a list made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec
import trio

from meshlocal.discovery.kubernetes.access import find_access
from meshlocal.discovery.kubernetes.api import FAILURES, Api, ApiError
from meshlocal.discovery.kubernetes.kubeconfig import KubeconfigError
from meshlocal.discovery.kubernetes.listwatch import (
    DEFAULT_LIMITS,
    NAME,
    Limits,
    ListWatch,
    Resource,
    collection,
    wait_after,
)
from meshlocal.discovery.kubernetes.mapping import Defaults, ObjectKey
from meshlocal.discovery.kubernetes.stores import AnyStore, endpoints_store, name_of, node_store, slice_store
from meshlocal.discovery.kubernetes.table import EndpointTable
from meshlocal.discovery.retry import Problems, Retry
from meshlocal.discovery.source import FollowedResource, Publisher, Source, SourceContext, SourceDetails, SourceError
from meshlocal.net.log import get_log
from meshlocal.policy.backoff import Backoff, UniformSource
from meshlocal.policy.kubernetes_options import KubernetesOptions
from meshlocal.policy.model import ServiceKey

_log = get_log(__name__)

NODES_WAIT = 5.0
"""Seconds that the first publication waits for the nodes' labels."""

NODES_WAIT_AGAIN = 60.0
"""The same where nodes were known before the source began anew: what it published then is served meanwhile."""

NODES_LOOK = 30.0
"""Seconds between two looks at whether nodes may be read by now; up to half as much again by chance."""

SLICES_LOOK = 3600.0
"""The same, at whether an API server that had no slices has some by now."""
_SLICES = ("/apis/discovery.k8s.io/v1", "endpointslices")
_ENDPOINTS = ("/api/v1", "endpoints")
_NODES = ("/api/v1", "nodes")
Kind = Literal["endpointslices", "endpoints"]


class SlicesFoundError(Exception):
    """The API server has what it did not have when the source began."""


class KubernetesSource:
    """A `Source` over one cluster.

    Args:
        api: its API server.
        options: what of it.
        rng: for jitter.
        zone: the `zone` label of instances for which the cluster gives none.
        cluster: the labels `cluster` and `cluster_id`, unless the options name others.
        limits: numbers of each list and watch.

    Attributes:
        kind: what is read: `endpointslices` or `endpoints`; None before that is known.
    """

    def __init__(
        self,
        api: Api,
        options: KubernetesOptions,
        rng: UniformSource,
        *,
        zone: str = "",
        cluster: str = "",
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._api = api
        self._options = options
        self._rng = rng
        self._defaults = Defaults(zone, options.cluster or cluster)
        self._limits = limits
        self._run: _Run | None = None
        self._had_nodes = False
        self.kind: Kind | None = None

    @property
    def name(self) -> str:
        """`kubernetes:` and its options."""
        return f"kubernetes:{self._options}"

    def may_know(self, service: ServiceKey) -> bool:
        """See `PartialSource.may_know`: services are named by their namespace."""
        namespaces = self._options.namespaces
        # A namespace has no dot; what stands before it may.
        _, dot, namespace = service.rpartition(".")
        return not namespaces or (bool(dot) and namespace in namespaces)

    def details(self) -> SourceDetails:
        """See `DetailedSource.details`."""
        if self._run is None:
            return SourceDetails((), {})
        now = trio.current_time()
        resources = [
            FollowedResource(
                watch.name,
                watch.lists > 0,
                watch.lists,
                watch.events,
                watch.failures,
                None if watch.heard is None else now - watch.heard,
            )
            for watch, _ in self._run.watches
        ]
        unreadable = sum(store.unreadable for _, store in self._run.watches)
        return SourceDetails(resources, self._run.table.left_out._asdict() | {"unreadable": unreadable})

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        """Publish the cluster's services, for ever. In sync once every list was complete."""
        problems = Problems(publisher, NAME)
        self.kind = await self._choose(problems)
        run = self._run = _Run(publisher, self._defaults, problems)
        async with trio.open_nursery() as nursery:
            if self.kind == "endpoints":
                nursery.start_soon(self._await_slices)
            nodes_known = trio.Event()
            if self._options.nodes:
                nursery.start_soon(self._follow_nodes, run, nodes_known)
            else:
                nodes_known.set()
            async with trio.open_nursery() as starting:
                for namespace in self._options.namespaces or ("",):
                    starting.start_soon(nursery.start, self._watch_of(run, self.kind, namespace).run)
            # What had their labels is not to lose them because a source begins anew (D1).
            with trio.move_on_after(NODES_WAIT_AGAIN if self._had_nodes else NODES_WAIT):
                await nodes_known.wait()
            self._had_nodes = nodes_known.is_set()
            await run.publish_all()
            task_status.started()
            problems.tell()
            counts = {name: count for name, count in run.table.left_out._asdict().items() if count}
            _log.info("kubernetes followed", kind=self.kind, objects=run.table.objects, left_out=counts)

    async def _await_slices(self) -> None:
        """Look from time to time whether the API server has slices by now, as after an upgrade.

        Raises:
            SlicesFoundError: it has, so that the source is to begin anew, with these.
        """
        while True:
            await trio.sleep(SLICES_LOOK * self._rng.uniform(1.0, 1.5))
            try:
                found = await self._has(*_SLICES, (self._options.namespaces or ("",))[0])
            except FAILURES:
                continue
            if found:
                raise SlicesFoundError("the API server has EndpointSlices now")

    def _retry(self, what: str, report: Callable[[str | None], None]) -> Retry:
        backoff = Backoff(self._limits.backoff_initial, self._limits.backoff_max, self._rng)
        return Retry(what, NAME, backoff, report)

    async def _choose(self, problems: Problems) -> Kind:
        """Which resource the API server has. It is asked until it answers one way or the other."""
        part = "the API server"
        report = problems.of(part)
        retry = self._retry(part, report)
        while True:
            try:
                kind = await self._ask_for_slices()
            except FAILURES as error:
                await wait_after(retry, error)
            else:
                report(None)
                return kind

    async def _ask_for_slices(self) -> Kind:
        namespace = (self._options.namespaces or ("",))[0]
        if await self._has(*_SLICES, namespace):
            return "endpointslices"
        if not await self._has(*_ENDPOINTS, namespace):
            raise ApiError(404, "neither EndpointSlices nor Endpoints are there")
        _log.warning("the API server has no EndpointSlices; v1 Endpoints are read instead")
        return "endpoints"

    async def _has(self, prefix: str, resource: str, namespace: str) -> bool:
        try:
            async with self._api.get(collection(prefix, resource, namespace), {"limit": "1"}, "application/json"):
                return True
        except ApiError as error:
            if error.status == 404:
                return False
            raise

    def _watch_of(self, run: _Run, kind: Kind, namespace: str) -> ListWatch:
        prefix, resource = _SLICES if kind == "endpointslices" else _ENDPOINTS
        name = f"{kind} in {namespace}" if namespace else kind
        path = collection(prefix, resource, namespace)
        make: Callable[..., AnyStore] = slice_store if kind == "endpointslices" else endpoints_store
        store = make(run.table, run.publish, run.warn_once, run.hold)
        return self._add(run, Resource(path, name, self._options.selector), store)

    def _add(self, run: _Run, resource: Resource, store: AnyStore) -> ListWatch:
        report = run.problems.of(resource.kind)
        watch = ListWatch(self._api, resource, store, self._rng, report, self._limits)
        run.watches.append((watch, store))
        return watch

    async def _follow_nodes(self, run: _Run, known: trio.Event) -> None:
        """Follow the nodes' labels; without the right to, do without."""
        path = collection(*_NODES)
        retry = self._retry("nodes", run.problems.of("nodes"))
        while True:
            try:
                async with self._api.get(path, {"limit": "1"}, "application/json"):
                    break
            except ApiError as error:
                if error.status in (403, 404):
                    if not known.is_set():
                        _log.info(
                            "nodes are not read: zone comes from the slices alone, region is unknown", reason=str(error)
                        )
                        known.set()
                    # The right may be granted later.
                    await trio.sleep(NODES_LOOK * self._rng.uniform(1.0, 1.5))
                    continue
                await wait_after(retry, error)
            except FAILURES as error:
                await wait_after(retry, error)
        run.problems.of("nodes")(None)
        resource = Resource(path, "nodes", metadata_only=True)
        watch = self._add(run, resource, node_store(run.table, run.publish, run.hold))
        async with trio.open_nursery() as nursery:
            await nursery.start(watch.run)
            known.set()


def open_kubernetes_sources(options: object, context: SourceContext) -> Iterator[Source]:
    """The sources that a `kubernetes:` URL names. The cluster is found at once, so that a mistake shows at once.

    It blocks while it reads a kubeconfig. It is read again whenever the API server refuses the credentials.

    Args:
        options: the URL's.
        context: its environment has KUBECONFIG, HOME, and what Kubernetes gives a pod.

    Raises:
        SourceError: no cluster is found, or the kubeconfig cannot be used.
    """
    assert isinstance(options, KubernetesOptions)
    # One that may not be read holds up its own services, and no others'.
    for namespace in options.namespaces or (None,):
        part = options if namespace is None else msgspec.structs.replace(options, namespaces=(namespace,))
        yield _open(part, context)


def _open(options: KubernetesOptions, context: SourceContext) -> KubernetesSource:
    home = Path(context.environment.get("HOME") or "/")
    try:
        find_access(options, context.environment, home)
    except KubeconfigError as error:
        raise SourceError(str(error)) from None
    api = Api(lambda: find_access(options, context.environment, home), lambda: datetime.now(UTC))
    return KubernetesSource(api, options, context.rng, zone=context.zone, cluster=context.cluster)


class _Run:
    """The state of one run: the table, and whether it is published."""

    def __init__(self, publisher: Publisher, defaults: Defaults, problems: Problems) -> None:
        self.table = EndpointTable(defaults)
        self.problems = problems
        self.watches: list[tuple[ListWatch, AnyStore]] = []
        self._publisher = publisher
        self._published = False
        self._held = 0
        self._let_go = trio.Event()
        self._warned: set[str] = set()

    async def publish_all(self) -> None:
        """Publish all there is, once nothing is half put; from then on what changes."""
        while self._held:
            await self._let_go.wait()
        self._published = True
        self._publisher.replace(self.table.take_all())

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Publish nothing while this is entered: what is put belongs together."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if not self._held:
                self._let_go.set()
                self._let_go = trio.Event()

    def publish(self) -> None:
        """Publish the services that changed, once the whole was, and nothing is half put."""
        if self._published and not self._held:
            for service, instances in self.table.take().items():
                self._publisher.update(service, instances)

    def warn_once(self, what: str, key: ObjectKey) -> None:
        if what not in self._warned:
            self._warned.add(what)
            _log.warning("kubernetes data is not all that it could be", problem=what, first=name_of(key))
