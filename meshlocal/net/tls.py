"""TLS contexts made of files, which follow the files (rule T3): new certificates are for new connections.

All of it reads files, so that none of it may be called in the event loop (P1): who runs one calls it in a thread
(`meshlocal.net.blocking`).
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


class FileProblemError(Exception):
    """A file cannot be used.

    Attributes:
        file: its path.
        cause: why.
    """

    def __init__(self, file: str, cause: OSError | ValueError) -> None:
        super().__init__(f"{file}: {why(cause)}")
        self.file = file
        self.cause = cause


class ServerContexts:
    """A server's certificate, and the contexts that serve with it.

    Args:
        certificate_file: its chain, in PEM.
        key_file: its key, in PEM; None: it stands with the chain.

    Raises:
        FileProblemError: a file cannot be used.
    """

    def __init__(self, certificate_file: str, key_file: str | None) -> None:
        self._certificate_file = certificate_file
        self._key_file = key_file
        self._made: list[ssl.SSLContext] = []
        self.reload()

    def reload(self) -> None:
        """Read the files again, for all contexts. Connections that are open go on.

        Raises:
            FileProblemError: a file cannot be used; nothing changes.
        """
        # First into one that is thrown away: a key that does not fit would spoil those in use.
        self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        for context in self._made:
            self._load(context)

    def context(self) -> ssl.SSLContext:
        """A context for one server, which follows each reload.

        Raises:
            FileProblemError: a file cannot be used.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load(context)
        self._made.append(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        load_chain(context, self._certificate_file, self._key_file)


class ClientContext:
    """A client's context, made anew once its file changed.

    Args:
        ca_file: the authorities that a server's certificate must come from, in PEM; None: those of the system.
    """

    def __init__(self, ca_file: str | None) -> None:
        self._ca_file = ca_file
        self._context: ssl.SSLContext | None = None
        self._made_of: object = None

    def get(self) -> ssl.SSLContext:
        """The context of the file as it is now.

        Raises:
            OSError, ValueError: it cannot be used.
        """
        made_of = _stamp(self._ca_file) if self._ca_file is not None else ()
        if self._context is None or made_of != self._made_of:
            self._context = ssl.create_default_context(cafile=self._ca_file)
            self._made_of = made_of
        return self._context


class FollowedContext:
    """A context made of files, and made anew once one of them changed (T3).

    Args:
        files: that `make` reads.
        make: gives the context.

    Raises:
        FileProblemError: a file cannot be used.

    Attributes:
        current: the context of the files as they were when they could last be used, and how often it was made anew.
    """

    def __init__(self, files: Iterable[str | None], make: Callable[[], ssl.SSLContext]) -> None:
        self._files = tuple(file for file in files if file is not None)
        self._make = make
        self._made_of = _stamps(self._files)
        self.current = make(), 0

    def look(self) -> bool:
        """Look at the files; whether there is another context now.

        Raises:
            FileProblemError: one cannot be used; the context stays.
        """
        made_of = _stamps(self._files)
        if made_of == self._made_of:
            return False
        # Both at once: who looks at them is another thread.
        self.current = self._make(), self.current[1] + 1
        self._made_of = made_of
        return True


def _stamp(file: str) -> tuple[int, ...]:
    """What changes when a file does: also where a link leads, as volumes of Kubernetes swap one."""
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _stamps(files: Iterable[str]) -> tuple[object, ...]:
    found: list[object] = []
    for file in files:
        try:
            found.append(_stamp(file))
        except OSError as error:
            raise FileProblemError(file, error) from None
    return tuple(found)


VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def server_context(
    certificate_file: str,
    key_file: str | None,
    *,
    client_ca_file: str | None,
    required: bool,
    minimum: str,
    protocols: Sequence[str],
) -> ssl.SSLContext:
    """A server's context.

    Args:
        certificate_file: its chain, in PEM.
        key_file: its key; None: it stands with the chain.
        client_ca_file: the authorities of clients' certificates; None: clients are not asked for one.
        required: they must have one, if they are asked.
        minimum: the least version of TLS, a key of `VERSIONS`.
        protocols: what is spoken inside, the best first (ALPN); empty: nothing is said of it.

    Raises:
        FileProblemError: a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = VERSIONS[minimum]
    # Nothing is renegotiated: it was a way to exhaust servers, and TLS 1.3 has none (RFC 8446, 4.1.2).
    context.options |= ssl.OP_NO_RENEGOTIATION
    load_chain(context, certificate_file, key_file)
    if client_ca_file is not None:
        load_authorities(context, client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


def client_context(
    ca_file: str | None,
    certificate_file: str | None,
    key_file: str | None,
    *,
    check_name: bool,
    minimum: str,
    protocols: Sequence[str],
) -> ssl.SSLContext:
    """A client's context, which believes no certificate that its authorities did not sign.

    Args:
        ca_file: the authorities of servers' certificates, in PEM; None: those of the system.
        certificate_file: its own chain, if it has one.
        key_file: its key; None: it stands with the chain.
        check_name: the server's name must be in its certificate.
        minimum: as in `server_context`.
        protocols: as in `server_context`.

    Raises:
        FileProblemError: a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = VERSIONS[minimum]
    context.check_hostname = check_name
    # A common name proves nothing (RFC 9525, 6.3).
    context.hostname_checks_common_name = False
    if ca_file is not None:
        load_authorities(context, ca_file)
    else:
        context.load_default_certs()
    if certificate_file is not None:
        load_chain(context, certificate_file, key_file)
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


def load_authorities(context: ssl.SSLContext, file: str) -> None:
    """Have a context believe these authorities.

    Raises:
        FileProblemError: the file cannot be used.
    """
    try:
        context.load_verify_locations(file)
    except (OSError, ValueError) as error:
        raise FileProblemError(file, error) from None


def load_chain(context: ssl.SSLContext, certificate_file: str, key_file: str | None) -> None:
    """Have a context prove itself with this certificate.

    Raises:
        FileProblemError: a file cannot be used.
    """
    for file in filter(None, (certificate_file, key_file)):
        try:
            # What ssl says of a file that is missing does not say which.
            Path(file).open("rb").close()
        except OSError as error:
            raise FileProblemError(file, error) from None
    try:
        # A key with a password would ask for it on the terminal.
        context.load_cert_chain(certificate_file, key_file, password=_no_password)
    except (OSError, ValueError) as error:
        raise FileProblemError(certificate_file, error) from None


def _no_password() -> str:
    raise ValueError("the key has a password")


def why(error: Exception) -> str:
    """What is wrong with a file, in the system's words where it has some."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
