"""What is told of requests: the access log and the metrics (R1)."""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import Any

import pytest
import trio
from prometheus_client import CollectorRegistry

from meshlocal.app.http_metrics import HttpCollector
from meshlocal.client.ended import Asked
from meshlocal.net.log import JsonFormatter, TextFormatter
from nursery_tests.proxy.http.conftest import B, Proxy, Served, Upstream, closes, response, says, until


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The access log, without what differs from run to run."""
    found = [json.loads(JsonFormatter().format(each)) for each in caplog.records if each.name == "meshlocal.access"]
    for each in found:
        assert each.pop("ts")
        assert each.pop("client").startswith("127.0.0.1:")
        assert 0 <= each.pop("seconds", 0) < 30
        assert (each.pop("level"), each.pop("logger"), each.pop("event")) == ("info", "meshlocal.access", "request")
    return found


async def test_access_log(proxy: Proxy, pair: tuple[Upstream, Upstream], caplog: pytest.LogCaptureFixture) -> None:
    """One line a request, at its end; queries are left out, for they carry secrets."""
    caplog.set_level(logging.INFO, "meshlocal.access")
    local, far = pair
    proxy.configure(access_log=True)
    async with await proxy.connect() as client:
        await client.get("/a?secret=1")
        await client.ask("PUT", "/b", b"hello")
        local.behaviour = closes
        await client.get("/c")
        far.behaviour = closes
        await client.ask("POST", "/d", b"x")
        await client.get("/e", host="1.2.3.4")
        await client.send(b"nonsense\r\n\r\n")
        await client.rest()
    await proxy.idle()
    here = {"service": "b", "host": "b", "instance": f"127.0.0.1:{local.port}", "node": "n1", "tier": "node"}
    there = {**here, "instance": f"127.0.0.1:{far.port}", "node": "n2", "tier": "other", "reason": "local_failed"}
    expected = [
        {**here, "method": "GET", "path": "/a", "status": 200, "sent": 0, "received": 5},
        {**here, "method": "PUT", "path": "/b", "status": 200, "sent": 5, "received": 5},
        {**there, "method": "GET", "path": "/c", "status": 200, "sent": 0, "received": 3, "attempts": 2},
        {**here, "method": "POST", "path": "/d", "status": 502, "sent": 1, "received": 0, "error": "no_response"},
        {"host": "1.2.3.4", "method": "GET", "path": "/e", "status": 503, "error": "unknown_host", "attempts": 0},
        {"status": 400, "error": "bad_request_line"},
    ]
    outcomes = ["served", "served", "served", "failed", "no_instance", None]
    got = [{name: value for name, value in line.items() if value is not None} for line in lines(caplog)]
    assert [line.pop("outcome", None) for line in got] == outcomes
    # Who is told of a failure is told which request it was.
    assert [bool(line.pop("request_id", None)) for line in got] == [False, False, False, True, True, False]
    for line, wanted in zip(got, expected, strict=True):
        if "method" in wanted:
            wanted = {"attempts": 1, "sent": 0, "received": 0, "protocol": "1.1", **wanted}
        assert line == wanted


async def test_what_left_the_node_or_failed_is_kept(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    """R1: with what was asked for, but no query, and each attempt's instance, failure and time."""
    local, far = pair
    async with await proxy.connect() as client:
        await client.get("/near?secret=1")
        local.behaviour = says(response(b"sorry", "500 Internal Server Error"))
        await client.get("/broken?secret=1")
        local.behaviour = closes
        await client.get("/away?secret=1")
    await proxy.idle()
    broken, away = proxy.table[B].told.recent
    assert broken.asked == Asked("1.1", "GET", "/broken", 500)
    assert (broken.tier, broken.reason, broken.outcome, broken.failures) == ("node", "", "served", ())
    assert away.asked == Asked("1.1", "GET", "/away", 200)
    assert (away.tier, away.reason, away.attempts) == ("other", "local_failed", 2)
    assert away.instance is not None
    assert away.instance.key.port == far.port
    [failed] = away.failures
    assert (failed.pick.instance.key.port, failed.error) == (local.port, "no_response")
    assert 0 <= failed.seconds <= away.seconds


async def test_access_log_is_off_by_default_and_may_be_text(
    proxy: Proxy, local: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "meshlocal.access")
    async with await proxy.connect() as client:
        await client.get("/quiet")
        assert not caplog.records
        proxy.configure(access_log=True)
        await client.get("/told")
    (record,) = caplog.records
    text = TextFormatter().format(record)
    assert "service=b" in text
    assert "path=/told" in text
    assert "\n" not in text


async def test_metrics(proxy: Proxy, pair: tuple[Upstream, Upstream]) -> None:
    local, far = pair
    proxy.configure(http={"retry_floor": 1, "retry_percent": 0})
    registry = CollectorRegistry(auto_describe=True)
    registry.register(HttpCollector(lambda: proxy.forwarder))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"meshlocal_http_{name}", {"service": "b", **labels})

    async with await proxy.connect() as client:
        for _ in range(3):
            await client.get()
        local.behaviour = says(response(b"busy", "503 Busy"))
        assert (await client.get()).status == 200
        assert (await client.get()).status == 503
        local.behaviour = closes
        assert (await client.get()).status == 200
        await client.get(host="1.2.3.4")
        assert registry.get_sample_value("meshlocal_http_clients_open") == 1
    await until(lambda: registry.get_sample_value("meshlocal_http_clients_open") == 0)
    assert value("responses_total", tier="node", reason="", status="2xx", protocol="1.1") == 3
    assert value("responses_total", tier="node", reason="", status="5xx", protocol="1.1") == 1
    assert value("responses_total", tier="other", reason="local_failed", status="2xx", protocol="1.1") == 2
    assert value("retries_total", cause="status") == 1
    assert value("retries_refused_total") == 1
    # The connection that had answered 503 was kept, and then closed by the instance; the fresh one was, too.
    assert value("retries_total", cause="no_response") == 1
    for tier, count in (("node", 4), ("other", 2)):
        assert value("request_seconds_count", tier=tier) == count
        assert value("request_seconds_bucket", tier=tier, le="30.0") == count
        assert 0 < (value("request_seconds_sum", tier=tier) or 0) < 180
    assert registry.get_sample_value("meshlocal_http_refused_total", {"reason": "unknown_host"}) == 1
    assert value("pool_connections") == proxy.pooled
    assert value("pool_connections_made_total") == local.accepted + far.accepted
    assert (value("pool_connections_reused_total") or 0) >= 3


@pytest.mark.parametrize("replay_buffer", [0, 65536])
async def test_the_bytes_of_bodies_are_counted(proxy: Proxy, local: Upstream, replay_buffer: int) -> None:
    """Both ways; whether a request's was held or streamed."""
    proxy.configure(attempts={"replay_buffer": replay_buffer})
    statistics = proxy.table[B].statistics
    async with await proxy.connect() as client:
        for number in range(1, 4):
            assert (await client.ask("PUT", "/", b"x" * 100)).body == b"local"
            await until(partial(lambda wanted: sum(proxy.requests().values()) == wanted, number))
            assert (statistics.bytes_sent, statistics.bytes_received) == (100 * number, 5 * number)
        await client.get()
    await proxy.idle()
    assert (statistics.bytes_sent, statistics.bytes_received) == (300, 20)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_the_histogram_has_how_long_a_request_took(proxy: Proxy, local: Upstream, method: str) -> None:
    """In seconds, from its head to its response's end."""

    async def thinks(upstream: Upstream, served: Served) -> None:
        await trio.sleep(0.12)
        await served.send(response(b"done"))

    local.behaviour = thinks
    registry = CollectorRegistry(auto_describe=True)
    registry.register(HttpCollector(lambda: proxy.forwarder))
    before = trio.current_time()
    assert (await proxy.ask(method, "/", b"x" if method == "POST" else None)).body == b"done"
    await proxy.idle()
    took = trio.current_time() - before

    def value(name: str, **labels: str) -> float:
        own = {"service": "b", "tier": "node", **labels}
        found = registry.get_sample_value(f"meshlocal_http_request_seconds_{name}", own)
        assert found is not None
        return found

    assert value("bucket", le="0.1") == 0
    assert value("bucket", le="60.0") == value("count") == 1
    assert 0.12 <= value("sum") <= took


async def test_failures_are_warned_of_but_not_each(
    proxy: Proxy, local: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    """With what to look for: the answer, each instance that was tried, the last error."""
    local.refuse()
    for _ in range(5):
        assert (await proxy.ask()).status == 502
    warnings = [each for each in caplog.records if each.name == "meshlocal.proxy.http.forwarder"]
    assert len(warnings) == 1
    told = json.loads(JsonFormatter().format(warnings[0]))
    assert (told["event"], told["answer"], told["last_error"]) == ("request failed", "failed", "refused")
    assert told["service"] == "b"
    assert told["tried"].startswith(f"127.0.0.1:{local.port} (node) refused")
