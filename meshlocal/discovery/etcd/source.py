"""Instances from etcd: listed at a revision, watched from the next, and listed again now and then.

    what happens                           what follows
    the member is away, or cut off         the next one is asked, at once; once all were, with backoff
    the connection was lost                watch from the revision after the last one that came: nothing is missed
    that revision was compacted            list again; what is held is put beside it, and only what differs published
    a key holds what cannot be read        it is said, and what the key held before stays
    nothing, for `RELIST` seconds          list again: a watch of etcd has been known to lose events
                                           (etcd-io/etcd#17555, #18089)

A list never shows as an outage. It is of one revision, page by page, so that what comes of the watch meanwhile is
older or newer than it, key by key: of two states of a key the newer counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import trio

from meshlocal.discovery.etcd.client import COMPACTED, FAILURES, Cluster, Session, told
from meshlocal.discovery.etcd.table import EtcdTable
from meshlocal.discovery.retry import Problems, Retry
from meshlocal.discovery.source import FollowedResource, Publisher, Source, SourceContext, SourceDetails
from meshlocal.net.log import get_log
from meshlocal.net.slices import in_slices
from meshlocal.policy.backoff import Backoff, UniformSource
from meshlocal.policy.etcd_options import EtcdOptions
from meshlocal.policy.model import CLUSTER, ZONE
from meshlocal.policy.steps import Steps
from meshlocal.wire.etcd_keys import EtcdKeyError, parse_key, parse_value, prefix_range
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import rpc_pb2 as pb

_log = get_log(__name__)

PAGE = 500
"""Keys of a page."""

RELIST = 300.0
"""Seconds after which all of it is listed again; up to half as much again by chance."""

BACKOFF_INITIAL, BACKOFF_MAX = 0.5, 15.0
"""Seconds between two rounds of all members."""

_STEP = 32
"""Keys that are read in a step."""


def open_etcd_source(options: object, context: SourceContext) -> Iterator[Source]:
    """The source that an `etcd:` URL names."""
    assert isinstance(options, EtcdOptions)
    yield EtcdSource(options, context.rng, {ZONE: context.zone, CLUSTER: context.cluster})


class EtcdSource:
    """A `Source` over the keys below a prefix.

    Args:
        options: which cluster, and which prefix.
        rng: for jitter.
        defaults: labels of instances that say nothing of them; those that are empty are none.
    """

    def __init__(self, options: EtcdOptions, rng: UniformSource, defaults: Mapping[str, str]) -> None:
        self._options = options
        self._rng = rng
        self._defaults = defaults
        self._cluster = Cluster(options)
        self._table = EtcdTable()
        self._first, self._end = prefix_range(options.prefix)
        self._revision = 0
        """The last one of which something came; 0: nothing was listed."""
        self._listed = 0
        self._lists = self._events = self._failures = 0
        self._heard: float | None = None
        self._in_sync = False
        self._cluster_id = 0
        self._hint: str | None = None

    @property
    def name(self) -> str:
        """`etcd:` with members and prefix, without the rest."""
        return f"etcd:{str(self._options).partition('?')[0]}"

    def details(self) -> SourceDetails:
        """See `DetailedSource`."""
        silence = None if self._heard is None else trio.current_time() - self._heard
        followed = FollowedResource(
            f"{self._options.prefix}/", self._in_sync, self._lists, self._events, self._failures, silence
        )
        return SourceDetails([followed], {"malformed": len(self._table.refused)})

    async def run(self, publisher: Publisher, *, task_status: trio.TaskStatus[None]) -> None:
        """See `Source.run`."""
        report = Problems(publisher, "etcd").of("etcd")
        retry = Retry("etcd", "etcd", Backoff(BACKOFF_INITIAL, BACKOFF_MAX, self._rng), report)
        tried = 0

        def well() -> None:
            nonlocal tried
            tried = 0
            retry.reset()
            report(self._hint)
            self._heard = trio.current_time()

        # What is held is of another run, whose publisher may be another one.
        self._table, self._revision, self._listed, self._in_sync = EtcdTable(), 0, 0, False
        while True:
            try:
                async with self._cluster.connect() as session:
                    await self._follow(session, publisher, task_status, well)
            except FAILURES as error:
                self._failures += 1
                tried += 1
                if tried % self._cluster.size:
                    # The next member may well answer.
                    await trio.lowlevel.checkpoint()
                    continue
                await retry.wait(told(error))

    async def _follow(
        self, session: Session, publisher: Publisher, task_status: trio.TaskStatus[None], well: Callable[[], None]
    ) -> None:
        """Follow the keys on one connection, until that fails."""
        relist = trio.current_time() + self._relist_in()
        if not self._revision:
            await self._list(session, publisher)
            well()
            if not self._in_sync:
                self._in_sync = True
                task_status.started()
        while True:
            async with session.watch(self._first, self._end, self._revision + 1) as call:
                while True:
                    with trio.move_on_at(relist) as patience:
                        response = await call.receive()
                    if patience.cancelled_caught:
                        await self._list(session, publisher)
                        well()
                        relist = trio.current_time() + self._relist_in()
                        continue
                    if response is None:
                        raise GrpcError(StatusCode.UNAVAILABLE, "etcd ended the watch")
                    if response.canceled and not response.compact_revision:
                        raise GrpcError(StatusCode.UNAVAILABLE, response.cancel_reason or "etcd ended the watch")
                    if response.canceled:
                        break
                    if self._is_another(response.header):
                        break
                    well()
                    await in_slices(self._take(response))
                    self._publish(publisher)
            await self._list_anew(session, publisher, COMPACTED if response.canceled else "another cluster answers")
            well()

    async def _list_anew(self, session: Session, publisher: Publisher, reason: str) -> None:
        _log.info("listing again", resource=self._options.prefix, reason=reason)
        await self._list(session, publisher)

    def _is_another(self, header: pb.ResponseHeader) -> bool:
        """Whether this is another cluster than before, or the same restored from a backup: its revisions are others, so
        that nothing that is held is newer than what it says."""
        known, self._cluster_id = self._cluster_id, header.cluster_id
        if header.revision >= self._revision and known in (0, header.cluster_id):
            return False
        self._table.forget_revisions()
        self._revision = self._listed = 0
        return True

    def _relist_in(self) -> float:
        return self._rng.uniform(RELIST, 1.5 * RELIST)

    def _publish(self, publisher: Publisher) -> None:
        for service, instances in self._table.take().items():
            publisher.update(service, instances)

    # Lists.

    async def _list(self, session: Session, publisher: Publisher) -> None:
        """Read all of it, and publish what differs; at first, all of it at once."""
        pages, revision = await self._pages(session)
        self._lists += 1
        self._is_another(pages[0].header)
        await in_slices(self._compare(pages, revision))
        self._revision = max(self._revision, revision)
        self._listed = revision
        self._hint = None
        if not any(page.kvs for page in pages):
            self._hint = await self._look_beside(session)
        if self._in_sync:
            self._publish(publisher)
        else:
            publisher.replace({name: instances or {} for name, instances in self._table.take().items()})

    async def _pages(self, session: Session) -> tuple[list[pb.RangeResponse], int]:
        """All pages, of one revision."""
        for last_try in (False, True):
            pages: list[pb.RangeResponse] = []
            key, revision = self._first, 0
            try:
                while True:
                    page = await session.range(
                        pb.RangeRequest(key=key, range_end=self._end, limit=PAGE, revision=revision)
                    )
                    pages.append(page)
                    revision = revision or page.header.revision
                    if not page.more or not page.kvs:
                        return pages, revision
                    key = page.kvs[-1].key + b"\0"
            except GrpcError as error:
                if last_try or COMPACTED not in error.message:
                    raise
                _log.info("a list expired half-way", resource=self._options.prefix, reason=error.message)
        raise AssertionError("the last try returns or raises")

    def _compare(self, pages: list[pb.RangeResponse], revision: int) -> Steps[None]:
        self._table.begin_list()
        for page in pages:
            for number, kv in enumerate(page.kvs):
                self._put(kv)
                if number % _STEP == _STEP - 1:
                    yield
        yield
        self._table.end_list(revision)

    async def _look_beside(self, session: Session) -> str | None:
        """Why there may be nothing: a slash more or less before the prefix is easily overlooked."""
        prefix = self._options.prefix
        other = prefix[1:] if prefix.startswith("/") else f"/{prefix}"
        first, end = prefix_range(other)
        if not other or not (await session.range(pb.RangeRequest(key=first, range_end=end, limit=1))).kvs:
            return None
        hosts = str(self._options).removeprefix("//").partition("/")[0]
        return f"no key begins with {prefix}/, but some with {other}/: write etcd://{hosts}/{other}"

    # Changes.

    def _take(self, response: pb.WatchResponse) -> Steps[None]:
        latest = self._revision
        for number, event in enumerate(response.events):
            self._events += 1
            kv = event.kv
            latest = max(latest, kv.mod_revision)
            # A list of a later revision has it already, be it gone since.
            if kv.mod_revision > self._listed:
                if event.type == pb.Event.DELETE:
                    self._remove(kv)
                else:
                    self._put(kv)
            if number % _STEP == _STEP - 1:
                yield
        if not response.fragment:
            # Else more of this revision is to come, and would be missed by who went on behind it.
            self._revision = latest
        yield

    def _put(self, kv: pb.KeyValue) -> None:
        try:
            key = parse_key(kv.key, self._options.prefix)
        except EtcdKeyError as error:
            _log.error("etcd key refused", problem=str(error), served="nothing of it")
            return
        try:
            instance = parse_value(kv.value, kv.key, key.service, self._defaults)
        except EtcdKeyError as error:
            served = self._table.refuse(key, kv.mod_revision, str(error))
            if served is not None:
                _log.error("etcd key refused", problem=str(error), served=served)
            return
        self._table.put(key, kv.mod_revision, instance)

    def _remove(self, kv: pb.KeyValue) -> None:
        try:
            key = parse_key(kv.key, self._options.prefix)
        except EtcdKeyError:
            return
        self._table.remove(key, kv.mod_revision)
