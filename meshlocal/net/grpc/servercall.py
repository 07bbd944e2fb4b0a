"""One call as its handler sees it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Generic

import anyio
import anyio.lowlevel
from google.protobuf.message import DecodeError

from meshlocal.net.grpc.stream import Stream
from meshlocal.net.log import get_log
from meshlocal.wire.grpc.framing import ACCEPT_ENCODING, MessageDecoder, check_encoding, split_message
from meshlocal.wire.grpc.metadata import decode_metadata, encode_grpc_message, encode_metadata, header, parse_timeout
from meshlocal.wire.grpc.method import Method, Req, Resp
from meshlocal.wire.grpc.status import GrpcError, Metadata, StatusCode
from meshlocal.wire.http2 import ErrorCode, Headers, header_list_size

log = get_log(__name__)

COMPRESS_FROM = 1024
MAX_STATUS_MESSAGE = 1024


class ServerCall(Generic[Req, Resp]):
    """A call under way. Valid until its handler returns. One task may send while another receives."""

    def __init__(
        self,
        stream: Stream,
        headers: Headers,
        peer: str,
        draining: anyio.Event,
        certificate: Mapping[str, object] | None = None,
    ) -> None:
        self.peer = peer
        """The client's address."""
        self.certificate: Mapping[str, object] = certificate or {}
        """The client's, as `ssl.SSLObject.getpeercert` gives it; empty if it showed none that was checked."""
        self.caller: Any = None
        """What a guard before the handler found out of who calls; None: nothing."""
        self.metadata: Metadata = ()
        """What the client sent along."""
        self.deadline = math.inf
        """When the client stops waiting, on anyio's (trio's) clock. The handler is cancelled then."""
        self.draining = draining
        """Set when the server drains: calls that would last should end."""
        self.trailing_metadata: list[tuple[str, str | bytes]] = []
        """Sent with the status."""
        self._stream = stream
        self._headers = headers
        self._options = stream.connection.options
        self._decoder = MessageDecoder(self._options.max_message_size)
        self._request_type: type[Any] | None = None
        self._headers_sent = False
        self._held = 0
        accepted = header(headers, b"grpc-accept-encoding") or b""
        self._gzip = self._options.gzip and b"gzip" in [name.strip() for name in accepted.split(b",")]

    async def receive(self) -> Req | None:
        """The next request; None when the client sent its last.

        Raises:
            GrpcError: the request is malformed or too large. Left alone, it becomes the call's status.
        """
        await anyio.lowlevel.checkpoint_if_cancelled()
        assert self._request_type is not None
        stream = self._stream
        while True:
            payload = self._decoder.next_message()
            if payload is not None:
                self._hold(0)
                break
            if data := stream.take():
                self._decoder.feed(data)
                self._hold(len(self._decoder))
            elif stream.peer_ended:
                self._decoder.finish()
                return None
            elif stream.failure is not None:
                raise stream.failure
            else:
                await stream.wait_changed()
        await anyio.lowlevel.cancel_shielded_checkpoint()
        try:
            request: Req = self._request_type.FromString(payload)
        except DecodeError as error:
            name = self._request_type.DESCRIPTOR.full_name
            raise GrpcError(StatusCode.INTERNAL, f"request is no {name}: {error}") from error
        return request

    def _hold(self, size: int) -> None:
        """Note how many bytes of a request that is not whole are held for the client.

        Raises:
            GrpcError: that is more than there may be of all its calls.
        """
        holding = self._options.holding
        if holding is not None and size != self._held:
            holding.change(self.peer, size - self._held)
            self._held = size

    async def receive_end(self) -> None:
        """Wait for the end of the client's stream, behind the one request of a call that takes no more.

        Raises:
            GrpcError: there is more. Nothing of it is kept.
        """
        await anyio.lowlevel.checkpoint_if_cancelled()
        stream = self._stream
        while not (len(self._decoder) or stream.take()):
            if stream.peer_ended:
                await anyio.lowlevel.cancel_shielded_checkpoint()
                return
            if stream.failure is not None:
                raise stream.failure
            await stream.wait_changed()
        raise GrpcError(StatusCode.INTERNAL, "the client sent more than one request")

    def __aiter__(self) -> AsyncIterator[Req]:
        return self

    async def __anext__(self) -> Req:
        request = await self.receive()
        if request is None:
            raise StopAsyncIteration
        return request

    def send_initial_metadata(self, metadata: Iterable[tuple[str, str | bytes]] = ()) -> None:
        """Send the response's headers now, before the first response. Does not wait.

        Raises:
            RuntimeError: they were sent already.
            ValueError: `metadata` may not be sent.
        """
        if self._headers_sent:
            raise RuntimeError("the response's headers were sent already")
        fields = [(b":status", b"200"), *_RESPONSE, *encode_metadata(metadata)]
        if self._gzip:
            fields.append((b"grpc-encoding", b"gzip"))
        self._stream.respond(fields)
        self._headers_sent = True

    async def send(self, response: Resp) -> None:
        """Send one response, waiting while the client's windows are full.

        Raises:
            GrpcError: the call is gone. The handler is being cancelled.
        """
        await self.send_encoded(response.SerializeToString())

    async def send_encoded(self, payload: bytes) -> None:
        """Send one response that was serialized before: a fan-out serializes once."""
        await self._send(payload, checkpoint=True)

    def try_send_encoded(self, payload: bytes) -> bool:
        """Send one serialized response if that needs no waiting; False: nothing was sent; `send_encoded` says why."""
        return self._headers_sent and self._try_send(payload)

    def _try_send(self, payload: bytes) -> bool:
        prefix, rest = self._encode(payload)
        return self._stream.try_send_data(rest, prefix)

    async def send_last(self, response: Resp) -> None:
        """Send the last response: what follows is the status, which goes in the same write."""
        await self._send(response.SerializeToString(), checkpoint=False)

    async def _send(self, payload: bytes, *, checkpoint: bool) -> None:
        if not self._headers_sent:
            self.send_initial_metadata()
        prefix, rest = self._encode(payload)
        await self._stream.send_data(rest, prefix, checkpoint=checkpoint)

    def _encode(self, payload: bytes) -> tuple[bytes, bytes]:
        return split_message(payload, compress=self._gzip and len(payload) >= COMPRESS_FROM)

    # What the server calls.

    async def run(self, method: Method[Req, Resp], handler: Callable[[ServerCall[Req, Resp]], Awaitable[None]]) -> None:
        """Run the handler under the call's deadline and end the call with a status."""
        try:
            await self._run(method, handler)
        finally:
            self._hold(0)

    async def _run(
        self, method: Method[Req, Resp], handler: Callable[[ServerCall[Req, Resp]], Awaitable[None]]
    ) -> None:
        self._request_type = method.request_type
        try:
            timeout = header(self._headers, b"grpc-timeout")
            if timeout is not None:
                self.deadline = anyio.current_time() + parse_timeout(timeout)
            self.metadata = decode_metadata(self._headers)
            gzip = check_encoding(header(self._headers, b"grpc-encoding"))
            self._decoder = MessageDecoder(self._options.max_message_size, gzip=gzip)
            with anyio.CancelScope(deadline=self.deadline) as scope:
                self._stream.on_failure = scope.cancel
                if self._stream.failure is not None:
                    return
                await handler(self)
            if not scope.cancelled_caught:
                self.finish(StatusCode.OK)
            elif self._stream.failure is None:
                self.finish(StatusCode.DEADLINE_EXCEEDED, "the call's deadline passed")
        except GrpcError as error:
            if self._stream.failure is None:
                self.finish(error.code, error.message, error.trailing)
        except Exception as error:
            if (status := _status_in(error)) is not None:
                self.finish(status.code, status.message, status.trailing)
                return
            # Its text may hold what the client must not see: that goes to the log alone.
            log.exception("grpc handler failed", method=method.path, peer=self.peer)
            self.finish(StatusCode.UNKNOWN, "the handler failed")
        except BaseExceptionGroup as error:
            # The connection was cancelled while the handler's nursery failed: the cancellation alone goes on.
            failed, cancelled = error.split(Exception)
            if failed is not None and _status_in(failed) is None:
                log.exception("grpc handler failed", method=method.path, peer=self.peer)
            assert cancelled is not None
            raise cancelled from None

    async def fail(self, code: StatusCode, message: str) -> None:
        """End the call without a handler."""
        await anyio.lowlevel.checkpoint()
        self.finish(code, message)

    def finish(self, code: StatusCode, message: str = "", trailing: Metadata = ()) -> None:
        """Send the status; a reset where half a message was sent, or where an error would wait for the client's window.

        The engine sends trailers as the end of the data, which takes a window that is not shut.
        """
        stream = self._stream
        if stream.failure is not None or stream.local_ended:
            return
        shut = self._headers_sent and code is not StatusCode.OK and not stream.connection.protocol.sendable(stream.id)
        if stream.partial or shut:
            stream.close(_RESETS.get(code, ErrorCode.INTERNAL_ERROR))
            return
        fields: list[tuple[bytes, bytes]] = []
        if not self._headers_sent:
            fields += [(b":status", b"200"), *_RESPONSE]
        fields.append((b"grpc-status", b"%d" % code))
        if message:
            fields.append((b"grpc-message", encode_grpc_message(message[:MAX_STATUS_MESSAGE])))
        try:
            custom = encode_metadata([*self.trailing_metadata, *trailing])
        except ValueError:
            log.exception("grpc trailing metadata cannot be sent", peer=self.peer)
            custom = []
        limit = stream.connection.protocol.peer_max_header_list_size
        if limit is not None and header_list_size([*fields, *custom]) > limit:
            log.warning("grpc trailing metadata exceeds the client's limit", peer=self.peer, limit=limit)
            custom = []
        if self._headers_sent:
            stream.send_trailers([*fields, *custom])
        else:
            stream.respond([*fields, *custom], end_stream=True)


def _status_in(error: Exception) -> GrpcError | None:
    """The first GrpcError of a group that holds nothing else: a handler's task group wraps what its tasks raise."""
    if not isinstance(error, ExceptionGroup) or error.split(GrpcError)[1] is not None:
        return None
    first: Exception = error
    while isinstance(first, ExceptionGroup):
        first = first.exceptions[0]
    return first if isinstance(first, GrpcError) else None


_RESETS = {
    StatusCode.DEADLINE_EXCEEDED: ErrorCode.CANCEL,
    StatusCode.RESOURCE_EXHAUSTED: ErrorCode.ENHANCE_YOUR_CALM,
}
"""What stands for a status that cannot be sent any more."""

_RESPONSE = ((b"content-type", b"application/grpc"), (b"grpc-accept-encoding", ACCEPT_ENCODING))
