"""gRPC for the campaign, over an engine that is not the proxy's: an instance's end of a connection, and a client's.

Each message is an ID; the answer is a name, the ID, and a filling.
"""

from __future__ import annotations

import math
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import trio
from h2.errors import ErrorCodes
from h2.events import DataReceived, Event, RequestReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived

from nursery_tests.h2_peer import H2Peer, H2PeerError, Headers

UNARY = "/campaign.Instance/Call"
"""A call of one message, which may be made once only."""

STREAM = "/campaign.Instance/Stream"
"""A call of as many messages as come, each of which is answered."""

STREAMS = 100
HEADER_LIST = 16_384
STATUS = {"4": "deadline", "8": "exhausted", "12": "unimplemented", "14": "unavailable"}
"""Statuses that a call may end with (gRPC's statuscodes.md), in a word."""

_PREFIX = struct.Struct(">?I")


def message(text: bytes) -> bytes:
    """As it is sent (gRPC over HTTP/2, Length-Prefixed-Message)."""
    return _PREFIX.pack(False, len(text)) + text


def take(buffer: bytearray) -> bytes | None:
    """The first message, which then is gone; None if it is not whole."""
    if len(buffer) < _PREFIX.size:
        return None
    _, size = _PREFIX.unpack_from(buffer)
    end = _PREFIX.size + size
    if len(buffer) < end:
        return None
    text = bytes(buffer[_PREFIX.size : end])
    del buffer[:end]
    return text


Send = Callable[[bytes], Awaitable[None]]
Answer = Callable[[str, bytes, Send], Awaitable[bool]]
"""Path, ID and what sends a part of the answer. False: the connection is gone."""


class GrpcInstance:
    """An instance's end of one connection.

    Args:
        receive: what comes next; empty at the end.
        send: sends all of it.
        answer: answers a message.
    """

    def __init__(self, receive: Callable[[], Awaitable[bytes]], send: Send, answer: Answer) -> None:
        self._receive = receive
        self._send = send
        self._answer = answer
        self._peer = H2Peer(client=False, max_streams=STREAMS, max_header_list_size=HEADER_LIST)
        self._calls: dict[int, tuple[trio.MemorySendChannel[bytes], bytearray]] = {}
        self._lock = trio.Lock()

    async def run(self, nursery: trio.Nursery) -> None:
        """Until the proxy ends it."""
        await self._flush()
        while data := await self._receive():
            try:
                events = self._peer.receive(data)
            except H2PeerError:
                await self._flush()
                raise
            for event in events:
                if isinstance(event, Event):
                    self._take(event, nursery)
            await self._flush()

    def _take(self, event: Event, nursery: trio.Nursery) -> None:
        if isinstance(event, RequestReceived):
            path = dict(event.headers)[b":path"].decode()
            send, receive = trio.open_memory_channel[bytes](math.inf)
            self._calls[event.stream_id] = send, bytearray()
            nursery.start_soon(self._serve, event.stream_id, path, receive)
        elif isinstance(event, DataReceived):
            self._peer.acknowledge(event.stream_id, event.flow_controlled_length)
            if event.stream_id in self._calls:
                send, buffer = self._calls[event.stream_id]
                buffer += event.data
                while (text := take(buffer)) is not None:
                    send.send_nowait(text)
        elif isinstance(event, StreamEnded | StreamReset) and event.stream_id in self._calls:
            self._calls.pop(event.stream_id)[0].close()

    async def _serve(self, stream_id: int, path: str, messages: AsyncIterator[bytes]) -> None:
        began = False

        async def send(data: bytes) -> None:
            nonlocal began
            try:
                if not began:
                    began = True
                    self._peer.send_headers(stream_id, [(b":status", b"200"), (b"content-type", b"application/grpc")])
                self._peer.send_data(stream_id, data)
            except H2PeerError:
                return  # the call was reset meanwhile
            await self._flush()

        async for text in messages:
            if not await self._answer(path, text, send):
                return
        try:
            self._peer.send_headers(stream_id, [(b"grpc-status", b"0")], end_stream=True)
        except H2PeerError:
            return  # likewise
        await self._flush()

    async def _flush(self) -> None:
        async with self._lock:
            while self._peer.outgoing:
                data = bytes(self._peer.outgoing)
                self._peer.outgoing.clear()
                await self._send(data)


def call_headers(authority: str, path: str) -> Headers:
    """How a call begins."""
    named = {":method": "POST", ":scheme": "http", ":path": path, ":authority": authority}
    named |= {"te": "trailers", "content-type": "application/grpc"}
    return [(name.encode(), value.encode()) for name, value in named.items()]


class CallError(Exception):
    """A call failed; the text says how, in a word."""


class GrpcClient:
    """A client's end of one connection, on which calls follow each other; or one call, whose messages do.

    Args:
        stream: the connection.
        authority: the service.
        keep: one call for all messages.

    Attributes:
        closing: the proxy wants no further call here.
        unprocessed: the last call failed because the proxy did not take it: it may be made again (RFC 9113, 6.8).
    """

    def __init__(self, stream: trio.SocketStream, authority: str, *, keep: bool) -> None:
        self._stream = stream
        self._authority = authority
        self._keep = keep
        self._peer = H2Peer(client=True, max_streams=STREAMS, max_header_list_size=HEADER_LIST)
        self._id = 0
        self._received = bytearray()
        self.closing = False
        self.unprocessed = False

    async def ask(self, id: str) -> str:
        """What answers an ID.

        Raises:
            CallError: there was no answer, not all of it, or another status than OK.
        """
        try:
            if not self._id:
                self._open()
            self._peer.send_data(self._id, message(id.encode()), end_stream=not self._keep)
            answer = await self._answered()
        except H2PeerError as error:
            raise CallError(f"broken: {error}") from None
        except trio.BrokenResourceError:
            raise CallError("cut" if self._received else "reset") from None
        return answer.decode().partition("\n")[0]

    def _open(self) -> None:
        self._id = self._peer.next_stream_id()
        self._received.clear()
        self._peer.send_headers(self._id, call_headers(self._authority, STREAM if self._keep else UNARY))

    async def _answered(self) -> bytes:
        """The next message; of a call that has but one, once it has ended."""
        answer = None
        while True:
            if self._keep and (answer := take(self._received)) is not None:
                return answer
            if self._peer.outgoing:
                data = bytes(self._peer.outgoing)
                self._peer.outgoing.clear()
                await self._stream.send_all(data)
            received = await self._stream.receive_some(65536)
            if not received:
                raise CallError("cut" if self._received else "ended")
            for event in self._peer.receive(received):
                if not isinstance(event, Event):
                    # What lasts goes on for as long as it is let.
                    self.closing = not self._keep
                    if event.last_stream_id < self._id:
                        self.unprocessed = True
                        raise CallError("ended")
                elif getattr(event, "stream_id", None) == self._id and self._take(event):
                    self._id = 0
                    answer = take(self._received)
                    if answer is None or self._received:
                        raise CallError("wrong")
                    return answer

    def _take(self, event: Event) -> bool:
        """Whether the call ended, and well."""
        if isinstance(event, DataReceived):
            self._received += event.data
            self._peer.acknowledge(self._id, event.flow_controlled_length)
        elif isinstance(event, StreamReset):
            self.unprocessed = event.error_code == ErrorCodes.REFUSED_STREAM
            raise CallError("cut" if self._received else "reset")
        elif isinstance(event, ResponseReceived | TrailersReceived):
            fields = dict(event.headers)
            if fields.get(b":status", b"200") != b"200":
                raise CallError(fields[b":status"].decode())
            status = fields.get(b"grpc-status", b"0").decode()
            if status != "0":
                # A call that has failed after half of its answer is as good as cut.
                raise CallError("cut" if self._received else STATUS.get(status, f"status {status}"))
        return isinstance(event, StreamEnded)
