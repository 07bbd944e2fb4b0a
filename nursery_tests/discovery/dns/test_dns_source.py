"""A DNS server over UDP and TCP as a registry: its answers, its silence, and its time (D3)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
import trio

from meshlocal.discovery.dns import resolving, source
from meshlocal.discovery.dns.source import DnsSource
from meshlocal.discovery.source import Instances
from meshlocal.policy.dns_options import DnsOptions
from meshlocal.policy.model import ServiceKey
from nursery_tests.discovery.dns.server import Server
from nursery_tests.discovery.published import Published as Publications

LIMIT = 20.0
B = ServiceKey("b")


class Published(Publications):
    """Of one service, which a DNS source never takes back."""

    def update(self, service: ServiceKey, instances: Instances | None) -> None:
        assert instances is not None
        super().update(service, instances)

    @property
    def endpoints(self) -> list[str]:
        return sorted(map(str, self.services.get(B, {})))


@pytest.fixture
async def server(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(source, "SHORTEST", 0.05)
    monkeypatch.setattr(source, "BACKOFF_INITIAL", 0.05)
    monkeypatch.setattr(source, "BACKOFF_MAX", 0.1)
    monkeypatch.setattr(resolving, "LIFETIME", 0.4)
    made = Server()
    await nursery.start(made.serve)
    return made


@asynccontextmanager
async def following(server: Server, text: str, defaults: Any = None) -> AsyncIterator[tuple[Published, DnsSource]]:
    """A source that is in sync."""
    made = DnsSource(DnsOptions.parse(f"{text}&server=127.0.0.1:{server.port}"), Random(0), defaults or {})
    published = Published()
    async with trio.open_nursery() as nursery:
        with trio.fail_after(LIMIT):
            await nursery.start(made.run, published)
        yield published, made
        nursery.cancel_scope.cancel()


SRV = "_http._tcp.b.example"


async def test_srv(server: Server) -> None:
    """Each target's addresses are instances; what SRV says of them are labels; nodes are by network."""
    server.records = {
        (SRV, "SRV"): (60, ["10 5 9001 one.example.", "20 0 9002 two.example."]),
        ("one.example", "A"): (60, ["10.0.1.1", "10.0.2.1"]),
        ("two.example", "AAAA"): (60, ["fd00::2"]),
    }
    text = f"{SRV}?service=b&port_name=http&node=10.0.1.0/24=n1&node=fd00::/16=n3"
    async with following(server, text, {"zone": "z1", "cluster": ""}) as (published, made):
        ports = {key.address: (key.port, key.port_name) for key in published.services[B]}
        assert ports == {"10.0.1.1": (9001, "http"), "10.0.2.1": (9001, "http"), "fd00::2": (9002, "http")}
        by_address = {key.address: found for key, found in published.services[B].items()}
        assert [by_address[each].node for each in ("10.0.1.1", "10.0.2.1", "fd00::2")] == ["n1", "", "n3"]
        labels = by_address["10.0.1.1"].labels
        assert labels == {
            "service": "b",
            "registry": "dns",
            "zone": "z1",
            "node": "n1",
            "srv_priority": "10",
            "srv_weight": "5",
            "srv_target": "one.example",
        }
        assert made.may_know(B)
        assert not made.may_know(ServiceKey("c"))
        assert made.name == f"dns:{SRV}"
        assert published.problem is None


async def test_addresses(server: Server) -> None:
    server.records = {("b.example", "A"): (60, ["10.0.0.2", "10.0.0.1"]), ("b.example", "AAAA"): (60, ["fd00::1"])}
    async with following(server, "b.example?service=b&port=9000") as (published, _):
        assert sorted(key.address for key in published.services[B]) == ["10.0.0.1", "10.0.0.2", "fd00::1"]
        assert {key.port for key in published.services[B]} == {9000}
    async with following(server, "b.example?service=b&port=9000&type=AAAA") as (published, _):
        assert [key.address for key in published.services[B]] == ["fd00::1"]


async def test_an_answer_holds_for_its_time(server: Server) -> None:
    """It is asked again then, and what is the same is not published again."""
    server.records = {("b.example", "A"): (1, ["10.0.0.1"])}
    async with following(server, "b.example?service=b&port=1&type=A") as (published, made):
        asked = len(server.asked)
        await trio.sleep(0.5)
        assert len(server.asked) == asked
        server.records = {("b.example", "A"): (1, ["10.0.0.1", "10.0.0.2"])}
        await published.until(lambda: published.calls == 2)
        assert len(published.services[B]) == 2
        with trio.fail_after(LIMIT):
            while made.details().resources[0].lists < 4:  # noqa: ASYNC110 - a count has no event
                await trio.sleep(0.05)
        assert published.calls == 2


async def test_there_is_nothing(server: Server) -> None:
    """No such name, and no such records: DNS says that the service has no instance; for how long, SOA says."""
    async with following(server, "b.example?service=b&port=1&type=A") as (published, made):
        assert published.services == {B: {}}
        assert published.problem is None
        found = await made._resolver.resolve("b.example", "A")
        assert found.ttl == 7
    server.records = {("b.example", "AAAA"): (60, ["fd00::1"])}
    async with following(server, "b.example?service=b&port=1&type=A") as (published, _):
        assert published.services == {B: {}}


async def test_there_is_no_such_service_here(server: Server) -> None:
    """RFC 2782: a single dot."""
    server.records = {(SRV, "SRV"): (60, ["0 0 0 ."])}
    async with following(server, f"{SRV}?service=b") as (published, _):
        assert published.services == {B: {}}


@pytest.mark.parametrize("how", ["servfail", "refused", "silent"])
async def test_who_cannot_say_changes_nothing(server: Server, how: str) -> None:
    """It is reported, and asked again; what was known stays (D3)."""
    server.records = {("b.example", "A"): (0, ["10.0.0.1"])}
    async with following(server, "b.example?service=b&port=1&type=A") as (published, _):
        if how == "silent":
            server.silent = True
        else:
            server.codes["b.example"] = dns.rcode.SERVFAIL if how == "servfail" else dns.rcode.REFUSED
        await published.until(lambda: published.problem is not None)
        assert "b.example A" in (published.problem or "")
        assert len(published.services[B]) == 1
        server.silent, server.codes = False, {}
        server.records = {("b.example", "A"): (0, ["10.0.0.2"])}
        await published.until(lambda: published.problem is None)
        assert [key.address for key in published.services[B]] == ["10.0.0.2"]


async def test_one_target_that_cannot_be_found_keeps_its_addresses(server: Server) -> None:
    server.records = {
        (SRV, "SRV"): (0, ["1 1 9000 one.example.", "1 1 9000 two.example."]),
        ("one.example", "A"): (0, ["10.0.0.1"]),
        ("two.example", "A"): (0, ["10.0.0.2"]),
    }
    async with following(server, f"{SRV}?service=b") as (published, _):
        server.codes["one.example"] = dns.rcode.SERVFAIL
        server.records["two.example", "A"] = (0, ["10.0.0.3"])
        await published.until(lambda: "10.0.0.3" in [key.address for key in published.services[B]])
        assert sorted(key.address for key in published.services[B]) == ["10.0.0.1", "10.0.0.3"]
        await published.until(lambda: published.problem is not None)
        assert "one.example" in (published.problem or "")


async def test_two_records_for_one_endpoint(server: Server) -> None:
    """The better priority counts."""
    server.records = {
        (SRV, "SRV"): (60, ["20 1 9000 a.example.", "10 1 9000 b.example."]),
        ("a.example", "A"): (60, ["10.0.0.1"]),
        ("b.example", "A"): (60, ["10.0.0.1"]),
    }
    async with following(server, f"{SRV}?service=b") as (published, _):
        [found] = published.services[B].values()
        assert found.labels["srv_priority"] == "10"


async def test_an_answer_that_is_too_long_for_udp(server: Server) -> None:
    addresses = [f"10.0.{number // 250}.{number % 250 + 1}" for number in range(600)]
    server.records = {("b.example", "A"): (60, addresses)}
    server.truncates = True
    async with following(server, "b.example?service=b&port=1&type=A") as (published, _):
        assert len(published.services[B]) == 600
        assert server.over_tcp == 1


async def test_addresses_that_no_instance_may_have_are_left_out(server: Server) -> None:
    server.records = {("b.example", "A"): (60, ["0.0.0.0", "10.0.0.1"])}
    async with following(server, "b.example?service=b&port=1&type=A") as (published, made):
        assert [key.address for key in published.services[B]] == ["10.0.0.1"]
        assert made.details().left_out == {"malformed": 1}
