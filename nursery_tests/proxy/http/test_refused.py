"""What is refused before an instance hears of it, with which status; and slow clients."""

from __future__ import annotations

import logging
from typing import NoReturn

import pytest
import trio
from trio.testing import MockClock

from meshlocal.client.statistics import Outcome, RequestKey
from nursery_tests.proxy.http.conftest import B, Client, Proxy, Served, Upstream, forward, stalls, until

HOST = b"host: b\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: b\r\ntransfer-encoding: chunked\r\n\r\n"

# Each of them is a way to smuggle a request past one of two parsers, or to make one of them guess.
SMUGGLING = {
    "both lengths": b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "length twice": b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\nx",
    "lengths in a list": b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 1, 1\r\n\r\nx",
    "length with a sign": b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: +1\r\n\r\nx",
    "negative length": b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: -1\r\n\r\n",
    "length in hex": b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 0x1\r\n\r\nx",
    "length with an underscore": b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 1_0\r\n\r\n0123456789",
    "huge length": b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 99999999999999999999\r\n\r\n",
    "empty length": b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length:\r\n\r\n",
    "folded line": b"GET / HTTP/1.1\r\nhost: b\r\nx: a\r\n b\r\n\r\n",
    "bare CR": b"GET / HTTP/1.1\r\nhost: b\r\nx: a\rb\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nhost: b\r\n\r\n",
    "bare LF between fields": b"GET / HTTP/1.1\r\nhost: b\nx: y\r\n\r\n",
    "space before the colon": b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length : 1\r\n\r\nx",
    "tab before the colon": b"POST / HTTP/1.1\r\nhost: b\r\ntransfer-encoding\t: chunked\r\n\r\n",
    "space before the name": b"GET / HTTP/1.1\r\n host: b\r\n\r\n",
    "no colon": b"GET / HTTP/1.1\r\nhost: b\r\nnonsense\r\n\r\n",
    "empty name": b"GET / HTTP/1.1\r\nhost: b\r\n: x\r\n\r\n",
    "NUL": b"GET / HTTP/1.1\r\nhost: b\r\nx: a\0b\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "host twice": b"GET / HTTP/1.1\r\nhost: b\r\nhost: b\r\n\r\n",
    "host with a path": b"GET / HTTP/1.1\r\nhost: b/x\r\n\r\n",
    "host with a user": b"GET / HTTP/1.1\r\nhost: u@b\r\n\r\n",
    "transfer encoding identity": b"POST / HTTP/1.1\r\nhost: b\r\ntransfer-encoding: identity\r\n\r\n",
    "transfer encoding twice": (
        b"POST / HTTP/1.1\r\nhost: b\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "transfer encoding in HTTP/1.0": b"POST / HTTP/1.0\r\nhost: b\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "vertical tab": b"POST / HTTP/1.1\r\nhost: b\r\ntransfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunk size no number": CHUNKED + b"x\r\n\r\n",
    "chunk size empty": CHUNKED + b"\r\n\r\n",
    "chunk size with a sign": CHUNKED + b"+1\r\nx\r\n0\r\n\r\n",
    "chunk size in 0x": CHUNKED + b"0x1\r\nx\r\n0\r\n\r\n",
    "chunk size huge": CHUNKED + b"FFFFFFFFFFFFFFFFF\r\n",
    "chunk size with a space": CHUNKED + b"1 \r\nx\r\n0\r\n\r\n",
    "chunk ended by LF": CHUNKED + b"1\nx\r\n0\r\n\r\n",
    "chunk longer than said": CHUNKED + b"1\r\nxy\r\n0\r\n\r\n",
    "chunk data ended by LF": CHUNKED + b"1\r\nx\n0\r\n\r\n",
    "chunk data ended by CR and more": CHUNKED + b"1\r\nx\rX0\r\n\r\n",
    "fragment": b"GET /a#b HTTP/1.1\r\nhost: b\r\n\r\n",
    "trailer folded": CHUNKED + b"0\r\nx: a\r\n b\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


async def refused(proxy: Proxy, client: Client, *, status: int) -> None:
    """It is told why, and the connection ends in good order."""
    answer = await client.response()
    assert answer.status == status
    assert answer.error
    assert answer.body.startswith(b"meshlocal: ")
    assert answer.fields["connection"] == "close"
    assert await client.rest() == b""


@pytest.mark.parametrize("kept", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("sent", SMUGGLING.values(), ids=SMUGGLING)
async def test_smuggling(proxy: Proxy, local: Upstream, sent: bytes, kept: bool) -> None:
    """400, and the end of the connection: what stands behind is not looked at."""
    async with await proxy.connect() as client:
        if kept:
            await client.get()
        heard = len(local.heads)
        await client.send(sent + b"GET /smuggled HTTP/1.1\r\nhost: b\r\n\r\n")
        await refused(proxy, client, status=400)
    await proxy.idle()
    assert not any(b"smuggled" in head for head in local.heads)
    # What is in the head is refused before any instance is tried; a body may be on its way by then.
    if not sent.startswith(CHUNKED):
        assert len(local.heads) == heard


@pytest.mark.parametrize("kept", [False, True], ids=["first", "second"])
@pytest.mark.parametrize(
    ("sent", "status", "http"),
    [
        (b"GET / HTTP/1.1\r\nhost: b\r\nx: " + b"y" * 2000 + b"\r\n\r\n", 431, {"max_head": 1000}),
        (b"GET / HTTP/1.1\r\nhost: b\r\nx: " + b"y" * 2000, 431, {"max_head": 1000}),
        (b"GET / HTTP/1.1\r\nhost: b\r\n" + b"x: y\r\n" * 10 + b"\r\n", 431, {"max_headers": 10}),
        (b"GET /" + b"y" * 200 + b" HTTP/1.1\r\nhost: b\r\n\r\n", 414, {"max_target": 100}),
        (b"GET /" + b"y" * 2000, 414, {"max_target": 100}),
        (b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 11\r\n\r\n", 413, {"max_body": 10}),
        (b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 11\r\n\r\n01234567890", 413, {"max_body": 10}),
        (b"POST / HTTP/1.1\r\nhost: b\r\nexpect: 100-continue\r\ncontent-length: 11\r\n\r\n", 413, {"max_body": 10}),
        (CHUNKED + b"b\r\n01234567890\r\n", 413, {"max_body": 10}),
        (b"POST / HTTP/1.1\r\nhost: b\r\nexpect: tea\r\ncontent-length: 1\r\n\r\n", 417, {}),
        (b"BREW / HTTP/1.1\r\nhost: b\r\n\r\n", 501, {}),
        (b"POST / HTTP/1.1\r\nhost: b\r\ntransfer-encoding: gzip, chunked\r\n\r\n", 501, {}),
        (b"GET / HTTP/1.2\r\nhost: b\r\n\r\n", 505, {}),
        (b"GET / HTTP/2.0\r\nhost: b\r\n\r\n", 505, {}),
        (b"GET /\r\n", 505, {}),
    ],
)
async def test_limits_and_what_is_not_served(
    proxy: Proxy, local: Upstream, sent: bytes, status: int, http: dict[str, int], kept: bool
) -> None:
    """Whatever else the limits are, and whether the connection had a request before."""
    async with await proxy.connect() as client:
        if kept:
            await client.get()
        proxy.configure(http=http)
        await client.send(sent)
        await refused(proxy, client, status=status)
    await proxy.idle()
    assert len(local.heads) == kept
    assert sum(proxy.forwarder.shared.refused.values()) == 1


async def test_an_answer_to_head_has_no_body(proxy: Proxy, local: Upstream) -> None:
    """Of the proxy's own as well: what came behind the head would be taken for the next response (RFC 9110, 9.3.2)."""
    async with await proxy.connect() as client:
        answer = await client.ask("HEAD", host="1.2.3.4")
        assert answer.told == (503, "unknown_host")
        assert int(answer.fields["content-length"]) > 0
        assert (await client.get()).body == b"local"


async def test_a_response_must_be_within_the_limits_too(proxy: Proxy, local: Upstream) -> None:
    proxy.configure(http={"max_head": 1000})

    async def large(upstream: Upstream, served: Served) -> None:
        await served.send(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 2000 + b"\r\n\r\n")

    local.behaviour = large
    assert (await proxy.ask()).told == (502, "broken_response")


@pytest.mark.parametrize("kept", [False, True])
async def test_a_head_that_does_not_come_in_time(proxy: Proxy, local: Upstream, kept: bool) -> None:
    """408: however busily it drips."""
    async with await proxy.connect() as client:
        if kept:
            await client.get()
        proxy.configure(http={"header_timeout": 0.05})
        await client.send(b"GET / HTTP/1.1\r\nhost: b\r\nx: y")
        answer = await client.response()
        assert answer.told == (408, "head_timeout")
        assert await client.rest() == b""


async def test_silence_before_a_first_request_and_between_requests(proxy: Proxy, local: Upstream) -> None:
    """Closed without a word, for there is nothing to answer."""
    proxy.configure(http={"header_timeout": 0.05})
    async with await proxy.connect() as client:
        assert await client.rest() == b""
    proxy.configure(http={"keep_alive_timeout": 0.05})
    async with await proxy.connect() as client:
        assert (await client.get()).body == b"local"
        assert await client.rest() == b""


@pytest.mark.parametrize("replay_buffer", [0, 65536])
async def test_a_body_that_does_not_come_in_time(
    proxy: Proxy, local: Upstream, replay_buffer: int, caplog: pytest.LogCaptureFixture
) -> None:
    """408, whether it is held or streams; counted and told of as such."""
    caplog.set_level(logging.INFO, "meshlocal.access")
    proxy.configure(http={"body_timeout": 0.05}, attempts={"replay_buffer": replay_buffer}, access_log=True)
    async with await proxy.connect() as client:
        await client.send(b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 10\r\n\r\nhello")
        answer = await client.response()
        assert answer.told == (408, "body_timeout")
        assert await client.rest() == b""
    await proxy.idle()
    await until(lambda: not local.open)
    assert proxy.pooled == 0
    assert proxy.forwarder.shared.refused == {"body_timeout": 1}
    assert {key.outcome: count for key, count in proxy.requests().items()} == {Outcome.CLIENT_LEFT: 1}
    assert [key[2] for key in proxy.forwarder.services[B].statistics.responses] == ["4xx"]
    told = [record.getMessage() for record in caplog.records if record.name == "meshlocal.access"]
    assert len(told) == 1
    assert "status=408" in told[0]
    assert "error=body_timeout" in told[0]


async def test_a_body_that_stops_amid_its_response(clock: MockClock, proxy: Proxy, local: Upstream) -> None:
    """Reset: a 408 would be taken for a part of the response."""
    proxy.configure(http={"body_timeout": 5.0}, attempts={"replay_buffer": 0})
    local.reads_bodies = False

    async def answers_early(upstream: Upstream, served: Served) -> bool:
        await served.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhello")
        return await stalls(upstream, served)

    local.behaviour = answers_early
    async with await proxy.connect() as client:
        await client.send(b"PUT / HTTP/1.1\r\nhost: b\r\ncontent-length: 500\r\n\r\nfirst")
        await client.until(b"hello")
        await client.send(b"second")
        await until(lambda: local.open[0].received.endswith(b"second"))
        await forward(clock, 10.0)
        assert await client.is_reset()
    await proxy.idle()
    assert proxy.requests() == {RequestKey("node", "", Outcome.CUT): 1}
    assert not proxy.forwarder.shared.refused


@pytest.mark.parametrize("replay_buffer", [0, 65536])
async def test_a_body_that_ends_early(proxy: Proxy, local: Upstream, replay_buffer: int) -> None:
    """400: no instance may take it for a whole one."""
    proxy.configure(attempts={"replay_buffer": replay_buffer})
    async with await proxy.connect() as client:
        await client.send(b"POST / HTTP/1.1\r\nhost: b\r\ncontent-length: 10\r\n\r\nhello")
        await client.send_eof()
        assert (await client.response()).told == (400, "body_incomplete")
        assert await client.rest() == b""
    await proxy.idle()
    await until(lambda: not local.open)
    assert not local.heads
    assert [key.outcome for key in proxy.requests()] == [Outcome.REFUSED]


async def test_a_head_that_ends_early(proxy: Proxy, local: Upstream) -> None:
    async with await proxy.connect() as client:
        await client.send(b"GET / HTTP/1.1\r\nhost")
        await client.send_eof()
        assert await client.rest() == b""


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("slow", [False, True])
async def test_a_response_that_stands_still(proxy: Proxy, local: Upstream, method: str, slow: bool) -> None:
    """The idle limit ends it with a reset; the time that its head took does not matter."""

    async def stops(upstream: Upstream, served: Served) -> bool:
        if slow:
            # Slower than what is looked at without a clock.
            await until(lambda: not proxy.forwarder.shared.patience.waiting)
        await served.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhello")
        await served.more()
        return False

    proxy.configure(attempts={"idle_timeout": 0.1})
    async with await proxy.connect() as client:
        await client.get()
        local.behaviour = stops
        await client.send(f"{method} / HTTP/1.1\r\nhost: b\r\n\r\n".encode())
        await client.until(b"hello")
        assert await client.is_reset()
    await proxy.idle()
    await until(lambda: not local.open)
    assert proxy.requests(B)[RequestKey("node", "", Outcome.CUT)] == 1


async def test_a_client_that_does_not_read(proxy: Proxy, local: Upstream) -> None:
    """The idle limit ends that, too."""

    async def endless(upstream: Upstream, served: Served) -> NoReturn:
        await served.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")
        while True:
            await served.send(bytes(65536))

    proxy.configure(attempts={"idle_timeout": 0.1})
    local.behaviour = endless
    async with await proxy.connect() as client:
        await client.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
        await proxy.idle()
        # Reset: what it has got must not look whole.
        with pytest.raises(trio.BrokenResourceError):
            await client.rest()
    await until(lambda: not local.open)
    assert proxy.requests() == {RequestKey("node", "", Outcome.CUT): 1}
    assert proxy.pooled == 0
