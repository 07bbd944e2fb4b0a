"""How requests and connections end."""

from __future__ import annotations

from enum import Enum


class End(Enum):
    """What becomes of a client's connection after a request."""

    KEEP = "keep"
    """It is ready for the next one."""
    CLOSE = "close"
    """It is closed."""
    LINGER = "linger"
    """It is closed, but the client may still be sending: to close at once would reset it, and cost it the answer."""
    ABORT = "abort"
    """It is reset: what was sent on it must not look complete."""


class ClientLeftError(Exception):
    """The client reset its connection (A8)."""


class CutError(Exception):
    """A response broke off after some of it went to the client."""


class AttemptTimeoutError(Exception):
    """An instance's time, or the request's, ran out before a response's head."""
