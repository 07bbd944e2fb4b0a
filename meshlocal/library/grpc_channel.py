"""A service over gRPC, in the shape that stubs made by grpcio's compiler call (rules A1 to A4, C1, C3).

GreeterStub(mesh.grpc_channel("b")).SayHello(request)      one request, one response: to be awaited
stub.Total(requests)                                       an iterable of requests, one response: to be awaited
async with stub.Count(request) as call: async for ...      one request, responses
async with stub.Chat() as call: await call.send(...)       both as they come
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Iterable
from typing import Any, Generic

import anyio

from meshlocal.library.core import MeshCore
from meshlocal.library.errors import CallError
from meshlocal.library.grpc_call import MeshCall
from meshlocal.library.grpc_channels import InstanceChannels
from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.policy.config_http import HttpConfig
from meshlocal.policy.model import ServiceKey
from meshlocal.policy.retry import RetryBudget
from meshlocal.wire.grpc.method import CodedMethod, Got, Sent
from meshlocal.wire.grpc.status import StatusCode

MetadataInput = Iterable[tuple[str, str | bytes]]


def open_grpc_channel(core: MeshCore, key: ServiceKey, *, max_message_size: int, gzip: bool) -> GrpcChannel:
    """See `Mesh.grpc_channel`."""
    # gRPC servers end a connection that pings often while nothing is under way; a call has its deadline.
    options = GrpcOptions(max_message_size=max_message_size, gzip=gzip, keepalive_interval=None)
    # All channels of a mesh with the same options share connections.
    channels = core.connections.get(options)
    if not isinstance(channels, InstanceChannels):
        channels = core.connections[options] = InstanceChannels(core, options)
    return GrpcChannel(core, channels, key)


class GrpcChannel:
    """A service over gRPC. Made by `Mesh.grpc_channel`.

    Its methods are what grpcio's generated stubs call. What they take beside path, serializer and deserializer is of
    no use here, and ignored.

    Args:
        core: of the mesh.
        channels: connections to instances.
        key: the service.
    """

    def __init__(self, core: MeshCore, channels: InstanceChannels, key: ServiceKey) -> None:
        self._core = core
        self._channels = channels
        self._key = key
        config = HttpConfig()
        self._budget = RetryBudget(config.retry_percent / 100, config.retry_floor)

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Sent], bytes] | None = None,
        response_deserializer: Callable[[bytes], Got] | None = None,
        **kwargs: Any,
    ) -> UnaryUnary[Sent, Got]:
        """A method with one request and one response; without serializers both are bytes."""
        return UnaryUnary(self, _coded(method, request_serializer, response_deserializer))

    def unary_stream(
        self,
        method: str,
        request_serializer: Callable[[Sent], bytes] | None = None,
        response_deserializer: Callable[[bytes], Got] | None = None,
        **kwargs: Any,
    ) -> UnaryStream[Sent, Got]:
        """A method with one request and any number of responses; without serializers both are bytes."""
        return UnaryStream(self, _coded(method, request_serializer, response_deserializer))

    def stream_unary(
        self,
        method: str,
        request_serializer: Callable[[Sent], bytes] | None = None,
        response_deserializer: Callable[[bytes], Got] | None = None,
        **kwargs: Any,
    ) -> StreamUnary[Sent, Got]:
        """A method with any number of requests and one response; without serializers both are bytes."""
        return StreamUnary(self, _coded(method, request_serializer, response_deserializer))

    def stream_stream(
        self,
        method: str,
        request_serializer: Callable[[Sent], bytes] | None = None,
        response_deserializer: Callable[[bytes], Got] | None = None,
        **kwargs: Any,
    ) -> StreamStream[Sent, Got]:
        """A method with any number of requests and of responses; without serializers both are bytes."""
        return StreamStream(self, _coded(method, request_serializer, response_deserializer))

    def call(self, method: CodedMethod[Sent, Got], metadata: MetadataInput = ()) -> MeshCall[Sent, Got]:
        """A call, which begins with its block."""
        return MeshCall(self._core, self._channels, self._key, self._budget, method, metadata)

    async def only_response(self, call: MeshCall[Sent, Got]) -> Got:
        """The one response of a call.

        Raises:
            CallError: the status; INTERNAL, if there was none, or another.
        """
        response = await call.receive()
        if response is None:
            raise CallError(StatusCode.INTERNAL, "the instance sent no response", self._key)
        if await call.receive() is not None:
            raise CallError(StatusCode.INTERNAL, "the instance sent more than one response", self._key)
        return response


class _Callable(Generic[Sent, Got]):
    def __init__(self, channel: GrpcChannel, method: CodedMethod[Sent, Got]) -> None:
        self._channel = channel
        self._method = method


class UnaryUnary(_Callable[Sent, Got]):
    """A method with one request and one response."""

    async def __call__(self, request: Sent, *, metadata: MetadataInput = ()) -> Got:
        """Send the request, and return the response. The deadline of the enclosing cancel scope goes along.

        Raises:
            CallError: another status than OK, with the instances that were tried.
        """
        async with self._channel.call(self._method, metadata) as call:
            await _send_last(call, request)
            return await self._channel.only_response(call)


class StreamUnary(_Callable[Sent, Got]):
    """A method with any number of requests and one response."""

    async def __call__(self, requests: Iterable[Sent] | AsyncIterable[Sent], *, metadata: MetadataInput = ()) -> Got:
        """Send the requests, and return the response. The deadline of the enclosing cancel scope goes along.

        Raises:
            CallError: another status than OK, with the instances that were tried.
        """
        async with self._channel.call(self._method, metadata) as call:
            try:
                if isinstance(requests, AsyncIterable):
                    async for request in requests:
                        await call.send(request)
                else:
                    for request in requests:
                        await call.send(request)
                await call.end()
            except anyio.BrokenResourceError:
                pass  # it answered without waiting for the rest
            return await self._channel.only_response(call)


class UnaryStream(_Callable[Sent, Got]):
    """A method with one request and any number of responses."""

    def __call__(self, request: Sent, *, metadata: MetadataInput = ()) -> Responses[Sent, Got]:
        """The responses, for an `async with` block, in which `async for` gives them."""
        return Responses(self._channel.call(self._method, metadata), request)


class StreamStream(_Callable[Sent, Got]):
    """A method with any number of requests and of responses."""

    def __call__(self, *, metadata: MetadataInput = ()) -> MeshCall[Sent, Got]:
        """The call, for an `async with` block: `send` and `end`, and `async for` or `receive`."""
        return self._channel.call(self._method, metadata)


class Responses(Generic[Sent, Got]):
    """A call whose one request is sent as its block begins.

    Args:
        call: not begun yet.
        request: to send.
    """

    def __init__(self, call: MeshCall[Sent, Got], request: Sent) -> None:
        self._call = call
        self._request = request

    async def __aenter__(self) -> MeshCall[Sent, Got]:
        await self._call.__aenter__()
        try:
            await _send_last(self._call, self._request)
        except BaseException as error:
            await self._call.__aexit__(type(error), error, error.__traceback__)
            raise
        return self._call

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        await self._call.__aexit__(kind, error, traceback)


async def _send_last(call: MeshCall[Sent, Got], request: Sent) -> None:
    try:
        await call.send(request, end=True)
    except anyio.BrokenResourceError:
        return  # it answered without waiting for the request


def _coded(
    method: str, serializer: Callable[[Sent], bytes] | None, deserializer: Callable[[bytes], Got] | None
) -> CodedMethod[Sent, Got]:
    return CodedMethod(method, serializer or _same, deserializer or _same)


def _same(data: Any) -> Any:
    return data
