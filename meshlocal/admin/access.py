"""Who may read the admin pages: under which names they are asked for, and with which token."""

from __future__ import annotations

import base64
import binascii
import hmac
import ssl
from collections.abc import Iterator
from functools import partial
from typing import Any

from meshlocal.admin.messages import Request, Response
from meshlocal.net.following import Followed
from meshlocal.net.tls import server_context
from meshlocal.net.token_file import read_token
from meshlocal.policy.config_access import AdminAccessConfig
from meshlocal.policy.hosts import host_of, is_own_host, is_own_origin

OPEN = ("/livez", "/readyz")
"""Pages for probes, which say no more than that: they may call the server what they like, and send no token."""


class AdminAccess:
    """Decides on requests for admin pages. To make it reads files.

    Args:
        config: the section `admin_access`.
        section: whose it is, for what is said: `proxy` or `discovery`.

    Raises:
        FileProblemError: a file cannot be used.
    """

    def __init__(self, config: AdminAccessConfig, section: str) -> None:
        self._names = frozenset(name.lower() for name in config.names)
        self._key = f"{section}.admin_access"
        self._token: Followed[str] | None = None
        self._context: Followed[ssl.SSLContext] | None = None
        if config.token_file is not None:
            self._token = Followed([config.token_file], partial(read_token, config.token_file))
        if config.certificate_file is not None:
            make = partial(
                server_context,
                config.certificate_file,
                config.key_file,
                client_ca_file=None,
                required=False,
                minimum="1.2",
                protocols=("http/1.1",),
            )
            self._context = Followed([config.certificate_file, config.key_file], make)

    @property
    def scheme(self) -> str:
        """Of the pages' URLs."""
        return "http" if self._context is None else "https"

    @property
    def context(self) -> ssl.SSLContext | None:
        """What the next connection is served over TLS with; None: without TLS."""
        return self._context.current[0] if self._context is not None else None

    def followed(self) -> Iterator[Followed[Any]]:
        """What is made of files."""
        if self._token is not None:
            yield self._token
        if self._context is not None:
            yield self._context

    def refusal(self, request: Request, local: str) -> Response | None:
        """The answer to a request that is none of those that may read; None: it may.

        Args:
            request: what was asked.
            local: the address that its connection was made to.
        """
        if request.path in OPEN:
            return None
        host = host_of(request.headers.get("host", ""))
        if "host" in request.headers and not is_own_host(host, local, self._names):
            named = (host or "")[:256]
            return Response.text(f"this server goes by no name {named!r}; {self._key}.names lists others", 421)
        origin = request.headers.get("origin")
        if origin is not None and not is_own_origin(origin, host, ()):
            return Response.text("pages of other origins may not read this one", 403)
        if self._token is not None and not self._knows(request.headers.get("authorization", "")):
            challenge = (
                ("WWW-Authenticate", 'Bearer realm="meshlocal"'),
                ("WWW-Authenticate", 'Basic realm="meshlocal"'),
            )
            return Response.text("a token is needed, as a bearer token or as the password of any user", 401)._replace(
                headers=challenge
            )
        return None

    def _knows(self, authorization: str) -> bool:
        assert self._token is not None
        scheme, _, sent = authorization.partition(" ")
        token = sent.strip().encode("latin-1")
        if scheme.lower() == "basic":
            try:
                token = base64.b64decode(token, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        # In constant time: how long it takes tells nothing of the token.
        return hmac.compare_digest(token, self._token.current[0].encode())
