"""A real etcd as a registry: what is in it is what is published, whatever happens to it (D3, D8)."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio

from meshlocal.discovery.etcd import client, source
from meshlocal.discovery.etcd.client import Cluster
from meshlocal.discovery.etcd.source import EtcdSource
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.policy.etcd_options import EtcdOptions
from meshlocal.policy.model import ServiceKey
from meshlocal.wire.grpc.status import GrpcError
from nursery_tests.certificates import Authority
from nursery_tests.discovery.published import Published
from nursery_tests.interop.etcd import LIMIT, Etcd, installed
from nursery_tests.logged import entry


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come soon."""
    monkeypatch.setattr(source, "BACKOFF_MAX", 0.5)


@pytest.fixture(params=["debian", "pypi"])
def etcd(request: pytest.FixtureRequest, program: Callable[[str], str], tmp_path: Path, quick: None) -> Any:
    """Of Debian, 3.4, and of PyPI, 3.5."""
    made = Etcd(*installed(program, request.param), tmp_path)
    made.start()
    yield made
    made.kill()


@asynccontextmanager
async def following(
    *etcds: Etcd, options: str = "", prefix: str = "p", host: str = "127.0.0.1"
) -> AsyncIterator[tuple[Published, EtcdSource]]:
    """A source that is in sync."""
    hosts = ",".join(f"{host}:{each.port}" for each in etcds)
    made = EtcdSource(EtcdOptions.parse(f"//{hosts}/{prefix}{options}"), Random(0), {"zone": "z1"})
    published = Published()
    async with trio.open_nursery() as nursery:
        with trio.fail_after(LIMIT):
            await nursery.start(made.run, published)
        yield published, made
        nursery.cancel_scope.cancel()


async def test_what_stands_in_etcd_is_published(etcd: Etcd) -> None:
    """At first all of it, then each change, and nothing of it twice."""
    await etcd.put("p/b/one", labels={"node": "n1"})
    await etcd.put("other/b/one", address="10.9.9.9")
    async with following(etcd) as (published, made):
        assert published.addresses == {"b": ["10.0.0.1"]}
        [found] = published.services[ServiceKey("b")].values()
        assert (found.node, found.labels["zone"], found.labels["registry"]) == ("n1", "z1", "etcd")
        await etcd.put("p/b/two", address="10.0.0.2")
        await etcd.put("p/c/one", address="10.0.0.3", ready=False)
        await published.until(lambda: published.addresses == {"b": ["10.0.0.1", "10.0.0.2"], "c": ["10.0.0.3"]})
        await etcd.ctl("del", "--prefix", "p/b/")
        await published.until(lambda: published.addresses == {"c": ["10.0.0.3"]})
        assert published.calls == 4
        assert published.problem is None
        [resource] = made.details().resources
        assert (resource.in_sync, resource.lists, resource.events) == (True, 1, 4)
        assert made.name == f"etcd://127.0.0.1:{etcd.port}/p"


async def test_nothing_is_there_yet(etcd: Etcd) -> None:
    """In sync with nothing: that is what etcd holds. A slash that is easily overlooked is named."""
    await etcd.ctl("get", "x")
    async with following(etcd) as (published, _):
        assert (published.addresses, published.problem) == ({}, None)
        await etcd.put("p/b/one")
        await published.until(lambda: published.addresses == {"b": ["10.0.0.1"]})
    await etcd.ctl("del", "--prefix", "p/")
    await etcd.put("/p/b/one")
    async with following(etcd) as (published, _):
        assert published.problem == (f"no key begins with p/, but some with /p/: write etcd://127.0.0.1:{etcd.port}//p")
    async with following(etcd, prefix="/p") as (published, _):
        assert (published.addresses, published.problem) == ({"b": ["10.0.0.1"]}, None)


async def test_what_cannot_be_read_harms_nobody_else(etcd: Etcd, caplog: pytest.LogCaptureFixture) -> None:
    """It is named; what the key held before stays; its neighbours change."""
    await etcd.put("p/b/one")
    await etcd.ctl("put", "p/b/bad", "nonsense")
    await etcd.ctl("put", "p/deep/er/key", "nonsense")
    async with following(etcd) as (published, made):
        assert published.addresses == {"b": ["10.0.0.1"]}
        await etcd.put("p/b/one", port="9000")
        await etcd.put("p/b/two", address="10.0.0.2")
        await published.until(lambda: published.addresses == {"b": ["10.0.0.1", "10.0.0.2"]})
        assert made.details().left_out == {"malformed": 2}
        await etcd.ctl("del", "p/b/one")
        await published.until(lambda: published.addresses == {"b": ["10.0.0.2"]})
    refused = [entry(each).fields for each in caplog.records if entry(each).event == "etcd key refused"]
    assert [each["served"] for each in refused] == ["nothing of it", "nothing of it", "what it said before"]
    assert refused[2]["problem"] == "p/b/one: port: expected a whole number, got the text '9000'"


async def test_an_outage_is_no_change(etcd: Etcd) -> None:
    """Killed and started again: what was published stays, and what happened since then comes (D3)."""
    await etcd.put("p/b/one")
    async with following(etcd) as (published, made):
        calls = published.calls
        etcd.kill()
        await published.until(lambda: published.problem is not None)
        assert "UNAVAILABLE" in (published.problem or "")
        assert published.addresses == {"b": ["10.0.0.1"]}
        etcd.start()
        await etcd.put("p/b/two", address="10.0.0.2")
        await published.until(lambda: published.addresses == {"b": ["10.0.0.1", "10.0.0.2"]})
        assert published.problem is None
        assert published.calls == calls + 1
        assert made.details().resources[0].lists == 1, "it went on where it was"


async def test_what_was_compacted_meanwhile_is_listed(etcd: Etcd) -> None:
    """Nobody can say any more what happened: only what differs is published."""
    await etcd.put("p/b/one")
    await etcd.put("p/c/one", address="10.0.0.9")
    async with following(etcd) as (published, made):
        etcd.kill()
        await published.until(lambda: published.problem is not None)
        calls = published.calls
        made._cluster._options = EtcdOptions.parse("//127.0.0.1:1/p")
        etcd.start()
        await etcd.put("p/b/two", address="10.0.0.2")
        await etcd.ctl("del", "p/b/one")
        revision = json.loads(await etcd.ctl("get", "p/b/two", "-w", "json"))["header"]["revision"]
        await etcd.ctl("compact", str(revision))
        made._cluster._options = made._options
        await published.until(lambda: published.addresses == {"b": ["10.0.0.2"], "c": ["10.0.0.9"]})
        assert published.calls == calls + 1
        assert made.details().resources[0].lists == 2


async def test_a_cluster_that_was_restored(etcd: Etcd) -> None:
    """Another one answers, whose revisions are lower: what it holds is what counts."""
    for number in range(20):
        await etcd.put("p/b/one", labels={"number": str(number)})
    await etcd.put("p/c/one", address="10.0.0.9")
    async with following(etcd) as (published, _):
        etcd.kill()
        await published.until(lambda: published.problem is not None)
        etcd.start(anew=True)
        await etcd.put("p/b/one", address="10.0.0.7")
        await published.until(lambda: published.addresses == {"b": ["10.0.0.7"]})


async def test_a_frozen_member_is_left_for_another(
    etcd: Etcd, program: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ping finds it out. Both are clusters of their own here, with the same keys."""
    monkeypatch.setattr(client, "_OPTIONS", GrpcOptions(keepalive_interval=0.5, keepalive_timeout=0.5))
    other = Etcd(program("etcd"), program("etcdctl"), tmp_path, "other")
    other.start()
    try:
        await etcd.put("p/b/one")
        await other.put("p/b/one", address="10.0.0.2")
        async with following(etcd, other) as (published, _):
            assert published.addresses == {"b": ["10.0.0.1"]}
            etcd.signal(signal.SIGSTOP)
            await published.until(lambda: published.addresses == {"b": ["10.0.0.2"]})
            assert published.problem is None
            etcd.signal(signal.SIGCONT)
    finally:
        other.kill()


async def test_events_that_were_lost_are_found(etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list now and then: some versions of etcd lost events of watches."""
    await etcd.put("p/b/one")
    monkeypatch.setattr(source, "RELIST", 0.5)
    async with following(etcd) as (published, made):

        def deaf(response: object) -> Iterator[None]:
            yield

        monkeypatch.setattr(made, "_take", deaf)
        await etcd.put("p/b/two", address="10.0.0.2")
        await published.until(lambda: published.addresses == {"b": ["10.0.0.1", "10.0.0.2"]})
        calls, lists = published.calls, made.details().resources[0].lists
        with trio.fail_after(LIMIT):
            while made.details().resources[0].lists < lists + 2:  # noqa: ASYNC110 - a count has no event
                await trio.sleep(0.05)
        assert published.calls == calls, "a list that finds nothing publishes nothing"


async def test_who_must_authenticate(etcd: Etcd, tmp_path: Path) -> None:
    """With a wrong password the reason is reported; a token that is no longer known is replaced."""
    await etcd.put("p/b/one")
    for command in ("user add root:rootpw", "user grant-role root root", "user add mesh:s3cret", "role add reader"):
        await etcd.ctl(*command.split())
    await etcd.ctl("role", "grant-permission", "reader", "--prefix=true", "read", "p/")
    await etcd.ctl("user", "grant-role", "mesh", "reader")
    await etcd.ctl("auth", "enable")
    etcd.ctl_flags = ["--user", "root:rootpw"]
    password = tmp_path / "password"
    password.write_text("s3cret\n")
    options = f"?user=mesh&password_file={password}"
    async with following(etcd, options=options) as (published, _):
        assert published.addresses == {"b": ["10.0.0.1"]}
        await etcd.put("p/b/two", address="10.0.0.2")
        await published.until(lambda: published.addresses == {"b": ["10.0.0.1", "10.0.0.2"]})
        etcd.kill()
        await published.until(lambda: published.problem is not None)
        etcd.start()
        await etcd.put("p/b/three", address="10.0.0.3")
        await published.until(lambda: published.addresses["b"] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"])
    password.write_text("wrong")
    made = EtcdSource(EtcdOptions.parse(f"//127.0.0.1:{etcd.port}/p{options}"), Random(0), {})
    published = Published()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_run(made, published))
        await published.until(lambda: published.problem is not None)
        assert "authentication failed" in (published.problem or "")
        assert "wrong" not in (published.problem or "")
        nursery.cancel_scope.cancel()


def make_run(made: EtcdSource, published: Published) -> Callable[[], Any]:
    async def run() -> None:
        await made.run(published, task_status=trio.TASK_STATUS_IGNORED)

    return run


async def test_over_tls(program: Callable[[str], str], tmp_path: Path, quick: None) -> None:
    """The server's certificate is checked, and a client's shown."""
    authority = Authority(tmp_path)
    server = authority.issue("server", ["localhost"])
    own = authority.issue("own")
    flags = ("--cert-file", server.certificate, "--key-file", server.key, "--client-cert-auth")
    etcd = Etcd(program("etcd"), program("etcdctl"), tmp_path, "tls", *flags, "--trusted-ca-file", authority.file)
    etcd.scheme, etcd.host = "https", "localhost"
    etcd.ctl_flags = ["--cacert", authority.file, "--cert", own.certificate, "--key", own.key]
    etcd.start()
    try:
        await etcd.put("p/b/one")
        options = f"?ca_file={authority.file}&certificate_file={own.certificate}&key_file={own.key}"
        async with following(etcd, options=options, host="localhost") as (published, _):
            assert published.addresses == {"b": ["10.0.0.1"]}
        stranger = Authority(tmp_path, "stranger")
        other = EtcdOptions.parse(f"//localhost:{etcd.port}/p?ca_file={stranger.file}")
        with pytest.raises(GrpcError, match="certificate"):
            async with Cluster(other).connect():
                raise AssertionError("it was let in")
    finally:
        etcd.kill()


async def test_pages(etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """More keys than a page has are one list."""
    monkeypatch.setattr(source, "PAGE", 7)
    for number in range(23):
        await etcd.put(f"p/b/i{number}", address=f"10.0.1.{number}")
    async with following(etcd) as (published, _):
        assert len(published.addresses["b"]) == 23
