"""TLS over a socket, as a `Pipe` (RFC 8446; rules T1, T2).

Theory of operation. OpenSSL has no socket of ours: what comes is put into one memory BIO, and what is to go out taken
from another, so that a handshake, a record and an alert each cost the system calls that they need and no more.

What was encrypted and is not sent yet is held here, one call's worth at most, and what it was made of counts as not
written: who writes comes again with the same bytes, as with a socket that took none of them. An end without the other
side's close_notify is a failure (RFC 8446, 6.1): a stream that was cut must not look complete.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256

from trio.lowlevel import checkpoint, notify_closing, wait_readable, wait_writable

from meshlocal.net.sockets import abort, close
from meshlocal.net.tls import certificate_of
from meshlocal.net.tls_error import TlsError

CHUNK = 65_536
"""Bytes that are encrypted at once."""

RECEIVED = 66_560
"""Bytes that are taken from the socket at once: four records of the largest kind (RFC 8446, 5.2)."""

PARTING = 65_536
"""Bytes that are read, and let go, of somebody whose handshake failed."""

BARREN = 65_536
"""Bytes that may come in a row without any data in them: a few records of TLS's own are all that anybody needs."""


class TlsPipe:
    """A `Pipe` that is TLS over a connected, non-blocking socket. `handshake` comes first.

    Args:
        sock: the socket, whose holder this is from here on.
        context: with which certificate, and who is believed.
        server: which side this is.
        server_name: a client's: the name that is asked for (SNI), and, where the context checks names, must be proved.
        session: a client's: of an earlier connection made with this context, to be resumed.
        on_session: a client's: called with the session that the server gave, to be resumed by another.

    Attributes:
        identity: who the other side is, once somebody has found out; empty: not known.
        told: what an instance is told of that; see `Pipe.told`.
    """

    __slots__ = (
        "_ahead",
        "_barren",
        "_came",
        "_dry",
        "_ended",
        "_going",
        "_more",
        "_object",
        "_on_session",
        "_pending",
        "_sock",
        "_taken",
        "identity",
        "told",
    )

    plain = None

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server: bool = False,
        server_name: str | None = None,
        session: ssl.SSLSession | None = None,
        on_session: Callable[[ssl.SSLSession], None] | None = None,
    ) -> None:
        self._sock = sock
        self._came = ssl.MemoryBIO()
        self._going = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._came, self._going, server_side=server, server_hostname=server_name, session=session
        )
        self._pending: bytes | memoryview = b""
        self._taken = 0
        self._ahead = b""
        self._barren = 0
        self._dry = False
        self._ended = False
        # The handshake may have left some.
        self._more = True
        self._on_session = on_session
        self.identity = ""
        self.told = b""

    # What was agreed on.

    @property
    def certificate(self) -> Mapping[str, object]:
        """The other side's, as `ssl.SSLObject.getpeercert` gives it; empty if it showed none that was checked.

        Raises:
            TlsError: it makes no sense.
        """
        return certificate_of(self._object)

    @property
    def certificate_digest(self) -> str:
        """The SHA-256 of the other side's in DER, in hexadecimal digits; empty if it showed none."""
        encoded = self._object.getpeercert(binary_form=True)
        return sha256(encoded).hexdigest() if encoded is not None else ""

    @property
    def protocol(self) -> str | None:
        """What is spoken inside, as ALPN settled it (RFC 7301); None: nothing was said of it."""
        return self._object.selected_alpn_protocol()

    @property
    def resumed(self) -> bool:
        """Whether an earlier session was."""
        return bool(self._object.session_reused)

    @property
    def version(self) -> str:
        """Of TLS."""
        return self._object.version() or ""

    # The handshake.

    async def handshake(self) -> None:
        """Shake hands. The caller's cancel scope is the deadline; the pipe stays the caller's, to be aborted.

        Raises:
            TlsError: the other side proved nothing, or nothing that was wanted, or spoke no TLS. It was told so.
            OSError: the connection failed.
        """
        while True:
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                await self._send()
            except ssl.SSLError as error:
                self._pending = self._going.read()
                with suppress(OSError):
                    self._flush()
                raise TlsError(why(error)) from None
            else:
                await self._send()
                return
            await wait_readable(self._sock)
            if self._receive() == 0:
                raise TlsError("the other side ended the connection in the handshake")

    async def part(self) -> None:
        """Behind a handshake that failed, let the other side read why: to close with bytes unread would be a reset,
        which overtakes the alert (RFC 1122, 4.2.2.13). The caller's cancel scope is the deadline."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            read = 0
            while read < PARTING:
                await wait_readable(self._sock)
                try:
                    data = self._sock.recv(RECEIVED)
                except BlockingIOError:
                    continue
                if not data:
                    return
                read += len(data)

    async def _send(self) -> None:
        self._pending = self._going.read()
        while not self._flush():
            await wait_writable(self._sock)

    # Bytes.

    def fileno(self) -> int:
        """See `Pipe.fileno`."""
        return self._sock.fileno()

    @property
    def may_hold(self) -> bool:
        """See `Pipe.may_hold`."""
        return bool(not self._dry or self._more or self._came.pending or self._ahead)

    def read(self, size: int) -> bytes | None:
        """See `Pipe.read`."""
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
            return data
        if self._ended:
            return b""
        # Where OpenSSL has nothing, to ask it first would cost an exception.
        if not (self._more or self._came.pending) and self._receive() is None:
            return None
        while True:
            try:
                data = self._object.read(size)
                # A record that is longer than what was asked for stays with OpenSSL.
                self._more = len(data) == size
            except ssl.SSLWantReadError:
                self._more = False
                self._answer()
                if self._barren > BARREN:
                    raise TlsError("much came that holds no data") from None
                if self._came.eof:
                    raise ConnectionResetError(errno.ECONNRESET, "ended amid a record") from None
                # What came held no data. Only a socket that says so has nothing more: an end that came with it is
                # announced no second time.
                if self._receive() is None:
                    return None
            except ssl.SSLEOFError:
                raise ConnectionResetError(errno.ECONNRESET, "ended without close_notify") from None
            except ssl.SSLZeroReturnError:
                self._ended = True
                return b""
            except ssl.SSLError as error:
                self._answer()
                raise TlsError(why(error)) from None
            else:
                if self._on_session is not None and data:
                    self._tell_session(self._on_session)
                # Data, or close_notify. What it may have to be answered with, a change of keys, goes out with it.
                self._answer()
                self._barren = 0
                self._ended = not data
                return data

    def _tell_session(self, on_session: Callable[[ssl.SSLSession], None]) -> None:
        """With the first bytes: in TLS 1.3 the server gives it behind the handshake, before what it says itself."""
        self._on_session = None
        session = self._object.session
        if session is not None:
            on_session(session)

    def _receive(self) -> int | None:
        """Take what came from the socket: how many bytes, 0 at its end; None if nothing came."""
        try:
            data = self._sock.recv(RECEIVED)
        except BlockingIOError:
            self._dry = True
            return None
        # Edge or level, what comes after a read that was not filled is announced (epoll(7), Q9); an end is not, behind
        # bytes that came with it.
        self._dry = 0 < len(data) < RECEIVED
        self._barren += len(data)
        if data:
            self._came.write(data)
        else:
            self._came.write_eof()
        return len(data)

    def _answer(self) -> None:
        """Send what TLS has to say by itself, unless what goes before it is still held: then with that."""
        if self._going.pending and not self._pending:
            self._pending = self._going.read()
            with suppress(OSError):
                # That nothing can be sent is no reason not to read; who writes is told.
                self._flush()

    def write(self, data: bytes | memoryview) -> int:
        """See `Pipe.write`. What is given after 0 begins with what was given before."""
        if self._pending:
            if not self._flush():
                return 0
            taken, self._taken = self._taken, 0
            if taken:
                return taken
        if not data:
            return 0
        try:
            taken = self._object.write(data if len(data) <= CHUNK else memoryview(data)[:CHUNK])
        except ssl.SSLWantReadError:
            return 0
        except ssl.SSLError as error:
            raise BrokenPipeError(errno.EPIPE, why(error)) from None
        going = self._going.read()
        try:
            sent = self._sock.send(going)
        except BlockingIOError:
            sent = 0
        if sent == len(going):
            return taken
        self._pending = memoryview(going)[sent:]
        self._taken = taken
        return 0

    def _flush(self) -> bool:
        """Send what is held; whether all of it is gone."""
        while self._pending:
            try:
                sent = self._sock.send(self._pending)
            except BlockingIOError:
                return False
            self._pending = memoryview(self._pending)[sent:]
        self._pending = b""
        return True

    def peek(self, size: int) -> bytes | None:
        """See `Pipe.peek`."""
        if not self._ahead:
            data = self.read(CHUNK)
            if not data:
                return data
            self._ahead = data
        return self._ahead[:size]

    def has_input(self) -> bool:
        """See `Pipe.has_input`."""
        if self._ahead:
            return True
        try:
            return bool(self._sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False

    # Its end.

    def end(self) -> None:
        """See `Pipe.end`: close_notify (RFC 8446, 6.1). What comes from the other side can still be read."""
        self._say_goodbye()

    @property
    def is_unsent(self) -> bool:
        """See `Pipe.is_unsent`."""
        return bool(self._pending)

    def _say_goodbye(self) -> None:
        # `unwrap` looks for the other side's close_notify, and fails for good where it finds data.
        with suppress(ssl.SSLError):
            while data := self._object.read(CHUNK):
                self._ahead += data
            self._ended = True
        with suppress(ssl.SSLError):
            # The other side's is waited for by who reads.
            self._object.unwrap()
        self._pending = bytes(self._pending) + self._going.read()
        self._flush()

    def close(self) -> None:
        """See `Pipe.close`."""
        if self._sock.fileno() != -1:
            with suppress(OSError):
                self._say_goodbye()
            close(self._sock)

    def abort(self) -> None:
        """See `Pipe.abort`."""
        abort(self._sock)

    def interrupt(self) -> None:
        """See `Pipe.interrupt`."""
        notify_closing(self._sock)

    def stop_reading(self) -> None:
        """See `Pipe.stop_reading`."""
        self._sock.shutdown(socket.SHUT_RD)

    async def wait_readable(self) -> None:
        """See `Pipe.wait_readable`."""
        if not self.may_hold:
            await wait_readable(self._sock)
        else:
            # What came of the socket may hold more than the last `read` gave.
            await checkpoint()

    async def wait_writable(self) -> None:
        """See `Pipe.wait_writable`."""
        await wait_writable(self._sock)


def why(error: ssl.SSLError) -> str:
    """What went wrong, in OpenSSL's words without its numbers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if error.reason:
        return error.reason.lower().replace("_", " ")
    return error.strerror or os.strerror(errno.EPROTO)
