"""Messages on their way: framing, interim responses, what belongs to one hop, what is added (RFC 9110, 9112)."""

from __future__ import annotations

import errno
import itertools
import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock, wait_all_tasks_blocked

from meshlocal.client.statistics import Outcome, RequestKey
from nursery_tests.proxy.http.conftest import B, Proxy, Served, Upstream, forward, ok, response, says, stalls, until


class Wrapped:
    """A socket that sends in another way."""

    def __init__(self, sock: socket.socket | None, send: Callable[[socket.socket, bytes], int]) -> None:
        assert sock is not None
        self._sock = sock
        self._send = send

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def send(self, data: bytes) -> int:
        return self._send(self._sock, data)


CHUNKS = b"5;ext=1\r\nhello\r\n6\r\n world\r\n0\r\nx-sum: 1\r\n\r\n"


async def test_headers_of_one_hop_do_not_go_on(proxy: Proxy, local: Upstream) -> None:
    """RFC 9110, 7.6.1, both ways; Host and all others are kept, in their order, byte by byte."""
    local.behaviour = says(
        b"HTTP/1.1 200 OK\r\nServer: x\r\nConnection: keep-alive, x-Hop\r\nX-HOP: 1\r\nKeep-Alive: timeout=5\r\n"
        b"Proxy-Connection: x\r\nUpgrade: h2\r\nTrailer: x-sum\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n"
        b"Proxy-Authenticate: Basic\r\nContent-Length: 2\r\n\r\nok"
    )
    async with await proxy.connect() as client:
        await client.send(
            b"GET /p HTTP/1.1\r\nHost: b\r\nConnection: x-mine, Keep-Alive, TE\r\nX-Mine: 1\r\nTE: trailers\r\n"
            b"Keep-Alive: 300\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic x\r\n"
            b"Authorization: Basic y\r\nAccept:  a \r\nUpgrade: h2c\r\nAccept: b\r\n\r\n"
        )
        answer = await client.response()
    assert local.heads == [b"GET /p HTTP/1.1\r\nHost: b\r\nAuthorization: Basic y\r\nAccept:  a \r\nAccept: b\r\n\r\n"]
    assert answer.head == (
        b"HTTP/1.1 200 OK\r\nServer: x\r\nTrailer: x-sum\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n"
        b"Proxy-Authenticate: Basic\r\nContent-Length: 2\r\n\r\n"
    )


async def test_connection_cannot_take_away_what_a_message_hangs_on(proxy: Proxy, local: Upstream) -> None:
    body = b"hello"
    answer = await proxy.ask("POST", "/", body, connection="content-length, host, x")
    assert answer.status == 200
    assert local.bodies == [body]
    assert b"host: b\r\n" in local.heads[0]


@pytest.mark.parametrize(
    ("http", "sent", "passed"),
    [
        ({}, {}, {}),
        ({}, {"x_forwarded_for": "1.2.3.4"}, {"x-forwarded-for": "1.2.3.4"}),
        ({"x_forwarded": "remove"}, {"x_forwarded_for": "1.2.3.4", "x_forwarded_proto": "https"}, {}),
        ({"x_forwarded": "append"}, {}, {"x-forwarded-for": "127.0.0.1", "x-forwarded-proto": "http"}),
        (
            {"x_forwarded": "append"},
            {"x_forwarded_for": "1.2.3.4", "x_forwarded_proto": "https"},
            {"x-forwarded-for": "1.2.3.4, 127.0.0.1", "x-forwarded-proto": "https"},
        ),
        ({"via": "mesh"}, {}, {"via": "1.1 mesh"}),
        ({"via": "mesh"}, {"via": "1.0 first"}, {"via": "1.0 first, 1.1 mesh"}),
    ],
)
async def test_via_and_forwarded(
    proxy: Proxy, local: Upstream, http: dict[str, Any], sent: dict[str, str], passed: dict[str, str]
) -> None:
    """As configured, and nothing by default."""
    proxy.configure(http=http)
    async with await proxy.connect() as client:
        answers = [await client.get(**sent) for _ in range(2)]
    for head in local.heads:
        got: dict[str, str] = {}
        for line in head.decode().split("\r\n")[1:-2]:
            name, _, value = line.partition(": ")
            if name != "host":
                got[name] = f"{got[name]}, {value}" if name in got else value
        assert got == passed
    for answer in answers:
        assert answer.fields.get("via") == ("1.1 mesh" if "via" in http else None)


@pytest.mark.parametrize("wanted", [False, True])
async def test_how_a_response_came_about(proxy: Proxy, pair: tuple[Upstream, Upstream], wanted: bool) -> None:
    """R1: if it is asked for, in responses and in answers of the proxy's own."""
    local, far = pair
    proxy.configure(http={"response_headers": wanted})

    def told(answer: Any) -> dict[str, str]:
        return {
            name.removeprefix("x-meshlocal-"): value
            for name, value in answer.fields.items()
            if name.startswith("x-meshlocal-") and name != "x-meshlocal-error"
        }

    async with await proxy.connect() as client:
        here = {"attempts": "1", "instance": f"127.0.0.1:{local.port}", "tier": "node"}
        assert told(await client.get()) == (here if wanted else {})
        assert told(await client.get()) == (here if wanted else {})
        local.refuse()
        proxy.publish(far)
        proxy.publish(local, far)
        there = {"attempts": "2", "instance": f"127.0.0.1:{far.port}", "tier": "other", "reason": "local_failed"}
        answer = await client.get()
        assert (answer.body, told(answer)) == (b"far", there if wanted else {})
        assert told(await client.get(host="1.2.3.4")) == ({"attempts": "0"} if wanted else {})


@pytest.mark.parametrize("replay_buffer", [0, 5, 65536])
@pytest.mark.parametrize("split", [False, True])
async def test_chunks_both_ways(proxy: Proxy, local: Upstream, replay_buffer: int, split: bool) -> None:
    """As they came, with their trailers; extensions are for one hop."""
    proxy.configure(attempts={"replay_buffer": replay_buffer})
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

    async def answer_in_pieces(upstream: Upstream, served: Served) -> None:
        for byte in head + CHUNKS:
            await served.send(bytes([byte]))

    local.behaviour = answer_in_pieces if split else says(head + CHUNKS)
    async with await proxy.connect() as client:
        for _ in range(2):
            request = b"PUT / HTTP/1.1\r\nhost: b\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n" + CHUNKS
            for piece in [request[at : at + 1] for at in range(len(request))] if split else [request]:
                await client.send(piece)
            answer = await client.response()
            assert answer.raw == CHUNKS.replace(b";ext=1", b"")
    assert local.bodies == [CHUNKS.replace(b";ext=1", b"")] * 2
    assert b"trailer: x-sum\r\n" in local.heads[0]
    assert local.accepted == 1


async def test_trailers_cannot_carry_what_frames_or_routes(proxy: Proxy, local: Upstream) -> None:
    """RFC 9110, 6.5.1."""
    body = b"0\r\nhost: c\r\nx-sum: 1\r\nContent-Length: 5\r\n\r\n"
    async with await proxy.connect() as client:
        await client.send(b"PUT / HTTP/1.1\r\nhost: b\r\ntransfer-encoding: chunked\r\n\r\n" + body)
        await client.response()
    assert local.bodies == [b"0\r\nx-sum: 1\r\n\r\n"]


@pytest.mark.parametrize(
    ("method", "raw"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 1000\r\netag: x\r\n\r\n"),
        ("GET", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
    ],
)
async def test_responses_without_a_body(proxy: Proxy, local: Upstream, method: str, raw: bytes) -> None:
    """The connections on both sides are ready for the next request at once."""
    async with await proxy.connect() as client:
        await client.get()
        local.behaviour = says(raw)
        for _ in range(3):
            answer = await client.ask(method)
            assert answer.head.split(b"\r\n")[0] == raw.split(b"\r\n")[0]
            if b"content-length: 1000" in raw:
                assert answer.fields["content-length"] == "1000"
        local.behaviour = ok
        assert (await client.get()).body == b"local"
    assert local.accepted == 1


async def test_interim_responses(proxy: Proxy, local: Upstream) -> None:
    """1xx go on, as many as come, before the final one."""
    hints = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"

    async def behaviour(upstream: Upstream, served: Served) -> None:
        await served.send(b"HTTP/1.1 102 Processing\r\n\r\n" + hints)
        await until(lambda: got)
        await served.send(hints + response(b"at last"))

    local.behaviour = behaviour
    async with await proxy.connect() as client:
        for _ in range(2):
            got = b""
            await client.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
            got = await client.until(b"\r\n\r\n") + await client.until(b"\r\n\r\n")
            assert got == b"HTTP/1.1 102 Processing\r\n\r\n" + hints
            assert await client.until(b"\r\n\r\n") == hints
            assert (await client.response()).body == b"at last"


@pytest.mark.parametrize("size", [5, 200_000])
async def test_expect_continue(proxy: Proxy, local: Upstream, size: int) -> None:
    """The instance says whether it wants the body; the client waits for that."""
    local.reads_bodies = False
    body = b"x" * size

    async def behaviour(upstream: Upstream, served: Served) -> None:
        assert not served.received
        await served.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await served.read_body() == body
        await ok(upstream, served)

    local.behaviour = behaviour
    async with await proxy.connect() as client:
        for _ in range(2):
            await client.send(
                b"POST / HTTP/1.1\r\nhost: b\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % size
            )
            assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            await client.send(body)
            assert (await client.response()).body == b"local"
    assert b"expect: 100-continue\r\n" in local.heads[0]
    assert local.accepted == 1


async def test_expect_continue_that_is_refused(proxy: Proxy, local: Upstream) -> None:
    """The instance answers without the body: nobody can tell whether it still comes, so both connections end."""
    local.reads_bodies = False
    local.behaviour = says(response(b"no", "403 Forbidden"))
    async with await proxy.connect() as client:
        await client.send(b"POST / HTTP/1.1\r\nhost: b\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
        answer = await client.response()
        assert (answer.status, answer.body, answer.fields["connection"]) == (403, b"no", "close")
        assert await client.rest() == b""
    await until(lambda: not local.open)
    assert proxy.pooled == 0


async def test_expect_continue_moves_on_while_the_body_was_not_asked_for(
    proxy: Proxy, pair: tuple[Upstream, Upstream]
) -> None:
    """A2: the body is still the client's."""
    local, far = pair
    local.refuse()

    async def behaviour(upstream: Upstream, served: Served) -> None:
        await served.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await served.read_body() == b"hello"
        await ok(upstream, served)

    far.reads_bodies, far.behaviour = False, behaviour
    async with await proxy.connect() as client:
        await client.send(b"POST / HTTP/1.1\r\nhost: b\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
        await client.until(b"HTTP/1.1 100 Continue\r\n\r\n")
        await client.send(b"hello")
        assert (await client.response()).body == b"far"


async def test_an_instance_that_does_not_say_whether_it_wants_the_body(
    clock: MockClock, proxy: Proxy, local: Upstream
) -> None:
    """A1: the time to answer is its own while the client waits for its word."""
    proxy.configure(attempts={"attempt_timeout": 5.0})
    local.reads_bodies = False
    local.behaviour = stalls
    async with await proxy.connect() as client:
        await client.send(b"POST / HTTP/1.1\r\nhost: b\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
        await until(lambda: local.heads)
        await wait_all_tasks_blocked()
        await forward(clock, 10.0)
        assert not local.open
        assert (await client.response()).told == (504, "attempt_timeout")


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_client_that_does_not_wait_to_be_asked_for_its_body(
    clock: MockClock, proxy: Proxy, local: Upstream, at_once: bool
) -> None:
    """A1: from its first byte on it is the client that is waited for."""
    proxy.configure(attempts={"attempt_timeout": 5.0})
    async with await proxy.connect() as client:
        head = b"POST / HTTP/1.1\r\nhost: b\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n"
        if at_once:
            await client.send(head + b"he")
        else:
            await client.send(head)
            await until(lambda: local.open)
            await wait_all_tasks_blocked()
            await client.send(b"he")
        await until(lambda: local.open and local.open[0].received == b"he")
        await forward(clock, 10.0)
        await client.send(b"llo")
        assert (await client.response()).body == b"local"
    assert local.bodies == [b"hello"]


@pytest.mark.parametrize("rest", [b"1\r\nx\r\n", b"0\r\n\r\n", b"nonsense\r\n"], ids=["more", "end", "malformed"])
async def test_what_comes_of_a_body_after_the_response_began_does_not_harm_that(
    clock: MockClock, proxy: Proxy, local: Upstream, rest: bytes
) -> None:
    """A1: it has no time to keep any more, and is not cut for what is wrong with the body: nothing else is said."""
    proxy.configure(attempts={"attempt_timeout": 5.0})
    local.reads_bodies = False
    go_on = trio.Event()

    async def answers_early(upstream: Upstream, served: Served) -> bool:
        await served.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello")
        await go_on.wait()
        await served.send(b"world")
        return await stalls(upstream, served)

    local.behaviour = answers_early
    async with await proxy.connect() as client:
        await client.send(b"PUT / HTTP/1.1\r\nhost: b\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
        head = await client.until(b"\r\n\r\n")
        assert b"connection: close\r\n" in head
        assert await client.exactly(5) == b"hello"
        await client.send(rest)
        await wait_all_tasks_blocked()
        await forward(clock, 10.0)
        go_on.set()
        assert await client.exactly(5) == b"world"
        assert await client.rest() == b""
    await proxy.idle()
    assert proxy.requests() == {RequestKey("node", "", Outcome.SERVED): 1}
    # Of a body that was not whole nobody can tell what the instance made.
    assert proxy.pooled == (rest == b"0\r\n\r\n")


async def test_an_answer_before_the_body_is_over(proxy: Proxy, local: Upstream) -> None:
    """An instance that refuses an upload is heard at once, though the client still sends."""
    local.reads_bodies = False
    local.behaviour = says(response(b"too much", "413 Content Too Large"))
    async with await proxy.connect() as client:
        await client.send(b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 1000000000\r\n\r\n" + bytes(1000))
        answer = await client.response()
        assert (answer.status, answer.body, answer.fields["connection"]) == (413, b"too much", "close")


async def test_a_response_that_breaks_off_before_the_body_is_over(proxy: Proxy, local: Upstream) -> None:
    """What the client got of it must not look whole."""
    proxy.configure(attempts={"replay_buffer": 0})
    local.reads_bodies = False
    local.behaviour = says(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello", closing=True)
    async with await proxy.connect() as client:
        await client.send(b"PUT / HTTP/1.1\r\nhost: b\r\ncontent-length: 500\r\n\r\nsome")
        assert await client.until(b"\r\n\r\n")
        assert await client.exactly(5) == b"hello"
        assert await client.is_reset()
    await proxy.idle()
    assert proxy.requests() == {RequestKey("node", "", Outcome.CUT): 1}
    assert proxy.pooled == 0


async def test_an_instance_that_takes_no_more_of_a_body_is_heard(
    proxy: Proxy, local: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have answered before it closed."""
    proxy.configure(attempts={"replay_buffer": 0})
    local.reads_bodies = False
    closed = trio.Event()

    def takes_the_head(sock: socket.socket, data: bytes) -> int:
        if data != b"some":
            return sock.send(data)
        closed.set()
        raise BrokenPipeError(errno.EPIPE, "closed")

    async def answers_late(upstream: Upstream, served: Served) -> bool:
        await closed.wait()
        # Nothing but the response tells the proxy's other task.
        await wait_all_tasks_blocked()
        await served.send(response(b"too much", "413 Content Too Large"))
        return False

    async with await proxy.connect() as client:
        await client.get()
        await until(lambda: proxy.pooled == 1)
        (upstream,) = next(iter(proxy.forwarder.services[B].pool._idle.values()))
        monkeypatch.setattr(upstream.pipe, "plain", Wrapped(upstream.pipe.plain, takes_the_head))
        local.behaviour = answers_late
        await client.send(b"PUT / HTTP/1.1\r\nhost: b\r\ncontent-length: 500\r\n\r\nsome")
        answer = await client.response()
        assert (answer.status, answer.body, answer.fields["connection"]) == (413, b"too much", "close")
    await proxy.idle()
    assert proxy.requests() == {RequestKey("node", "", Outcome.SERVED): 2}
    assert proxy.pooled == 0


@pytest.mark.parametrize("keep_alive", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
async def test_http_1_0_clients(proxy: Proxy, local: Upstream, keep_alive: bool, chunked: bool) -> None:
    """They get no chunks, no interim responses, and a connection that stays only if they ask for that."""
    interim = b"HTTP/1.1 103 Early Hints\r\n\r\n"
    body = b"transfer-encoding: chunked\r\n\r\n" + CHUNKS if chunked else b"content-length: 11\r\n\r\nhello world"
    local.behaviour = says(interim + b"HTTP/1.1 200 OK\r\n" + body)
    fields = "connection: Keep-Alive\r\n" if keep_alive else ""
    async with await proxy.connect() as client:
        stays = keep_alive and not chunked
        for _ in range(2 if stays else 1):
            await client.send(f"GET / HTTP/1.0\r\nhost: b\r\n{fields}\r\n".encode())
            head = await client.until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"transfer-encoding" not in head
            if stays:
                assert b"connection: keep-alive\r\n" in head
                assert await client.exactly(11) == b"hello world"
            else:
                assert b"connection: close\r\n" in head
                assert await client.rest() == b"hello world"
    assert local.heads[0].startswith(b"GET / HTTP/1.1\r\n")
    assert local.accepted == 1


@pytest.mark.parametrize("raw", [b"HTTP/1.0 200 OK\r\n\r\nhello", b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello"])
async def test_a_body_that_ends_with_the_connection(proxy: Proxy, local: Upstream, raw: bytes) -> None:
    """An HTTP/1.1 client gets it in chunks, and keeps its connection."""
    local.behaviour = says(raw, closing=True)
    async with await proxy.connect() as client:
        for _ in range(2):
            answer = await client.get()
            assert (answer.body, answer.fields["transfer-encoding"]) == (b"hello", "chunked")
            assert "connection" not in answer.fields
    assert local.accepted == 2
    assert proxy.pooled == 0


async def test_http_1_0_instances_that_keep_their_connection(proxy: Proxy, local: Upstream) -> None:
    local.behaviour = says(b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok")
    async with await proxy.connect() as client:
        for _ in range(3):
            answer = await client.get()
            assert answer.head == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
    assert local.accepted == 1


@pytest.mark.parametrize("body", [False, True])
async def test_pipelined_requests(proxy: Proxy, local: Upstream, body: bool) -> None:
    """Answered in their order, each picked for itself, whatever is sent at once."""
    extra = "content-length: 3\r\n\r\nabc" if body else "\r\n"

    async def behaviour(upstream: Upstream, served: Served) -> None:
        await served.send(response(served.head.split(b" ")[1]))

    local.behaviour = behaviour
    requests = "".join(f"PUT /{number} HTTP/1.1\r\nhost: b\r\n{extra}" for number in range(50)).encode()
    async with await proxy.connect() as client:
        await client.send(requests[:-1])
        await client.send(requests[-1:])
        assert [(await client.response()).body for _ in range(50)] == [b"/%d" % number for number in range(50)]
    assert local.accepted == 1


async def test_empty_lines_before_a_request(proxy: Proxy, local: Upstream) -> None:
    """RFC 9112, 2.2: some clients end a body with one."""
    async with await proxy.connect() as client:
        for _ in range(3):
            await client.send(b"\r\n")
            await client.send(b"\r\nPOST / HTTP/1.1\r\nhost: b\r\ncontent-length: 1\r\n\r\nx")
            assert (await client.response()).body == b"local"
            await client.send(b"\r\n\r\nGET / HTTP/1.1\r\nhost: b\r\n\r\n")
            assert (await client.response()).body == b"local"


async def test_connection_close_from_the_client(proxy: Proxy, local: Upstream) -> None:
    """It is the client's connection that ends; the instance's stays."""
    for _ in range(2):
        async with await proxy.connect() as client:
            answer = await client.get(connection="close")
            assert (answer.body, answer.fields["connection"]) == (b"local", "close")
            assert await client.rest() == b""
    assert local.accepted == 1
    assert b"connection" not in local.heads[0]


async def test_connection_close_from_the_instance(proxy: Proxy, local: Upstream) -> None:
    """And the other way round."""
    local.behaviour = says(response(b"bye", connection="close"), closing=True)
    async with await proxy.connect() as client:
        for _ in range(2):
            answer = await client.get()
            assert answer.body == b"bye"
            assert "connection" not in answer.fields
    assert local.accepted == 2


UPGRADE = b"GET /ws HTTP/1.1\r\nhost: b\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x\r\n\r\n"


async def test_upgrade(proxy: Proxy, local: Upstream) -> None:
    """From the switch on it is a tunnel, and what either side said early goes on."""

    async def switch(upstream: Upstream, served: Served) -> bool:
        await served.send(
            b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\nx: y\r\n\r\nfirst"
        )
        while await served.more():
            await served.send(served.received.upper())
            served.received = b""
        return False

    local.behaviour = switch
    async with await proxy.connect() as client:
        await client.get(host="1.2.3.4")
        await client.send(UPGRADE + b"early")
        head = await client.until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\nx: y\r\n")
        assert b"connection: upgrade\r\nupgrade: websocket\r\n" in head
        assert await client.exactly(10) == b"firstEARLY"
        await client.send(b"later" * 50_000)
        assert await client.exactly(250_000) == b"LATER" * 50_000
        await client.send_eof()
        assert await client.rest() == b""
    assert b"connection: upgrade\r\nupgrade: websocket\r\n" in local.heads[0]
    await proxy.idle()
    assert proxy.requests() == {RequestKey("node", "", Outcome.SERVED): 1}


async def test_upgrade_that_an_instance_takes_in_pieces(
    proxy: Proxy, local: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the client says early is for the other protocol, and does not get lost."""

    def takes_half(sock: socket.socket, data: bytes) -> int:
        return sock.send(data[: (len(data) + 1) // 2])

    async def switch(upstream: Upstream, served: Served) -> bool:
        await wait_all_tasks_blocked()
        await served.send(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
        while await served.more():
            await served.send(served.received.upper())
            served.received = b""
        return False

    async with await proxy.connect() as client:
        await client.get()
        await until(lambda: proxy.pooled == 1)
        (upstream,) = next(iter(proxy.forwarder.services[B].pool._idle.values()))
        monkeypatch.setattr(upstream.pipe, "plain", Wrapped(upstream.pipe.plain, takes_half))
        # The real one asks the socket's own type.
        for module in ("flows", "ways"):
            monkeypatch.setattr(f"meshlocal.net.{module}.is_unix", lambda sock: False)
        local.behaviour = switch
        await client.send(UPGRADE)
        await until(lambda: len(local.heads) == 2)
        await client.send(b"early")
        assert (await client.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        assert await client.exactly(5) == b"EARLY"
        await client.send_eof()
        assert await client.rest() == b""
    await proxy.idle()
    assert proxy.requests() == {RequestKey("node", "", Outcome.SERVED): 2}


async def test_upgrade_that_is_declined(proxy: Proxy, local: Upstream) -> None:
    """Then it was a request like any other."""
    async with await proxy.connect() as client:
        await client.send(UPGRADE)
        assert (await client.response()).body == b"local"
        assert (await client.get()).body == b"local"
    assert local.accepted == 1


async def test_a_switch_that_nobody_asked_for(proxy: Proxy, local: Upstream) -> None:
    local.behaviour = says(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n")
    assert (await proxy.ask()).told == (502, "broken_response")


async def test_an_idle_tunnel_ends(proxy: Proxy, local: Upstream) -> None:
    """Its limit is the one of a response that stands still."""

    async def switch(upstream: Upstream, served: Served) -> bool:
        await served.send(b"HTTP/1.1 101 Switching\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
        await served.more()
        return False

    proxy.configure(attempts={"idle_timeout": 0.1})
    local.behaviour = switch
    async with await proxy.connect() as client:
        await client.send(UPGRADE)
        await client.until(b"\r\n\r\n")
        assert await client.is_reset()
    await until(lambda: not local.open)


async def test_a_long_response_keeps_nobody_waiting(
    proxy: Proxy, local: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tasks have their turn while it is passed on, also if all of it is there when the first of it is read."""
    size = 60_000
    # So that what the kernel has room for is many pieces.
    monkeypatch.setattr("meshlocal.proxy.http.lane.CHUNK", 64)
    monkeypatch.setattr("meshlocal.proxy.http.h1.upstream.CHUNK", 64)
    sent = 0
    seen = [0]

    def counts(sock: socket.socket, data: bytes) -> int:
        nonlocal sent
        taken = sock.send(data)
        sent += taken
        return taken

    async def look() -> None:
        while True:
            seen.append(sent)
            await trio.lowlevel.checkpoint()

    async with await proxy.connect() as client, trio.open_nursery() as nursery:
        await client.get()
        (connection,) = proxy.forwarder
        monkeypatch.setattr(connection.pipe, "plain", Wrapped(connection.pipe.plain, counts))
        nursery.start_soon(look)
        local.behaviour = says(response(bytes(size)))
        assert (await client.get()).body == bytes(size)
        nursery.cancel_scope.cancel()
    assert sent > size
    assert max(after - before for before, after in itertools.pairwise([*seen, sent])) < size / 4


@pytest.mark.parametrize("direction", ["up", "down"])
async def test_backpressure(proxy: Proxy, local: Upstream, direction: str) -> None:
    """What one side does not take, the other is not allowed to send: nothing piles up here."""
    local.reads_bodies = False
    sent = 0
    go_on = trio.Event()
    block = bytes(65536)

    async def behaviour(upstream: Upstream, served: Served) -> bool:
        nonlocal sent
        if direction == "up":
            await go_on.wait()
            left = 256 * 65536 - len(served.received)
            served.received = b""
            while left > 0:
                await served.more()
                left -= len(served.received)
                served.received = b""
            await ok(upstream, served)
            return True
        await served.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (256 * 65536))
        for _ in range(256):
            await served.send(block)
            sent += 1
        return True

    local.behaviour = behaviour

    async def send_body(client: Any) -> None:
        nonlocal sent
        for _ in range(256):
            await client.send(block)
            sent += 1

    async with await proxy.connect() as client, trio.open_nursery() as nursery:
        if direction == "up":
            await client.send(b"PUT / HTTP/1.1\r\nhost: b\r\ncontent-length: %d\r\n\r\n" % (256 * 65536))
            nursery.start_soon(send_body, client)
        else:
            await client.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
        before = -1
        while sent != before:
            before = sent
            # What comes to a standstill does so within this, on any machine; were it slower, the test would be weaker.
            await trio.sleep(0.3)
        # The kernel's buffers on two connections hold some megabytes.
        assert sent < 230
        go_on.set()
        answer = await client.response()
        assert answer.body == (b"local" if direction == "up" else bytes(256 * 65536))
