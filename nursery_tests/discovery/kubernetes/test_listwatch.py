"""List and watch, against an API server in memory: what it may do, and when it is asked again."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import groupby, pairwise
from random import Random
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from meshlocal.discovery.kubernetes.api import ApiError, DataError
from meshlocal.discovery.kubernetes.listwatch import Limits, ListWatch, Resource, collection
from meshlocal.net.http_client import HttpError

LIMITS = Limits(
    page=2, watch_shortest=100, silence=50, max_line=1000, steady=5, backoff_initial=1, backoff_max=16, page_timeout=9
)
PATH = collection("/apis/g/v1", "things", "ns")


class Body:
    """An answer's body: its pieces, and how it ends: `end`, `cut`, or silence for ever."""

    def __init__(self, *pieces: Any, end: Any = "end", delay: Any = 0.0) -> None:
        self._pieces = list(pieces)
        self._end = end
        self._delay = delay

    async def receive(self) -> Any:
        await trio.sleep(self._delay)
        if self._pieces:
            return self._pieces.pop(0)
        if self._end == "cut":
            raise HttpError("the connection ended in the middle of an answer")
        if self._end == "silence":
            await trio.sleep_forever()
        return b""

    async def receive_all(self, limit: Any) -> Any:
        if self._end == "silence":
            await trio.sleep_forever()
        return b"".join(self._pieces)


class Api:
    """Answers from a script: an exception is raised, a `Body` is the answer; at its end watches are silent."""

    def __init__(self, *script: Any) -> None:
        self._script = list(script)
        self.start = 0.0
        self.asked: list[tuple[float, str, dict[str, Any]]] = []
        self.open = 0
        self.done = trio.Event()

    @asynccontextmanager
    async def get(self, path: Any, query: Any, accept: Any) -> AsyncIterator[Any]:
        assert path == PATH
        await trio.lowlevel.checkpoint()
        kind = "watch" if "watch" in query else "list"
        self.asked.append((round(trio.current_time() - self.start, 3), kind, dict(query)))
        answer = self._script.pop(0) if self._script else None
        if answer is None:
            self.done.set()
            await trio.sleep_forever()
        if isinstance(answer, Exception):
            raise answer
        self.open += 1
        try:
            yield answer
        finally:
            self.open -= 1

    @property
    def kinds(self) -> Any:
        return [kind for _, kind, _ in self.asked]

    @property
    def versions(self) -> Any:
        """Of each request: what it starts from."""
        return [query.get("resourceVersion") or query.get("continue") or "-" for _, _, query in self.asked]

    @property
    def pauses(self) -> Any:
        times = [time for time, _, _ in self.asked]
        return [round(b - a, 3) for a, b in pairwise(times)]


class Store:
    """A store of names, as the real one reads them."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self.listing: set[str] = set()
        self.published: list[list[str]] = []

    def begin(self) -> None:
        self.listing = set()

    def _put(self, item: Any) -> Any:
        found = json.loads(bytes(item))
        if "name" not in found:
            raise DataError("an object that does not say what it is")
        self.held[found["name"]] = found["rv"]
        return found

    def listed(self, item: Any) -> None:
        self.listing.add(self._put(item)["name"])

    def commit(self) -> Iterator[Any]:
        self.held = {name: rv for name, rv in self.held.items() if name in self.listing}
        yield
        self.published.append(sorted(self.held))

    def changed(self, change: Any, item: Any) -> Any:
        found = self._put(item)
        if change == "DELETED":
            del self.held[found["name"]]
        return found["rv"]

    def flush(self) -> None:
        self.published.append(sorted(self.held))


class Half:
    """A source of jitter that always takes the upper bound."""

    def uniform(self, a: Any, b: Any) -> Any:
        return b


def page(version: Any, *names: Any, more: Any = "") -> Any:
    meta = {"resourceVersion": version} | ({"continue": more} if more else {})
    return Body(json.dumps({"metadata": meta, "items": [{"name": name, "rv": version} for name in names]}).encode())


def event(change: Any, name: Any, version: Any) -> Any:
    return json.dumps({"type": change, "object": {"name": name, "rv": version}}).encode() + b"\n"


def bookmark(version: Any) -> Any:
    return json.dumps({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": version}}}).encode() + b"\n"


def error(code: Any, **details: Any) -> Any:
    status = {"code": code, "message": f"error {code}", "details": details or None}
    return json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"


class Followed:
    def __init__(self, api: Any, store: Any, reports: Any, watch: Any) -> None:
        self.api, self.store, self.reports, self.watch = api, store, reports, watch


def following(api: Any, resource: Resource, store: Any, *rest: Any) -> ListWatch:
    """Of things that only look like an API and a store."""
    return ListWatch(api, resource, store, *rest)


async def follow(*script: Any, limits: Any = LIMITS, selector: Any = "") -> Any:
    """Follow until the script is over, and a little longer; everything is closed afterwards."""
    api, store = Api(*script), Store()
    reports: list[Any] = []
    api.start = trio.current_time()
    resource = Resource(PATH, "things", selector)
    watch = following(api, resource, store, Half(), reports.append, limits)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        with trio.fail_after(100_000):
            await api.done.wait()
        nursery.cancel_scope.cancel()
    assert api.open == 0
    return Followed(api, store, reports, watch)


pytestmark = pytest.mark.usefixtures("autojump_clock")


async def test_a_watch_starts_where_the_list_ended(autojump_clock: Any) -> None:
    """Pages are followed to their end; the watch starts from the last page's version, with bookmarks and an end."""
    found = await follow(page("7", "a", "b", more="t1"), page("7", "c", more="t2"), page("8", "d"), selector="x=y")
    assert [query for _, _, query in found.api.asked] == [
        {"labelSelector": "x=y", "limit": "2"},
        {"labelSelector": "x=y", "limit": "2", "continue": "t1"},
        {"labelSelector": "x=y", "limit": "2", "continue": "t2"},
        {
            "labelSelector": "x=y",
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": "200",
            "resourceVersion": "8",
        },
    ]
    assert found.store.published == [["a", "b", "c", "d"]]
    assert found.watch.lists == 1


async def test_watch_ends_in_due_time(autojump_clock: Any) -> None:
    """A watch that the server ended after its time goes on from the last version, bookmarks among them, at once."""
    found = await follow(
        page("7", "a"),
        Body(event("ADDED", "b", "9"), bookmark("12"), delay=10),
        Body(b" ", delay=40),
        Body(event("DELETED", "a", "14"), delay=20),
    )
    assert found.api.versions == ["-", "7", "12", "12", "14"]
    assert found.api.pauses == [0, 30, 80, 40]
    assert found.store.published == [["a"], ["a", "b"], ["a", "b"], ["b"]]
    assert set(found.reports) == {None}
    assert (found.watch.events, found.watch.failures) == (2, 0)


@pytest.mark.parametrize("at", range(1, 50, 6))
async def test_a_stream_cut_in_a_line(at: Any, autojump_clock: Any) -> None:
    """Half a line is no event; the watch resumes from the last whole one, and the line comes again."""
    line = event("ADDED", "c", "10")
    found = await follow(
        page("7", "a"),
        Body(event("ADDED", "b", "9") + line[:at], end="cut", delay=10),
        Body(line[:at], line[at:], end="silence"),
    )
    assert found.api.versions[:3] == ["-", "7", "9"]
    assert found.api.pauses[1] == 21, "the cut after 20 s, and one backoff"
    assert found.store.published[:3] == [["a"], ["a", "b"], ["a", "b", "c"]]
    assert found.reports[:2] == [None, None]
    assert found.reports[2] == "things: the connection ended in the middle of an answer"
    assert found.reports[3] is None


async def test_a_silent_stream_lists_again(autojump_clock: Any) -> None:
    """A watch without a byte for the deadline is closed; any byte counts, whole line or not.

    The server may have been restored to an earlier state: then it accepts the version, and would be silent for ever.
    """
    found = await follow(
        page("7", "ghost"),
        Body(b" ", b" ", bookmark("8"), end="silence", delay=40),
        page("3", "a"),
        Body(event("ADDED", "b", "4"), end="silence"),
    )
    # 3 pieces in 120 s, and 50 s of silence.
    assert found.api.pauses[:3] == [0, 170, 0]
    assert found.api.versions[:4] == ["-", "7", "-", "3"]
    assert found.store.published[0] == ["ghost"]
    assert found.store.published[-1] == ["a", "b"]
    assert set(found.reports) == {None}


async def test_a_server_that_sends_no_bookmarks_is_not_listed_without_end(autojump_clock: Any) -> None:
    """Nor called unhealthy each time: where nothing happens, nothing comes. One that sends some is watched closely."""
    quiet = [answer for _ in range(6) for answer in (page("7"), Body(end="silence"))]
    found = await follow(*quiet, page("7"), Body(bookmark("8"), end="silence"), page("9"), Body(end="silence"))
    assert [pause for pause in found.api.pauses if pause] == [50, 100, 200, 400, 600, 600, 50, 100]
    assert set(found.reports) == {None}


async def test_all_is_listed_again_once_in_a_while(autojump_clock: Any) -> None:
    """Whatever was lost on the way is found then; at the end of a watch, so that none is cut."""
    # Each lasts for 80 s, so that the 47th is the first to end after half as much again as the limit.
    ends = [Body(bookmark(str(100 + number)), delay=40) for number in range(94)]
    script = [page("1"), *ends[:47], page("2"), *ends[47:], page("3"), Body(end="silence")]
    found = await follow(*script, limits=msgspec.structs.replace(LIMITS, relist=2500))
    assert [at for at, kind, _ in found.api.asked if kind == "list"][:3] == [0, 3760, 7520]
    assert found.watch.failures == 0


async def test_a_resource_that_is_no_longer_served_ends_it(autojump_clock: Any) -> None:
    """Its source chooses anew then."""
    api, store = Api(page("7", "a"), ApiError(404, "no such thing"), ApiError(404, "no such thing")), Store()
    api.start = trio.current_time()
    watch = following(api, Resource(PATH, "things"), store, Half(), lambda problem: None, LIMITS)
    with pytest.raises(ApiError, match="no such thing"):
        await watch.run()
    assert store.published == [["a"]]


async def test_a_404_long_after_another_ends_nothing(autojump_clock: Any) -> None:
    """A server that is behind a balancer may say so once, at times. In between the watch worked."""
    missing = ApiError(404, "no such thing")
    works = [Body(event("ADDED", "b", "8"), bookmark("9"), bookmark("10"), delay=40) for _ in range(2)]
    found = await follow(page("7", "a"), missing, works[0], missing, works[1], missing, Body(end="silence"))
    assert found.api.kinds[:7] == ["list", *["watch"] * 6]
    assert found.watch.lists == 1


async def test_a_right_that_is_granted_is_seen_soon(autojump_clock: Any) -> None:
    """However long it was missing."""
    found = await follow(*[ApiError(403, "forbidden")] * 100, page("7", "a"), Body(end="silence"))
    assert max(found.api.pauses[:100]) == 5
    assert found.store.published[0] == ["a"]


async def test_what_is_wrong_for_long_is_logged_once(autojump_clock: Any, caplog: Any) -> None:
    """A selector that the server refuses, for one."""
    await follow(*[ApiError(400, "unable to parse selector")] * 50, page("7"), Body(end="silence"))
    assert caplog.text.count("unable to parse selector") == 1


async def test_an_expired_version_lists_again_at_once(autojump_clock: Any) -> None:
    """410, as an event or as the answer: list again, at once, and nothing but the difference is published."""
    for gone in (Body(error(410)), ApiError(410, "too old")):
        found = await follow(
            page("7", "a", "b"),
            Body(bookmark("8"), end="cut", delay=40),
            gone,
            page("20", "b", "c"),
            Body(end="silence"),
        )
        assert found.api.kinds[:5] == ["list", "watch", "watch", "list", "watch"]
        assert found.api.versions[3:5] == ["-", "20"]
        assert [names for names, _ in groupby(found.store.published)] == [["a", "b"], ["b", "c"]]
        assert found.watch.lists == 2


async def test_a_calm_watch_that_expired_is_no_failure(autojump_clock: Any) -> None:
    """The ordinary end of a version's life is neither waited for nor told as a problem."""
    found = await follow(page("7"), Body(b" ", delay=40), Body(error(410)), page("9"), Body(end="silence"))
    assert found.api.pauses[:4] == [0, 80, 0, 0]
    assert set(found.reports[:5]) == {None}


async def test_versions_that_expire_at_once_are_not_asked_without_end(autojump_clock: Any) -> None:
    """A server whose every list is too old for a watch is asked less and less often."""
    script = [answer for version in range(5) for answer in (page(str(version)), Body(error(410)))]
    found = await follow(*script)
    assert [pause for pause in found.api.pauses if pause] == [1, 2, 4, 8]


async def test_retry_after_is_kept(autojump_clock: Any) -> None:
    """429: not before Retry-After, be it a header's or a Status's; the version stays."""
    found = await follow(
        ApiError(429, "later", 7.0),
        page("7", "a"),
        ApiError(429, "later", 30.0),
        Body(error(429, retryAfterSeconds=20)),
        ApiError(429, "later"),
    )
    assert found.api.versions == ["-", "-", "7", "7", "7", "7"]
    assert found.api.pauses == [7, 0, 30, 20, 8]
    assert found.reports[0] == "things: the API server answered 429: later"


async def test_a_server_error_is_retried_and_then_listed(autojump_clock: Any) -> None:
    """500 as an event (a real server's): the watch is tried again, and after the second time listed anew."""
    found = await follow(page("7", "a"), Body(error(500)), Body(error(500)), page("9", "a"), Body(end="silence"))
    assert found.api.kinds[:5] == ["list", "watch", "watch", "list", "watch"]
    assert found.api.pauses[:4] == [0, 1, 2, 0]
    assert found.store.published[:2] == [["a"], ["a"]]


async def test_an_hour_of_outage(autojump_clock: Any) -> None:
    """D3: an API server that is away for an hour costs a bounded number of tries, and no state: it resumes."""
    refused = [OSError(111, "Connection refused")] * 230
    found = await follow(page("7", "a"), Body(bookmark("8"), end="cut"), *refused, Body(event("ADDED", "b", "9")))
    assert found.api.asked[-2][0] > 3600
    assert max(found.api.pauses) == 16
    assert found.api.versions[2:] == ["8"] * 231 + ["9"]
    assert found.store.published == [["a"], ["a"], ["a", "b"]]


async def test_the_server_is_down_at_start(autojump_clock: Any) -> None:
    """The first list is tried until it comes, with backoff; started then."""
    api, store = Api(*[OSError(111, "Connection refused")] * 3, page("1", "a")), Store()
    reports: list[Any] = []
    api.start = trio.current_time()
    watch = following(api, Resource(PATH, "things"), store, Half(), reports.append, LIMITS)
    async with trio.open_nursery() as nursery:
        await nursery.start(watch.run)
        assert trio.current_time() - api.start == pytest.approx(7)
        assert reports == ["things: Connection refused"] * 3 + [None]
        assert store.published == [["a"]]
        nursery.cancel_scope.cancel()


async def test_a_list_that_expires_half_way(autojump_clock: Any) -> None:
    """A continue token that is too old: from the first page again, and the second time all in one page."""
    expired = ApiError(410, "The provided continue parameter is too old")
    found = await follow(
        page("7", "a", "b", more="t"), expired, page("8", "a", "x", more="t"), expired, page("9", "a", "c")
    )
    limits = [query.get("limit") for _, kind, query in found.api.asked if kind == "list"]
    assert limits == ["2", "2", "2", "2", None]
    assert found.store.published == [["a", "c"]], "what only the lists that came to nothing named is gone"
    assert found.watch.failures == 0


async def test_a_list_that_breaks_half_way_publishes_nothing(autojump_clock: Any) -> None:
    """A page that fails starts the list again; nothing was published of the first half."""
    found = await follow(page("7", "a", "b", more="t"), OSError("reset"), page("8", "b"), Body(end="silence"))
    assert found.store.published[0] == ["b"]


async def test_a_page_has_a_deadline(autojump_clock: Any) -> None:
    found = await follow(Body(end="silence"), page("8", "b"))
    assert found.api.pauses == [10, 0]
    assert found.reports[0] == "things: no answer in time"


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n",
        b"{}\n",
        b'{"type": "ADDED"}\n',
        b'{"type": "ADDED", "object": {}}\n',
        b'{"type": "SYNC", "object": {"name": "x", "rv": "9"}}\n',
        b'{"type": "BOOKMARK", "object": {}}\n',
        b'{"type": "ERROR", "object": 7}\n',
        b'{"type": "ADDED", "object": ' + b"[" * 100_000 + b"\n",
        b"\xff\xfe\n",
        b"x" * 1001,
    ],
)
async def test_a_line_that_cannot_be_read_lists_again(line: Any, autojump_clock: Any) -> None:
    """Nobody knows what it was: what stands before it counts, and everything is listed again."""
    limits = LIMITS if line.endswith(b"\n") and len(line) < 1000 else msgspec.structs.replace(LIMITS, max_line=1000)
    found = await follow(
        page("7", "a"),
        Body(event("ADDED", "b", "8"), line, event("ADDED", "never", "9")),
        page("11", "a", "b"),
        limits=limits,
    )
    assert found.api.kinds == ["list", "watch", "list", "watch"]
    assert found.api.versions[-1] == "11"
    assert all("never" not in names for names in found.store.published)
    assert found.watch.failures == 1


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"<html>", b"[]", b'{"metadata":{"resourceVersion":""},"items":[]}', b"[" * 100_000, b"\xff"]
)
async def test_a_list_that_cannot_be_read_is_asked_for_again(body: Any, autojump_clock: Any) -> None:
    """D3: nothing is published of it."""
    found = await follow(Body(body), Body(body), page("3", "a"))
    assert found.api.pauses == [1, 2, 0]
    assert found.store.published == [["a"]]


async def test_a_watch_that_ends_at_once_is_not_asked_without_end(autojump_clock: Any) -> None:
    """Neither is one that says the same version every time; one that brings events is."""
    short = [
        Body(),
        Body(bookmark("7")),
        Body(),
        Body(event("ADDED", "b", "8")),
        Body(event("ADDED", "c", "9")),
        Body(),
    ]
    found = await follow(page("7", "a"), *short)
    assert found.api.pauses == [0, 1, 2, 4, 0, 0, 1]
    assert found.reports[-1] == "things: the watch ended after less than 5 s"


async def test_backoff_ends_when_it_works(autojump_clock: Any) -> None:
    """A watch that lasted, or brought something, starts the backoff anew."""
    broken = [OSError("reset")] * 3
    found = await follow(
        page("7"), *broken, Body(b" ", end="cut", delay=3), *broken, Body(event("ADDED", "b", "8"), end="cut"), *broken
    )
    assert [pause for pause in found.api.pauses if pause] == [1, 2, 4, 7, 2, 4, 8, 1, 2, 4, 8]


async def test_cancellation_at_every_step(autojump_clock: Any) -> None:
    """Whenever it is cancelled, nothing stays open."""
    for moment in range(0, 60, 3):
        api, store = (
            Api(
                page("7", "a", more="t"),
                page("7", "b"),
                Body(event("ADDED", "c", "8"), end="cut", delay=5),
                ApiError(500, "no"),
                Body(error(410), delay=2),
                Body(end="silence"),
            ),
            Store(),
        )
        api.start = trio.current_time()
        with trio.move_on_after(moment):
            await following(api, Resource(PATH, "things"), store, Random(0), lambda _: None, LIMITS).run()
        assert api.open == 0
