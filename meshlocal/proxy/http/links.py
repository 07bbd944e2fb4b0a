"""Connections to instances in HTTP/2, which all clients of a service share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import ClassVar, Protocol

import trio

from meshlocal.client.security import Security
from meshlocal.net.pipe import Pipe
from meshlocal.net.relay_loop import RelayLoop
from meshlocal.policy.config_http import HttpConfig
from meshlocal.policy.model import HostPort
from meshlocal.policy.retry import Failure
from meshlocal.proxy.http.link import Link
from meshlocal.wire.http2 import (
    DataReceived,
    ErrorCode,
    GoAwayReceived,
    Headers,
    Http2Error,
    Http2Limits,
    Http2Protocol,
    InformationalResponseReceived,
    ResponseReceived,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
)


class UpstreamStream(Protocol):
    """A stream on a connection to an instance. None of these may wait.

    Attributes:
        id: its number.
    """

    id: int

    def accepted(self, left: int) -> None:
        """All but `left` bytes of the request's body went out to the instance."""
        ...

    def on_interim(self, fields: Headers) -> None:
        """An interim head (1xx) came."""
        ...

    def on_head(self, fields: Headers, *, end: bool) -> None:
        """The final head came; `end`: and nothing comes behind it."""
        ...

    def on_data(self, data: bytes, *, end: bool) -> None:
        """A piece of the response's body came."""
        ...

    def on_trailers(self, fields: Headers) -> None:
        """The response ended, with trailers."""
        ...

    def on_reset(self, code: int) -> None:
        """The stream was reset, by the instance or for what came on it."""
        ...

    def on_lost(self, failure: Failure) -> None:
        """The connection took it no further.

        Args:
            failure: what that is for a stream on which nothing came yet.
        """
        ...


class UpstreamLink(Link):
    """One connection to an instance.

    Args:
        pipe: the connection's bytes.
        place: where it leads.
        config: what holds for http listeners.
        loop: the relay's loop; None if there is none.
        links: has it.
        security: that it was made with; None: it is in plaintext.

    Attributes:
        place: as given.
        security: as given.
        streams: those that live, by number.
        closing: it takes no more streams.
        used: a response came on it (A4).
        idle_since: when its last stream ended, by trio.current_time().
    """

    __slots__ = ("_config", "_links", "_most", "closing", "idle_since", "place", "security", "streams", "used")

    def __init__(
        self,
        pipe: Pipe,
        place: HostPort,
        config: HttpConfig,
        loop: RelayLoop | None,
        links: SharedLinks,
        security: Security | None,
    ) -> None:
        http2 = config.http2
        limits = Http2Limits(
            max_streams=http2.upstream_streams,
            max_header_list_size=config.max_head,
            window=http2.window,
            continuations=http2.continuations,
        )
        super().__init__(pipe, Http2Protocol(client=True, limits=limits), loop, http2.window)
        self._config = config
        self._links = links
        self._most = http2.upstream_streams
        self.place = place
        self.security = security
        self.streams: dict[int, UpstreamStream] = {}
        self.closing = False
        self.used = False
        self.idle_since = self.heard

    def now(self) -> float:
        """By trio.current_time()."""
        return self._time()

    @property
    def is_available(self) -> bool:
        """Whether it takes another stream now. Until the instance says how many it takes, that is one: what it refused
        would go to the next instance (C1), which may be on another node."""
        if self.closing or self.over:
            return False
        protocol = self.protocol
        return len(self.streams) < (min(self._most, protocol.peer_max_streams) if protocol.settings_received else 1)

    @property
    def is_live(self) -> bool:
        """Whether it takes streams, now or once there is room."""
        return not (self.closing or self.over)

    @property
    def is_new(self) -> bool:
        """Whether the instance has yet to say how many streams it takes."""
        return self.is_live and not self.protocol.settings_received

    # What its streams call.

    def open(self, stream: UpstreamStream, fields: Headers, *, end: bool) -> bool:
        """Send a request's head on a stream of its own; False: the connection takes none any more."""
        if self.pipe.plain is None:
            # RFC 9113, 8.3.1: servers tell by it whether they were asked over TLS.
            fields = [(name, b"https" if name == b":scheme" else value) for name, value in fields]
        try:
            stream.id = self.protocol.send_request(fields, end_stream=end)
        except Http2Error:
            self.closing = True
            return False
        self.streams[stream.id] = stream
        self.touch()
        return True

    def send(self, stream: UpstreamStream, piece: bytes, *, end: bool) -> bool:
        """Queue a piece of a request's body; False: the stream is gone."""
        try:
            self.protocol.send_data(stream.id, piece, end_stream=end)
        except Http2Error:
            return False
        self.owing[stream] = None
        self.touch()
        return True

    def end_with(self, stream: UpstreamStream, trailers: Headers) -> bool:
        """Queue a request's trailers, which end it; False: the stream is gone."""
        try:
            self.protocol.send_trailers(stream.id, trailers)
        except Http2Error:
            return False
        self.touch()
        return True

    def leave(self, stream: UpstreamStream, code: int | None = None) -> None:
        """A stream is over; `code`: reset it with that, for it has not ended on both sides."""
        if self.streams.pop(stream.id, None) is None:
            return
        self.owing.pop(stream, None)
        if code is not None:
            self.protocol.reset(stream.id, code)
            self.touch()
        if not self.streams:
            self.idle_since = self.heard
            if self.closing and not self.over:
                self.finish()
        if self._links.wanted:
            self._links.freed()

    # What came.

    def _on_head(self, event: ResponseReceived) -> None:
        self.used = True
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            stream.on_head(event.headers, end=event.end_stream)

    def _on_data(self, event: DataReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            stream.on_data(event.data, end=event.end_stream)
        else:
            self.give(event.stream_id, len(event.data))

    def _on_trailers(self, event: TrailersReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            stream.on_trailers(event.headers)

    def _on_reset(self, event: StreamReset | StreamClosed) -> None:
        """By the instance; or by the engine, for what came on it, or because it is above a GOAWAY's last one."""
        stream = self.streams.get(event.stream_id)
        if stream is not None and (event.error_code or type(event) is StreamReset):
            stream.on_reset(event.error_code)

    def _on_interim(self, event: InformationalResponseReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            stream.on_interim(event.headers)

    def _on_settings(self, event: SettingsReceived) -> None:
        self._links.freed()

    def _on_goaway(self, event: GoAwayReceived) -> None:
        """It takes no more streams; those above the last one were not processed (RFC 9113, 6.8)."""
        self.closing = True
        for stream in [each for each in self.streams.values() if each.id > event.last_stream_id]:
            stream.on_reset(ErrorCode.REFUSED_STREAM)
        self.retire()

    def retire(self) -> None:
        """It takes no more streams, and ends with the last one (H2)."""
        self.closing = True
        if not self.streams and not self.over:
            self.finish()
        self._links.freed()

    handlers: ClassVar = {
        ResponseReceived: _on_head,
        DataReceived: _on_data,
        TrailersReceived: _on_trailers,
        StreamReset: _on_reset,
        StreamClosed: _on_reset,
        InformationalResponseReceived: _on_interim,
        SettingsReceived: _on_settings,
        GoAwayReceived: _on_goaway,
    }

    # Its end.

    def on_over(self) -> None:
        """See `Link.on_over`."""
        self.closing = True
        failure = Failure.STALE if self.used else Failure.NO_RESPONSE
        for stream in list(self.streams.values()):
            stream.on_lost(failure)
        self.streams.clear()
        self._links.drop(self)

    def look(self, now: float) -> None:
        """End it if nothing is heard of it any more, or if nobody used it for long."""
        config = self._config
        if not self.streams:
            if self.idle_since + config.pool_idle_timeout <= now:
                self.retire()
            return
        self.keep_alive(now, config.http2.keepalive_interval, config.http2.keepalive_timeout)


class _Waiter:
    """Who waits for a connection that another makes.

    Attributes:
        error: how that failed, in a word; empty while it did not.
    """

    __slots__ = ("error",)

    def __init__(self) -> None:
        self.error = ""


class SharedLinks:
    """The connections to one service's instances in HTTP/2.

    Args:
        loop: the relay's loop; None if there is none.
        run: has a connection served to its end, in a task of its own.

    Attributes:
        paths: of instances' Unix sockets now; connections that were made when an instance had another take no more.
        wanted: how many wait for a stream that is free, or for a connection that another makes.
    """

    __slots__ = (
        "_changed",
        "_closed",
        "_connecting",
        "_links",
        "_loop",
        "_places",
        "_run",
        "_waiting",
        "paths",
        "security",
        "wanted",
    )

    def __init__(self, loop: RelayLoop | None, run: Callable[[UpstreamLink], None]) -> None:
        self._loop = loop
        self._run = run
        self.security: Security | None = None
        self.paths: Mapping[HostPort, str] = {}
        self._links: dict[HostPort, list[UpstreamLink]] = {}
        self._places: Collection[HostPort] | None = None
        self._connecting: set[HostPort] = set()
        self._waiting: dict[HostPort, list[_Waiter]] = {}
        self._changed: trio.Event | None = None
        self._closed = False
        self.wanted = 0

    def __len__(self) -> int:
        return sum(map(len, self._links.values()))

    def __iter__(self) -> Iterator[UpstreamLink]:
        for links in list(self._links.values()):
            yield from list(links)

    def take(self, place: HostPort) -> UpstreamLink | None:
        """A connection to the instance that takes another stream now; None if there is none."""
        for link in self._links.get(place, ()):
            if link.is_available:
                return link
        return None

    def may_connect(self, place: HostPort, most: int) -> bool:
        """Whether another connection may be made to the instance now, of at most so many; not while one is."""
        links = self._links.get(place, ())
        live = sum(link.is_live for link in links)
        return place not in self._connecting and live < most and not any(link.is_new for link in links)

    def begin_connect(self, place: HostPort) -> None:
        """A connection is being made; wants an `end_connect`."""
        self._connecting.add(place)

    def end_connect(self, place: HostPort, error: str) -> None:
        """That came to an end; `error`: how it failed, in a word, empty if it did not."""
        self._connecting.discard(place)
        for waiter in self._waiting.pop(place, ()):
            waiter.error = error
        self.freed()

    def adopt(
        self,
        pipe: Pipe,
        place: HostPort,
        config: HttpConfig,
        security: Security | None,
        path: str | None = None,
    ) -> UpstreamLink:
        """Share a connection that was made, with this security, when the instance's Unix socket was at this path."""
        link = UpstreamLink(pipe, place, config, self._loop, self, security)
        gone = self._closed or (self._places is not None and place not in self._places)
        if gone or security is not self.security or path != self.paths.get(place):
            # It serves who made it, and no other (H2, T1).
            link.closing = True
        self._links.setdefault(place, []).append(link)
        self._run(link)
        return link

    def drop(self, link: UpstreamLink) -> None:
        """A connection is over."""
        links = self._links.get(link.place)
        if links is not None and link in links:
            links.remove(link)
            if not links:
                del self._links[link.place]
        self.freed()

    def freed(self) -> None:
        """A stream or a connection may be free: those that wait look again."""
        changed, self._changed = self._changed, None
        if changed is not None:
            # Not at once: Trio may be about to sleep, and would not look again before it does.
            trio.lowlevel.current_trio_token().run_sync_soon(changed.set)

    async def wait_changed(self, place: HostPort) -> str:
        """Wait until `take` or `may_connect` may say something else; gives how the connection failed that was being
        made to the instance, in a word, empty if it did not."""
        if self._changed is None:
            self._changed = trio.Event()
        waiter = _Waiter()
        if place in self._connecting:
            self._waiting.setdefault(place, []).append(waiter)
        self.wanted += 1
        try:
            await self._changed.wait()
        finally:
            self.wanted -= 1
            waiting = self._waiting.get(place, [])
            if waiter in waiting:
                waiting.remove(waiter)
        return waiter.error

    def keep_only(self, places: Collection[HostPort]) -> None:
        """Connections to all other places take no more streams (H2)."""
        self._places = places
        for link in self:
            if link.place not in places:
                link.retire()

    def retire(self, places: Collection[HostPort]) -> None:
        """Connections to these places take no more streams."""
        for link in self:
            if link.place in places:
                link.retire()

    def renew(self, security: Security | None) -> None:
        """Share only what is made with this from now on (T1)."""
        self.security = security
        for link in self:
            link.retire()

    def close(self) -> None:
        """The service is followed no longer: connections end with their last stream."""
        self._closed = True
        self.keep_only(())

    def sweep(self, now: float) -> None:
        """End what is dead, or was idle for long."""
        for link in self:
            link.look(now)
