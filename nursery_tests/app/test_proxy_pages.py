"""app/proxy_pages and app/proxy_metrics: what a proxy tells of itself (L5, R1, R2, D1)."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from meshlocal.admin.messages import Request, Response
from meshlocal.admin.server import answer
from meshlocal.app.config_loader import load_config
from meshlocal.app.operator import Operator
from meshlocal.app.proxy import ProxyProcess
from meshlocal.app.proxy_pages import proxy_routes
from meshlocal.client.statistics import Outcome, RequestKey
from meshlocal.policy import model
from meshlocal.policy.config import Config, MetricsConfig
from meshlocal.policy.model import Conditions, ServiceKey, ServiceSnapshot, make_instance
from meshlocal.policy.retry import Failure
from meshlocal.proxy.http.record import HttpRecord
from meshlocal.wire.http1.request import parse_request

B, C = ServiceKey("b"), ServiceKey("c")


def make_process(node: str = "n1", prefer: tuple[str, ...] = ("node",)) -> ProxyProcess:
    def load() -> Config:
        flags: Mapping[str, object] = {
            "proxy.discovery.urls": ("grpc://127.0.0.1:1",),
            "proxy.listen": ("tcp://127.0.0.1:0=b", "tcp://127.0.0.1:0=c"),
            "proxy.node_name": node,
            "proxy.prefer": prefer,
        }
        return load_config(None, flags, {}, "proxy")

    return ProxyProcess(load, random.Random(0), Operator({}))


def publish(process: ProxyProcess, service: ServiceKey = B, *, unknown: bool = False, node: str = "n1") -> None:
    instances = [
        make_instance("10.0.0.1", 9000, labels={"node": node}),
        make_instance("10.0.0.2", 9000, labels={"node": "n2"}),
        make_instance("10.0.0.3", 9000, labels={"node": "<n3>"}, conditions=Conditions(ready=False)),
    ]
    process.services.publish(ServiceSnapshot(service, "1", model.index([] if unknown else instances), unknown))


async def get(process: ProxyProcess, target: str) -> Response:
    path, _, query = target.partition("?")
    return await answer(proxy_routes(process)[path], Request("GET", path, query, {}))


async def live(process: ProxyProcess, query: str = "?service=b") -> dict[str, Any]:
    """What the page draws, by its parts."""
    lines = (await get(process, f"/live{query}")).body.splitlines()
    return {part.pop("part"): part for part in map(json.loads, lines)}


async def page(process: ProxyProcess) -> str:
    """What is said of the proxy itself."""
    facts: str = (await live(process))["proxy"]["facts"]
    assert facts in (await get(process, "/")).body.decode()
    return facts


async def brief(process: ProxyProcess) -> Any:
    """What is said of the first service in brief."""
    return (await live(process))["services"]["services"][0]


async def metrics(process: ProxyProcess, query: str = "") -> dict[tuple[str, ...], float]:
    text = (await get(process, f"/metrics{query}")).body.decode()
    return {
        (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_health_pages() -> None:
    """S1."""
    process = make_process()
    assert (await get(process, "/livez")).status == 200
    assert (await get(process, "/readyz")) == Response(
        503, "text/plain; charset=utf-8", b"not ready: waiting for the first snapshot of every service\n"
    )
    process.readiness.set_ready()
    assert (await get(process, "/readyz")).status == 200
    assert 'class="good">ready<' in (await page(process))
    process.readiness.drain()
    assert ((await get(process, "/readyz")).status, (await get(process, "/livez")).status) == (503, 200)
    assert "not ready: draining" in (await page(process))
    assert (await metrics(process))["meshlocal_ready",] == 0


async def test_the_node_and_what_is_wrong_with_it() -> None:
    """L5: in a metric and on the page for as long as it is so."""
    process = make_process()
    assert "no instance of any" not in (await page(process))  # nothing is known yet
    publish(process, node="n2")
    publish(process, C, node="n2")
    assert "no instance of any watched service is on it" in (await page(process))
    assert (await metrics(process))["meshlocal_node_unmatched",] == 1
    publish(process)
    assert "no instance of any watched service is on it" not in (await page(process))
    assert (await metrics(process))["meshlocal_node_unmatched",] == 0
    nowhere = make_process(node="")
    publish(nowhere)
    assert "unknown: no instance counts as local" in await page(nowhere)
    found = await metrics(nowhere)
    assert (found["meshlocal_node_unknown",], found["meshlocal_node_unmatched",]) == (1, 0)


@pytest.mark.parametrize(
    ("prefer", "unknown"), [(("nodee",), 1), (("zone", "node"), 1), (("node", "zone"), 0), (("node",), 0)]
)
async def test_a_preferred_label_that_the_proxy_lacks(prefer: tuple[str, ...], unknown: int) -> None:
    """L5, R1: one that is mistyped would let every request leave its node."""
    process = make_process(prefer=prefer)
    publish(process)
    assert (await metrics(process))["meshlocal_node_unknown",] == unknown
    missing = next((key for key in prefer if key != "node"), None)
    said = f"the {missing} is unknown, though proxy.prefer names it: no instance counts as of the same {missing}"
    assert (said in (await page(process))) is (missing is not None)
    assert "the node is unknown" not in (await page(process))


async def test_requests_by_tier_and_reason() -> None:
    """R1: how much stays on the node, and why the rest does not."""
    process = make_process()
    publish(process)
    shown = await brief(process)
    assert (shown["near"], shown["away"], shown["failed"], shown["since"]) == (0, 0, 0, [0, 0, 0])
    requests = process.services[B].statistics.requests
    requests[RequestKey("other", "local_failed", Outcome.FAILED)] = 1
    requests[RequestKey("node", "", Outcome.SERVED)] = 3
    requests[RequestKey("other", "local_failed", Outcome.SERVED)] = 1
    requests[RequestKey("node", "", Outcome.FAILED)] = 5
    shown = await brief(process)
    assert (shown["near"], shown["away"], shown["failed"]) == (3, 1, 6), "what failed stayed nowhere"
    assert shown["since"] == [3, 1, 6]
    rows = (await live(process))["detail"]["requests"]
    why = "local_failed: only after every instance of the same node failed"
    assert {"tier": "other", "reason": why, "outcome": "served", "count": 1} in rows
    found = await metrics(process)
    name = "meshlocal_requests_total"
    assert found[name, "outcome=served", "reason=", "service=b", "tier=node"] == 3
    assert found[name, "outcome=served", "reason=local_failed", "service=b", "tier=other"] == 1
    assert found["meshlocal_instances", "service=b", "tier=node"] == 1
    assert found["meshlocal_instances", "service=b", "tier=other"] == 1
    assert found["meshlocal_instances_left_out", "service=b"] == 1


async def test_metrics_are_found_by_name() -> None:
    process = make_process()
    publish(process)
    assert set(await metrics(process, "?name[]=meshlocal_ready&name[]=meshlocal_requests_total")) == {
        ("meshlocal_ready",)
    }
    process.services[B].statistics.requests[RequestKey("node", "", Outcome.SERVED)] = 3
    assert len(await metrics(process, "?name[]=meshlocal_requests_total")) == 1


async def test_the_state_and_age_of_discovery(autojump_clock: trio.testing.MockClock) -> None:
    """D1: going on with what it knew, it says how old that is."""
    process = make_process()
    status = process.feed.status
    assert "nothing heard yet" in (await page(process))
    assert ("meshlocal_snapshot_age_seconds",) not in (await metrics(process))
    status.source, status.connected, status.confirmed_at = "grpc://x:1", True, trio.current_time()
    await trio.sleep(4.5)
    assert "connected" in (await page(process))
    assert "current 4.5 s ago" in (await page(process))
    status.connected, status.problem = False, "connection <refused>"
    await trio.sleep(3 * 86400)
    text = await page(process)
    assert "connection &lt;refused&gt;" in text
    assert "current 3 days ago" in text
    found = await metrics(process)
    assert found["meshlocal_snapshot_age_seconds",] == 3 * 86400 + 4.5
    assert found["meshlocal_discovery_connected",] == 0


async def test_services_tells_each_instances_place() -> None:
    process = make_process()
    publish(process)
    b, c = json.loads((await get(process, "/services")).body)
    assert (b["service"], b["known"], b["tiers"]) == ("b", True, {"node": 1, "other": 1})
    assert [(each["node"], each["tier"], each["left_out"]) for each in b["instances"]] == [
        ("n1", "node", None),
        ("n2", "other", None),
        ("<n3>", None, "not_ready"),
    ]
    assert (c["known"], c["version"], c["instances"]) == (None, None, [])
    rows = (await live(process))["detail"]["instances"]
    assert [(row["node"], row["tier"], row["left_out"]) for row in rows] == [
        ("n1", "node", ""),
        ("n2", "other", ""),
        ("<n3>", "", "not_ready"),
    ]


async def test_which_instance_is_hot() -> None:
    """Of each instance: attempts, failures by cause, and how long it took; as metrics only if they are asked for."""
    process = make_process()
    publish(process)
    counts = process.services[B].statistics.instance(("10.0.0.2", 9000))
    counts.attempts, counts.worked = 7, 4
    counts.failures["refused"] = 3
    for seconds in (0.002, 0.004, 0.4):
        counts.connect.add(seconds)
        counts.response.add(2 * seconds)
    [shown] = [row for row in (await live(process))["detail"]["instances"] if row["instance"] == "10.0.0.2:9000"]
    assert (shown["attempts"], shown["failures"], shown["connect"]["p50"]) == (7, {"refused": 3}, 0.00375)
    assert shown["response"]["p50"] < shown["response"]["p99"]
    found = json.loads((await get(process, "/services")).body)[0]["instances"]
    (view,) = [each["counts"] for each in found if each["address"] == "10.0.0.2"]
    assert (view["attempts"], view["worked"], view["failures"]) == (7, 4, {"refused": 3})
    assert 0.0025 <= view["connect"]["p50"] <= 0.005
    assert not [name for name in await metrics(process) if name[0].startswith("meshlocal_instance_")]
    proxy = msgspec.structs.replace(process.config.proxy, metrics=MetricsConfig(instances=True))
    process.config = msgspec.structs.replace(process.config, proxy=proxy)
    told = await metrics(process)
    own = ("instance=10.0.0.2:9000", "node=n2")
    assert told["meshlocal_instance_attempts_total", *own, "outcome=refused", "service=b"] == 3
    assert told["meshlocal_instance_attempts_total", *own, "outcome=worked", "service=b"] == 4
    assert told["meshlocal_instance_under_way", *own, "service=b"] == 0
    assert told["meshlocal_instance_response_seconds_count", *own, "service=b"] == 3


async def test_metrics_of_instances_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshlocal.app.proxy_metrics.INSTANCES", 2)
    process = make_process()
    publish(process)
    proxy = msgspec.structs.replace(process.config.proxy, metrics=MetricsConfig(instances=True))
    process.config = msgspec.structs.replace(process.config, proxy=proxy)
    for number in range(1, 4):
        process.services[B].statistics.instance((f"10.0.0.{number}", 9000)).attempts = 1
    found = [name for name in await metrics(process) if name[0] == "meshlocal_instance_under_way"]
    assert len(found) == 2


async def test_services_that_are_not_there() -> None:
    process = make_process()
    assert (await brief(process))["state"] == "nothing heard of it yet"
    assert (await live(process))["detail"]["instances"] == []
    publish(process, unknown=True)
    assert (await brief(process))["state"] == "no registry knows it: requests are refused"
    assert "detail" not in await live(process, "?service=zz")
    assert "detail" not in await live(process, "")
    assert json.loads((await get(process, "/services")).body)[0]["known"] is False


async def test_a_long_list_is_cut_on_the_page_only() -> None:
    process = make_process()
    many = [make_instance(f"10.0.{number // 250}.{number % 250}", 1) for number in range(700)]
    process.services.publish(ServiceSnapshot(B, "1", model.index(many)))
    detail = (await live(process))["detail"]
    assert (len(detail["instances"]), detail["known"], len(detail["plan"])) == (500, 700, 20)
    assert len(json.loads((await get(process, "/services")).body)[0]["instances"]) == 700


async def test_what_left_the_node_is_told_with_its_attempts() -> None:
    """R1: the latest first."""
    process = make_process()
    publish(process)
    for path in ("/first", "/second"):
        record = HttpRecord(
            ("127.0.0.1", 5),
            parse_request(f"GET {path}?x=1 HTTP/1.1\r\nHost: b\r\n\r\n".encode()),
            trio.current_time(),
            None,
        )
        record.begin(process.services[B], 10.0)
        record.try_next(trio.current_time())
        record.attempt_failed(Failure.CONNECT, trio.current_time(), "refused")
        record.try_next(trio.current_time())
        record.answered()
        record.status = 200
        record.end(Outcome.SERVED, trio.current_time())
    second, first = (await live(process))["detail"]["recent"]
    assert (second["path"], first["path"]) == ("/second", "/first")
    assert (first["method"], first["status"], first["tier"], first["reason"]) == ("GET", 200, "other", "local_failed")
    assert [(each["instance"], each["error"]) for each in first["failed"]] == [("10.0.0.1:9000", "refused")]


async def test_an_ejection_counts_down(autojump_clock: trio.testing.MockClock) -> None:
    """H1."""
    process = make_process()
    publish(process)
    fitness, picker = process.services[B].fitness, process.services[B].picker
    assert picker is not None
    [near] = [each for each in picker.snapshot.instances.values() if each.node == "n1"]
    while not len(fitness.health):
        fitness.judge(near, Failure.CONNECT, "refused", trio.current_time())
    left = []
    for _ in range(2):
        [row] = [row for row in (await live(process))["detail"]["instances"] if row["node"] == "n1"]
        assert (row["state"], row["cause"]) == ("ejected", "connect")
        left.append(row["next_trial_in"])
        await trio.sleep(1)
    assert 0 <= left[1] < left[0]
    assert (await brief(process))["ejected"] == 1


async def test_explain() -> None:
    """R2."""
    process = make_process()
    assert (await get(process, "/explain?service=b")).status == 503
    publish(process)
    view = json.loads((await get(process, "/explain?service=b")).body)
    assert [(step["node"], step["tier"], step["reason"]) for step in view["plan"]] == [
        ("n1", "node", None),
        ("n2", "other", "local_failed"),
    ]
    assert [each["why"] for each in view["left_out"]] == ["not_ready"]
    for target in ("/explain", "/explain?service=zz", "/explain?service=%3Cb%3E"):
        missing = await get(process, target)
        assert (missing.status, missing.content_type) == (404, "text/plain; charset=utf-8")
        assert missing.body.endswith(b"there are: b, c\n")


async def test_config_is_as_the_file_would_have_it() -> None:
    view = json.loads((await get(make_process(), "/config")).body)
    assert view["proxy"]["listen"] == ["tcp://127.0.0.1:0=b", "tcp://127.0.0.1:0=c"]
    assert view["proxy"]["discovery"]["urls"] == ["grpc://127.0.0.1:1"]
    assert view["proxy"]["node_name"] == "n1"
    assert view["proxy"]["attempts"]["deadline"] == 10.0
