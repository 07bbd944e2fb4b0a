"""Discovery over WebSocket: a connection for each call (`meshlocal.wire.discovery_websocket`)."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Generic

import anyio

from meshlocal.client.link import MAX_EVENT_SIZE, Events
from meshlocal.net.websocket_client import ClosedError, RejectedError, WebSocket, WebSocketOptions, open_websocket
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.wire import discovery_websocket as wire
from meshlocal.wire.discovery_methods import WATCH_INSTANCES
from meshlocal.wire.grpc.method import Method, Req, Resp
from meshlocal.wire.grpc.status import GrpcError, StatusCode, from_http_status


class WebSocketLink:
    """A `Link` that connects anew for each call."""

    def __init__(
        self,
        url: DiscoveryUrl,
        config: DiscoveryClientConfig,
        ssl_context: ssl.SSLContext | None,
        metadata: tuple[tuple[str, str], ...],
    ) -> None:
        self._url = url
        self._config = config
        self._ssl_context = ssl_context
        self._headers = metadata

    @asynccontextmanager
    async def watch(self, method: Method[Req, Resp], request: Req) -> AsyncIterator[Events[Resp]]:
        """See `Link.watch`."""
        async with self._call(method, request) as answers:
            yield answers

    async def unary(self, method: Method[Req, Resp], request: Req) -> Resp:
        """See `Link.unary`."""
        async with self._call(method, request) as answers:
            answer = await answers.receive()
            if answer is None:
                raise GrpcError(StatusCode.INTERNAL, "the server sent no response")
            return answer

    async def probe(self) -> None:
        """See `Link.probe`: a handshake, and no request."""
        with anyio.fail_after(self._config.connect_timeout), _as_grpc_errors():
            async with self._open(WATCH_INSTANCES.path):
                pass

    def _open(self, target: str) -> AbstractAsyncContextManager[WebSocket]:
        options = WebSocketOptions(
            max_message_size=MAX_EVENT_SIZE,
            keepalive_interval=self._config.keepalive_interval,
            keepalive_timeout=self._config.keepalive_timeout,
        )
        return open_websocket(
            self._url.host,
            self._url.port,
            target,
            [wire.PROTO],
            options=options,
            ssl_context=self._ssl_context,
            headers=self._headers,
        )

    @asynccontextmanager
    async def _call(self, method: Method[Req, Resp], request: Req) -> AsyncIterator[Answers[Req, Resp]]:
        with anyio.CancelScope() as connecting:
            connecting.deadline = anyio.current_time() + self._config.connect_timeout
            with _as_grpc_errors():
                async with self._open(method.path) as websocket:
                    await websocket.send(request.SerializeToString())
                    connecting.deadline = float("inf")
                    yield Answers(websocket, method)
        if connecting.cancelled_caught:
            raise TimeoutError


@contextmanager
def _as_grpc_errors() -> Iterator[None]:
    """What a connection ends with, in gRPC's terms."""
    try:
        yield
    except ConnectionError as error:
        raise GrpcError(StatusCode.UNAVAILABLE, str(error), unprocessed=True) from error
    except RejectedError as error:
        code = from_http_status(error.status) if error.status else StatusCode.UNAVAILABLE
        told = error.reason or f"the server answered with HTTP status {error.status}"
        raise GrpcError(code, told, unprocessed=True) from error
    except ClosedError as error:
        raise wire.Close(error.code, error.reason).status() from error


class Answers(Generic[Req, Resp]):
    """The answers to one request."""

    def __init__(self, websocket: WebSocket, method: Method[Req, Resp]) -> None:
        self._websocket = websocket
        self._method = method
        self._codec = wire.ProtoCodec()

    @property
    def received(self) -> int:
        """See `Events.received`."""
        return self._websocket.received

    async def receive(self) -> Resp | None:
        """The next answer; None at the end."""
        try:
            frame = await self._websocket.receive()
            return self._codec.decode(frame, self._method.response_type)
        except ClosedError as error:
            if error.code == wire.NORMAL:
                return None
            raise wire.Close(error.code, error.reason).status() from error
        except wire.Close as error:
            await self._websocket.aclose(error.code, error.reason)
            raise error.status() from error
