"""A peer that is not ours: HTTP/2 (RFC 9113) over the pure Python h2, with graceful GOAWAY both ways.

The product's engine is another one (`meshlocal.wire.http2`), so that what they agree on is more than one's opinion.

h2 closes its state machine when a GOAWAY is sent or received, and refuses every stream from then on. A graceful
shutdown needs the opposite: streams up to GOAWAY's last stream id go on until they end (RFC 9113 section 6.8). So h2
sees no GOAWAY here: received ones are cut out of the byte stream before it, and sent ones are serialized beside it,
into the outgoing buffer that is kept here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import Event
from h2.exceptions import H2Error, ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.exceptions import HyperframeError
from hyperframe.frame import GoAwayFrame

Headers: TypeAlias = Sequence[tuple[bytes, bytes]]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_STREAM_ID = 2**31 - 1
DEFAULT_WINDOW = 65_535
MAX_FRAME_SIZE = 16_384
_GOAWAY = 0x7
_GOAWAY_BODY = struct.Struct(">II")
_HEADER_SIZE = 9
# Streams that a peer opens before it saw our SETTINGS are refused one by one. h2 would end the connection.
_EXTRA_STREAMS = 1000


class H2PeerError(Exception):
    """The peer broke HTTP/2: this connection is over. What is left to send, a GOAWAY with the reason, is queued."""

    def __init__(self, reason: str, error_code: int = ErrorCodes.PROTOCOL_ERROR) -> None:
        super().__init__(reason)
        self.error_code = error_code


class GoAway(NamedTuple):
    """A received GOAWAY: no stream above `last_stream_id` was or will be processed."""

    last_stream_id: int
    error_code: int
    debug_data: bytes


class GoAwaySplitter:
    """Cuts GOAWAY frames out of a byte stream that is fed in pieces of any size.

    Refuses too large frames by their headers, too: h2 would do so only once it holds all of one.
    """

    __slots__ = ("_goaway", "_header", "_left", "_preface")

    def __init__(self, *, preface: bool) -> None:
        self._preface = len(PREFACE) if preface else 0
        self._header = b""
        self._left = 0
        self._goaway: bytearray | None = None

    def split(self, data: bytes) -> list[bytes | GoAway]:
        """What `data` holds, in order: bytes that are no GOAWAY frames, and whole GOAWAY frames.

        Raises:
            H2PeerError: no preface, a frame that is too large, or a GOAWAY of impossible size or stream.
        """
        parts: list[bytes | GoAway] = []
        position = min(self._preface, len(data))
        if data[:position] != PREFACE[len(PREFACE) - self._preface :][:position]:
            raise H2PeerError("no HTTP/2 preface")
        self._preface -= position
        start = 0
        end = len(data)
        if self._header:
            # The header that the last piece broke off: h2 has not seen it yet, so it goes before this piece.
            data = self._header + data
            self._header = b""
            end = len(data)
        while position < end:
            if self._goaway is not None or self._left:
                taken = min(self._left, end - position)
                if self._goaway is not None:
                    self._goaway += data[position : position + taken]
                self._left -= taken
                position += taken
                if self._goaway is not None:
                    start = position
                    if not self._left:
                        parts.append(_parse_goaway(self._goaway))
                        self._goaway = None
                continue
            if end - position < _HEADER_SIZE:
                self._header = data[position:]
                end = position
                break
            self._left = int.from_bytes(data[position : position + 3], "big")
            if self._left > MAX_FRAME_SIZE:
                raise H2PeerError(f"frame of {self._left} bytes, limit {MAX_FRAME_SIZE}", ErrorCodes.FRAME_SIZE_ERROR)
            if data[position + 3] == _GOAWAY:
                if self._left < _GOAWAY_BODY.size or any(data[position + 5 : position + 9]):
                    raise H2PeerError(f"malformed GOAWAY of {self._left} bytes")
                if position > start:
                    parts.append(data[start:position])
                self._goaway = bytearray()
                start = position + _HEADER_SIZE
            position += _HEADER_SIZE
        if start < end:
            parts.append(data[start:end] if (start, end) != (0, len(data)) else data)
        return parts


def _parse_goaway(body: bytearray) -> GoAway:
    last_stream_id, error_code = _GOAWAY_BODY.unpack_from(body)
    return GoAway(last_stream_id & MAX_STREAM_ID, error_code, bytes(body[_GOAWAY_BODY.size :]))


class _Connection(H2Connection):
    # h2 remembers how closed streams were closed, to tell late frames from wrong ones: 65,536 of them, which would be
    # megabytes for a connection that lives long.
    MAX_CLOSED_STREAMS = 2048


class H2Peer:
    """One side of one HTTP/2 connection.

    Every method leaves what is to be sent in `outgoing`, which the caller empties from the front. `max_streams` bounds
    the streams that the peer may have open, and with `DEFAULT_WINDOW` a stream sizes the connection's window, so that
    streams that nobody reads do not hold up the others. `max_header_list_size` is announced; the connection ends
    only at four times that size, so that the caller can refuse single streams.
    """

    def __init__(self, *, client: bool, max_streams: int, max_header_list_size: int) -> None:
        self.outgoing = bytearray()
        self.max_header_list_size = max_header_list_size
        self._splitter = GoAwaySplitter(preface=not client)
        config = H2Configuration(client_side=client, header_encoding=None, normalize_outbound_headers=False)
        config.validate_outbound_headers = False
        self._h2 = h2 = _Connection(config)
        announced = {
            SettingCodes.ENABLE_PUSH: 0,
            SettingCodes.MAX_CONCURRENT_STREAMS: max_streams,
            SettingCodes.MAX_HEADER_LIST_SIZE: max_header_list_size,
        }
        h2.local_settings = Settings(client=client, initial_values=announced)
        h2.initiate_connection()
        enforced = announced | {SettingCodes.MAX_CONCURRENT_STREAMS: max_streams + _EXTRA_STREAMS}
        h2.local_settings = Settings(client=client, initial_values=enforced)
        h2.decoder.max_header_list_size = 4 * max_header_list_size
        # Twice what the streams can hold: h2 hands a window back when half of it was consumed.
        h2.increment_flow_control_window((2 * max_streams - 1) * DEFAULT_WINDOW)
        self._flush()

    def receive(self, data: bytes) -> list[Event | GoAway]:
        """Feed bytes from the peer.

        Raises:
            H2PeerError: they break the protocol.
        """
        events: list[Event | GoAway] = []
        try:
            for part in self._splitter.split(data):
                if isinstance(part, GoAway):
                    events.append(part)
                else:
                    events.extend(self._h2.receive_data(part))
        except H2PeerError as error:
            self._flush()
            self.send_goaway(self.highest_inbound_stream_id, error.error_code)
            raise
        except (H2Error, HyperframeError) as error:
            self._flush()
            raise H2PeerError(str(error) or type(error).__name__) from error
        self._flush()
        return events

    @property
    def highest_inbound_stream_id(self) -> int:
        """The highest stream that the peer opened."""
        return self._h2.highest_inbound_stream_id

    @property
    def peer_max_streams(self) -> int:
        """How many streams the peer lets this side have open."""
        return self._h2.remote_settings.max_concurrent_streams

    @property
    def peer_max_header_list_size(self) -> int | None:
        """The largest header list that the peer takes, in bytes as RFC 9113 section 6.5.2 counts them."""
        return self._h2.remote_settings.max_header_list_size

    def next_stream_id(self) -> int:
        """The id for a new stream of a client. Raises H2PeerError when all were used."""
        try:
            return self._h2.get_next_available_stream_id()
        except ProtocolError as error:
            raise H2PeerError(str(error)) from error

    def send_headers(self, stream_id: int, headers: Headers, *, end_stream: bool = False) -> None:
        """Open a stream, answer one, or send its trailers. Raises H2PeerError if the stream's state forbids it."""
        try:
            self._h2.send_headers(stream_id, headers, end_stream)
        except ProtocolError as error:
            raise H2PeerError(str(error)) from error
        self._flush()

    def send_data(self, stream_id: int, data: bytes | memoryview, *, end_stream: bool = False) -> None:
        """Send at most `sendable` bytes. Raises H2PeerError if the stream's state forbids it."""
        try:
            self._h2.send_data(stream_id, data, end_stream)
        except ProtocolError as error:
            raise H2PeerError(str(error)) from error
        self._flush()

    def sendable(self, stream_id: int) -> int:
        """How many bytes of one DATA frame the windows and the frame size allow now. 0 for a stream unknown."""
        try:
            window = self._h2.local_flow_control_window(stream_id)
        except ProtocolError:
            return 0
        return max(0, min(window, self._h2.max_outbound_frame_size, MAX_FRAME_SIZE))

    def acknowledge(self, stream_id: int, size: int) -> None:
        """The application consumed `size` flow-controlled bytes of a stream, which may be gone by now."""
        if size:
            try:
                self._h2.acknowledge_received_data(size, stream_id)
            except ProtocolError:
                return  # the connection is over: nobody waits for its windows
            self._flush()

    def reset(self, stream_id: int, error_code: int) -> None:
        """Send RST_STREAM, unless the stream is gone."""
        try:
            self._h2.reset_stream(stream_id, error_code)
        except ProtocolError:
            return
        self._flush()

    def ping(self, payload: bytes) -> None:
        """Send a PING of 8 bytes."""
        try:
            self._h2.ping(payload)
        except ProtocolError:
            return
        self._flush()

    def send_goaway(self, last_stream_id: int, error_code: int = ErrorCodes.NO_ERROR, debug_data: bytes = b"") -> None:
        """Announce that streams above `last_stream_id` are not processed. Open ones go on."""
        frame = GoAwayFrame(0, last_stream_id=last_stream_id, error_code=error_code, additional_data=debug_data)
        self.outgoing += frame.serialize()

    def _flush(self) -> None:
        self.outgoing += self._h2.data_to_send()


def header_list_size(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """The size of a header list as SETTINGS_MAX_HEADER_LIST_SIZE counts it (RFC 9113 section 6.5.2)."""
    return sum(len(name) + len(value) + 32 for name, value in headers)
