"""Why a server could not be connected, for people."""

from __future__ import annotations

import os
import socket
import ssl

import anyio

CONNECT_ERRORS = (OSError, ValueError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError)
"""What anyio raises when a connection, or TLS over it, comes to nothing: a server that ends or resets the connection
within the handshake is no `OSError` to it, nor is a name that can be nobody's."""

STREAM_ERRORS = (OSError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError)
"""What anyio raises on a stream that is over, whatever is done with it: over TLS, to send ends likewise as to receive,
and an alert (RFC 8446, 6), by which a server refuses a client's certificate behind the handshake, is an `OSError`."""


def why_not_connected(error: BaseException) -> str:
    """Why a connect failed, in the system's words. anyio wraps one error for each address that it tried."""
    if error.__cause__ is not None:
        return why_not_connected(error.__cause__)
    if isinstance(error, BaseExceptionGroup):
        return ", ".join(dict.fromkeys(map(why_not_connected, error.exceptions)))
    if isinstance(error, anyio.EndOfStream):
        return "the server ended the connection within the TLS handshake"
    if not isinstance(error, OSError):
        return str(error) or "the connection broke off"
    # trio puts the address into the system's words. A resolver's and TLS's numbers are none of the system's.
    foreign = isinstance(error, socket.gaierror | ssl.SSLError) or not error.errno
    text = (error.strerror if foreign else os.strerror(error.errno or 0)) or str(error)
    return text[:1].lower() + text[1:]
