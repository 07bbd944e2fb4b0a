"""CONNECT in HTTP/2: a stream that becomes a stream of bytes both ways (RFC 9113, 8.5)."""

from __future__ import annotations

import trio

from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import Outcome
from meshlocal.net.pipe import Pipe, finish_writing
from meshlocal.proxy.http.ends import ClientLeftError
from meshlocal.proxy.http.h2.body import Http2Body
from meshlocal.proxy.http.h2.client import H2Client
from meshlocal.proxy.http.link import CHUNK
from meshlocal.proxy.http.request import HttpRequest
from meshlocal.wire.http2 import ErrorCode


async def run_stream_tunnel(client: H2Client, request: HttpRequest, state: ServiceState, pipe: Pipe) -> bool:
    """Say that it is open, then move bytes until both sides ended; tells whether that was in good order.

    The pipe stays the caller's. The request's outcome is set.

    Args:
        client: the client's end.
        request: the CONNECT.
        state: its service.
        pipe: the connection to the instance.

    Raises:
        ClientLeftError: the client reset its stream.
    """
    body = request.body
    assert isinstance(body, Http2Body)
    client.begin([(b":status", b"200"), *request.explanation_fields()], end=False)
    client.await_transfer()
    state.statistics.open += 1
    failed = ""

    async def give(nursery: trio.Nursery) -> None:
        nonlocal failed
        try:
            while not body.finished:
                piece = memoryview(await client.next_piece(body))
                client.await_transfer()
                while piece:
                    piece = piece[pipe.write(piece) :]
                    if piece:
                        await pipe.wait_writable()
            await finish_writing(pipe)
        except OSError as error:
            failed = f"upstream {error.strerror}"
            nursery.cancel_scope.cancel()

    async def take(nursery: trio.Nursery) -> None:
        nonlocal failed
        try:
            while True:
                await pipe.wait_readable()
                data = pipe.read(CHUNK)
                if data is None:
                    continue
                client.await_transfer()
                if not data:
                    # Before the client can have all of it.
                    request.outcome = Outcome.SERVED
                    client.pass_on(b"", end=True)
                    return
                request.received += len(data)
                await client.send(data)
                client.await_transfer()
        except OSError as error:
            failed = f"upstream {error.strerror}"
            nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(give, nursery)
            nursery.start_soon(take, nursery)
    except* ClientLeftError:
        raise ClientLeftError from None
    finally:
        state.statistics.open -= 1
    if failed:
        request.error = failed
        request.outcome = Outcome.CUT
        client.cut(ErrorCode.CONNECT_ERROR)
        return False
    request.outcome = Outcome.SERVED
    return True
