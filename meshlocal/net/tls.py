"""TLS contexts made of files, which follow the files (rule T3): new certificates are for new connections.

All of it reads files, so that none of it may be called in the event loop (P1): who runs one calls it in a thread
(`meshlocal.net.blocking`).
"""

from __future__ import annotations

import os
import ssl
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
        for file in filter(None, (self._certificate_file, self._key_file)):
            try:
                # What ssl says of a file that is missing does not say which.
                Path(file).open("rb").close()
            except OSError as error:
                raise FileProblemError(file, error) from None
        try:
            context.load_cert_chain(self._certificate_file, self._key_file)
        except (OSError, ValueError) as error:
            raise FileProblemError(self._certificate_file, error) from None


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
        made_of: object = ()
        if self._ca_file is not None:
            found = os.stat(self._ca_file)
            made_of = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if self._context is None or made_of != self._made_of:
            self._context = ssl.create_default_context(cafile=self._ca_file)
            self._made_of = made_of
        return self._context


def why(error: Exception) -> str:
    """What is wrong with a file, in the system's words where it has some."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
