"""List, watch, resume, and list again: one resource of an API server, followed for ever.

Theory of operation (Kubernetes API concepts, "Efficient detection of changes"). A list, in pages, gives every object
and a resource version. A watch from that version gives what happens after it; each event, and each bookmark, carries
the version to resume from.

    what happens                          what follows
    the server ends the watch             watch again from the last version, at once
    the stream is cut                     likewise, with backoff; half a line is thrown away: it will come again
    the stream falls silent               list again: a server whose etcd was restored accepts a watch from a version
                                          that it has not reached, and says nothing
    429                                   watch again, not before Retry-After
    the server is away, or answers 5xx    likewise, with backoff
    410: the version is too old           list again; at once, but not twice in a row
    any refusal a second time in a row    list again: the version may be one that this server never had
    a line that cannot be read            list again: nobody knows what it was
    a page's continue token is too old    list again from the first page; the second time, all in one page
    404, twice in a row                   the resource is no longer served: `run` ends, for its source to choose anew
    nothing, for `relist` seconds         list again, once the watch ends: whatever was lost on the way is found then

A list never shows as an outage: its objects are put beside those that are held, and what it did not name is removed
at its end, in one step. The version is opaque and never compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import msgspec
import trio

from meshlocal.discovery.kubernetes.api import (
    FAILURES,
    Api,
    ApiError,
    DataError,
    SilenceError,
    StreamError,
    describe_failure,
)
from meshlocal.discovery.kubernetes.objects import (
    UNREADABLE,
    ListMeta,
    decode_bookmark,
    decode_event,
    decode_list,
    decode_status,
)
from meshlocal.discovery.retry import Retry
from meshlocal.net.http_client import Response
from meshlocal.net.log import get_log
from meshlocal.net.slices import in_slices
from meshlocal.policy.backoff import Backoff, UniformSource
from meshlocal.policy.steps import Steps

_log = get_log(__name__)

NAME = "kubernetes"
"""What messages call the registry."""

Change = Literal["ADDED", "MODIFIED", "DELETED"]
_CHANGES: dict[str, Change] = {"ADDED": "ADDED", "MODIFIED": "MODIFIED", "DELETED": "DELETED"}


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of a list-and-watch. Times in seconds, sizes in bytes.

    Attributes:
        page: objects in a page.
        page_timeout: for a page's body, after its head.
        max_page: the longest page; a page of all objects may be as long too.
        watch_shortest: the least time after which the server is asked to end a watch; drawn up to twice that, so that
            a fleet's watches do not all end at once.
        silence: the longest time without a byte of a watch. Servers send a bookmark about once a minute; to one that
            does not, twice as much time is given each time, up to `silence_longest`.
        silence_longest: the most of it.
        relist: after which all of it is listed again; up to half as much again by chance.
        max_line: the longest event. Kubernetes keeps no object of more than 3 MiB by default.
        steady: a watch that lasted this long, or got further than its version, ends the backoff.
        backoff_initial: before the first retry, before jitter.
        backoff_max: between retries at most, before jitter.
    """

    page: int = 500
    page_timeout: float = 60.0
    max_page: int = 256 * 1024 * 1024
    watch_shortest: float = 240.0
    silence: float = 75.0
    silence_longest: float = 600.0
    relist: float = 3600.0
    max_line: int = 16 * 1024 * 1024
    steady: float = 5.0
    backoff_initial: float = 0.5
    backoff_max: float = 30.0


DEFAULT_LIMITS = Limits()

FORBIDDEN_PAUSE = 5.0
"""Seconds between two tries at most while the server says that the right to is missing."""


class Resource(msgspec.Struct, frozen=True):
    """What is listed and watched.

    Attributes:
        path: of the collection.
        selector: a label selector; empty: everything.
        kind: what messages call it, such as `endpointslices in shop`.
        metadata_only: only the objects' metadata is asked for.
    """

    path: str
    kind: str
    selector: str = ""
    metadata_only: bool = False

    def accept(self, what: Literal["PartialObjectMetadataList", "PartialObjectMetadata"]) -> str:
        """The Accept header for its list or watch."""
        # A server that cannot leave the rest out sends it all, which is skipped.
        if not self.metadata_only:
            return "application/json"
        return f"application/json;as={what};g=meta.k8s.io;v=v1,application/json"


class Store(Protocol):
    """Where the objects go. Nothing of it blocks."""

    def begin(self) -> None:
        """A list begins. Another may have begun, and not come to its end: nothing of that one counts."""
        ...

    def listed(self, item: msgspec.Raw) -> None:
        """An object of the list."""
        ...

    def commit(self) -> Steps[None]:
        """The list is complete: it takes the place of what is held, and what it did not name is gone. Publish what
        changed. In steps, between which nothing of it may be published."""
        ...

    def changed(self, change: Change, item: msgspec.Raw) -> str:
        """An event of the watch. Returns the object's resource version.

        Raises:
            DataError: the object says neither what it is nor its version.
        """
        ...

    def flush(self) -> None:
        """The events that have come so far were all handed over: publish what changed."""
        ...


class ListWatch:
    """Follows one resource.

    Args:
        api: the server.
        resource: what of it.
        store: where the objects go.
        rng: for the backoff's jitter, and the length of watches.
        report: told what is wrong, and None when nothing is any longer.
        limits: sizes, times and backoff.

    Attributes:
        lists: complete lists so far.
        events: events so far, bookmarks not among them.
        failures: failures so far, of any kind.
        heard: when a page or line last came, in trio's time; None: never.
    """

    def __init__(
        self,
        api: Api,
        resource: Resource,
        store: Store,
        rng: UniformSource,
        report: Callable[[str | None], None],
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._api = api
        self._resource = resource
        self._store = store
        self._rng = rng
        self._report = report
        self._limits = limits
        self._version: str | None = None
        backoff = Backoff(limits.backoff_initial, limits.backoff_max, rng)
        self._retry = Retry(resource.kind, NAME, backoff, report)
        self._refusals = 0
        self._missing = 0
        self._expired = False
        self._silence = limits.silence
        self._list_again = math.inf
        self.lists = 0
        self.events = 0
        self.heard: float | None = None

    @property
    def name(self) -> str:
        """What messages call what it follows."""
        return self._resource.kind

    @property
    def failures(self) -> int:
        """Failures so far, of any kind."""
        return self._retry.failures

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow for ever. Started when the first list is complete."""
        while True:
            try:
                if self._version is None:
                    self._version = await self._list()
                    relist = self._limits.relist * self._rng.uniform(1.0, 1.5)
                    self._list_again = trio.current_time() + relist
                    self._missing = 0
                    self.lists += 1
                    if self.lists == 1:
                        task_status.started()
                await self._watch()
                if trio.current_time() >= self._list_again:
                    self._version = None
            except FAILURES as error:
                await self._failed(error)

    async def _failed(self, error: Exception) -> None:
        """Decide how to go on after a failure, and wait before that if it has to be.

        Raises:
            ApiError: the server serves no such resource any more.
        """
        status = error.status if isinstance(error, ApiError) else 0
        self._missing = self._missing + 1 if status == 404 else 0
        if self._missing > 1 and self.lists:
            raise error
        if status and status not in (401, 403, 429):
            self._refusals += 1
        expired = status == 410
        if expired or isinstance(error, DataError | SilenceError) or self._refusals > 1:
            self._version = None
        at_once = (expired and not self._expired) or isinstance(error, SilenceError)
        self._expired = expired
        if at_once:
            # A version lives for some minutes, an outage may be longer, and some servers send no bookmarks: that is no
            # failure of anybody's. If the list fails, that is one.
            _log.info("listing again", resource=self._resource.kind, reason=str(error))
            return
        await wait_after(self._retry, error)

    def _progress(self) -> None:
        """Note that the watch works: failures from now on count as first ones."""
        self._refusals = 0
        self._missing = 0
        self._expired = False
        self._retry.reset()

    # List

    async def _list(self) -> str:
        """List everything; returns the version to watch from."""
        for pages in (True, True, False):
            self._store.begin()
            version = await self._list_once(self._limits.page if pages else 0)
            if version is not None:
                await in_slices(self._store.commit())
                self._report(None)
                return version
        raise DataError("a list in one page was refused as too old")

    async def _list_once(self, page: int) -> str | None:
        """List everything in pages of this many objects (0: in one); None if the server forgot where it was."""
        query = {"labelSelector": self._resource.selector} if self._resource.selector else {}
        if page:
            query["limit"] = str(page)
        token = ""
        while True:
            try:
                meta = await self._take_page(query | ({"continue": token} if token else {}))
            except ApiError as error:
                if error.status == 410 and token:
                    _log.info("a list expired half-way", resource=self._resource.kind, reason=str(error))
                    return None
                raise
            token = meta.continue_token
            if not token:
                return meta.resource_version

    async def _take_page(self, query: Mapping[str, str]) -> ListMeta:
        accept = self._resource.accept("PartialObjectMetadataList")
        async with self._api.get(self._resource.path, query, accept) as response:
            with trio.fail_after(self._limits.page_timeout):
                body = await response.receive_all(self._limits.max_page)
        try:
            found = decode_list(body)
        except UNREADABLE as error:
            raise DataError(f"a list that cannot be read: {error}") from None
        if not found.metadata.resource_version:
            raise DataError("a list without a resourceVersion")
        self.heard = trio.current_time()
        for item in found.items or ():
            self._store.listed(item)
            # Thousands of objects in a page must not keep everybody else waiting.
            await trio.lowlevel.checkpoint()
        return found.metadata

    # Watch

    async def _watch(self) -> None:
        """Watch from the version that is held, until the server ends it.

        Raises:
            StreamError: it ended as soon as it had begun.
            SilenceError: it fell silent.
            DataError: a line of it cannot be read.
        """
        limits = self._limits
        assert self._version is not None
        seconds = self._rng.uniform(limits.watch_shortest, 2 * limits.watch_shortest)
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(math.ceil(seconds)),
            "resourceVersion": self._version,
        }
        if self._resource.selector:
            query["labelSelector"] = self._resource.selector
        start = trio.current_time()
        accept = self._resource.accept("PartialObjectMetadata")
        async with self._api.get(self._resource.path, query, accept) as response:
            self._report(None)
            try:
                progressed = await self._read_events(response)
            finally:
                if trio.current_time() - start >= limits.steady:
                    self._progress()
        if not progressed and trio.current_time() - start < limits.steady:
            raise StreamError(f"the watch ended after less than {limits.steady:g} s")

    async def _read_events(self, response: Response) -> bool:
        """Handle events until the stream ends; tells whether they led to another version."""
        pending = bytearray()
        start = self._version
        while True:
            with trio.move_on_after(self._silence) as silence:
                piece = await response.receive()
            if silence.cancelled_caught:
                lasted, self._silence = self._silence, min(2 * self._silence, self._limits.silence_longest)
                raise SilenceError(f"the watch was silent for {lasted:g} s")
            if not piece:
                # What has no line end yet is no event. It comes again, whole.
                return self._version != start
            end = piece.rfind(b"\n")
            if end < 0:
                pending += piece
            else:
                lines = (bytes(pending) + piece[:end]).split(b"\n")
                pending = bytearray(piece[end + 1 :])
                try:
                    for line in lines:
                        if line:
                            self._handle(line)
                finally:
                    self._store.flush()
            if len(pending) > self._limits.max_line:
                raise DataError(f"an event of more than {self._limits.max_line} bytes")

    def _handle(self, line: bytes) -> None:
        try:
            event = decode_event(line)
            if event.type == "ERROR":
                raise ApiError.from_status(decode_status(event.object))
            if event.type == "BOOKMARK":
                self._silence = self._limits.silence
                version = decode_bookmark(event.object).metadata.resource_version
            elif (change := _CHANGES.get(event.type)) is not None:
                version = self._store.changed(change, event.object)
                self.events += 1
            else:
                raise DataError(f"an event of the unknown type {event.type[:50]!r}")
        except UNREADABLE as error:
            raise DataError(f"an event that cannot be read: {error}") from None
        self.heard = trio.current_time()
        if version and version != self._version:
            # A server that only repeats a version, and ends the watch, is not to be asked without end.
            self._version = version
            self._progress()


async def wait_after(retry: Retry, error: Exception) -> None:
    """Wait before the next try after a failure."""
    at_least, at_most = 0.0, math.inf
    if isinstance(error, ApiError):
        at_least = error.retry_after
        if error.status in (401, 403):
            # Somebody has to grant a right, and expects it to be seen then.
            at_most = FORBIDDEN_PAUSE
    await retry.wait(describe_failure(error), at_least=at_least, at_most=at_most)


def collection(prefix: str, resource: str, namespace: str = "") -> str:
    """The path of a collection: `/api/v1` and `nodes`, or `/apis/GROUP/VERSION` and the rest."""
    return f"{prefix}/namespaces/{namespace}/{resource}" if namespace else f"{prefix}/{resource}"
