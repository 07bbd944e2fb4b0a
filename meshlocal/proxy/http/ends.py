"""How requests and connections end."""

from __future__ import annotations

from enum import Enum


class End(Enum):
    """What becomes of a client's connection after a request."""

    KEEP = "keep"
    """The connection is ready for the next request."""
    CLOSE = "close"
    """The connection is closed."""
    LINGER = "linger"
    """The connection is closed, but the client may still be sending: to close at once would cost it the answer."""
    ABORT = "abort"
    """The connection is reset: what was sent on it must not look complete."""


class ClientLeftError(Exception):
    """The client reset its connection (A8)."""


class CutError(Exception):
    """A response broke off after some of it went to the client."""


class AttemptTimeoutError(Exception):
    """An instance's time, or the request's, ran out before a response's head."""


class Expiry(Enum):
    """What a connection waits for, and so what happens when that does not come in time."""

    FIRST = "first"
    """For a connection's first request: it is closed without a word, as it never said one. Browsers open spare ones."""
    IDLE = "idle"
    """The next request: closed without a word."""
    HEAD = "head"
    """The rest of a head: 408."""
    BODY = "body"
    """More of a request's body: 408, unless a response was begun."""
    TRANSFER = "transfer"
    """More of a response, or that the client takes it: reset."""
