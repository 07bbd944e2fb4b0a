"""Spans on their way: batches, a collector that is slow, away or refuses, and what is lost is counted (R3, P1, P2)."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as theirs

from meshlocal.app import tracing
from meshlocal.app.tracing import BATCH, EXPORT_LIMIT, INTERVAL, QUEUE, CollectorFiles, Exporter
from meshlocal.client.ended import Asked
from meshlocal.net.following import FileProblemError
from meshlocal.net.http_client import HttpError, Origin
from meshlocal.net.supervision import Supervision
from meshlocal.policy.addresses import CollectorUrl
from meshlocal.policy.config_tracing import TracingConfig
from meshlocal.policy.model import ServiceKey, make_instance
from meshlocal.proxy.http.marks import Trace
from meshlocal.proxy.http.traced import TracedRequest
from nursery_tests.certificates import Authority
from nursery_tests.logged import entry

NEAR = make_instance("10.0.0.1", 9001, labels={"node": "n1"})
URL = CollectorUrl("http", "collector", 4318, "/v1/traces")
CONFIG = TracingConfig(endpoint=URL, service_name="edge")


def request(number: int) -> TracedRequest:
    """A request of two spans."""
    asked = Asked("1.1", "GET", "/", 200)
    key = ServiceKey("b")
    ended = (0.0, 0.0, "served", -1, False, False, "node", "", "", 1, NEAR, 0.0, ())
    return TracedRequest(Trace(number, 0, 1, 1), key, asked, "http", "b", None, "", *ended)


def spans(**counts: int) -> dict[str, int]:
    """What is counted, those of which there are none too."""
    return {**dict.fromkeys(tracing.OUTCOMES, 0), **counts}


class Answer:
    def __init__(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.status = status
        self.headers = headers
        self._body = body

    async def receive_all(self, limit: int) -> bytes:
        return self._body


class Collector:
    """In the place of the HTTP client.

    Attributes:
        got: the numbers of the requests of each export, and when it came.
        answers: what is answered or raised next; empty: 200.
        takes: seconds that an answer takes.
    """

    def __init__(self) -> None:
        self.got: list[tuple[float, list[int]]] = []
        self.headers: list[Mapping[str, str]] = []
        self.asked: list[tuple[Origin, str, str]] = []
        self.answers: list[Any] = []
        self.takes = 0.0

    @asynccontextmanager
    async def send(
        self, origin: Origin, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> AsyncIterator[Answer]:
        self.asked.append((origin, method, target))
        self.headers.append(headers)
        spans = theirs.ExportTraceServiceRequest.FromString(body).resource_spans[0].scope_spans[0].spans
        seen = {int.from_bytes(span.trace_id, "big"): None for span in spans}
        self.got.append((trio.current_time(), list(seen)))
        await trio.sleep(self.takes)
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, Exception):
            raise answer
        status, more, body = answer if isinstance(answer, tuple) else (answer, {}, b"")
        yield Answer(status, body, more)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Collector:
    made = Collector()
    monkeypatch.setattr(tracing, "send", made.send)
    return made


def files_of(made: Exporter) -> CollectorFiles:
    assert made.files is not None
    return made.files


Lines = Callable[[str], list[Any]]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Lines:
    """The fields of what was logged of an event."""
    return lambda event: [entry(each).fields for each in caplog.records if entry(each).event == event]


def exporter(config: TracingConfig = CONFIG) -> Exporter:
    return Exporter(CollectorFiles(config), {"host.name": "h"}, "1", random.Random(0), lambda: 1000.0)


async def test_what_comes_goes_together(
    collector: Collector, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    made = exporter()
    nursery.start_soon(made.run)
    await trio.testing.wait_all_tasks_blocked()
    start = trio.current_time()
    made.add(request(1))
    await trio.sleep(1)
    made.add(request(2))
    await trio.sleep(INTERVAL)
    ((when, got),) = collector.got
    # What is encoded in more than one slice, on a machine that is slow, pauses between them.
    assert start + INTERVAL <= when < start + INTERVAL + 1
    assert got == [1, 2]
    assert collector.asked == [(Origin("collector", 4318), "POST", "/v1/traces")]
    assert collector.headers == [{"Content-Type": "application/x-protobuf", "User-Agent": "meshlocal/1"}]
    assert made.spans == spans(exported=4)
    await trio.sleep(1000)
    assert len(collector.got) == 1, "nothing is sent while there is nothing (P3)"


async def test_many_go_at_once(
    collector: Collector, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    made = exporter()
    nursery.start_soon(made.run)
    await trio.testing.wait_all_tasks_blocked()
    start = trio.current_time()
    for number in range(1, 2 * BATCH + 2):
        made.add(request(number))
    await trio.sleep(INTERVAL + 1)
    assert [len(got) for _, got in collector.got] == [BATCH, BATCH, 1]
    first, second, rest = (when - start for when, _ in collector.got)
    assert first <= second < 1 < INTERVAL <= rest
    assert [number for _, got in collector.got for number in got] == list(range(1, 2 * BATCH + 2))


async def test_a_collector_that_is_slow(
    collector: Collector, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, logged: Lines
) -> None:
    """P2: what does not fit is dropped and counted; the first ones stay."""
    made = exporter()
    collector.takes = 5
    nursery.start_soon(made.run)
    for number in range(1, QUEUE + 11):
        made.add(request(number))
    await trio.sleep(5 * QUEUE / BATCH + 1)
    assert [number for _, got in collector.got for number in got] == list(range(1, QUEUE + 1))
    assert made.spans == spans(exported=QUEUE * 2, dropped=20)
    [line] = logged("spans not exported")
    assert "too many requests wait" in line["problem"]


@pytest.mark.parametrize(
    "problem",
    [
        503,
        (429, {"retry-after": "7"}, b""),
        (503, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, b""),
        (503, {"retry-after": "²"}, b""),
        (503, {"retry-after": "-1"}, b""),
        OSError(111, "Connection refused"),
        HttpError("no HTTP/1.1 answer"),
        trio.BrokenResourceError(),
    ],
)
async def test_a_collector_that_is_away(
    collector: Collector, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, problem: Any
) -> None:
    """The same spans go again, later each time; what is asked for is waited."""
    made = exporter()
    collector.answers = [problem, problem]
    nursery.start_soon(made.run)
    made.add(request(1))
    await trio.sleep(60)
    assert [got for _, got in collector.got] == [[1]] * 3
    waits = [after[0] - before[0] for before, after in zip(collector.got, collector.got[1:], strict=False)]
    if isinstance(problem, tuple) and problem[0] == 429:
        assert waits == [7, 7]
    else:
        assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2
    assert made.spans == spans(exported=2)


async def test_a_collector_that_stays_away(
    collector: Collector, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, logged: Lines
) -> None:
    made = exporter()
    collector.answers = [OSError(111, "Connection refused")] * tracing.TRIES
    nursery.start_soon(made.run)
    made.add(request(1))
    await trio.sleep(100)
    made.add(request(2))
    await trio.sleep(INTERVAL + 1)
    assert [got for _, got in collector.got] == [[1]] * tracing.TRIES + [[2]]
    assert made.spans == spans(failed=2, exported=2)
    line = logged("spans not exported")[0]
    assert line["endpoint"] == "http://collector:4318/v1/traces"
    assert "Connection refused" in line["problem"]
    assert line["remedy"]


async def test_a_collector_that_never_answers(
    collector: Collector, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, logged: Lines
) -> None:
    made = exporter()
    collector.takes = 1e6
    nursery.start_soon(made.run)
    made.add(request(1))
    await trio.sleep(INTERVAL + EXPORT_LIMIT + 0.1)
    assert logged("spans not exported")[0]["problem"] == "no answer within 10 s"


@pytest.mark.parametrize("status", [400, 401, 404, 500, 301])
async def test_a_collector_that_refuses(
    collector: Collector, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, logged: Lines, status: int
) -> None:
    """OTLP, "Failures": they are not sent again."""
    made = exporter()
    collector.answers = [status]
    nursery.start_soon(made.run)
    made.add(request(1))
    await trio.sleep(60)
    assert len(collector.got) == 1
    assert made.spans == spans(refused=2)
    assert logged("spans not exported")[0]["problem"] == f"the collector answers {status}"


async def test_a_collector_that_takes_some(
    collector: Collector, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, logged: Lines
) -> None:
    made = exporter()
    partial = theirs.ExportTracePartialSuccess(rejected_spans=1, error_message="too old")
    collector.answers = [
        (200, {}, theirs.ExportTraceServiceResponse(partial_success=partial).SerializeToString()),
    ]
    nursery.start_soon(made.run)
    made.add(request(1))
    await trio.sleep(60)
    assert made.spans == spans(exported=1, refused=1)
    assert "too old" in logged("spans not exported")[0]["problem"]


@pytest.mark.parametrize("takes", [0.0, 1.0])
async def test_the_end_of_the_process(
    collector: Collector, autojump_clock: trio.testing.MockClock, takes: float
) -> None:
    """What waits, and what was on its way, goes out before, once."""
    made = exporter()
    collector.takes = takes
    with trio.move_on_after(INTERVAL + takes / 2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.run)
            made.add(request(1))
            await trio.sleep(INTERVAL / 2)
            made.add(request(2))
            await trio.sleep_forever()
    collector.got.clear()
    await made.flush()
    assert [got for _, got in collector.got] == [[1, 2]]
    assert made.spans == spans(exported=4)
    await made.flush()
    assert len(collector.got) == 1


async def test_the_end_does_not_wait_for_long(
    collector: Collector, autojump_clock: trio.testing.MockClock, logged: Lines
) -> None:
    made = exporter()
    collector.takes = 1e6
    made.add(request(1))
    start = trio.current_time()
    await made.flush()
    assert trio.current_time() - start == tracing.FLUSH_LIMIT
    assert made.spans == spans(failed=2)
    assert logged("spans not exported")[-1]["problem"] == "the proxy ended"


async def test_a_token_and_a_certificate(
    collector: Collector, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    """T3: they follow their files."""
    authority = Authority(tmp_path)
    (tmp_path / "token").write_text("s3cret\n")
    config = TracingConfig(
        endpoint=CollectorUrl("https", "collector", 443, "/x"),
        token_file=str(tmp_path / "token"),
        ca_file=authority.file,
    )
    made = exporter(config)
    for token in ("s3cret", "other"):
        (tmp_path / "token").write_text(token)
        for followed in files_of(made).followed():
            followed.look()
        made.add(request(1))
        await made.flush()
        assert collector.headers[-1]["Authorization"] == f"Bearer {token}"
    origin, _, target = collector.asked[-1]
    assert origin.tls is files_of(made).tls
    assert origin.tls is not None
    assert origin.tls.check_hostname
    assert target == "/x"
    assert len(list(files_of(made).followed())) == 2


@pytest.mark.parametrize("authority", [True, False])
def test_a_file_that_cannot_be_used(tmp_path: Path, authority: bool) -> None:
    url, missing = CollectorUrl("https", "c", 443, "/"), str(tmp_path / "missing")
    config = (
        TracingConfig(endpoint=url, ca_file=missing) if authority else TracingConfig(endpoint=url, token_file=missing)
    )
    with pytest.raises(FileProblemError, match="missing: No such file"):
        CollectorFiles(config)


async def test_a_fault_costs_one_batch(
    collector: Collector, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, logged: Lines
) -> None:
    """What cannot be sent is not tried for ever: it is counted, and the next batch goes."""
    made = exporter()
    collector.answers = [RuntimeError("broken")]
    nursery.start_soon(Supervision(random.Random(0)).keep, "tracing", made.run)
    made.add(request(1))
    await trio.sleep(INTERVAL + 1)
    made.add(request(2))
    await trio.sleep(60)
    assert [got for _, got in collector.got] == [[1], [2]]
    assert made.spans == spans(failed=2, exported=2)
    assert logged("spans not exported")[0]["problem"] == "a fault of this program"


async def test_tracing_is_turned_off(
    collector: Collector, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """S2: what waits goes nowhere, and is counted; no file is followed any more."""
    made = exporter()
    nursery.start_soon(made.run)
    made.add(request(1))
    await trio.sleep(1)
    made.use(None)
    await trio.sleep(60)
    assert collector.got == []
    assert made.spans == spans(dropped=2)
    made.use(CollectorFiles(CONFIG))
    made.add(request(2))
    await trio.sleep(INTERVAL + 1)
    assert [got for _, got in collector.got] == [[2]]


@pytest.mark.parametrize("count", [-5, 3])
async def test_a_collector_that_counts_wrongly(
    collector: Collector, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, count: int
) -> None:
    """No count ever falls, and none is of more than was sent."""
    made = exporter()
    partial = theirs.ExportTracePartialSuccess(rejected_spans=count)
    collector.answers = [(200, {}, theirs.ExportTraceServiceResponse(partial_success=partial).SerializeToString())]
    nursery.start_soon(made.run)
    made.add(request(1))
    await trio.sleep(60)
    assert made.spans == (spans(exported=2) if count < 0 else spans(refused=2))


async def test_a_query_of_the_endpoint_is_not_logged(
    collector: Collector, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, logged: Lines
) -> None:
    made = exporter(TracingConfig(endpoint=CollectorUrl.parse("http://c:1/v1?token=s3cret")))
    collector.answers = [400]
    nursery.start_soon(made.run)
    made.add(request(1))
    await trio.sleep(60)
    assert logged("spans not exported")[0]["endpoint"] == "http://c:1/v1"
