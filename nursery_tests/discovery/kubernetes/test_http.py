"""One GET: bodies however framed, ends that were not announced, limits, and the way through a proxy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any

import pytest
import trio

from meshlocal.discovery.kubernetes.api import FAILURES, Api, ApiError, describe_failure
from meshlocal.discovery.kubernetes.kubeconfig import Access
from meshlocal.net import http_client
from meshlocal.net.http_client import ConnectProxy, HttpError, Origin


@asynccontextmanager
async def peer(answer: Any, *, hold: Any = False) -> AsyncIterator[Any]:
    """A server that gives each connection these bytes, in pieces if they are a list; its port, and what it was sent."""
    heads = []

    async def serve(stream: Any) -> None:
        async with stream:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                data = await stream.receive_some(1000)
                if not data:
                    return
                head += data
            heads.append(head.decode())
            for piece in answer if isinstance(answer, list) else [answer]:
                await stream.send_all(piece)
                await trio.sleep(0.001)
            if hold:
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield listeners[0].socket.getsockname()[1], heads
        nursery.cancel_scope.cancel()


async def get(answer: Any, limit: Any = 10_000, **more: Any) -> Any:
    async with (
        peer(answer) as (port, heads),
        http_client.send(Origin("127.0.0.1", port), "GET", "/a?b=c", more) as response,
    ):
        found = response.status, await response.receive_all(limit)
        assert await response.receive() == b"", "the end stays the end"
        assert heads == [
            f"GET /a?b=c HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\nAccept-Encoding: identity\r\n"
            + "".join(f"{name}: {value}\r\n" for name, value in more.items())
            + "\r\n"
        ]
        return found


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: 1\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        CHUNKED,
        [bytes([byte]) for byte in CHUNKED],
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcde",
        b"HTTP/1.1 200 OK\r\n\r\nabcde",
        b"HTTP/1.0 200 OK\r\n\r\nabcde",
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcde",
    ],
)
async def test_bodies(answer: Any) -> None:
    assert await get(answer, Accept="x") == (200, b"abcde")


async def test_no_body() -> None:
    assert await get(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") == (200, b"")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "the connection ended in the middle of an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-", "the connection ended in the middle of an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcd", "the connection ended in the middle of an answer"),
        (CHUNKED[:60], "the connection ended in the middle of an answer"),
        (CHUNKED.replace(b"0\r\nTrailer: 1\r\n\r\n", b""), "the connection ended in the middle of an answer"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no HTTP/1.1 answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "no HTTP/1.1 answer"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "no HTTP/1.1 answer"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: " + b"x" * 70_000, "head of more than 65536 bytes"),
        (b"HTTP/1.1 102 Wait\r\n\r\n" * 5000, "head of more than 65536 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n" + b"x" * 20_000, "an answer of more than 10000 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 0\r\n\r\n", "in the encoding 'gzip'"),
    ],
)
async def test_answers_that_are_none(answer: Any, message: Any) -> None:
    """A cut is never passed off as an end, and nothing is read without bound."""
    with trio.fail_after(10), pytest.raises(ExceptionGroup) as caught:
        await get(answer)
    error = caught.value
    while isinstance(error, ExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, HttpError)
    assert message in str(error)


async def test_headers_cannot_be_added_to() -> None:
    async with peer(b"") as (port, heads):
        for value, message in (("a\r\nB: c", "a control character"), ("\u20ac", "HTTP does not allow")):
            with pytest.raises(HttpError, match=message):
                async with http_client.send(Origin("127.0.0.1", port), "GET", "/", {"A": value}):
                    pass
        assert not heads


async def test_leaving_early_closes() -> None:
    """In the middle of a body, by cancellation too; the peer sees it at once."""
    async with peer(CHUNKED[:60], hold=True) as (port, _):
        async with http_client.send(Origin("127.0.0.1", port), "GET", "/", {}) as response:
            assert await response.receive() == b"abc"
            with trio.move_on_after(0.01) as scope:
                await response.receive()
                await response.receive()
            assert scope.cancelled_caught
        with trio.move_on_after(0.01) as scope:
            async with http_client.send(Origin("127.0.0.1", port), "GET", "/", {}) as response:
                await response.receive_all(1000)
        assert scope.cancelled_caught


# Through a proxy.


@asynccontextmanager
async def proxy(answer: Any = b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n") -> AsyncIterator[Any]:
    """An HTTP proxy; what it was asked."""
    asked = []

    async def pump(source: Any, sink: Any) -> None:
        while data := await source.receive_some(1000):
            await sink.send_all(data)

    async def serve(stream: Any) -> None:
        async with stream:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += await stream.receive_some(1)
            asked.append(head.decode())
            if b" 200 " not in answer:
                await stream.send_all(answer)
                return
            port = int(head.split(b" ")[1].rpartition(b":")[2])
            async with await trio.open_tcp_stream("127.0.0.1", port) as upstream, trio.open_nursery() as nursery:
                await stream.send_all(answer)
                nursery.start_soon(pump, upstream, stream)
                with suppress(trio.BrokenResourceError):
                    await pump(stream, upstream)
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        yield listeners[0].socket.getsockname()[1], asked
        nursery.cancel_scope.cancel()


async def test_a_proxy(kube: Any) -> None:
    """CONNECT, and TLS with the API server inside, whose name is what is checked."""
    async with kube.serving() as server, proxy() as (port, asked):
        found = kube.access(server, proxy=ConnectProxy("127.0.0.1", port, "Basic eA=="))
        async with kube.following(server, find=lambda: found) as (_, publications):
            assert publications.services == {}
            assert set(asked) == {
                f"CONNECT 127.0.0.1:{server.port} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
                "Proxy-Authorization: Basic eA==\r\n\r\n"
            }


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "the proxy refused: HTTP/1.1 407 Proxy Authentic"),
        (b"nonsense\r\n\r\n", "the proxy refused: nonsense"),
        (b"HTTP/1.1 200", "the proxy gave no answer to CONNECT"),
    ],
)
async def test_a_proxy_that_refuses(answer: Any, message: Any) -> None:
    async with proxy(answer.replace(b" 200", b" 20")) as (port, _):
        api = Api(lambda: access(1, proxy=ConnectProxy("127.0.0.1", port, "")), now)
        assert message in await failure(api)


def access(port: Any, **more: Any) -> Any:
    return Access(origin="test", scheme="http", host="127.0.0.1", port=port, **more)


def now() -> datetime:
    raise AssertionError("no credential is looked at that expires")


async def failure(api: Any) -> Any:
    try:
        async with api.get("/x", {}, "application/json"):
            return "none"
    except FAILURES as error:
        return describe_failure(error)


# What the API's refusals say.


@pytest.mark.parametrize(
    ("head", "body", "message", "retry_after"),
    [
        ("429 Too Many", b'{"kind":"Status","message":"later","code":429}', "429: later", 7.0),
        ("429 Too Many", b'{"message":"later","details":{"retryAfterSeconds":3}}', "429: later", 7.0),
        ("503 Away", b"<html>gone</html>", "503: <html>gone</html>", 7.0),
        ("404 Not Found", b"404 page not found\n", "404: 404 page not found", 7.0),
        ("500 Error", b"", "500: no reason given", 7.0),
        ("500 Error", b"\xff\xfe", "500: \ufffd\ufffd", 7.0),
        ("500 Error", b'{"reason":"InternalError"}', "500: InternalError", 7.0),
        ("500 Error", b"x" * 100_000, "500: no reason given", 7.0),
        ("302 Found", b"", "302: no reason given", 7.0),
    ],
)
async def test_refusals(head: Any, body: Any, message: Any, retry_after: Any) -> None:
    answer = f"HTTP/1.1 {head}\r\nRetry-After: 7\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    async with peer(answer) as (port, heads):
        with pytest.raises(ApiError) as caught:
            async with Api(lambda: access(port), now).get("/x", {"a": "b c"}, "application/json"):
                pass
        assert str(caught.value) == message
        assert caught.value.retry_after == retry_after
        assert heads[0].startswith("GET /x?a=b+c HTTP/1.1\r\n")


async def test_waits_that_a_server_may_ask_for_are_bounded() -> None:
    assert ApiError(429, "", 1e9).retry_after == 300
    assert ApiError(429, "", -5).retry_after == 0
    answer = b"HTTP/1.1 429 X\r\nRetry-After: Wed, 21 Oct 2026 07:28:00 GMT\r\nContent-Length: 0\r\n\r\n"
    async with peer(answer) as (port, _):
        with pytest.raises(ApiError) as caught:
            async with Api(lambda: access(port), now).get("/x", {}, "application/json"):
                pass
        assert caught.value.retry_after == 0


async def test_a_server_that_gives_no_head() -> None:
    async with peer([], hold=True) as (port, _):
        api = Api(lambda: access(port), now, head_timeout=0.05)
        assert await failure(api) == "no answer in time"


async def test_nobody_listens() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    problem = await failure(Api(lambda: access(port), now))
    assert problem.startswith(f"all attempts to connect to 127.0.0.1:{port} failed: ")
    assert problem.endswith(": Connection refused")
