"""One request over HTTP/1.1 (RFC 9112), with TLS, and nothing more: what a list, a watch and an export need.

A connection serves one request. The answer's body is read piece by piece, however it is framed, and an end that the
framing did not announce is an error: a cut is never passed off as an end. Deadlines are the caller's cancel scopes;
leaving the block closes the connection at once, in the middle of an answer too.

httptools (llhttp) parses. The clients that exist do not fit: httpx and httpcore leave unfinished async generators
behind when a stream is left early under trio.
"""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple, TypeAlias

import httptools
import msgspec
import trio

from meshlocal.policy.addresses import format_host_port

MAX_HEAD = 65536
"""Bytes of an answer's status line and headers, and of all answers before the last (1xx)."""
RECEIVE = 65536
"""Bytes read at once."""

_Stream: TypeAlias = "trio.SocketStream | trio.SSLStream[trio.SocketStream]"


class HttpError(Exception):
    """The peer speaks no HTTP/1.1 that can be used, or the connection ended before its answer did."""


class ConnectProxy(NamedTuple):
    """A proxy that is asked to CONNECT.

    Attributes:
        host: its name or address.
        port: 1 to 65535.
        authorization: its Proxy-Authorization header; empty: none.
    """

    host: str
    port: int
    authorization: str


class Origin(msgspec.Struct, frozen=True):
    """Where requests go.

    Attributes:
        host: an IP address without brackets, or a DNS name.
        port: 1 to 65535.
        tls: none for plain HTTP.
        server_name: the name that the certificate is checked against; empty: `host`.
        proxy: an HTTP proxy that is asked to CONNECT; none: straight there.
    """

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    server_name: str = ""
    proxy: ConnectProxy | None = None

    @property
    def authority(self) -> str:
        """`HOST:PORT`."""
        return format_host_port(self.host, self.port)


class Response:
    """An answer whose head has come. `headers` has lower-case names; of several with one name the last."""

    def __init__(self, stream: _Stream) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._stream = stream
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: deque[bytes] = deque()
        self._head_complete = False
        self._complete = False

    async def receive(self) -> bytes:
        """The next piece of the body, at most `RECEIVE` bytes; empty: the body is complete.

        Raises:
            HttpError: the connection ended before the body, or what came is no HTTP.
            trio.BrokenResourceError: the connection broke.
        """
        while not self._pieces:
            if self._complete:
                return b""
            await self._read()
        return self._pieces.popleft()

    async def receive_all(self, limit: int) -> bytes:
        """What is left of the body.

        Raises:
            HttpError: as `receive`; or the body is longer than `limit` bytes.
        """
        body = bytearray()
        while piece := await self.receive():
            body += piece
            if len(body) > limit:
                raise HttpError(f"an answer of more than {limit} bytes")
        return bytes(body)

    async def _receive_head(self) -> None:
        read = 0
        while not self._head_complete:
            read += await self._read()
            if read > MAX_HEAD and not self._head_complete:
                raise HttpError(f"an answer's head of more than {MAX_HEAD} bytes")
        if self.headers.get("content-encoding", "identity") != "identity":
            raise HttpError(f"an answer in the encoding {self.headers['content-encoding']!r}, which was not asked for")

    async def _read(self) -> int:
        data = await self._stream.receive_some(RECEIVE)
        if not data:
            if self._head_complete and not self._framed:
                # RFC 9112, section 6.3, point 8: without a length the connection's end is the body's.
                self._complete = True
                return 0
            raise HttpError("the connection ended in the middle of an answer")
        try:
            self._parser.feed_data(bytes(data))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            # What precedes the fault in the same read is not to be trusted either.
            raise HttpError(f"no HTTP/1.1 answer: {error}") from None
        return len(data)

    @property
    def _framed(self) -> bool:
        return "content-length" in self.headers or "transfer-encoding" in self.headers

    # What the parser calls.

    def on_message_begin(self) -> None:
        """An answer begins, after an interim one (1xx) too."""
        self.status = 0
        self.headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header of the response."""
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1").strip()

    def on_headers_complete(self) -> None:
        """The head of an answer has come."""
        self.status = self._parser.get_status_code()
        self._head_complete = self.status >= 200

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if body:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        """The end of an answer."""
        self._complete = self._head_complete


@asynccontextmanager
async def send(
    origin: Origin, method: str, target: str, headers: Mapping[str, str], body: bytes | None = None
) -> AsyncIterator[Response]:
    """Send a request, and wait for the answer's head.

    Args:
        origin: where to.
        method: such as GET.
        target: path and query, encoded.
        headers: beside Host, Connection, Accept-Encoding and Content-Length.
        body: None: there is none.

    Raises:
        HttpError: the answer is no HTTP/1.1, or the proxy refused.
        OSError: no connection.
        trio.BrokenResourceError: the connection broke, or its TLS handshake failed; the cause says how.
    """
    stream = await _connect(origin)
    try:
        lines = [f"{method} {target} HTTP/1.1", f"Host: {origin.authority}", "Connection: close"]
        lines.append("Accept-Encoding: identity")
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        await stream.send_all(_head(lines, headers) + (body or b""))
        response = Response(stream)
        await response._receive_head()
        yield response
    finally:
        # Nothing is left to say: a closing handshake would only wait for a peer that may be gone.
        await trio.aclose_forcefully(stream)


def _head(lines: list[str], headers: Mapping[str, str]) -> bytes:
    lines = lines + [f"{name}: {value}" for name, value in headers.items()]
    text = "\r\n".join(lines)
    # A token from a file must not be able to add headers, or to end them.
    if any(ord(character) < 32 for line in lines for character in line):
        raise HttpError("a request header has a control character in it")
    try:
        return (text + "\r\n\r\n").encode("latin-1")
    except UnicodeEncodeError:
        raise HttpError("a request header has a character that HTTP does not allow") from None


async def _connect(origin: Origin) -> _Stream:
    first = origin.proxy or origin
    plain = await trio.open_tcp_stream(first.host, first.port)
    stream: _Stream = plain
    try:
        if origin.proxy is not None:
            await _ask_proxy(plain, origin, origin.proxy)
        if origin.tls is not None:
            name = origin.server_name or origin.host
            stream = trio.SSLStream(plain, origin.tls, server_hostname=name, https_compatible=True)
            await stream.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(plain)
        raise
    return stream


async def _ask_proxy(stream: trio.SocketStream, origin: Origin, proxy: ConnectProxy) -> None:
    """CONNECT (RFC 9110, section 9.3.6)."""
    headers = {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}
    await stream.send_all(_head([f"CONNECT {origin.authority} HTTP/1.1", f"Host: {origin.authority}"], headers))
    head = bytearray()
    # One byte at a time, since the tunnel's first bytes may stand right behind the head.
    while not head.endswith(b"\r\n\r\n"):
        data = await stream.receive_some(1)
        if not data or len(head) > MAX_HEAD:
            raise HttpError("the proxy gave no answer to CONNECT")
        head += data
    status = head.split(b"\r\n", 1)[0].decode("latin-1")
    version, _, rest = status.partition(" ")
    if not version.startswith("HTTP/1.") or not rest.startswith("2"):
        raise HttpError(f"the proxy refused: {status[:100]}")
