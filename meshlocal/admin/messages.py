"""The admin server's HTTP/1.1, without I/O: bytes to requests, responses to bytes (RFC 9112).

Only what an admin page needs: no request has a body, and whatever is not understood is refused.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

import httptools
import msgspec

HEAD_LIMIT = 16384
"""The most bytes of a request's head."""

PLAIN_TEXT = "text/plain; charset=utf-8"


class Request(NamedTuple):
    """A request's head. `path` is as sent, `query` what follows its `?`; header names are in lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]

    def values(self, name: str) -> list[str]:
        """The values that the query gives to a name, in order."""
        return urllib.parse.parse_qs(self.query).get(name, [])


class Response(NamedTuple):
    """An answer. `headers` are beside the content's type and length and those that every response has; `policy` is its
    Content-Security-Policy (CSP 3), which lets a page load and run nothing unless it says what."""

    status: int = 200
    content_type: str = PLAIN_TEXT
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    policy: str = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

    @classmethod
    def text(cls, text: str, status: int = 200) -> Response:
        """Plain text; ends with a line break, so that a shell's prompt does not follow it."""
        return cls(status, PLAIN_TEXT, (text if text.endswith("\n") else text + "\n").encode())

    @classmethod
    def json(cls, value: object, status: int = 200) -> Response:
        """Anything that msgspec encodes, indented for people."""
        return cls(status, "application/json", msgspec.json.format(msgspec.json.encode(value)) + b"\n")


class Head(NamedTuple):
    """A request, and what it means for its connection."""

    request: Request
    keep_alive: bool
    has_body: bool
    http10: bool


class RequestReader:
    """Cuts one connection's bytes into request heads.

    Attributes:
        refusal: what to answer to bytes that are no acceptable request; nothing after them is read.
        in_head: a head has begun and not ended.
    """

    __slots__ = ("_done", "_fed", "_headers", "_heads", "_parser", "_size", "_target", "in_head", "refusal")

    def __init__(self) -> None:
        self.refusal: Response | None = None
        self.in_head = False
        self._parser = httptools.HttpRequestParser(self)
        self._heads: list[Head] = []
        self._headers: dict[str, str] = {}
        self._target = bytearray()
        self._fed = 0
        self._size = 0
        self._done = False

    def feed(self, data: bytes) -> list[Head]:
        """The heads that end in these bytes. After one with a body or without keep-alive, and after a refusal, none."""
        if self._done:
            return []
        self._heads = []
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # No protocol is offered to switch to: the request is answered as any other (RFC 9110, 7.8), but the
            # parser goes no further.
            if self._heads:
                self._heads[-1] = self._heads[-1]._replace(keep_alive=False)
            self._done = True
        except httptools.HttpParserError as error:
            if not self._done:
                self._refuse(400, f"malformed request: {error}")
        # Of a head that has not ended, the parser may hold what no callback has seen yet.
        self._fed = 0 if self._heads else self._fed + len(data)
        self._limit(self._fed)
        return self._heads

    def _limit(self, size: int) -> None:
        if size > HEAD_LIMIT and not self._done:
            self._refuse(431, f"the request's head is longer than {HEAD_LIMIT} bytes")

    def _refuse(self, status: int, text: str) -> None:
        self.refusal = Response.text(text, status)
        self._done = True

    # What follows is called by httptools. It must not raise.

    def on_message_begin(self) -> None:
        """A request line begins."""
        self.in_head = True
        self._headers = {}
        self._target = bytearray()
        self._size = 0

    def on_url(self, part: bytes) -> None:
        """A part of the target."""
        self._target += part
        self._size += len(part)
        self._limit(self._size)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole header."""
        self._size += len(name) + len(value) + len(": \r\n")
        self._limit(self._size)
        if self._done:
            return
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        """The head ends."""
        self.in_head = False
        if self._done:
            return
        version = self._parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._refuse(505, f"HTTP/{version} is not served here; HTTP/1.1 is")
            return
        has_body = "transfer-encoding" in self._headers or bool(self._headers.get("content-length", "").strip("0"))
        keep_alive = self._parser.should_keep_alive() and not has_body
        path, _, query = _origin_form(self._target.decode("latin-1")).partition("?")
        request = Request(self._parser.get_method().decode("latin-1"), path, query, self._headers)
        self._heads.append(Head(request, keep_alive, has_body, version == "1.0"))
        self._done = not keep_alive


def _origin_form(target: str) -> str:
    """A target without scheme and host, which a client that takes us for a proxy puts first (RFC 9112, 3.2.2)."""
    _, scheme, rest = target.partition("://")
    if target.startswith("/") or not scheme:
        return target
    _, slash, path = rest.partition("/")
    return slash + path or "/"


def encode(response: Response, *, to: Head | None = None) -> bytes:
    """A response as it goes over the wire; `to` is the head that it answers, None for what is answered unread.

    Raises:
        ValueError: the status is none, or a header has control characters.
    """
    kept = to is not None and to.keep_alive
    # HTTP/1.1 keeps connections without a word.
    connection = "" if kept and to is not None and not to.http10 else "keep-alive" if kept else "close"
    head = _head(response, len(response.body), connection)
    return head if to is not None and to.request.method == "HEAD" else head + response.body


def encode_head(response: Response) -> bytes:
    """The head of a response whose content follows, and ends with its connection.

    Raises:
        ValueError: as `encode`.
    """
    return _head(response, None, "close")


def _head(response: Response, length: int | None, connection: str) -> bytes:
    headers = [
        ("Content-Type", response.content_type),
        *([("Content-Length", str(length))] if length is not None else ()),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Frame-Options", "DENY"),
        ("Content-Security-Policy", response.policy),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        *response.headers,
        *([("Connection", connection)] if connection else ()),
    ]
    lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
    for name, value in headers:
        if not (name + value).isprintable():
            raise ValueError(f"control characters in header {name!r}")
        lines.append(f"{name}: {value}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
