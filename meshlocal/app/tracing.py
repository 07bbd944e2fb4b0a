"""Spans on their way to a collector, by OTLP over HTTP (rules R3, P1, P2).

Requests that are traced are kept until there are `BATCH` of them, or for `INTERVAL` seconds, and go out in one export,
by a task beside the data path. What does not fit while a collector is slow or away is dropped and counted: no request
waits for it, and memory is bounded. The spans are made and encoded in slices, between which traffic has its turn.
"""

from __future__ import annotations

import logging
import ssl
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import trio

from meshlocal.app.spans import request_spans, span_count
from meshlocal.net.following import Followed
from meshlocal.net.http_client import HttpError, Origin, send
from meshlocal.net.log import RateLimited, get_log
from meshlocal.net.slices import in_slices
from meshlocal.net.tls import client_context
from meshlocal.net.token_file import read_token
from meshlocal.policy.backoff import Backoff, UniformSource
from meshlocal.policy.config_tracing import TracingConfig
from meshlocal.policy.steps import Steps
from meshlocal.proxy.http.record import HttpRecord
from meshlocal.proxy.http.traced import TracedRequest, traced_request
from meshlocal.wire.otlp import CONTENT_TYPE, Value, encode_spans, rejected

_log = get_log(__name__)

QUEUE = 2048
"""Requests that wait to be exported; those beyond are dropped."""

BATCH = 256
"""Requests of one export, at most."""

INTERVAL = 5.0
"""Seconds for which a request waits for others to go with, at most."""

EXPORT_LIMIT = 10.0
"""Seconds that a collector may take for one export."""

TRIES = 5
"""Exports of the same spans, before they are dropped."""

FLUSH_LIMIT = 2.0
"""Seconds that a proxy that ends takes to export what is left."""

ANSWER_LIMIT = 65536
"""Bytes of an answer that are read."""

_SLICE = 0.0002
"""Seconds that spans are encoded for in a row."""

_PAUSE = 0.001
"""Seconds between two such slices: a batch takes milliseconds, which requests shall not wait for."""

_BACKOFF_FIRST, _BACKOFF_MOST = 1.0, 30.0

_AGAIN = frozenset({429, 502, 503, 504})
"""Answers after which the same spans may be sent again (OTLP, "Failures")."""

_WARNING_INTERVAL = 60.0


OUTCOMES = ("exported", "dropped", "refused", "failed")
"""What becomes of spans."""


class CollectorFiles:
    """What is made of files for a collector.

    Args:
        config: where it is.

    Raises:
        FileProblemError: a file cannot be used.
    """

    def __init__(self, config: TracingConfig) -> None:
        self.config = config
        ca, token = config.ca_file, config.token_file
        self._tls: Followed[ssl.SSLContext] | None = None
        self._token: Followed[str] | None = None
        if config.endpoint is not None and config.endpoint.scheme == "https":
            self._tls = Followed(
                [ca], lambda: client_context(ca, None, None, check_name=True, minimum="1.2", protocols=())
            )
        if token is not None:
            self._token = Followed([token], lambda: read_token(token))

    def followed(self) -> Iterator[Followed[Any]]:
        """What is to be looked at (T3)."""
        if self._tls is not None:
            yield self._tls
        if self._token is not None:
            yield self._token

    @property
    def tls(self) -> ssl.SSLContext | None:
        """As the files are now; None: without TLS."""
        return self._tls.current[0] if self._tls is not None else None

    @property
    def token(self) -> str:
        """Likewise; empty: there is none."""
        return self._token.current[0] if self._token is not None else ""


class Exporter:
    """Exports requests that are traced.

    Args:
        files: where to, and with what; replaced when the configuration is (S2).
        resource: attributes of this process, beside service.name.
        version: of this program.
        rng: for the backoff's jitter.
        wall: the time of day, in seconds since 1970.

    Attributes:
        files: as given; None: tracing was turned off.
        spans: how many were exported, and were not, by what became of them: `exported`; `dropped`, as too many waited;
            `refused` by the collector; `failed`, as it was away or broke off.
    """

    def __init__(
        self,
        files: CollectorFiles,
        resource: Mapping[str, Value],
        version: str,
        rng: UniformSource,
        wall: Callable[[], float],
    ) -> None:
        self.files: CollectorFiles | None = files
        # From the beginning: of a count that appears with its first event, nobody sees that it rose.
        self.spans: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self._resource = resource
        self._version = version
        self._rng = rng
        self._wall = wall
        self._queue: deque[TracedRequest] = deque()
        self._some = trio.Event()
        self._many = trio.Event()
        self._problem = RateLimited(_log, logging.WARNING, "spans not exported", interval=_WARNING_INTERVAL)

    def use(self, files: CollectorFiles | None) -> None:
        """Export to this collector from now on; None: to none, and what waits is dropped."""
        self.files = files
        if files is None:
            self.spans["dropped"] += _spans(self._queue)
            self._queue.clear()

    def ended(self, record: HttpRecord, now: float) -> None:
        """A request ended, at this moment by its clock."""
        if record.mark is not None and record.mark.trace is not None:
            self.add(traced_request(record, record.mark.trace, now))

    def add(self, request: TracedRequest) -> None:
        """Take a request that ended."""
        if len(self._queue) >= QUEUE:
            self.spans["dropped"] += span_count(request)
            self._tell("too many requests wait for the collector: it is slow, or too many are sampled")
            return
        self._queue.append(request)
        self._some.set()
        if len(self._queue) >= BATCH:
            self._many.set()

    async def run(self) -> None:
        """Export what comes, until cancelled."""
        while True:
            if not self._queue:
                # Without a timer, while there is nothing to time (P3).
                self._some = trio.Event()
                await self._some.wait()
            if len(self._queue) < BATCH:
                self._many = trio.Event()
                with trio.move_on_after(INTERVAL):
                    await self._many.wait()
            await self._export(TRIES)

    async def flush(self) -> None:
        """Export what is left, as far as there is time for it. Called while `run` does not."""
        with trio.move_on_after(FLUSH_LIMIT):
            while self._queue:
                await self._export(1)
        if self._queue:
            self._lose(self._queue, "failed", "the proxy ended")
            self._queue.clear()

    async def _export(self, tries: int) -> None:
        batch = [self._queue.popleft() for _ in range(min(len(self._queue), BATCH))]
        if not batch:
            return
        try:
            body = await in_slices(self._encode(batch), _SLICE, _PAUSE)
            await self._send(body, batch, tries)
        except Exception:
            # To send it again would only fail again.
            self._lose(batch, "failed", "a fault of this program")
            raise
        except BaseException:
            # It was cancelled: who flushes has another try.
            self._queue.extendleft(reversed(batch))
            raise

    def _encode(self, batch: list[TracedRequest]) -> Steps[bytes]:
        offset = self._wall() - trio.current_time()
        spans = chain.from_iterable(request_spans(request, offset) for request in batch)
        name = self.files.config.service_name if self.files is not None else ""
        resource = {"service.name": name, **self._resource}
        return encode_spans(resource, ("meshlocal", self._version), spans)

    async def _send(self, body: bytes, batch: list[TracedRequest], tries: int) -> None:
        backoff = Backoff(_BACKOFF_FIRST, _BACKOFF_MOST, self._rng)
        for left in reversed(range(tries)):
            problem, wait = await self._try(body, batch)
            if not problem:
                return
            if wait is None or not left:
                self._lose(batch, "refused" if wait is None else "failed", problem)
                return
            self._tell(problem)
            await trio.sleep(max(wait, backoff.next()))

    async def _try(self, body: bytes, batch: list[TracedRequest]) -> tuple[str, float | None]:
        """Send them once: what is wrong, empty if nothing is, and after how many seconds they may be sent again; None:
        they may not."""
        files = self.files
        url = files.config.endpoint if files is not None else None
        if files is None or url is None:
            return "tracing was turned off", None
        headers = {"Content-Type": CONTENT_TYPE, "User-Agent": f"meshlocal/{self._version}"}
        if files.token:
            headers["Authorization"] = f"Bearer {files.token}"
        try:
            with trio.fail_after(EXPORT_LIMIT):
                async with send(Origin(url.host, url.port, files.tls), "POST", url.path, headers, body) as response:
                    answer = await response.receive_all(ANSWER_LIMIT)
        except (HttpError, OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
            return _told(error), 0.0
        if response.status == 200:
            count, why = rejected(answer)
            count = min(max(count, 0), _spans(batch))
            self.spans["exported"] += _spans(batch) - count
            if count:
                self.spans["refused"] += count
                self._tell(f"the collector took all but {count}: {why}")
            return "", None
        problem = f"the collector answers {response.status}"
        if response.status not in _AGAIN:
            return problem, None
        return problem, _retry_after(response.headers.get("retry-after", ""))

    def _lose(self, batch: Iterable[TracedRequest], word: str, problem: str) -> None:
        self.spans[word] += _spans(batch)
        self._tell(problem)

    def _tell(self, problem: str) -> None:
        url = self.files.config.endpoint if self.files is not None else None
        self._problem(
            trio.current_time(),
            # A query may hold what nobody else is to see.
            endpoint=str(url).partition("?")[0] if url is not None else None,
            problem=problem,
            remedy="see proxy.tracing.endpoint, and meshlocal_trace_spans_total for what was lost",
        )


def _spans(batch: Iterable[TracedRequest]) -> int:
    return sum(map(span_count, batch))


def _told(error: Exception) -> str:
    if isinstance(error, trio.TooSlowError):
        return f"no answer within {EXPORT_LIMIT:g} s"
    cause = error.__cause__ if isinstance(error, trio.BrokenResourceError) and error.__cause__ is not None else error
    return str(cause) or type(cause).__name__


def _retry_after(text: str) -> float:
    """Seconds that a collector asks for; bounded, and 0 for a date, which is not worth a clock here."""
    return min(float(text), _BACKOFF_MOST * 2) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0
