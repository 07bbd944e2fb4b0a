"""The SPIFFE Workload API, against grpcio's server: what is taken, what is refused, and that it is followed (T3)."""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from meshlocal.net.following import Followed, Following
from meshlocal.net.tls import certificates, client_context, server_context
from meshlocal.net.workload_api import WorkloadApi
from meshlocal.policy.identity import identities
from meshlocal.wire.pb import workload_pb2 as pb
from nursery_tests.certificates import Authority, served
from nursery_tests.logged import events
from nursery_tests.spiffe import Agent, answer

WEB = "spiffe://td/ns/shop/sa/web"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@contextmanager
def agent(folder: Path, first: pb.X509SVIDResponse | None) -> Iterator[Agent]:
    made = Agent(folder / "agent.sock", first)
    try:
        yield made
    finally:
        made.stop()


@asynccontextmanager
async def following(path: Path) -> AsyncIterator[WorkloadApi]:
    api = WorkloadApi(str(path), random.Random(0))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.run)
            yield api
            nursery.cancel_scope.cancel()


async def until(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110 - another process's doing
        await trio.sleep(0.01)


async def test_an_svid_and_the_next(tmp_path: Path, authority: Authority) -> None:
    with agent(tmp_path, answer(authority, WEB)) as said:
        async with following(said.socket) as api:
            await api.arrived.wait()
            first = api.svid
            assert first is not None
            assert (first.spiffe_id, first.trust_domain, api.connected, api.problem) == (WEB, "td", True, "")
            assert b"PRIVATE KEY" in first.key
            assert repr(first) == f"Svid({WEB!r})"
            said.say(answer(authority, "spiffe://td/other"))
            await until(lambda: api.version == 2)
            assert api.svid is not None
            assert api.svid.spiffe_id == "spiffe://td/other"


def spoilt(authority: Authority, **fields: object) -> pb.X509SVIDResponse:
    response = answer(authority, WEB)
    for name, value in fields.items():
        setattr(response.svids[0], name, value)
    return response


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"spiffe_id": "web"}, "spiffe_id: 'web' is no SPIFFE ID"),
        ({"spiffe_id": "spiffe://td/a b"}, "spiffe_id: "),
        ({"x509_svid": b""}, "x509_svid: is empty"),
        ({"x509_svid": b"\x30\x82"}, "x509_svid: is no certificate"),
        ({"x509_svid_key": b""}, "x509_svid_key: is empty"),
        ({"bundle": b"nonsense"}, "bundle: is no certificate"),
        (None, "the answer has no SVID"),
    ],
)
async def test_what_makes_no_sense_changes_nothing(
    tmp_path: Path,
    authority: Authority,
    caplog: pytest.LogCaptureFixture,
    fields: dict[str, object] | None,
    problem: str,
) -> None:
    with agent(tmp_path, answer(authority, WEB)) as said:
        async with following(said.socket) as api:
            await api.arrived.wait()
            kept = api.svid
            said.say(pb.X509SVIDResponse() if fields is None else spoilt(authority, **fields))
            await until(lambda: api.problem)
            assert api.problem.startswith(problem)
            assert (api.svid, api.version) == (kept, 1)
            said.say(answer(authority, WEB))
            await until(lambda: api.version == 2)
            assert api.problem == ""
    assert "PRIVATE KEY" not in caplog.text


async def test_an_agent_that_is_away_that_denies_and_that_comes_back(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """What it said holds meanwhile."""
    place = tmp_path / "agent.sock"
    async with following(place) as api:
        await until(lambda: "no such file" in api.problem.lower())
        with agent(tmp_path, None):
            await until(lambda: api.problem == "no identity issued")
            assert not api.connected
        with agent(tmp_path, answer(authority, WEB)) as said:
            await api.arrived.wait()
            said.end_streams()
            await until(lambda: said.asked == 2 and api.version == 2)
        await until(lambda: not api.connected)
        assert api.svid is not None
    told = [event for event in events(caplog.records) if event == "workload api cannot be followed"]
    assert len(told) < 12, "each problem is said when it comes, not with each attempt"


async def test_contexts_follow_it(tmp_path: Path, authority: Authority) -> None:
    """Of both sides; before there is an SVID nobody is believed, and what does not fit changes nothing."""
    api = WorkloadApi(str(tmp_path / "agent.sock"), random.Random(0))
    make = partial(server_context, api, None, client_ca_file=api, required=True, minimum="1.3", protocols=())
    theirs = Followed([api], make)
    ours = Followed([api], partial(client_context, api, api, None, check_name=False, minimum="1.3", protocols=()))
    assert (theirs.current[0].validity, ours.current[0].trust_domain) == (None, "")
    with pytest.raises(ssl.SSLError):
        served(theirs.current[0], ours.current[0])
    looks = Following(lambda: [theirs, ours])
    api.on_update = looks.look
    with agent(tmp_path, answer(authority, WEB)) as said:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.run)
            await api.arrived.wait()
            assert ours.current[0].trust_domain == "td"
            first = served(theirs.current[0], ours.current[0])
            assert first is not None
            assert list(certificates([theirs])) == [api.path]
            before = theirs.current
            wrong = answer(authority, WEB)
            wrong.svids[0].x509_svid_key = answer(authority, WEB).svids[0].x509_svid_key
            kept = api.svid
            for unfit, problem in ((wrong, "key values mismatch"), (answer(authority, WEB, end=-0.5), "has expired")):
                said.say(unfit)
                await until(partial(_has_problem, api, problem))
                # Also for who makes something of it anew.
                assert (api.svid, api.version) == (kept, 1)
                assert not theirs.look()
                assert theirs.current == before
            said.say(answer(authority, WEB))
            await until(lambda: theirs.current != before)
            assert served(theirs.current[0], ours.current[0]) != first
            nursery.cancel_scope.cancel()


def _has_problem(api: WorkloadApi, problem: str) -> bool:
    return problem in api.problem.lower().replace("_", " ")


def test_a_bundle_speaks_of_its_own_trust_domain_only() -> None:
    """SPIFFE-ID, 2.1: what its authority signs for another one proves nothing."""
    certificate = {"subjectAltName": (("URI", "spiffe://other/web"), ("URI", WEB), ("DNS", "x"), ("URI", "https://x/"))}
    assert identities(certificate, "td") == (WEB, "https://x/", "x")
    assert identities(certificate, "") == ("https://x/", "x")
    assert identities(certificate) == ("spiffe://other/web", WEB, "https://x/", "x")
