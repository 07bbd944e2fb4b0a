"""HTTP/2 (RFC 9113) framing and state, without I/O. The only module that knows the engine.

Theory of operation. The engine is nghttp2, by way of ngh2: it parses and writes frames, keeps streams' states and
windows, compresses headers, and refuses what breaks the protocol. Bytes of the peer go in (`receive`) and come out as
events; what is to be sent is asked for (`data_to_send`) when somebody can send it, so that all that one turn brought
goes out in one write. Credit is given back by hand (`acknowledge`), never on receipt, also for a stream that is gone.

What the engine does by itself: it answers SETTINGS and PING. It refuses streams that the peer opened before it knew the
limit (RFC 9113, 5.1.2). It resets streams whose message is malformed (8.1.1), so that no event tells of their request.
Streams at or below a GOAWAY's last one go on, both ways, and those above are ignored (6.8). What breaks the connection
is an `Http2Error`, once, with a GOAWAY that says why left to be sent.

What it does not: it does not look at the headers that are sent. Those of a peer are checked when they come, and those
that come from HTTP/1.1 were checked there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from ngh2 import Configuration, Connection, Role
from ngh2.events import (
    ConnectionClosed,
    DataReceived,
    Event,
    GoAwayReceived,
    InformationalResponseReceived,
    PingAcknowledged,
    PingReceived,
    RequestReceived,
    ResponseReceived,
    SettingsAcknowledged,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from ngh2.exceptions import NGH2Error

__all__ = [
    "DEFAULT_WINDOW",
    "MAX_FRAME_SIZE",
    "MAX_STREAM_ID",
    "PREFACE",
    "DataReceived",
    "ErrorCode",
    "Event",
    "GoAwayReceived",
    "Headers",
    "Http2Error",
    "Http2Limits",
    "Http2Protocol",
    "InformationalResponseReceived",
    "PingAcknowledged",
    "PingReceived",
    "RequestReceived",
    "ResponseReceived",
    "SettingsAcknowledged",
    "SettingsReceived",
    "StreamClosed",
    "StreamReset",
    "TrailersReceived",
    "WindowUpdated",
    "header_list_size",
]

Headers: TypeAlias = Sequence[tuple[bytes, bytes]]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""How a client begins (RFC 9113, 3.4)."""

MAX_STREAM_ID = 2**31 - 1
DEFAULT_WINDOW = 65_535
"""Bytes that a stream's peer may send before some are given back, and, until it is told more, a connection's."""

MAX_FRAME_SIZE = 16_384
"""Bytes of the largest frame that is taken (RFC 9113, 4.2)."""

_LARGEST_WINDOW = 2**31 - 1
_GOAWAY = struct.Struct(">BHBBIII")
_ENABLE_PUSH, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE, _MAX_HEADER_LIST_SIZE = 2, 3, 4, 6
_UNTOLD = 0xFFFF_FFFF


class ErrorCode(IntEnum):
    """Why a stream or a connection ended (RFC 9113, section 7)."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD

    @classmethod
    def name_of(cls, code: int) -> str:
        """The name of a code; the number of one that has none."""
        try:
            return cls(code).name
        except ValueError:
            return f"{code:#x}"


class Http2Error(Exception):
    """The peer broke HTTP/2: this connection is over. What is left to send, a GOAWAY with the reason, is there.

    Attributes:
        error_code: of that GOAWAY.
    """

    def __init__(self, reason: str, error_code: int = ErrorCode.PROTOCOL_ERROR) -> None:
        super().__init__(reason)
        self.error_code = error_code


class Http2Limits(NamedTuple):
    """What one side lets its peer do on one connection.

    Attributes:
        max_streams: that it may have open. More are refused one by one until it knows this, and end the connection
            from then on.
        max_header_list_size: bytes of a message's fields, as RFC 9113, 6.5.2, counts them. It is told this; the
            connection ends at `HEADER_SLACK` times as much, so that the caller can refuse single messages.
        window: bytes of one stream that were not given back.
        connection_window: the same of all streams together; None: twice what all streams may hold, so that those
            whose bytes nobody takes do not hold up the others.
        acknowledgements: answers to its PING and SETTINGS frames that may wait to be sent.
        resets: streams that it may reset: at once after a while without, and in a second. A server's.
        continuations: frames after the first that a head may come in.
        glitches: frames that are of no use and do no harm, such as PRIORITY: at once after a while without, and in a
            second.
    """

    max_streams: int = 100
    max_header_list_size: int = 16_384
    window: int = DEFAULT_WINDOW
    connection_window: int | None = None
    acknowledgements: int = 10_000
    resets: tuple[int, int] = (1_000, 33)
    continuations: int = 8
    glitches: tuple[int, int] = (10_000, 330)


HEADER_SLACK = 4
"""A peer that sends fields of more than so many times what it was told loses the connection."""


class Http2Protocol:
    """One side of one HTTP/2 connection.

    Args:
        client: which side.
        limits: what the peer may do.

    Attributes:
        peer_max_streams: how many streams the peer lets this side have open.
        peer_max_header_list_size: bytes of fields that it takes, as RFC 9113, 6.5.2, counts them; None if it did not
            say.
        highest_inbound_stream_id: the highest stream of the peer's that was told of.
        settings_received: it said what it takes.
        unsent: what the engine had to say to what came last, for `data_to_send`.
        finished: the connection takes and sends nothing more: it broke, or its last stream ended behind a GOAWAY.
    """

    __slots__ = (
        "_connection",
        "client",
        "finished",
        "highest_inbound_stream_id",
        "peer_max_header_list_size",
        "peer_max_streams",
        "settings_received",
        "unsent",
    )

    def __init__(self, *, client: bool, limits: Http2Limits) -> None:
        self.client = client
        self.peer_max_streams = 100
        self.peer_max_header_list_size: int | None = None
        self.highest_inbound_stream_id = 0
        self.settings_received = False
        self.finished = False
        self.unsent = b""
        self._connection = Connection(
            Role.CLIENT if client else Role.SERVER,
            Configuration(
                auto_window_update=False,
                max_outbound_ack=limits.acknowledgements,
                stream_reset_rate_limit=limits.resets,
                max_continuations=limits.continuations,
                glitch_rate_limit=limits.glitches,
                max_inbound_header_list_size=HEADER_SLACK * limits.max_header_list_size,
                max_send_header_block_length=2**24,
            ),
        )
        settings = {_MAX_CONCURRENT_STREAMS: limits.max_streams, _MAX_HEADER_LIST_SIZE: limits.max_header_list_size}
        if client:
            settings[_ENABLE_PUSH] = 0
        if limits.window != DEFAULT_WINDOW:
            settings[_INITIAL_WINDOW_SIZE] = limits.window
        self._connection.initiate_connection(settings)
        window = limits.connection_window or 2 * limits.max_streams * limits.window
        if window > DEFAULT_WINDOW:
            self._connection.set_local_window_size(min(window, _LARGEST_WINDOW))

    # What comes.

    def receive(self, data: bytes) -> list[Event]:
        """Feed bytes from the peer; gives what they say.

        Answers to PINGs come last: who waits for one has then heard of every stream that the peer opened before it.
        Frames of one stream's data that come one behind the other are one event: where they end means nothing
        (RFC 9113, 8.1), and each costs its way through all that handles it.

        Raises:
            Http2Error: they break the protocol. What they said before is lost with the connection.
        """
        connection = self._connection
        if self.finished:
            return []
        try:
            connection.receive_data(data)
            events = connection.events()
            if connection.want_write:
                # That may be the GOAWAY with which the engine ends it all. It tells so only once it wrote that.
                self.unsent += connection.data_to_send()
                events += connection.events()
        except NGH2Error as error:
            if self._ended_in_order():
                return []
            raise self._end(str(error) or type(error).__name__) from error
        answered = joinable = False
        data_of = 0
        for event in events:
            kind = type(event)
            if kind is DataReceived:
                stream_id = event.stream_id  # type: ignore[attr-defined] # a DataReceived
                joinable = joinable or stream_id == data_of
                data_of = stream_id
            elif kind is RequestReceived:
                self.highest_inbound_stream_id = event.stream_id  # type: ignore[attr-defined] # a RequestReceived
            elif kind is SettingsReceived:
                self._read_settings(event)  # type: ignore[arg-type] # a SettingsReceived
            elif kind is PingAcknowledged:
                answered = True
            elif kind is ConnectionClosed:
                self._finish(event)  # type: ignore[arg-type] # a ConnectionClosed
        if joinable:
            events = _join_data(events)
        if answered:
            events.sort(key=_is_answer)
        return events

    def _read_settings(self, event: SettingsReceived) -> None:
        settings = event.settings
        self.peer_max_streams = settings.get(_MAX_CONCURRENT_STREAMS, self.peer_max_streams)
        most = settings.get(_MAX_HEADER_LIST_SIZE)
        if most is not None:
            self.peer_max_header_list_size = most
        if not self.settings_received:
            self.settings_received = True
            if _MAX_CONCURRENT_STREAMS not in settings:
                # It has no limit of its own (RFC 9113, 6.5.2).
                self.peer_max_streams = _UNTOLD

    def _ended_in_order(self) -> bool:
        """Whether the engine takes nothing more because its last stream ended behind a GOAWAY, with what was sent."""
        self.finished = self.finished or any(
            type(event) is ConnectionClosed and not event.error_code for event in self._connection.events()
        )
        return self.finished

    def _finish(self, event: ConnectionClosed) -> None:
        """The engine takes nothing more: the GOAWAY is its own. Without an error, the last stream ended behind one."""
        self.finished = True
        if event.error_code:
            said = event.debug_data.decode("latin-1")
            raise Http2Error(said or ErrorCode.name_of(event.error_code), event.error_code)

    def _end(self, reason: str) -> Http2Error:
        """The engine gave up, and would say nothing more: the GOAWAY is ours."""
        code = ErrorCode.PROTOCOL_ERROR
        if "exceed" in reason or "flood" in reason.lower():
            code = ErrorCode.ENHANCE_YOUR_CALM
        if not self.finished:
            self.finished = True
            self.unsent += goaway(self.highest_inbound_stream_id, code, reason.encode("latin-1", "replace"))
        return Http2Error(reason, code)

    # What is sent.

    def data_to_send(self, most: int | None = None) -> bytes:
        """What there is to be sent, as far as the peer's windows allow. It must be sent, and in this order.

        Args:
            most: bytes that the engine gives at once; what is left comes next. None: all.
        """
        try:
            data = self._connection.data_to_send(most)
        except NGH2Error as error:
            data = b""
            if not self.finished:
                self._end(str(error) or type(error).__name__)
        if self.unsent:
            data, self.unsent = self.unsent + data, b""
        return data

    def send_request(self, headers: Headers, *, end_stream: bool = False) -> int:
        """Open a stream; gives its number. The caller minds `peer_max_streams`.

        Raises:
            Http2Error: the connection takes no more.
        """
        try:
            return self._connection.send_request(headers, end_stream=end_stream)
        except NGH2Error as error:
            raise Http2Error(str(error) or type(error).__name__) from error

    def send_response(self, stream_id: int, headers: Headers, *, end_stream: bool = False) -> None:
        """Answer a request.

        Raises:
            Http2Error: the stream's state forbids it.
        """
        try:
            self._connection.send_response(stream_id, headers, end_stream=end_stream)
        except NGH2Error as error:
            raise Http2Error(str(error) or type(error).__name__) from error

    def send_informational(self, stream_id: int, headers: Headers) -> None:
        """Send an interim response (1xx).

        Raises:
            Http2Error: the stream's state forbids it.
        """
        try:
            self._connection.send_informational_response(stream_id, headers)
        except NGH2Error as error:
            raise Http2Error(str(error) or type(error).__name__) from error

    def send_data(self, stream_id: int, data: bytes | memoryview, *, end_stream: bool = False) -> None:
        """Send data; what the windows do not allow yet waits here, and counts in `waiting`.

        Raises:
            Http2Error: the stream's state forbids it.
        """
        try:
            self._connection.send_data(stream_id, data, end_stream=end_stream)
        except NGH2Error as error:
            raise Http2Error(str(error) or type(error).__name__) from error

    def end_stream(self, stream_id: int) -> None:
        """End this side of a stream, behind what was sent on it.

        Raises:
            Http2Error: the stream's state forbids it.
        """
        try:
            self._connection.end_stream(stream_id)
        except NGH2Error as error:
            raise Http2Error(str(error) or type(error).__name__) from error

    def send_trailers(self, stream_id: int, headers: Headers) -> None:
        """Send a message's trailers, which end this side of the stream.

        Raises:
            Http2Error: the stream's state forbids it.
        """
        try:
            self._connection.send_trailers(stream_id, headers)
        except NGH2Error as error:
            raise Http2Error(str(error) or type(error).__name__) from error

    def sendable(self, stream_id: int) -> int:
        """How many bytes more the windows allow now for a stream; 0 for one that is not known, or whose head
        `data_to_send` did not give yet."""
        connection = self._connection
        try:
            window = connection.stream_remote_window_size(stream_id)
        except NGH2Error:
            return 0
        return max(0, min(window, connection.remote_window_size) - connection.queued_body_size(stream_id))

    def waiting(self, stream_id: int) -> int:
        """Bytes of a stream that wait to be sent; 0 for one that is not known."""
        return self._connection.queued_body_size(stream_id)

    def acknowledge(self, stream_id: int, size: int) -> None:
        """Give back `size` bytes of a stream's data, which may be gone by now."""
        if size:
            try:
                self._connection.acknowledge_received_data(size, stream_id)
            except (NGH2Error, ValueError):
                return  # the connection is over: nobody waits for its windows

    def reset(self, stream_id: int, error_code: int) -> None:
        """Send RST_STREAM, unless the stream is gone."""
        try:
            self._connection.reset_stream(stream_id, error_code)
        except NGH2Error:
            return

    def ping(self, payload: bytes) -> None:
        """Send a PING of 8 bytes."""
        try:
            self._connection.ping(payload)
        except NGH2Error:
            return

    def send_goaway(self, last_stream_id: int, error_code: int = ErrorCode.NO_ERROR, debug_data: bytes = b"") -> None:
        """Announce that streams above `last_stream_id` are not processed. Open ones go on (RFC 9113, 6.8)."""
        try:
            if last_stream_id == MAX_STREAM_ID:
                # Written beside the engine, which would take an idle connection for ended with it. Here it stands
                # between two frames.
                self.unsent += self._connection.data_to_send() + goaway(last_stream_id, error_code, debug_data)
            else:
                self._connection.send_goaway(error_code, last_stream_id=last_stream_id, debug_data=debug_data)
        except NGH2Error:
            return


def _join_data(events: Sequence[Event]) -> list[Event]:
    """The same, with neighbouring pieces of a stream's data as one. Empty ones stay, to be counted, but for an end."""
    joined = []
    at = 0
    while at < len(events):
        event = events[at]
        at += 1
        if isinstance(event, DataReceived) and event.data and not event.end_stream:
            pieces, end = [event.data], False
            while at < len(events) and not end:
                next_one = events[at]
                if not isinstance(next_one, DataReceived) or next_one.stream_id != event.stream_id:
                    break
                end = next_one.end_stream
                if not next_one.data and not end:
                    break
                pieces.append(next_one.data)
                at += 1
            if len(pieces) > 1:
                event = DataReceived(event.stream_id, b"".join(pieces), end)
        joined.append(event)
    return joined


def _is_answer(event: Event) -> bool:
    return type(event) is PingAcknowledged


def goaway(last_stream_id: int, error_code: int, debug_data: bytes = b"") -> bytes:
    """A GOAWAY frame (RFC 9113, 6.8)."""
    size = 8 + len(debug_data)
    return _GOAWAY.pack(size >> 16, size & 0xFFFF, 7, 0, 0, last_stream_id, error_code) + debug_data


def header_list_size(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """The size of a header list as SETTINGS_MAX_HEADER_LIST_SIZE counts it (RFC 9113, 6.5.2)."""
    return sum(len(name) + len(value) + 32 for name, value in headers)
