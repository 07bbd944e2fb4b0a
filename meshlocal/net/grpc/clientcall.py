"""One call as its caller sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Generic

import anyio
import anyio.lowlevel

from meshlocal.net.grpc.options import GrpcOptions
from meshlocal.net.grpc.stream import Stream
from meshlocal.wire.grpc.framing import MessageDecoder, check_encoding, encode_message
from meshlocal.wire.grpc.metadata import decode_grpc_message, decode_metadata, header, is_grpc
from meshlocal.wire.grpc.method import CallMethod, Got, Sent
from meshlocal.wire.grpc.status import GrpcError, Metadata, StatusCode, from_http_status, parse_status
from meshlocal.wire.http2 import Headers, header_list_size

COMPRESS_FROM = 1024


class ClientCall(Generic[Sent, Got]):
    """A call under way, inside `Channel.call`. One task may send while another receives."""

    def __init__(self, stream: Stream, method: CallMethod[Sent, Got], options: GrpcOptions) -> None:
        self.method = method
        self.initial_metadata: Metadata | None = None
        """The server's metadata, once the first response or the status came."""
        self.trailing_metadata: Metadata | None = None
        """The metadata that came with the status, once `receive` saw the end."""
        self._stream = stream
        self._options = options
        self._decoder: MessageDecoder | None = None
        self._finished = False

    @property
    def received(self) -> int:
        """Bytes of responses that came so far, of one that is not whole yet too."""
        return self._stream.received

    @property
    def answered(self) -> bool:
        """Whether the server's first headers came: it is alive, and has the call."""
        return self._stream.headers is not None

    async def send(self, request: Sent, *, end: bool = False) -> None:
        """Send one request, waiting while the server's windows are full. `end`: no other follows.

        Raises:
            GrpcError: the call failed.
            anyio.BrokenResourceError: the server ended the call with OK before.
            anyio.ClosedResourceError: after `end`.
        """
        payload = self.method.serialize(request)
        data = encode_message(payload, compress=self._options.gzip and len(payload) >= COMPRESS_FROM)
        await self._send(data, end=end)

    async def end(self) -> None:
        """Half-close: no request follows. No error if the server ended the call before."""
        if not self._stream.local_ended:
            try:
                await self._send(b"", end=True)
            except anyio.BrokenResourceError:
                return

    async def _send(self, data: bytes, *, end: bool) -> None:
        try:
            await self._stream.send_data(data, end_stream=end)
        except anyio.BrokenResourceError:
            self._check_headers(self._stream.headers or ())
            code, message = self._status()
            if code is not StatusCode.OK:
                raise GrpcError(code, message, self._trailing()) from None
            raise

    async def wait_initial_metadata(self) -> Metadata:
        """Wait for the server's first headers. Raises GrpcError if the call failed before."""
        while self._stream.headers is None:
            if self._stream.failure is not None:
                raise self._stream.failure
            await self._stream.wait_changed()
        if self.initial_metadata is None:
            headers = self._stream.headers
            self._check_headers(headers)
            trailers_only = self._stream.trailers is None and header(headers, b"grpc-status") is not None
            self.initial_metadata = () if trailers_only else decode_metadata(headers)
        return self.initial_metadata

    async def receive(self) -> Got | None:
        """The next response; None after the last, when the server's status was OK.

        Raises:
            GrpcError: the server's status, or why there is none.
        """
        await anyio.lowlevel.checkpoint()
        if self._finished:
            return None
        stream = self._stream
        await self.wait_initial_metadata()
        assert stream.headers is not None
        if self._decoder is None:
            gzip = check_encoding(header(stream.headers, b"grpc-encoding"))
            self._decoder = MessageDecoder(self._options.max_message_size, gzip=gzip)
        while True:
            payload = self._decoder.next_message()
            if payload is not None:
                return self.method.parse(payload)
            if data := stream.take():
                self._decoder.feed(data)
            elif stream.peer_ended:
                self._finish(self._decoder)
                return None
            elif stream.failure is not None:
                raise stream.failure
            else:
                await stream.wait_changed()

    def __aiter__(self) -> AsyncIterator[Got]:
        return self

    async def __anext__(self) -> Got:
        response = await self.receive()
        if response is None:
            raise StopAsyncIteration
        return response

    def _check_headers(self, headers: Headers) -> None:
        """Raises GrpcError where the answer is not gRPC's."""
        if header_list_size(headers) > self._options.max_header_list_size:
            raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, "the server's metadata exceeds the limit")
        if header(headers, b"grpc-status") is not None:
            return
        http_status = header(headers, b":status")
        if http_status != b"200":
            text = (http_status or b"none").decode("ascii", "replace")
            code = from_http_status(int(text)) if text.isdecimal() else StatusCode.UNKNOWN
            raise GrpcError(code, f"HTTP status {text}")
        content_type = header(headers, b"content-type")
        if content_type is None or not is_grpc(content_type):
            raise GrpcError(StatusCode.UNKNOWN, f"content-type {content_type!r} is not gRPC's")

    def _end_headers(self) -> Headers:
        return self._stream.trailers or self._stream.headers or ()

    def _status(self) -> tuple[StatusCode, str]:
        headers = self._end_headers()
        status = header(headers, b"grpc-status")
        if status is None:
            return StatusCode.UNKNOWN, "the server sent no grpc-status"
        return parse_status(status), decode_grpc_message(header(headers, b"grpc-message") or b"")

    def _trailing(self) -> Metadata:
        if header_list_size(self._end_headers()) > self._options.max_header_list_size:
            raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, "the server's metadata exceeds the limit")
        return decode_metadata(self._end_headers())

    def _finish(self, decoder: MessageDecoder) -> None:
        self.trailing_metadata = self._trailing()
        code, message = self._status()
        if code is not StatusCode.OK:
            raise GrpcError(code, message, self.trailing_metadata)
        decoder.finish()
        self._finished = True
