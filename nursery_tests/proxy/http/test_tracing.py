"""Traces and ids of requests: what passes through, what an instance is told, what is recorded (rule R3)."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

import pytest
import trio

from meshlocal.admin.messages import Request
from meshlocal.admin.metrics_page import metrics_response
from meshlocal.app.http_metrics import HttpCollector
from meshlocal.net.wall_clock import wall_clock
from meshlocal.policy.addresses import CollectorUrl
from meshlocal.policy.config_tracing import TracingConfig
from meshlocal.policy.steps import finish
from meshlocal.proxy.http.marks import Marker, Trace
from meshlocal.proxy.http.record import HttpRecord
from meshlocal.proxy.http.traced import TracedRequest, traced_request
from meshlocal.wire.http1.request import MARKS, parse_request
from nursery_tests.proxy.http.conftest import B, Proxy, Upstream, closes, resets, response, says
from nursery_tests.proxy.http.h2 import CALL, GET, GRPC_OK, H2Instance, H2Wire, asking, h2_client

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"
COLLECTOR = CollectorUrl("http", "127.0.0.1", 4318, "/v1/traces")


@pytest.fixture
def traced(proxy: Proxy) -> list[TracedRequest]:
    """What is recorded, with a collector configured; of requests without a trace all."""
    found: list[TracedRequest] = []

    def ended(record: HttpRecord, now: float) -> None:
        assert record.mark is not None
        assert record.mark.trace is not None
        found.append(traced_request(record, record.mark.trace, now))

    proxy.forwarder.shared.traced = ended
    trace(proxy)
    return found


def trace(proxy: Proxy, percent: float = 100, http: Mapping[str, object] | None = None) -> None:
    proxy.configure(tracing=TracingConfig(endpoint=COLLECTOR, sample_percent=percent), http=http)


def names(head: bytes) -> list[tuple[str, str]]:
    """The fields of a head that say which request it is, or of which trace."""
    lines = [line.partition(":") for line in head.decode().split("\r\n")[1:-2]]
    wanted = ("traceparent", "tracestate", "x-request-id")
    return sorted((name.lower(), value.strip()) for name, _, value in lines if name.lower() in wanted)


def only(head: bytes, name: str) -> str:
    [value] = [value for found, value in names(head) if found == name]
    return value


# Off, as it is by default.


@pytest.mark.parametrize("parent", [SAMPLED, UNSAMPLED, "nonsense"])
async def test_a_trace_passes_through(proxy: Proxy, local: Upstream, parent: str) -> None:
    """Whatever it says: whoever understands it stands behind the proxy."""
    await proxy.ask(traceparent=parent, tracestate="a=b,c=d", x_request_id="r1")
    assert names(local.heads[0]) == [("traceparent", parent), ("tracestate", "a=b,c=d"), ("x-request-id", "r1")]


async def test_nothing_is_added(proxy: Proxy, local: Upstream) -> None:
    assert "x-request-id" not in (await proxy.ask()).fields
    assert names(local.heads[0]) == []
    assert not proxy.forwarder.shared.marker.needed


async def test_a_trace_passes_through_in_http2(proxy: Proxy, nursery: trio.Nursery) -> None:
    near = H2Instance("near", "n1", nursery)
    await nursery.start(near.serve)
    proxy.publish(near.instance)
    async with await h2_client(proxy.port()) as client:
        asked = asking(GET, traceparent=SAMPLED, tracestate="a=b", x_request_id="r1")
        assert (await client.ask(asked)).status == 200
    assert sorted(near.asked[0].head) == sorted(asked)


# On.


async def test_an_instance_is_told_of_its_attempt(
    proxy: Proxy, pair: tuple[Upstream, Upstream], traced: list[TracedRequest]
) -> None:
    """Each attempt is a span of its own below the request's, which is below the caller's; what vendors say goes on."""
    local, far = pair
    local.behaviour = closes
    answer = await proxy.ask(traceparent=SAMPLED, tracestate="a=b")
    assert answer.body == b"far"
    await proxy.idle()
    [request] = traced
    assert request.trace == Trace(int(TRACE, 16), int(SPAN, 16), request.trace.span_id, 1)
    for number, upstream in ((1, local), (2, far)):
        own = f"{request.trace.attempt_id(number):016x}"
        assert names(upstream.heads[-1]) == [("traceparent", f"00-{TRACE}-{own}-01"), ("tracestate", "a=b")]
    assert request.trace.attempt_id(1) != request.trace.attempt_id(2) != request.trace.span_id
    [failed] = request.failures
    assert (failed.number, failed.error, failed.pick.instance) == (1, "no_response", local.instance)
    assert (request.attempts, request.instance, request.reason) == (2, far.instance, "local_failed")
    assert request.began >= failed.began + failed.seconds >= request.started


async def test_a_trace_begins_here(proxy: Proxy, local: Upstream, traced: list[TracedRequest]) -> None:
    """Also where what the caller said is no trace: what vendors said of that is dropped with it (3.3)."""
    async with await proxy.connect() as client:
        await client.get("/plain")
        await client.get("/nonsense", traceparent="nonsense", tracestate="a=b")
        await client.get("/orphan", tracestate="a=b")
        await client.send(
            f"GET /two HTTP/1.1\r\nhost: b\r\ntraceparent: {SAMPLED}\r\ntraceparent: {SAMPLED}\r\n\r\n".encode()
        )
        await client.response()
    await proxy.idle()
    assert [each.trace.parent_id for each in traced] == [0, 0, 0, 0]
    assert len({each.trace.trace_id for each in traced} - {int(TRACE, 16)}) == 4
    for head, request in zip(local.heads, traced, strict=True):
        own = f"00-{request.trace.trace_id:032x}-{request.trace.attempt_id(1):016x}-01"
        assert names(head) == [("traceparent", own)]


async def test_a_caller_that_records_nothing_decides(
    proxy: Proxy, local: Upstream, traced: list[TracedRequest]
) -> None:
    await proxy.ask(traceparent=UNSAMPLED, tracestate="a=b")
    assert names(local.heads[0]) == [("traceparent", UNSAMPLED), ("tracestate", "a=b")]
    await proxy.idle()
    assert traced == []


async def test_the_same_connection_is_traced_and_not(
    proxy: Proxy, local: Upstream, traced: list[TracedRequest]
) -> None:
    """A request that a client's next one is made of leaves it nothing."""
    async with await proxy.connect() as client:
        for parent in (SAMPLED, UNSAMPLED, SAMPLED):
            await client.get("/", traceparent=parent)
        trace(proxy, 0)
        await client.get("/")
    await proxy.idle()
    assert len(traced) == 2
    assert names(local.heads[1]) == [("traceparent", UNSAMPLED)]
    assert names(local.heads[3]) == []


async def test_off_again(proxy: Proxy, local: Upstream, traced: list[TracedRequest]) -> None:
    """S2: nothing is recorded from then on, and a trace passes through."""
    proxy.configure()
    await proxy.ask(traceparent=SAMPLED)
    assert names(local.heads[0]) == [("traceparent", SAMPLED)]
    await proxy.idle()
    assert traced == []


@pytest.mark.parametrize("instance", ["http1", "http2"])
@pytest.mark.parametrize("client", ["http1", "http2"])
async def test_either_version(
    proxy: Proxy, nursery: trio.Nursery, local: Upstream, traced: list[TracedRequest], client: str, instance: str
) -> None:
    """Of HTTP, on either side."""
    proxy.configure(
        tracing=TracingConfig(endpoint=COLLECTOR), http={"request_id": "make"}, service={"protocol": instance}
    )
    new = H2Instance("new", "n1", nursery)
    await nursery.start(new.serve)
    proxy.publish(new.instance if instance == "http2" else local.instance)
    if client == "http2":
        async with await h2_client(proxy.port()) as wire:
            assert (await wire.ask(asking(GET, traceparent=SAMPLED, tracestate="a=b"))).status == 200
    else:
        assert (await proxy.ask(traceparent=SAMPLED, tracestate="a=b")).status == 200
    await proxy.idle()
    [request] = traced
    assert request.asked.protocol == ("2" if client == "http2" else "1.1")
    if instance == "http2":
        told = sorted((name.decode(), value.decode()) for name, value in new.asked[0].head if name in MARKS)
    else:
        told = names(local.heads[0])
    own = f"00-{TRACE}-{request.trace.attempt_id(1):016x}-01"
    assert told == [("traceparent", own), ("tracestate", "a=b"), ("x-request-id", request.asked.request_id)]


async def refuses_call(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
    await wire.wait(lambda: wire.streams[stream_id].ended)
    wire.peer.send_headers(stream_id, [*GRPC_OK, (b"grpc-status", b"13")], end_stream=True)
    await wire.flush()


async def test_a_call(proxy: Proxy, nursery: trio.Nursery, traced: list[TracedRequest]) -> None:
    """gRPC: the call's status is what counts."""
    near = H2Instance("near", "n1", nursery)
    await nursery.start(near.serve)
    proxy.publish(near.instance)
    async with await h2_client(proxy.port()) as client:
        near.behaviour = refuses_call
        await client.call(traceparent=SAMPLED)
        await client.call(traceparent=SAMPLED)
    await proxy.idle()
    assert [(each.is_grpc, each.grpc_status, each.outcome) for each in traced] == [(True, 13, "served")] * 2
    assert all(each.fault for each in traced)


async def test_what_is_told_of_a_failure(proxy: Proxy, local: Upstream, traced: list[TracedRequest]) -> None:
    local.behaviour = resets
    answer = await proxy.ask("POST", "/x?secret=1", b"x")
    await proxy.idle()
    [request] = traced
    assert answer.told == (502, "no_response")
    assert (request.asked.path, request.asked.status, request.fault) == ("/x", 502, True)
    assert request.asked.request_id == answer.fields["x-request-id"]
    assert (request.outcome, request.error) == ("failed", "no_response")
    assert [each.number for each in request.failures] == [1]


async def test_a_request_for_nobody(proxy: Proxy, traced: list[TracedRequest]) -> None:
    answer = await proxy.ask(host="no.where.at.all")
    await proxy.idle()
    [request] = traced
    assert (request.service, request.attempts, request.instance) == (None, 0, None)
    assert (request.asked.status, request.error) == (503, "unknown_host")
    assert answer.fields["x-request-id"] == request.asked.request_id


# Ids.


@pytest.mark.parametrize("given", [None, "", "r1", "r" * 500])
async def test_ids_are_made(proxy: Proxy, local: Upstream, given: str | None) -> None:
    """Where there is none, for the instance to see; one that came is passed on as it is."""
    proxy.configure(http={"request_id": "make"})
    async with await proxy.connect() as client:
        for _ in range(2):
            await client.get("/", **({} if given is None else {"x_request_id": given}))
    first, second = (only(head, "x-request-id") for head in local.heads)
    if given:
        assert first == second == given
    else:
        assert re.fullmatch(r"[0-9a-f]{32}", first)
        assert first != second


async def test_an_id_stays_through_attempts(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    proxy.configure(http={"request_id": "make"})
    local, far = pair
    local.behaviour = closes
    await proxy.ask()
    assert only(local.heads[-1], "x-request-id") == only(far.heads[-1], "x-request-id")


@pytest.mark.parametrize("given", ["", "r1"])
async def test_an_answer_of_the_proxys_own_has_an_id(proxy: Proxy, local: Upstream, given: str) -> None:
    """For the operator to look for in the log: also where the request had none."""
    local.behaviour = closes
    answer = await proxy.ask("POST", "/", b"x", **({"x_request_id": given} if given else {}))
    told = answer.fields["x-request-id"]
    assert told == given or re.fullmatch(r"[0-9a-f]{32}", told)
    assert answer.body == f"meshlocal: the instance ended the connection without a response (request {told})\n".encode()
    [kept] = proxy.table[B].told.recent
    assert kept.asked.request_id == told


async def test_an_answer_of_an_instance_has_none(proxy: Proxy, local: Upstream) -> None:
    local.behaviour = says(response(b"sorry", "500 Internal Server Error"))
    proxy.configure(http={"request_id": "make"})
    assert "x-request-id" not in (await proxy.ask()).fields


async def test_a_long_id_is_told_in_part(proxy: Proxy) -> None:
    answer = await proxy.ask(host="no.where.at.all", x_request_id="r" * 500)
    assert answer.fields["x-request-id"] == "r" * 128


async def test_answers_in_http2_have_an_id(proxy: Proxy) -> None:
    proxy.publish()
    async with await h2_client(proxy.port()) as client:
        plain = await client.ask(GET)
        assert re.fullmatch(r"[0-9a-f]{32}", plain["x-request-id"] or "")
        assert f"(request {plain['x-request-id']})" in plain.data.decode()
        call = await client.ask(asking(CALL, x_request_id="r 2"), b"\0\0\0\0\2hi")
        assert call["x-request-id"] == "r 2"
        assert "(request r 2)" in (call["grpc-message"] or "")


# What is drawn.


def test_the_share_that_is_traced() -> None:
    marker = Marker(0.25, random.Random(1), makes_ids=False)
    head = parse_request(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
    marks = [marker.mark(head) for _ in range(4000)]
    assert 900 < sum(mark is not None for mark in marks) < 1100


@pytest.mark.parametrize("sampled", [None, 0.0])
def test_nothing_is_begun(sampled: float | None) -> None:
    marker = Marker(sampled, random.Random(1), makes_ids=False)
    assert marker.mark(parse_request(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")) is None


def test_spans_of_attempts_are_never_nought() -> None:
    """It would stand for no span."""
    last = Trace(1, 0, 2**64 - 1, 1)
    assert last.attempt_id(1) == 1
    assert Trace(1, 0, 2**64 - 2, 1).attempt_id(1) == 2**64 - 1


async def test_a_latency_leads_to_its_trace(proxy: Proxy, local: Upstream, traced: list[TracedRequest]) -> None:
    """Where OpenMetrics is asked for: the last request of each bucket that is traced; nowhere else."""
    await proxy.ask(traceparent=SAMPLED)
    await proxy.ask(traceparent=UNSAMPLED)
    await proxy.idle()
    answers = {}
    for accept in ("application/openmetrics-text;version=1.0.0", "text/plain"):
        request = Request("GET", "/metrics", "", {"accept": accept})
        answers[accept[:8]] = finish(metrics_response(request, [HttpCollector(lambda: proxy.forwarder)])).body.decode()
    lines = [line for line in answers["applicat"].splitlines() if " # {" in line]
    [line] = lines
    assert line.startswith("meshlocal_http_request_seconds_bucket{")
    shown = re.search(r'# \{trace_id="(\w+)"\} (\S+) (\S+)$', line)
    assert shown is not None
    assert shown[1] == TRACE
    assert float(shown[2]) == pytest.approx(traced[0].ended - traced[0].started)
    assert abs(float(shown[3]) - wall_clock()) < 60
    assert " # {" not in answers["text/pla"]


@pytest.mark.parametrize("given", ["a" * 127 + " b", "caf\xe9", "a" * 500])
async def test_an_id_is_told_as_it_came(proxy: Proxy, given: str) -> None:
    """As far as it is told: no field ends with a space (RFC 9113, 8.2.1)."""
    expected = given[:128].rstrip()
    async with await proxy.connect() as client:
        await client.send(b"GET / HTTP/1.1\r\nhost: b.a.c.d.e\r\nx-request-id: %b\r\n\r\n" % given.encode("latin-1"))
        assert (await client.response()).fields["x-request-id"] == expected
    async with await h2_client(proxy.port()) as wire:
        fields = [*GET[:2], (b":authority", b"b.a.c.d.e"), GET[3], (b"x-request-id", given.encode("latin-1"))]
        stream_id = wire.open(fields)
        seen = wire.streams[stream_id]
        await wire.until(lambda: seen.over)
        assert dict(seen.head)[b"x-request-id"] == expected.encode("latin-1")


async def test_a_mark_for_this_hop_alone_is_none(proxy: Proxy, local: Upstream, traced: list[TracedRequest]) -> None:
    """A Connection field may name it (RFC 9110, 7.6.1): then the instance gets one that is made here."""
    trace(proxy, 100, {"request_id": "make"})
    await proxy.ask(connection="x-request-id, traceparent", x_request_id="hop", traceparent=SAMPLED)
    await proxy.idle()
    told = dict(names(local.heads[0]))
    [request] = traced
    assert told["x-request-id"] == request.asked.request_id != "hop"
    assert request.trace.trace_id != int(TRACE, 16)


async def test_an_answer_that_was_dropped_has_its_status(
    proxy: Proxy, pair: tuple[Upstream, Upstream], traced: list[TracedRequest]
) -> None:
    local, _ = pair
    local.behaviour = says(response(b"later", "503 Service Unavailable"))
    assert (await proxy.ask()).body == b"far"
    await proxy.idle()
    [request] = traced
    assert [(each.error, each.status) for each in request.failures] == [("status", 503)]
