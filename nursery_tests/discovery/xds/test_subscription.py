"""What one stream is sent of one type, as xDS's state of the world has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from meshlocal.discovery.xds.subscription import Answer, Content, Subscription
from meshlocal.wire.xds import ResourceType

CLUSTER, ENDPOINTS = ResourceType.CLUSTER, ResourceType.ENDPOINTS


class Client:
    """One type on one stream, from the client's side: what it has, and the server that it has it from."""

    def __init__(self, kind: ResourceType, server: Mapping[str, str]) -> None:
        self.subscription = Subscription(kind)
        self.server = server
        self.nonce = ""
        self.has: dict[str, str] = {}
        self.wants: Sequence[str] = ()
        self.sent: list[dict[str, str]] = []

    def request(self, *names: str, nonce: str | None = None, version: str = "") -> Answer | None:
        self.wants = names
        nonce = self.nonce if nonce is None else nonce
        return None if self.subscription.is_stale(nonce) else self.subscription.request(names, nonce, version)

    def turn(self) -> dict[str, str] | None:
        """What the server sends, if it does; the client has not answered it yet."""
        subscription = self.subscription
        if not subscription.is_due:
            return None
        names = subscription.take(self.server)
        bodies = subscription.respond(
            {
                name: Content.of(f"{name}={self.server[name]}".encode()) if name in self.server else None
                for name in names
            }
        )
        if bodies is None:
            return None
        found = dict(body.decode().split("=") for body in bodies)
        self.sent.append(found)
        return found

    def ack(self) -> None:
        self.nonce = self.subscription.nonce
        self.request(*self.wants)


def test_a_first_request_is_answered_and_then_silence() -> None:
    client = Client(ENDPOINTS, {"a": "1", "b": "1"})
    client.request("a")
    assert client.turn() == {"a": "1"}
    assert client.subscription.under_way
    client.ack()
    assert not client.subscription.under_way
    assert client.turn() is None


@pytest.mark.parametrize(("kind", "sent"), [(CLUSTER, {}), (ENDPOINTS, None)])
def test_what_does_not_exist_is_told_of_types_that_are_sent_whole(
    kind: ResourceType, sent: dict[str, str] | None
) -> None:
    """Of the others, a client waits for it, and takes it for missing after a time of its own."""
    client = Client(kind, {})
    client.request("a")
    assert client.turn() == sent


def test_of_endpoints_only_what_changed_is_sent() -> None:
    server = {"a": "1", "b": "1"}
    client = Client(ENDPOINTS, server)
    client.request("a", "b")
    assert client.turn() == {"a": "1", "b": "1"}
    client.ack()
    server["b"] = "2"
    client.subscription.mark("a")
    client.subscription.mark("b")
    assert client.turn() == {"b": "2"}


def test_clusters_are_sent_whole_and_only_if_something_of_it_is_new() -> None:
    server = {"a": "1", "b": "1", "c": "1"}
    client = Client(CLUSTER, server)
    client.request("a", "b")
    assert client.turn() == {"a": "1", "b": "1"}
    client.ack()
    client.subscription.mark("a")
    client.subscription.mark("c")
    assert client.turn() is None
    del server["a"]
    client.subscription.mark("a")
    assert client.turn() == {"b": "1"}


def test_one_response_at_a_time_and_the_next_has_the_latest_state() -> None:
    """D4: what changes meanwhile is not queued."""
    server = {"a": "1"}
    client = Client(ENDPOINTS, server)
    client.request("a")
    client.turn()
    for value in "234":
        server["a"] = value
        client.subscription.mark("a")
        assert client.turn() is None
    client.ack()
    assert client.turn() == {"a": "4"}


def test_what_a_client_rejects_is_not_sent_again_until_it_is_another() -> None:
    server = {"a": "1"}
    client = Client(ENDPOINTS, server)
    client.request("a")
    client.turn()
    client.ack()  # Whether it accepted or not, it has answered.
    client.subscription.mark("a")
    assert client.turn() is None
    server["a"] = "2"
    client.subscription.mark("a")
    assert client.turn() == {"a": "2"}


def test_a_request_that_crossed_a_response_counts_for_nothing() -> None:
    server = {"a": "1", "b": "1"}
    client = Client(ENDPOINTS, server)
    client.request("a")
    client.turn()
    client.ack()
    server["a"] = "2"
    client.subscription.mark("a")
    client.turn()
    assert client.request("a", "b", nonce="1") is None
    assert client.subscription.under_way
    assert "b" not in client.subscription.names
    # It says the same again with its answer.
    client.nonce = "2"
    assert client.request("a", "b") == (True, True)
    assert client.turn() == {"b": "1"}


def test_a_nonce_of_a_stream_before_is_no_answer() -> None:
    client = Client(ENDPOINTS, {"a": "1"})
    assert client.request("a", nonce="17") == (False, True)
    assert client.turn() == {"a": "1"}


def test_what_is_given_up_and_wanted_anew_is_sent_anew() -> None:
    client = Client(ENDPOINTS, {"a": "1", "b": "1"})
    client.request("a", "b")
    client.turn()
    client.ack()
    client.request("b")
    assert client.turn() is None
    client.request("a", "b")
    assert client.turn() == {"a": "1"}


@pytest.mark.parametrize("names", [(), ("*",)])
def test_a_wildcard_is_all_that_there_is(names: tuple[str, ...]) -> None:
    server = {"a": "1"}
    client = Client(CLUSTER, server)
    client.request(*names)
    assert client.turn() == {"a": "1"}
    client.ack()
    server["b"] = "1"
    client.subscription.mark("b")
    assert client.turn() == {"a": "1", "b": "1"}
    client.ack()
    del server["a"]
    client.subscription.mark("a")
    assert client.turn() == {"b": "1"}


def test_a_wildcard_of_nothing_is_answered() -> None:
    client = Client(CLUSTER, {})
    client.request()
    assert client.turn() == {}


def test_no_names_after_some_are_none() -> None:
    """Only who never named any means all by none."""
    client = Client(CLUSTER, {"a": "1", "b": "1"})
    client.request("a")
    client.turn()
    client.ack()
    client.request()
    assert not client.subscription.wildcard
    client.subscription.mark("b")
    assert client.turn() is None


def test_a_wildcard_that_ends_leaves_what_is_named() -> None:
    server = {"a": "1", "b": "1"}
    client = Client(CLUSTER, server)
    client.request("*", "a")
    assert client.turn() == {"a": "1", "b": "1"}
    client.ack()
    client.request("a")
    client.subscription.mark("b")
    assert client.turn() is None
    client.request("a", "b")
    assert client.turn() == {"a": "1", "b": "1"}


def test_of_endpoints_there_is_no_wildcard() -> None:
    client = Client(ENDPOINTS, {"a": "1"})
    client.request()
    assert not client.subscription.wildcard
    assert client.turn() is None


def test_what_cannot_be_said_yet_stays_due() -> None:
    client = Client(CLUSTER, {"a": "1"})
    client.request("a")
    client.subscription.take()
    client.subscription.hold()
    assert client.subscription.is_due
    assert client.turn() == {"a": "1"}


def test_what_was_answered_is_not_owed_again() -> None:
    """A hold before anything was taken anew puts back nothing of what is done."""
    client = Client(CLUSTER, {"a": "1"})
    client.request("a")
    assert client.turn() == {"a": "1"}
    client.ack()
    client.subscription.hold()
    assert not client.subscription.is_due


def test_what_was_taken_and_put_back_is_sent_after_the_rest() -> None:
    client = Client(ENDPOINTS, {"a": "1", "b": "1"})
    client.request("a", "b")
    first, *rest = client.subscription.take()
    client.subscription.put_back(rest)
    client.subscription.respond({first: Content.of(b"a=1")})
    client.ack()
    assert client.turn() == {"b": "1"}


class Streams(RuleBasedStateMachine):
    """A client that follows the rules, against a server's state that changes: in the end it has what there is."""

    kind = ENDPOINTS

    def __init__(self) -> None:
        super().__init__()
        self.server: dict[str, str] = {}
        self.client = Client(self.kind, self.server)
        self.version = 0
        self.client.request("a")
        self.answering: dict[str, str] | None = None

    @rule(name=st.sampled_from("abcd"), gone=st.booleans())
    def change(self, name: str, gone: bool) -> None:
        self.version += 1
        if gone:
            self.server.pop(name, None)
        else:
            self.server[name] = str(self.version)
        self.client.subscription.mark(name)

    @rule(names=st.sets(st.sampled_from("abcd"), min_size=1))
    def want(self, names: set[str]) -> None:
        self.client.request(*sorted(names))
        if self.kind is ENDPOINTS:
            for name in self.client.has.keys() - names:
                del self.client.has[name]

    @rule()
    def serve(self) -> None:
        if self.answering is None:
            self.answering = self.client.turn()

    @rule()
    def answer(self) -> None:
        if self.answering is not None:
            wanted = {name: body for name, body in self.answering.items() if name in self.client.wants}
            self.client.has = wanted if self.kind.whole else {**self.client.has, **wanted}
            self.answering = None
            self.client.ack()

    def teardown(self) -> None:
        for _ in range(3):
            self.serve()
            self.answer()
        wanted = {name: body for name, body in self.server.items() if name in self.client.wants}
        held = {name: body for name, body in self.client.has.items() if name in self.server}
        assert held == wanted
        if self.kind.whole:
            assert self.client.has == wanted
        assert self.client.turn() is None


class WholeStreams(Streams):
    kind = CLUSTER


TestStreams = Streams.TestCase
TestStreams.settings = settings(max_examples=100, stateful_step_count=30)
TestWholeStreams = WholeStreams.TestCase
TestWholeStreams.settings = settings(max_examples=100, stateful_step_count=30)
