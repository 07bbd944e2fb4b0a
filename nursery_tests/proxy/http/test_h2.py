"""HTTP/2 through the proxy: each stream a request of its own (C1 to C4, A2 to A8, F1, H2, S1)."""

from __future__ import annotations

import errno
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
import trio

from meshlocal.client.statistics import Outcome
from meshlocal.policy.config_health import FailbackConfig, LimitsConfig
from meshlocal.policy.model import make_instance
from meshlocal.proxy.returning import Returning
from meshlocal.wire.http2 import MAX_STREAM_ID, ErrorCode
from nursery_tests.h2_peer import GoAway
from nursery_tests.proxy.http import h2
from nursery_tests.proxy.http.conftest import B, Proxy, Served, Upstream, Upstreams, decode_chunks, ok, response, until
from nursery_tests.proxy.http.conftest import says as says_http1
from nursery_tests.proxy.http.h2 import (
    CALL,
    DONE,
    GET,
    GRPC_OK,
    MESSAGE,
    OK,
    POST,
    H2Instance,
    H2Wire,
    asking,
    h2_client,
)

Instances = Callable[..., Awaitable[H2Instance]]


@pytest.fixture
def instance(nursery: trio.Nursery) -> Instances:
    """Makes instances, which are not published."""

    async def make(name: str, node: str | None = None, port_name: str = "") -> H2Instance:
        made = H2Instance(name, node, nursery, port_name=port_name)
        await nursery.start(made.serve)
        return made

    return make


@pytest.fixture
async def near(proxy: Proxy, instance: Instances) -> H2Instance:
    """An instance on the proxy's node; the only one that is known."""
    made = await instance("near", "n1")
    proxy.publish(made.instance)
    return made


@pytest.fixture
async def both(proxy: Proxy, near: H2Instance, instance: Instances) -> tuple[H2Instance, H2Instance]:
    """Two: on the proxy's node, and on another."""
    far = await instance("far", "n2")
    proxy.publish(near.instance, far.instance)
    return near, far


async def connect(proxy: Proxy, listener: int = 0) -> H2Wire:
    return await h2_client(proxy.port(listener))


def outcomes(proxy: Proxy) -> dict[str, int]:
    """Requests that ended, by outcome."""
    found: dict[str, int] = {}
    for key, count in proxy.requests().items():
        found[str(key.outcome)] = found.get(str(key.outcome), 0) + count
    return found


async def settled(proxy: Proxy, count: int) -> None:
    """Wait until so many requests ended, and nothing of them is left."""
    await until(lambda: sum(proxy.requests().values()) == count)
    state = proxy.table[B]
    assert state.in_use == 0
    assert not proxy.forwarder.shared.patience.waiting
    for link in proxy.forwarder.services[B].links:
        assert not link.streams
        assert not link.owing


# Messages


@pytest.mark.parametrize("first", [1, 5, 16, 18, 20, 24, 33])
async def test_a_preface_in_pieces(proxy: Proxy, near: H2Instance, first: int) -> None:
    async with await connect(proxy) as client:
        stream_id = client.open(GET)
        sent = bytes(client.peer.outgoing)
        client.peer.outgoing.clear()
        await client.raw(sent[:first])
        await until(lambda: [each.has_input() for each in proxy.forwarder] == [False])
        await client.raw(sent[first:])
        seen = client.streams[stream_id]
        await client.until(lambda: seen.over)
        assert (seen.status, bytes(seen.data)) == (200, b"near")


async def test_many_requests_share_one_connection_to_the_instance(proxy: Proxy, near: H2Instance) -> None:
    async with await connect(proxy) as one, await connect(proxy, 1) as other:
        for _ in range(3):
            assert (await one.ask()).data == b"near"
            assert (await other.ask()).data == b"near"
    assert near.accepted == 1
    await settled(proxy, 6)
    assert outcomes(proxy) == {"served": 6}


async def test_a_request_goes_on_as_it_came(proxy: Proxy, near: H2Instance) -> None:
    fields = asking(POST, cookie="a=b", x_y="z", te="trailers", user_agent="test")
    async with await connect(proxy) as client:
        seen = await client.ask(fields, b"body")
        assert seen.status == 200
    (asked,) = near.asked
    assert sorted(asked.head) == sorted(fields)
    assert asked.data == b"body"


async def test_interim_heads_data_and_trailers_pass_both_ways(proxy: Proxy, near: H2Instance) -> None:
    async def behave(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
        seen = wire.streams[stream_id]
        wire.peer.send_headers(stream_id, [(b":status", b"103"), (b"link", b"</x>")])
        await wire.flush()
        await wire.wait(lambda: seen.ended)
        wire.peer.send_headers(stream_id, OK)
        wire.peer.send_data(stream_id, bytes(seen.data))
        wire.peer.send_headers(stream_id, [*seen.trailers, (b"b", b"c")], end_stream=True)
        await wire.flush()

    near.behaviour = behave
    async with await connect(proxy) as client:
        stream_id = client.open(POST, end=False)
        seen = client.streams[stream_id]
        await client.until(lambda: seen.interim)
        assert seen.interim == [[(b":status", b"103"), (b"link", b"</x>")]]
        await client.data(stream_id, b"one")
        await client.data(stream_id, b"two")
        await client.trailers(stream_id, [(b"a", b"b")])
        await client.until(lambda: seen.ended)
        assert seen.data == b"onetwo"
        assert seen.trailers == [(b"a", b"b"), (b"b", b"c")]
    await settled(proxy, 1)


async def test_a_message_passes_without_waiting_for_more(proxy: Proxy, near: H2Instance) -> None:
    """C4, both ways, in turns."""

    async def echo(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
        seen = wire.streams[stream_id]
        wire.peer.send_headers(stream_id, GRPC_OK)
        while not seen.ended:
            await wire.wait(lambda: seen.data or seen.ended)
            if seen.data:
                wire.peer.send_data(stream_id, bytes(seen.data))
                seen.data.clear()
                await wire.flush()
        wire.peer.send_headers(stream_id, DONE, end_stream=True)
        await wire.flush()

    near.behaviour = echo
    async with await connect(proxy) as client:
        stream_id = client.open(CALL, end=False)
        seen = client.streams[stream_id]
        for _ in range(5):
            await client.data(stream_id, MESSAGE)
            await client.until(lambda: seen.data == MESSAGE)
            seen.data.clear()
        await client.end(stream_id)
        await client.until(lambda: seen.ended)
        assert seen.grpc == 0
    await settled(proxy, 1)


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 1_000_000])
async def test_bodies_of_any_size(proxy: Proxy, near: H2Instance, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)

    async def behave(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
        seen = await h2.whole(wire, stream_id)
        wire.peer.send_headers(stream_id, OK)
        rest = bytes(seen.data)
        while rest:
            piece = rest[: wire.peer.sendable(stream_id)]
            if not piece:
                await wire.wait(lambda: wire.peer.sendable(stream_id))
                continue
            wire.peer.send_data(stream_id, piece)
            rest = rest[len(piece) :]
            await wire.flush()
        wire.peer.send_data(stream_id, b"", end_stream=True)
        await wire.flush()

    near.behaviour = behave
    async with await connect(proxy) as client:
        stream_id = client.open(POST, end=False)
        seen = client.streams[stream_id]
        rest = body
        await client.until(lambda: client.settled)
        while rest:
            piece = rest[: client.peer.sendable(stream_id)]
            if not piece:
                await client.step()
                continue
            client.peer.send_data(stream_id, piece)
            rest = rest[len(piece) :]
            await client.flush()
        await client.end(stream_id)
        await client.until(lambda: seen.over)
        assert bytes(seen.data) == body
    await settled(proxy, 1)


async def test_head_and_no_content(proxy: Proxy, near: H2Instance) -> None:
    async with await connect(proxy) as client:
        seen = await client.ask(asking(GET, _method="HEAD"))
        assert (seen.status, seen["content-length"], bytes(seen.data)) == (200, "5", b"")
        near.behaviour = h2.says([(b":status", b"204")])
        seen = await client.ask()
        assert (seen.status, bytes(seen.data)) == (204, b"")


async def test_an_early_answer_stops_a_client_that_still_sends(proxy: Proxy, near: H2Instance) -> None:
    """RFC 9113, 8.1: a whole response, then RST_STREAM with NO_ERROR."""

    async def behave(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
        wire.peer.send_headers(stream_id, [(b":status", b"413")], end_stream=True)
        await wire.flush()

    near.behaviour = behave
    async with await connect(proxy) as client:
        stream_id = client.open(POST, end=False)
        seen = client.streams[stream_id]
        await client.until(lambda: seen.ended and seen.reset is not None)
        assert (seen.status, seen.reset) == (413, ErrorCode.NO_ERROR)
        assert (await client.ask(asking(GET, _method="GET"))).status == 413
    await settled(proxy, 2)


# Which version an instance is spoken to in


async def test_a_client_of_http2_and_an_instance_of_http1(proxy: Proxy, upstream: Upstreams) -> None:
    made = await upstream("old", "n1")
    proxy.configure(service={"protocol": "http1"})
    proxy.publish(made)
    async with await connect(proxy, 1) as client:
        seen = await client.ask(asking(GET, cookie="a=b", x="y"))
        assert (seen.status, bytes(seen.data)) == (200, b"old")
        assert made.heads == [b"GET / HTTP/1.1\r\nhost: b\r\nx: y\r\ncookie: a=b\r\n\r\n"]
        seen = await client.ask(asking(POST, content_length="4"), b"body")
        assert seen.status == 200
        assert made.bodies[-1] == b"body"
        stream_id = client.open(POST, end=False)
        seen = client.streams[stream_id]
        await client.data(stream_id, b"in")
        await client.data(stream_id, b"pieces")
        await client.end(stream_id)
        await client.until(lambda: seen.over)
        assert seen.status == 200
    assert b"transfer-encoding: chunked" in made.heads[-1]
    assert decode_chunks(made.bodies[-1]) == b"inpieces"
    await settled(proxy, 3)
    assert outcomes(proxy) == {"served": 3}


@pytest.mark.parametrize(
    ("said", "status", "data", "fields"),
    [
        (response(b"abc", x="y"), 200, b"abc", {"x": "y", "content-length": "3"}),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nt: u\r\n\r\n",
            200,
            b"abc",
            {"t": "u"},
        ),
        (b"HTTP/1.1 200 OK\r\nconnection: close, z\r\nz: 1\r\nkeep-alive: x\r\n\r\nabc", 200, b"abc", {"z": None}),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", {}),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + response(b"x"), 200, b"x", {}),
        (b"HTTP/1.1 404 Not Found\r\nX-Upper: A\r\ncontent-length: 0\r\n\r\n", 404, b"", {"x-upper": "A"}),
        (b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n", 502, None, {"x-meshlocal-error": "broken_response"}),
    ],
)
async def test_answers_of_http1_to_a_client_of_http2(
    proxy: Proxy, upstream: Upstreams, said: bytes, status: int, data: bytes | None, fields: dict[str, str | None]
) -> None:
    made = await upstream("old", "n1")
    made.behaviour = says_http1(said, closing=b"close" in said)
    proxy.configure(service={"protocol": "http1"})
    proxy.publish(made)
    async with await connect(proxy, 1) as client:
        seen = await client.ask()
        assert seen.status == status
        assert data is None or bytes(seen.data) == data
        assert {name: seen[name] for name in fields} == fields
        assert "connection" not in h2.names(seen.head)
    await settled(proxy, 1)


async def test_an_answer_of_http1_that_breaks_off_resets_the_stream(proxy: Proxy, upstream: Upstreams) -> None:
    made = await upstream("old", "n1")
    made.behaviour = says_http1(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc", closing=True)
    proxy.configure(service={"protocol": "http1"})
    proxy.publish(made)
    async with await connect(proxy, 1) as client:
        seen = await client.ask()
        assert (seen.status, seen.ended) == (200, False)
        assert seen.reset == ErrorCode.INTERNAL_ERROR
        made.behaviour = ok
        assert (await client.ask()).status == 200
    await settled(proxy, 2)
    assert outcomes(proxy) == {"served": 1, "cut": 1}


@pytest.mark.parametrize("port_name", ["grpc", "grpc-web", "http2", "h2c", "kubernetes.io/h2c"])
async def test_a_client_of_http1_and_an_instance_of_http2(proxy: Proxy, instance: Instances, port_name: str) -> None:
    made = await instance("new", "n1", port_name)
    proxy.publish(made.instance)
    async with await proxy.connect() as client:
        got = await client.get(x="y")
        assert (got.status, got.body) == (200, b"new")
        assert (await client.ask("POST", "/p", b"body")).status == 200
        await client.send(
            b"POST / HTTP/1.1\r\nhost: b\r\ntransfer-encoding: chunked\r\n\r\n2\r\nin\r\n0\r\nt: u\r\n\r\n"
        )
        assert (await client.response()).body == b"new"
        assert (await client.ask("HEAD")).fields["content-length"] == "5"
    assert made.accepted == 1
    first, second, third, _ = made.asked
    assert [(name, first[name]) for name in (":method", ":path", ":scheme", ":authority", "x", "host")] == [
        (":method", "GET"),
        (":path", "/"),
        (":scheme", "http"),
        (":authority", "b"),
        ("x", "y"),
        ("host", None),
    ]
    assert (bytes(second.data), second["content-length"]) == (b"body", "4")
    assert (bytes(third.data), third["t"], third["transfer-encoding"]) == (b"in", "u", None)
    await settled(proxy, 4)


async def test_the_label_of_kubernetes_app_protocol_counts_too(proxy: Proxy, instance: Instances) -> None:
    made = await instance("new", "n1")
    labels = {"node": "n1", "app_protocol": "kubernetes.io/h2c"}
    proxy.publish(make_instance("127.0.0.1", made.port, labels=labels))
    assert (await proxy.ask()).body == b"new"


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        (h2.refuses(ErrorCode.REFUSED_STREAM), (502, "refused")),
        (h2.refuses(ErrorCode.INTERNAL_ERROR), (502, "reset")),
        (h2.ends, (502, "no_response")),
        (h2.says([(b":status", b"500")]), (500, None)),
    ],
)
async def test_failures_of_http2_told_to_a_client_of_http1(
    proxy: Proxy, instance: Instances, behaviour: h2.Behaviour, told: tuple[int, str | None]
) -> None:
    made = await instance("new", "n1", "h2c")
    made.behaviour = behaviour
    proxy.publish(made.instance)
    assert (await proxy.ask("POST", "/", b"x")).told == told
    await settled(proxy, 1)


# Attempts


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_refused_stream_goes_to_the_next_instance_whatever_the_method(
    proxy: Proxy, both: tuple[H2Instance, H2Instance], method: str
) -> None:
    """C1."""
    near, far = both
    near.behaviour = h2.refuses(ErrorCode.REFUSED_STREAM)
    async with await connect(proxy) as client:
        seen = await client.ask(asking(GET, _method=method), b"body" if method == "POST" else None)
        assert (seen.status, bytes(seen.data)) == (200, b"far")
    assert bytes(far.asked[0].data) == (b"body" if method == "POST" else b"")
    await settled(proxy, 1)
    assert proxy.retries == {"refused": 1}


async def test_streams_above_a_goaway_go_to_the_next_instance_and_those_below_go_on(
    proxy: Proxy, both: tuple[H2Instance, H2Instance]
) -> None:
    near, _ = both
    begun: list[int] = []

    async def behave(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
        begun.append(stream_id)
        if len(begun) < 3:
            return
        wire.peer.send_goaway(min(begun))
        wire.peer.send_headers(min(begun), OK)
        wire.peer.send_data(min(begun), b"near", end_stream=True)
        await wire.flush()

    near.behaviour = behave
    async with await connect(proxy) as client:
        streams = [client.open(POST) for _ in range(3)]
        await client.until(lambda: all(client.streams[each].over for each in streams))
        assert sorted(bytes(client.streams[each].data) for each in streams) == [b"far", b"far", b"near"]
        near.behaviour = h2.answers
        assert (await client.ask()).data == b"near", "F1: back on a connection of its own"
    assert near.accepted == 2
    await settled(proxy, 4)


@pytest.mark.parametrize(
    ("behaviour", "retried"),
    [
        (h2.ends, {"no_response": 1}),
        (h2.resets, {"no_response": 1}),
        (h2.refuses(ErrorCode.INTERNAL_ERROR), {"reset": 1}),
    ],
)
async def test_what_may_be_repeated_goes_on_and_what_may_not_is_answered(
    proxy: Proxy, both: tuple[H2Instance, H2Instance], behaviour: h2.Behaviour, retried: dict[str, int]
) -> None:
    """A3."""
    near, _ = both
    near.behaviour = behaviour
    async with await connect(proxy) as client:
        assert (await client.ask()).data == b"far"
        assert proxy.retries == retried
        assert (await client.ask(POST, b"x")).status == 502
        seen = await client.call()
        assert (seen.status, seen.grpc) == (200, 14)
    await settled(proxy, 3)


async def test_a_connection_that_was_used_and_ended_is_replaced(proxy: Proxy, near: H2Instance) -> None:
    """A4: a fresh connection to the same instance."""
    async with await connect(proxy) as client:
        assert (await client.ask()).data == b"near"

        async def once(made: H2Instance, wire: H2Wire, stream_id: int) -> None:
            near.behaviour = h2.answers
            await h2.ends(made, wire, stream_id)

        near.behaviour = once
        assert (await client.ask()).data == b"near"
    assert proxy.retries == {"stale": 1}
    await settled(proxy, 2)


async def test_an_instance_that_refuses_connections_is_passed_over(
    proxy: Proxy, both: tuple[H2Instance, H2Instance]
) -> None:
    """A2, and of many streams that want a connection one asks for it."""
    near, _ = both
    near.refuse()
    async with await connect(proxy) as client:
        await until(lambda: refused(near.port))
        streams = [client.open(POST, end=True) for _ in range(20)]
        await client.until(lambda: all(client.streams[each].over for each in streams))
        assert {bytes(client.streams[each].data) for each in streams} == {b"far"}
    await settled(proxy, 20)
    assert outcomes(proxy) == {"served": 20}


def refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


async def test_no_instance_and_no_service(proxy: Proxy) -> None:
    proxy.publish(unknown=True)
    async with await connect(proxy) as client:
        seen = await client.ask()
        assert (seen.status, seen["x-meshlocal-error"]) == (503, "unknown_service")
        assert (await client.call()).grpc == 12
        proxy.publish()
        seen = await client.ask()
        assert (seen.status, seen["x-meshlocal-error"]) == (503, "no_instance")
        seen = await client.call()
        assert (seen.grpc, seen["x-meshlocal-error"]) == (14, "no_instance")
        assert (seen["grpc-message"] or "").startswith("meshlocal: ")
        assert (await client.ask(asking(GET, _authority="nobody.example"))).status == 503
    await settled(proxy, 4)


async def test_a_status_of_retry_on_goes_to_the_next_instance(
    proxy: Proxy, both: tuple[H2Instance, H2Instance]
) -> None:
    near, _ = both
    near.behaviour = h2.says([(b":status", b"503")])
    async with await connect(proxy) as client:
        assert (await client.ask()).data == b"far"
        assert (await client.ask(POST, b"x")).status == 503
    assert proxy.retries == {"status": 1}
    await settled(proxy, 2)


async def test_a_status_of_grpc_retry_on_goes_to_the_next_instance(
    proxy: Proxy, both: tuple[H2Instance, H2Instance]
) -> None:
    """C3: of headers only, if it is listed; behind a message it is not."""
    near, _ = both
    unavailable = [*GRPC_OK, (b"grpc-status", b"14")]
    async with await connect(proxy) as client:
        near.behaviour = h2.says(unavailable)
        assert (await client.call()).grpc == 14, "not listed"
        proxy.configure(attempts={"grpc_retry_on": ("UNAVAILABLE",)})
        seen = await client.call()
        assert (seen.grpc, bytes(seen.data)) == (0, MESSAGE)
        near.behaviour = h2.says([*GRPC_OK, (b"grpc-status", b"13")])
        assert (await client.call()).grpc == 13, "another one"
        near.behaviour = h2.says(GRPC_OK, MESSAGE, [(b"grpc-status", b"14")])
        assert (await client.call()).grpc == 14, "a message came"
    assert proxy.retries == {"status": 1}
    await settled(proxy, 4)


@pytest.mark.parametrize("code", [ErrorCode.INTERNAL_ERROR, ErrorCode.CANCEL])
async def test_a_post_of_the_clients_first_flight_is_not_sent_twice(
    proxy: Proxy, both: tuple[H2Instance, H2Instance], code: int
) -> None:
    """A3: it is begun outside of the loop's turn, on a connection that another client made."""
    near, far = both
    async with await connect(proxy) as warm:
        assert (await warm.ask()).data == b"near"
        near.behaviour = h2.refuses(code)
        async with await connect(proxy) as client:
            seen = await client.ask(POST)
            assert (seen.status, seen["x-meshlocal-error"]) == (502, "reset")
    assert far.asked == []
    await settled(proxy, 2)


async def test_an_interim_head_that_went_to_the_client_is_the_beginning_of_a_response(
    proxy: Proxy, both: tuple[H2Instance, H2Instance]
) -> None:
    """A3: no byte of a response has come, or else it stays where it is."""
    near, far = both

    async def behave(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
        wire.peer.send_headers(stream_id, [(b":status", b"103")])
        await wire.flush()
        await wire.reset(stream_id, ErrorCode.INTERNAL_ERROR)

    near.behaviour = behave
    async with await connect(proxy) as client:
        seen = await client.ask()
        assert (seen.status, seen["x-meshlocal-error"]) == (502, "broken_response")
    assert far.asked == []
    await settled(proxy, 1)


async def test_a_body_that_nobody_took_yet_is_held_however_long_it_is(
    proxy: Proxy, both: tuple[H2Instance, H2Instance]
) -> None:
    """A2: nothing was sent to an instance that could not be connected."""
    proxy.configure(attempts={"replay_buffer": 4})
    near, far = both
    near.refuse()
    async with await connect(proxy) as client:
        await until(lambda: refused(near.port))
        stream_id = client.open(POST, end=False)
        client.peer.send_data(stream_id, b"more than that", end_stream=True)
        seen = client.streams[stream_id]
        await client.until(lambda: seen.over)
        assert (seen.status, bytes(seen.data)) == (200, b"far")
    assert far.asked[0].data == b"more than that"
    await settled(proxy, 1)


# Time


async def test_grpc_timeout_covers_the_wait_for_a_first_snapshot(proxy: Proxy) -> None:
    """C3."""
    async with await connect(proxy) as client:
        seen = await client.call(grpc_timeout="50m")
        assert (seen.grpc, seen["x-meshlocal-error"]) == (4, "deadline")
    await settled(proxy, 1)


async def test_grpc_timeout_is_the_calls_deadline_and_goes_on_shortened(proxy: Proxy, near: H2Instance) -> None:
    """C3."""
    near.behaviour = h2.stalls
    async with await connect(proxy) as client:
        seen = await client.call(grpc_timeout="50m")
        assert (seen.grpc, seen["x-meshlocal-error"]) == (4, "deadline")
        shortened = near.asked[0]["grpc-timeout"] or ""
        assert shortened != "50m"
        assert int(shortened[:-1]) * {"n": 1e-9, "u": 1e-6, "m": 1e-3}[shortened[-1]] <= 0.05
        await until(lambda: near.asked[0].reset == ErrorCode.CANCEL)
    await settled(proxy, 1)
    assert outcomes(proxy) == {"deadline": 1}


async def test_a_call_ends_at_its_deadline_after_its_head_too(proxy: Proxy, near: H2Instance) -> None:
    async def behave(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
        wire.peer.send_headers(stream_id, GRPC_OK)
        wire.peer.send_data(stream_id, MESSAGE)
        await wire.flush()

    near.behaviour = behave
    async with await connect(proxy) as client:
        seen = await client.call(grpc_timeout="50m")
        assert (bytes(seen.data), seen.ended, seen.reset) == (MESSAGE, False, ErrorCode.CANCEL)
        await until(lambda: near.asked[0].reset == ErrorCode.CANCEL)
    await settled(proxy, 1)
    assert outcomes(proxy) == {"deadline": 1}


async def test_without_grpc_timeout_a_call_may_wait_for_its_head(proxy: Proxy, near: H2Instance) -> None:
    proxy.configure(attempts={"response_deadline": 0.05})
    answer = trio.Event()

    async def behave(made: H2Instance, wire: H2Wire, stream_id: int) -> None:
        await answer.wait()
        await h2.answers(made, wire, stream_id)

    near.behaviour = behave
    async with await connect(proxy) as client:
        waits = client.open(CALL, end=False)
        await client.data(waits, MESSAGE, end=True)
        plain = await client.ask()
        assert (plain.status, plain["x-meshlocal-error"]) == (504, "deadline")
        assert not client.streams[waits].over
        answer.set()
        await client.until(lambda: client.streams[waits].over)
        assert client.streams[waits].grpc == 0
    await settled(proxy, 2)


async def test_attempt_timeout_goes_on_with_what_may_be_repeated(
    proxy: Proxy, both: tuple[H2Instance, H2Instance]
) -> None:
    proxy.configure(attempts={"attempt_timeout": 0.05})
    near, _ = both
    near.behaviour = h2.stalls
    async with await connect(proxy) as client:
        assert (await client.ask()).data == b"far"
    assert proxy.retries == {"timeout": 1}
    await settled(proxy, 1)


async def test_a_body_that_does_not_come_is_408(proxy: Proxy, near: H2Instance) -> None:
    proxy.configure(http={"body_timeout": 0.05})
    async with await connect(proxy) as client:
        stream_id = client.open(POST, end=False)
        seen = client.streams[stream_id]
        await client.until(lambda: seen.over)
        assert (seen.status, seen["x-meshlocal-error"]) == (408, "body_timeout")
    await settled(proxy, 1)
    assert outcomes(proxy) == {"client_left": 1}
    assert proxy.forwarder.shared.refused["body_timeout"] == 1


async def test_a_response_that_stands_still_is_cut(proxy: Proxy, near: H2Instance) -> None:
    proxy.configure(attempts={"idle_timeout": 0.05})

    async def behave(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
        wire.peer.send_headers(stream_id, OK)
        await wire.flush()

    near.behaviour = behave
    async with await connect(proxy) as client:
        seen = await client.ask()
        assert (seen.status, seen.reset) == (200, ErrorCode.CANCEL)
    await settled(proxy, 1)
    assert outcomes(proxy) == {"cut": 1}


async def test_a_request_that_stands_still_on_an_instance_of_http1_is_let_go(proxy: Proxy, upstream: Upstreams) -> None:
    made = await upstream("old", "n1")
    made.behaviour = says_http1(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc")
    proxy.configure(service={"protocol": "http1"}, attempts={"idle_timeout": 0.1})
    proxy.publish(made)
    async with await connect(proxy, 1) as client:
        seen = await client.ask()
        assert (seen.status, seen.reset) == (200, ErrorCode.CANCEL)
        await until(lambda: not made.open)
        await settled(proxy, 1)
    assert outcomes(proxy) == {"cut": 1}


async def test_an_idle_client_is_told_and_closed(proxy: Proxy, near: H2Instance) -> None:
    proxy.configure(http={"keep_alive_timeout": 0.05})
    async with await connect(proxy) as client:
        assert (await client.ask()).status == 200
        await client.until(lambda: client.closed)
        assert [each.error_code for each in client.goaways] == [ErrorCode.NO_ERROR]
    await proxy.idle()


async def test_idle_clients_go_when_descriptors_run_out(
    proxy: Proxy, near: H2Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others stay."""
    monkeypatch.setattr("meshlocal.proxy.http.forwarder.SHED_REST", 0.0)
    async with await connect(proxy) as idle, await connect(proxy) as busy:
        assert (await idle.ask()).status == 200
        near.behaviour = h2.stalls
        busy.open(GET)
        await busy.flush()
        await until(lambda: len(near.asked) == 2)
        proxy.forwarder.shed()
        await idle.until(lambda: idle.closed)
        assert [each.error_code for each in idle.goaways] == [ErrorCode.NO_ERROR]
        await idle.stream.aclose()
        await until(lambda: len(proxy.forwarder) == 1)
        await busy.reset(1)
    await settled(proxy, 2)


async def test_an_unused_connection_to_an_instance_is_closed(proxy: Proxy, near: H2Instance) -> None:
    proxy.configure(http={"pool_idle_timeout": 0.05})
    async with await connect(proxy) as client:
        assert (await client.ask()).status == 200
        await until(lambda: not near.wires)
        assert (await client.ask()).status == 200
    assert near.accepted == 2


# Leaving


@pytest.mark.parametrize("when", ["before the head", "after it"])
async def test_a_client_that_resets_its_stream_cancels_the_instances(proxy: Proxy, near: H2Instance, when: str) -> None:
    """A8, C4."""

    async def behave(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
        if when == "after it":
            wire.peer.send_headers(stream_id, OK)
            await wire.flush()

    near.behaviour = behave
    async with await connect(proxy) as client:
        stream_id = client.open(POST, end=False)
        await client.flush()
        await until(lambda: near.asked)
        if when == "after it":
            await client.until(lambda: client.streams[stream_id].head)
        await client.reset(stream_id)
        await until(lambda: near.asked[0].reset == ErrorCode.CANCEL)
        near.behaviour = h2.answers
        assert (await client.ask()).status == 200
    await settled(proxy, 2)
    assert outcomes(proxy) == {"served": 1, "cut" if when == "after it" else "client_left": 1}


async def test_a_stream_that_is_over_before_its_tasks_first_step(proxy: Proxy, upstream: Upstreams) -> None:
    """The connection that was taken for it is not lost."""
    made = await upstream("old", "n1")
    proxy.configure(service={"protocol": "http1"})
    proxy.publish(made)
    async with await connect(proxy, 1) as client:
        assert (await client.ask()).status == 200
        await until(lambda: proxy.pooled == 1)
        stream_id = client.open(GET)
        client.peer.reset(stream_id, ErrorCode.CANCEL)
        await client.flush()
        await until(lambda: proxy.pooled == 0 and not made.open)
        assert (await client.ask()).status == 200
    await settled(proxy, 3)
    assert outcomes(proxy) == {"served": 2, "client_left": 1}


@pytest.mark.parametrize("protocol", ["http1", "http2"])
async def test_a_client_that_resets_its_connection_leaves_nothing(
    proxy: Proxy, near: H2Instance, upstream: Upstreams, protocol: str
) -> None:
    old = await upstream("old", "n1")

    async def silent(_: Upstream, served: object) -> None:
        await trio.sleep_forever()

    old.behaviour = silent
    near.behaviour = h2.stalls
    proxy.configure(service={"protocol": protocol})
    proxy.publish(old if protocol == "http1" else near.instance)
    async with await connect(proxy, 1) as client:
        for _ in range(5):
            client.open(GET)
        await client.flush()
        await until(lambda: len(near.asked) + len(old.heads) == 5)
        client.reset_connection()
    await settled(proxy, 5)
    await proxy.idle()
    assert outcomes(proxy) == {"client_left": 5}


async def test_a_client_that_leaves_while_a_connection_is_made(proxy: Proxy, near: H2Instance) -> None:
    near.max_streams = 1
    near.behaviour = h2.stalls
    proxy.configure(http={"http2": {"connections": 1, "upstream_streams": 1}})
    async with await connect(proxy) as client:
        first, second = client.open(GET), client.open(GET)
        await client.flush()
        await until(lambda: B in proxy.forwarder.services and proxy.forwarder.services[B].links.wanted == 1)
        await client.reset(second)
        await until(lambda: proxy.forwarder.services[B].links.wanted == 0)
        await client.reset(first)
    await settled(proxy, 2)


async def test_an_instance_that_resets_a_response_resets_the_clients(proxy: Proxy, near: H2Instance) -> None:
    async def behave(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
        wire.peer.send_headers(stream_id, GRPC_OK)
        await wire.flush()
        await wire.reset(stream_id, ErrorCode.ENHANCE_YOUR_CALM)

    near.behaviour = behave
    async with await connect(proxy) as client:
        seen = await client.call()
        assert seen.reset == ErrorCode.ENHANCE_YOUR_CALM
    await settled(proxy, 1)
    assert outcomes(proxy) == {"cut": 1}


# Shared connections


async def test_a_full_connection_gets_a_second_one_up_to_the_cap_and_then_requests_wait(
    proxy: Proxy, near: H2Instance
) -> None:
    near.max_streams = 2
    proxy.configure(http={"http2": {"connections": 2}})
    answer = trio.Event()
    under_way = most = 0

    async def behave(made: H2Instance, wire: H2Wire, stream_id: int) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await answer.wait()
        under_way -= 1
        await h2.answers(made, wire, stream_id)

    near.behaviour = behave
    async with await connect(proxy) as client:
        assert not near.wires
        streams = [client.open(GET)]
        await client.flush()
        await until(lambda: len(near.asked) == 1)
        streams += [client.open(GET) for _ in range(7)]
        await client.flush()
        await until(lambda: len(near.asked) == 4)
        links = proxy.forwarder.services[B].links
        await until(lambda: links.wanted == 4)
        assert near.accepted == 2
        answer.set()
        await client.until(lambda: all(client.streams[each].over for each in streams))
        assert {client.streams[each].status for each in streams} == {200}
    assert most <= 4
    await settled(proxy, 8)


async def test_an_instance_that_discovery_removes_gets_no_new_stream_and_finishes_its_own(
    proxy: Proxy, both: tuple[H2Instance, H2Instance]
) -> None:
    """H2."""
    near, far = both
    answer = trio.Event()

    async def behave(made: H2Instance, wire: H2Wire, stream_id: int) -> None:
        await answer.wait()
        await h2.answers(made, wire, stream_id)

    near.behaviour = behave
    async with await connect(proxy) as client:
        under_way = client.open(GET)
        await client.flush()
        await until(lambda: near.asked)
        proxy.publish(far.instance)
        assert (await client.ask()).data == b"far"
        answer.set()
        await client.until(lambda: client.streams[under_way].over)
        assert client.streams[under_way].data == b"near"
        await until(lambda: not near.wires)
    await settled(proxy, 2)


async def test_a_dead_connection_is_found_by_ping(proxy: Proxy, both: tuple[H2Instance, H2Instance]) -> None:
    near, _ = both
    proxy.configure(http={"http2": {"keepalive_interval": 0.05, "keepalive_timeout": 0.05}})
    frozen = trio.Event()

    async def freeze(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
        async def nothing() -> bool:
            await trio.sleep_forever()

        wire.step = nothing  # type: ignore[method-assign] # it reads no more
        frozen.set()

    near.behaviour = freeze
    async with await connect(proxy) as client:
        assert (await client.ask()).data == b"far"
    assert frozen.is_set()


# CONNECT

TUNNEL = [(b":method", b"CONNECT"), (b":authority", b"b:80")]


async def test_connect_makes_a_stream_a_stream_of_bytes(proxy: Proxy, upstream: Upstreams) -> None:
    """RFC 9113, 8.5."""
    made = await upstream("old", "n1")

    async def echo(_: Upstream, served: Served) -> bool:
        while await served.more():
            await served.send(bytes(served.received))
            served.received = bytearray()
        return False

    made.greets = echo
    proxy.publish(made)
    async with await connect(proxy) as client:
        stream_id = client.open(TUNNEL, end=False)
        seen = client.streams[stream_id]
        await client.until(lambda: seen.head)
        assert seen.head == [(b":status", b"200")]
        for said in (b"one", b"two" * 10_000):
            await client.data(stream_id, said)
            await client.until(lambda: len(seen.data) in (3, 30_003))
        await client.end(stream_id)
        await client.until(lambda: seen.over)
        assert (bytes(seen.data), seen.ended) == (b"one" + b"two" * 10_000, True)
    await settled(proxy, 1)
    assert outcomes(proxy) == {"served": 1}


async def test_a_tunnel_whose_instance_ends_first_goes_on_the_other_way(proxy: Proxy, upstream: Upstreams) -> None:
    """RFC 9113, 8.5: each half ends by itself."""
    made = await upstream("old", "n1")
    heard: list[bytes] = []

    async def end_first(_: Upstream, served: Served) -> bool:
        await served.send(b"bye")
        await served.send_eof()
        while await served.more():
            pass
        heard.append(bytes(served.received))
        return False

    made.greets = end_first
    proxy.publish(made)
    async with await connect(proxy) as client:
        stream_id = client.open(TUNNEL, end=False)
        seen = client.streams[stream_id]
        await client.until(lambda: seen.ended)
        assert (bytes(seen.data), seen.reset) == (b"bye", None)
        await client.data(stream_id, b"still here")
        await client.end(stream_id)
        await until(lambda: heard)
        assert heard == [b"still here"]
        await settled(proxy, 1)
    assert outcomes(proxy) == {"served": 1}


async def test_a_tunnel_whose_instance_resets_it_is_reset(proxy: Proxy, upstream: Upstreams) -> None:
    made = await upstream("old", "n1")

    async def reset(_: Upstream, served: Served) -> bool:
        await served.more()
        served.reset()
        return False

    made.greets = reset
    proxy.publish(made)
    async with await connect(proxy) as client:
        stream_id = client.open(TUNNEL, end=False)
        seen = client.streams[stream_id]
        await client.data(stream_id, b"x")
        await client.until(lambda: seen.over)
        assert seen.reset == ErrorCode.CONNECT_ERROR
    await settled(proxy, 1)
    assert outcomes(proxy) == {"cut": 1}


@pytest.mark.parametrize(
    ("authority", "status", "reason"),
    [("b", 400, "bad_target"), ("a.b.c.d.example:80", 403, "connect_forbidden")],
)
async def test_connect_leads_nowhere_but_to_services(
    proxy: Proxy, near: H2Instance, authority: str, status: int, reason: str
) -> None:
    async with await connect(proxy) as client:
        seen = await client.ask([TUNNEL[0], (b":authority", authority.encode())])
        assert (seen.status, seen["x-meshlocal-error"]) == (status, reason)
        assert (await client.ask()).status == 200


# Flow control


async def test_one_stream_that_stalls_costs_its_window_and_holds_up_no_other(proxy: Proxy, near: H2Instance) -> None:
    """C2."""
    size = 200_000
    sent: dict[int, int] = {}

    async def behave(made: H2Instance, wire: H2Wire, stream_id: int) -> None:
        if wire.streams[stream_id][":path"] != "/big":
            await h2.answers(made, wire, stream_id)
            return
        wire.peer.send_headers(stream_id, OK)
        sent[stream_id] = 0
        while sent[stream_id] < size:
            room = wire.peer.sendable(stream_id)
            if not room:
                await wire.wait(lambda: wire.peer.sendable(stream_id))
                continue
            wire.peer.send_data(stream_id, bytes(min(room, size - sent[stream_id])))
            sent[stream_id] += min(room, size - sent[stream_id])
            await wire.flush()
        wire.peer.send_data(stream_id, b"", end_stream=True)
        await wire.flush()

    near.behaviour = behave
    async with await connect(proxy) as client, await connect(proxy) as other:
        client.takes = False
        stream_id = client.open(asking(GET, _path="/big"))
        seen = client.streams[stream_id]
        await client.until(lambda: len(seen.data) == 65_535)
        await until(lambda: sum(sent.values()) >= 65_535)
        for _ in range(50):
            assert (await other.ask()).data == b"near"
            assert (await client.ask()).data == b"near"
        assert sum(sent.values()) <= 2 * 65_535, "what the client does not take, the instance does not send"
        assert len(seen.data) == 65_535
        got = 0
        while not seen.over:
            client.peer.acknowledge(stream_id, 65_535)
            await client.flush()
            got += len(seen.data)
            seen.data.clear()
            await client.until(lambda: seen.data or seen.over)
        assert got + len(seen.data) == size
    await settled(proxy, 101)


async def test_a_body_that_the_instance_does_not_take_waits_in_the_client(proxy: Proxy, near: H2Instance) -> None:
    async def behave(made: H2Instance, wire: H2Wire, stream_id: int) -> None:
        wire.takes = False
        await trio.sleep_forever()

    near.behaviour = behave
    async with await connect(proxy) as client:
        stream_id = client.open(POST, end=False)
        await client.until(lambda: client.settled)
        sent = 0
        stuck = False
        while not stuck:
            if room := client.peer.sendable(stream_id):
                client.peer.send_data(stream_id, bytes(room))
                sent += room
                await client.flush()
                continue
            with trio.move_on_after(0.1) as scope:
                await client.step()
            stuck = scope.cancelled_caught
        assert 2 * 65_535 <= sent <= 3 * 65_535, "a window that the instance has, and one that waits here"
        await client.reset(stream_id)
    await settled(proxy, 1)


async def test_bytes_of_streams_that_were_reset_are_given_back(proxy: Proxy, near: H2Instance) -> None:
    """Else the connection to the instance would come to a stop for everybody."""

    async def behave(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
        wire.peer.send_headers(stream_id, OK)
        await wire.flush()
        wire.peer.send_data(stream_id, bytes(16_000))
        await wire.flush()

    near.behaviour = behave
    async with await connect(proxy) as client:
        client.takes = False
        await client.until(lambda: client.settled)

        async def give_up() -> None:
            stream_id = client.open(GET)
            seen = client.streams[stream_id]
            await client.until(lambda: seen.head)
            await client.reset(stream_id)
            client.peer.acknowledge(stream_id, len(seen.data))

        for _ in range(150):
            await give_up()
        near.behaviour = h2.answers
        client.takes = True
        assert (await client.ask()).data == b"near"
    assert near.accepted == 1
    await settled(proxy, 151)


# Drain


async def test_drain_says_goaway_twice_and_lets_streams_finish(proxy: Proxy, near: H2Instance) -> None:
    """S1."""
    answer = trio.Event()

    async def behave(made: H2Instance, wire: H2Wire, stream_id: int) -> None:
        await answer.wait()
        await h2.answers(made, wire, stream_id)

    near.behaviour = behave
    async with await connect(proxy) as client:
        first = client.open(GET)
        await client.flush()
        await until(lambda: near.asked)
        proxy.forwarder.drain()
        late = client.open(GET)  # it does not know yet
        await client.until(lambda: len(client.goaways) == 2)
        assert [each.last_stream_id for each in client.goaways] == [MAX_STREAM_ID, late]
        answer.set()
        await client.until(lambda: client.closed)
        assert [bytes(client.streams[each].data) for each in (first, late)] == [b"near", b"near"]
    await settled(proxy, 2)
    await proxy.idle()


async def begin_drain(proxy: Proxy, client: H2Wire) -> None:
    """Drain, until the client was told; its answer to the PING waits to be sent with what it says next."""
    proxy.forwarder.drain()
    while not client.goaways:
        for event in client.peer.receive(await client.stream.receive_some(65_536)):
            if isinstance(event, GoAway):
                client.goaways.append(event)


async def test_drain_serves_what_comes_with_the_answer_to_its_ping(proxy: Proxy, near: H2Instance) -> None:
    """S1: the last stream is fixed behind what the client had sent before it knew."""
    async with await connect(proxy) as client:
        assert (await client.ask()).status == 200
        await begin_drain(proxy, client)
        late = client.open(GET)
        await client.until(lambda: client.closed)
        assert [each.last_stream_id for each in client.goaways] == [MAX_STREAM_ID, late]
        assert bytes(client.streams[late].data) == b"near"
    await settled(proxy, 2)
    await proxy.idle()


async def test_drain_answers_more_than_one_turn_takes(proxy: Proxy, near: H2Instance) -> None:
    """S1: what came, and has its turn yet to come, is not forgotten when all streams before it have ended."""
    async with await connect(proxy) as client:
        assert (await client.ask()).status == 200
        await begin_drain(proxy, client)
        late = [client.open(asking(GET, _scheme="ftp")) for _ in range(90)] + [client.open(GET) for _ in range(9)]
        await client.until(lambda: client.closed)
        assert client.goaways[-1].last_stream_id == late[-1]
        assert Counter(client.streams[each].status for each in late) == {400: 90, 200: 9}
    await proxy.idle()


async def test_drain_ends_an_idle_connection(proxy: Proxy, near: H2Instance) -> None:
    async with await connect(proxy) as client:
        assert (await client.ask()).status == 200
        proxy.forwarder.drain()
        await client.until(lambda: client.closed)
        assert client.goaways[0].last_stream_id == MAX_STREAM_ID
    await proxy.idle()


# What is refused


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        (asking(GET, host="c"), 400, "bad_host"),
        (asking(GET, _authority="b:1:2"), 400, "bad_host"),
        (asking(GET, _scheme="ftp"), 400, "bad_target"),
        (asking(GET, _path="/#x"), 400, "bad_target"),
        (asking(POST, expect="99"), 417, "bad_expectation"),
        (asking(GET, x="y" * 66_000), 431, "head_too_large"),
        (asking(GET, _path="/" + "y" * 17_000), 414, "target_too_long"),
        ([*GET, *[(b"x%d" % number, b"y") for number in range(200)]], 431, "too_many_headers"),
        (asking(CALL, grpc_timeout="soon"), 200, "bad_grpc_timeout"),
        (asking(GET, _method="HEAD", expect="99"), 417, "bad_expectation"),
        (asking(POST, content_length="100"), 413, "body_too_large"),
    ],
)
async def test_requests_that_are_refused_cost_themselves_only(
    proxy: Proxy, near: H2Instance, fields: h2.Fields, status: int, reason: str
) -> None:
    proxy.configure(http={"max_body": 50})
    async with await connect(proxy) as client:
        stream_id = client.open(fields, end=False)
        seen = client.streams[stream_id]
        await client.until(lambda: seen.over)
        assert (seen.status, seen["x-meshlocal-error"]) == (status, reason)
        assert (await client.ask()).status == 200
    assert proxy.forwarder.shared.refused[reason] == 1


async def test_a_body_that_grows_too_long_behind_the_head_resets_its_stream(proxy: Proxy, near: H2Instance) -> None:
    proxy.configure(http={"max_body": 50})

    async def behave(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
        wire.peer.send_headers(stream_id, OK)
        await wire.flush()

    near.behaviour = behave
    async with await connect(proxy) as client:
        stream_id = client.open(POST, end=False)
        seen = client.streams[stream_id]
        await client.until(lambda: seen.head)
        await client.data(stream_id, bytes(60))
        await client.until(lambda: seen.over)
        assert seen.reset == ErrorCode.CANCEL
        await until(lambda: near.asked[0].reset == ErrorCode.CANCEL)
    await settled(proxy, 1)
    assert outcomes(proxy) == {"cut": 1}


async def test_a_body_that_grows_too_long_is_413(proxy: Proxy, near: H2Instance) -> None:
    proxy.configure(http={"max_body": 50})
    near.behaviour = h2.stalls
    async with await connect(proxy) as client:
        stream_id = client.open(POST, end=False)
        seen = client.streams[stream_id]
        await client.data(stream_id, bytes(40))
        await until(lambda: near.asked and len(near.asked[0].data) == 40)
        await client.data(stream_id, bytes(40))
        await client.until(lambda: seen.over)
        assert (seen.status, seen["x-meshlocal-error"]) == (413, "body_too_large")
        await until(lambda: near.asked[0].reset == ErrorCode.CANCEL)
    await settled(proxy, 1)


async def test_limits_of_requests_hold_for_streams(proxy: Proxy, near: H2Instance) -> None:
    near.behaviour = h2.stalls
    proxy.configure(service={"limits": LimitsConfig(requests=1)})
    async with await connect(proxy) as client:
        first = client.open(GET)
        await client.flush()
        await until(lambda: near.asked)
        seen = await client.ask()
        assert (seen.status, seen["x-meshlocal-error"]) == (503, "limit_requests")
        seen = await client.call()
        assert seen.grpc == 8
        await client.reset(first)
    await settled(proxy, 3)


# Floods


def frame(kind: int, flags: int, stream_id: int, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + body


@pytest.mark.parametrize(
    "flood",
    [
        frame(6, 0, 0, b"12345678"),
        frame(4, 0, 0),
        frame(0, 0, 1),
    ],
    ids=["PING", "SETTINGS", "empty DATA"],
)
async def test_floods_cost_their_connection_only(proxy: Proxy, near: H2Instance, flood: bytes) -> None:
    proxy.configure(http={"http2": {"control_frames": 100, "control_frames_per_second": 1}})
    near.behaviour = h2.stalls
    async with await connect(proxy) as bad, await connect(proxy) as good:
        bad.open(POST, end=False)
        await bad.raw(flood * 99)
        await until(lambda: near.asked)
        near.behaviour = h2.answers
        assert (await good.ask()).status == 200
        assert not bad.closed
        await bad.raw(flood * 50)
        await bad.until(lambda: bad.closed)
        assert bad.goaways[-1].error_code == ErrorCode.ENHANCE_YOUR_CALM
        assert (await good.ask()).status == 200
    assert proxy.forwarder.shared.refused["http2_flood"] == 1
    await settled(proxy, 3)


async def test_rapid_reset_costs_its_connection_only(proxy: Proxy, near: H2Instance) -> None:
    """CVE-2023-44487."""
    proxy.configure(http={"http2": {"resets": 20, "resets_per_second": 1}})
    async with await connect(proxy) as bad, await connect(proxy) as good:
        for _ in range(30):
            stream_id = bad.open(GET)
            bad.peer.reset(stream_id, ErrorCode.CANCEL)
        await bad.until(lambda: bad.closed)
        assert bad.goaways[-1].error_code == ErrorCode.ENHANCE_YOUR_CALM
        assert (await good.ask()).status == 200
    await until(lambda: proxy.table[B].in_use == 0)


async def test_bytes_that_break_the_rules_cost_their_connection_only(proxy: Proxy, near: H2Instance) -> None:
    near.behaviour = h2.stalls
    async with await connect(proxy) as bad, await connect(proxy) as good:
        bad.open(GET)
        await bad.flush()
        await until(lambda: near.asked)
        near.behaviour = h2.answers
        await bad.raw(frame(6, 0, 0, b"short"))
        await bad.until(lambda: bad.closed)
        assert bad.goaways[-1].error_code == ErrorCode.FRAME_SIZE_ERROR
        assert (await good.ask()).status == 200
    await settled(proxy, 2)
    assert outcomes(proxy) == {"client_left": 1, "served": 1}


async def test_streams_over_the_limit_are_refused(proxy: Proxy, near: H2Instance) -> None:
    proxy.configure(http={"http2": {"max_streams": 2}})
    near.behaviour = h2.stalls
    async with await connect(proxy) as client:
        streams = [client.open(GET) for _ in range(4)]
        await client.until(lambda: [each for each in streams if client.streams[each].over])
        await until(lambda: len(near.asked) == 2)
        assert [client.streams[each].reset for each in streams] == [None, None, 7, 7]
    await settled(proxy, 2)


async def test_what_is_for_this_proxy_goes_no_further(proxy: Proxy, near: H2Instance) -> None:
    async with await connect(proxy) as client:
        await client.ask(asking(GET, proxy_authorization="secret", x_forwarded_client_cert="URI=spiffe://td/me", x="y"))
    assert near.asked[0]["proxy-authorization"] is None
    assert near.asked[0]["x-forwarded-client-cert"] is None
    assert near.asked[0]["x"] == "y"


async def test_headers_that_tell_how_a_response_came_about(proxy: Proxy, both: tuple[H2Instance, H2Instance]) -> None:
    """R1."""
    near, far = both
    near.behaviour = h2.refuses(7)
    proxy.configure(http={"response_headers": True, "via": "mesh", "x_forwarded": "append"})
    async with await connect(proxy) as client:
        seen = await client.ask()
        assert seen["x-meshlocal-attempts"] == "2"
        assert seen["x-meshlocal-reason"] == "local_failed"
        assert seen["x-meshlocal-instance"] == f"127.0.0.1:{far.port}"
        assert seen["via"] == "2 mesh"
    assert far.asked[0]["x-forwarded-for"] == "127.0.0.1"
    assert far.asked[0]["x-forwarded-proto"] == "http"
    assert far.asked[0]["via"] == "2 mesh"


async def test_what_is_counted_of_calls(proxy: Proxy, near: H2Instance) -> None:
    """Failures that hide behind 200 count as failures."""
    async with await connect(proxy) as client:
        await client.call()
        near.behaviour = h2.says(GRPC_OK, MESSAGE, [(b"grpc-status", b"13")])
        await client.call()
        near.behaviour = h2.says([*GRPC_OK, (b"grpc-status", b"5")])
        await client.call()
        await client.ask()
    await settled(proxy, 4)
    statistics = proxy.forwarder.services[B].statistics
    assert statistics.calls == {("node", "", 0): 1, ("node", "", 13): 1, ("node", "", 5): 1}
    assert statistics.responses == {
        ("node", "", "2xx", "2"): 2,
        ("node", "", "5xx", "2"): 1,
        ("node", "", "4xx", "2"): 1,
    }


@pytest.mark.parametrize("grpc", [True, False])
async def test_streams_that_last_and_are_silent_return_if_asked(
    proxy: Proxy, both: tuple[H2Instance, H2Instance], nursery: trio.Nursery, grpc: bool
) -> None:
    """F2: gRPC with UNAVAILABLE, for its clients call again then; other streams are reset."""
    near, far = both
    proxy.configure(service={"failback": FailbackConfig(after=0.02, interval=0.02, quiet=0.05)})

    async def lasts(_: H2Instance, wire: H2Wire, stream_id: int) -> None:
        wire.peer.send_headers(stream_id, GRPC_OK if grpc else OK)
        wire.peer.send_data(stream_id, MESSAGE)
        await wire.flush()

    near.behaviour = far.behaviour = lasts
    async with await connect(proxy) as client:
        proxy.publish(far.instance)
        seen = client.streams[client.open(CALL if grpc else POST)]
        await client.until(lambda: seen.data)
        nursery.start_soon(Returning(proxy.table, proxy.forwarder.streams, random.Random(0)).run)
        proxy.publish(near.instance, far.instance)
        await client.until(lambda: seen.over)
        assert (seen.grpc, seen.reset) == ((14, None) if grpc else (None, ErrorCode.CANCEL))
        await until(lambda: far.asked[0].reset == ErrorCode.CANCEL)
        again = client.streams[client.open(CALL if grpc else POST)]
        await client.until(lambda: again.data)
        assert len(near.asked) == 1
        await client.reset(max(client.streams))
    await settled(proxy, 2)
    assert outcomes(proxy) == {"returned": 1, "cut": 1}


async def test_calls_leave_a_node_whose_instance_is_gone_and_return(
    proxy: Proxy, both: tuple[H2Instance, H2Instance], nursery: trio.Nursery, instance: Instances
) -> None:
    """F1, on one client connection that stays: none fails."""
    near, far = both
    async with await connect(proxy) as client:
        assert near.accepted == 0
        for _ in range(3):
            await client.call()
        assert len(near.asked) == 3
        near.refuse()
        for wire in list(near.wires):
            wire.peer.send_goaway(MAX_STREAM_ID)
            await wire.flush()
        await until(lambda: not near.wires)
        for _ in range(3):
            assert (await client.call()).grpc == 0
        assert len(far.asked) == 3
        again = await instance("near", "n1")
        proxy.publish(again.instance, far.instance)
        for _ in range(3):
            assert (await client.call()).grpc == 0
        assert len(again.asked) == 3
    await settled(proxy, 9)
    assert outcomes(proxy) == {str(Outcome.SERVED): 9}
