"""HTTP/1.1 as a scripted upstream speaks it: requests read whole, responses as a test wants them."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

import httptools


class HttpRequest(NamedTuple):
    """A request that an upstream got. Header names are in lower case; of a repeated header the last value counts."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


class HttpResponse(NamedTuple):
    """A response.

    Attributes:
        status: its status.
        body: its body.
        headers: beside Content-Length, which is added.
        close: the connection is closed after it.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = {}
    close: bool = False

    def encode(self) -> bytes:
        """The response as it is sent."""
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        fields = {"Content-Length": str(len(self.body)), **self.headers}
        if self.close:
            fields["Connection"] = "close"
        lines += [f"{name}: {value}" for name, value in fields.items()]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + self.body


class RequestReader:
    """Cuts a connection's bytes into requests."""

    def __init__(self) -> None:
        self.requests: list[HttpRequest] = []
        self._parser = httptools.HttpRequestParser(self)
        self._target = b""
        self._headers: dict[str, str] = {}
        self._body = bytearray()

    def feed(self, data: bytes) -> None:
        """Take in bytes.

        Raises:
            httptools.HttpParserError: they are no HTTP/1.1.
        """
        self._parser.feed_data(data)

    # What follows is called by httptools.

    def on_message_begin(self) -> None:
        """A request begins."""
        self._target, self._headers, self._body = b"", {}, bytearray()

    def on_url(self, part: bytes) -> None:
        """A part of the target."""
        self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        """A whole header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, part: bytes) -> None:
        """A part of the body."""
        self._body += part

    def on_message_complete(self) -> None:
        """A request ends."""
        method = self._parser.get_method().decode("latin-1")
        self.requests.append(HttpRequest(method, self._target.decode("latin-1"), self._headers, bytes(self._body)))
