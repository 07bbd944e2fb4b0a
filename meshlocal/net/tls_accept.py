"""The handshake with who connects to a server of our own, on Trio's streams."""

from __future__ import annotations

import ssl
from contextlib import suppress

import trio

from meshlocal.net.tls import certificate_of, has_expired
from meshlocal.net.tls_error import TlsError
from meshlocal.net.trio_internals import last_words
from meshlocal.net.wall_clock import wall_clock

TIMEOUT = 10.0
"""Seconds that a client's handshake may take."""

ALERT_TIMEOUT = 1.0
ALERT_READ = 65_536
"""Seconds that a client who is refused may take to read why, and bytes of its that are read meanwhile."""


async def accept_tls(stream: trio.abc.Stream, context: ssl.SSLContext) -> trio.SSLStream[trio.abc.Stream] | None:
    """Shake hands as the server.

    Returns:
        The stream inside TLS; None: nothing came of it, the client was told so as far as TLS can, and the stream is
        closed.
    """
    secured = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
    done = False
    try:
        with trio.move_on_after(TIMEOUT):
            await secured.do_handshake()
            certificate = certificate_of(secured)
            done = not has_expired(certificate, resumed=bool(secured.session_reused), now=wall_clock())
    except TlsError:
        # Its certificate makes no sense: nothing can be said to that.
        pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        # It left, or what it sent is no TLS, or not the TLS that is wanted.
        with trio.move_on_after(ALERT_TIMEOUT):
            await _part(stream, last_words(secured))
    finally:
        if not done:
            await trio.aclose_forcefully(stream)
    return secured if done else None


async def _part(stream: trio.abc.Stream, alert: bytes) -> None:
    """Say the alert, and read on for a moment: to close with bytes unread would reset the connection before that is
    read."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        if alert:
            await stream.send_all(alert)
        if isinstance(stream, trio.abc.HalfCloseableStream):
            await stream.send_eof()
        read = 0
        while read < ALERT_READ and (data := await stream.receive_some(4096)):
            read += len(data)
