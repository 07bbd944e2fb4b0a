"""Asks a running proxy at its admin address."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import NamedTuple

from meshlocal.admin.streaming import LINES
from meshlocal.app.query import QueryError
from meshlocal.net.following import FileProblemError
from meshlocal.net.tls import client_context
from meshlocal.net.token_file import read_token
from meshlocal.policy.addresses import AddressError, SocketAddress
from meshlocal.policy.config_build import ConfigError
from meshlocal.policy.exposure import is_loopback
from meshlocal.policy.problems import Problem

NO_PROXY = "{} does not answer as a proxy's admin address does"
"""What is said of an address at which something else answers."""

_TIMEOUT = 5.0
_SILENCE = 60.0
"""Seconds after which a stream that says nothing at all is taken for dead: it says so much sooner that it lives."""


class Answer(NamedTuple):
    """What was answered."""

    status: int
    headers: Message
    body: bytes

    @property
    def word(self) -> str | None:
        """What it says in one line of text; None if it says something else."""
        text = self.body.decode(errors="replace").strip()
        return text if self.headers.get_content_type() == "text/plain" and "\n" not in text else None


class Admin:
    """The admin pages of a proxy.

    Args:
        address: as given: HOST:PORT, or as the line has it that says that the process is ready.
        ca_file: the authorities of an https:// address, in PEM; None: those of the system.
        token_file: holds the token that the pages want; None: they want none.

    Raises:
        ConfigError: that is no address, or a file cannot be used.
    """

    def __init__(self, address: str, ca_file: str | None, token_file: str | None) -> None:
        self.address = address
        try:
            self._place = SocketAddress.parse(address.removeprefix("http://").removeprefix("https://").rstrip("/"))
        except AddressError as error:
            raise ConfigError([Problem("", str(error), "--proxy")]) from None
        secure = address.startswith("https://")
        self._headers = {}
        self._context: ssl.SSLContext | None = None
        if token_file is not None:
            if not secure and not is_loopback(self._place.host):
                problem = "no token goes over plaintext beyond this machine: ask at https://"
                raise ConfigError([Problem("", problem, "--token-file")])
            with _blamed("--token-file"):
                self._headers["Authorization"] = f"Bearer {read_token(token_file)}"
        if secure:
            with _blamed("--ca-file"):
                self._context = client_context(
                    ca_file, None, None, check_name=True, minimum="1.2", protocols=("http/1.1",)
                )

    def get(self, target: str) -> Answer:
        """A page.

        Raises:
            QueryError: nobody answers, or not in HTTP.
        """
        with self._asked(target) as response:
            return Answer(response.status, response.headers, response.read())

    def lines(self, target: str) -> Iterator[bytes]:
        """The lines of a page that goes on, as they come, to its end.

        Raises:
            QueryError: nobody answers, or there is no such page.
        """
        with self._asked(target, silence=_SILENCE) as response:
            if response.status != 200:
                answer = Answer(response.status, response.headers, response.read())
                raise QueryError(f"{self.address}: {answer.word or f'status {response.status}'}")
            if response.headers.get_content_type() != LINES:
                raise QueryError(NO_PROXY.format(self.address))
            while line := response.readline():
                if line.strip():
                    yield line

    @contextmanager
    def _asked(self, target: str, *, silence: float = _TIMEOUT) -> Iterator[HTTPResponse]:
        host, port = self._place.host, self._place.port
        connection = (
            HTTPConnection(host, port, timeout=_TIMEOUT)
            if self._context is None
            else HTTPSConnection(host, port, timeout=_TIMEOUT, context=self._context)
        )
        try:
            connection.connect()
            connection.sock.settimeout(silence)
            connection.request("GET", target, headers=self._headers)
            with connection.getresponse() as response:
                yield response
        except (OSError, HTTPException) as error:
            # What came in place of HTTP is some other program's, and nothing to print.
            why = "its answer is no HTTP"
            if isinstance(error, OSError):
                foreign = isinstance(error, ssl.SSLError) or not error.errno
                why = (str(error) or type(error).__name__) if foreign else os.strerror(error.errno or 0).lower()
            raise QueryError(f"cannot ask the proxy at {self.address}: {why}") from None
        finally:
            connection.close()


@contextmanager
def _blamed(option: str) -> Iterator[None]:
    try:
        yield
    except FileProblemError as error:
        raise ConfigError([Problem("", str(error), option)]) from None
