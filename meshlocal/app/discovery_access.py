"""Who may talk to a discovery server, over what, and about which services: its certificate, authorities and tokens,
from files that may change."""

from __future__ import annotations

import logging
import ssl
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import trio

from meshlocal.net.following import FileProblemError, Followed
from meshlocal.net.grpc.server import Handler, Routes, ServerCall
from meshlocal.net.log import RateLimited, get_log
from meshlocal.net.tls import SvidSource, TlsContext, server_context
from meshlocal.policy.config import DiscoveryServerConfig
from meshlocal.policy.config_build import ConfigError
from meshlocal.policy.identity import identities, is_identity, is_svid
from meshlocal.policy.problems import Problem
from meshlocal.policy.visibility import Visibility
from meshlocal.wire.grpc.status import GrpcError, StatusCode

_SCHEME = "bearer "

_WARNING_INTERVAL = 5.0

_log = get_log(__name__)


class DiscoveryAccess:
    """The certificate, the authorities and the tokens of one server, and what callers may see. To make it reads files.

    Args:
        config: names the files.
        workload: gives the certificate and the clients' authorities in their place.

    Raises:
        ConfigError: a file cannot be used.

    Attributes:
        tls: whether connections are over TLS.
        refused: how many calls were, by why: `unauthenticated` or `not_allowed`.
    """

    def __init__(self, config: DiscoveryServerConfig, workload: SvidSource | None = None) -> None:
        self._config = config
        self.tls = config.is_tls
        self.refused: Counter[str] = Counter(unauthenticated=0, not_allowed=0)
        self._visibility = Visibility(config.allow)
        self._tokens: Followed[Mapping[bytes, str]] | None = None
        self._contexts: dict[str, Followed[TlsContext]] = {}
        self._told = RateLimited(_log, logging.WARNING, "discovery call refused", interval=_WARNING_INTERVAL)
        try:
            if config.tokens_file is not None:
                self._tokens = Followed([config.tokens_file], partial(_read_tokens, config.tokens_file))
            certificate = config.tls_certificate_file or workload
            if certificate is not None:
                # Over HTTP/2 a server that takes no ALPN is none; WebSocket is of HTTP/1.1.
                for kind, protocol in (("grpc", "h2"), ("websocket", "http/1.1")):
                    self._contexts[kind] = self._follow_context(
                        certificate, config.tls_client_ca_file or workload, protocol
                    )
        except FileProblemError as error:
            raise self._problem(error) from None

    def _follow_context(
        self, certificate: str | SvidSource, authorities: str | SvidSource | None, protocol: str
    ) -> Followed[TlsContext]:
        config = self._config
        make = partial(
            server_context,
            certificate,
            config.tls_key_file,
            client_ca_file=authorities,
            # A token will do for who has no certificate.
            required=config.tokens_file is None,
            minimum="1.2",
            protocols=(protocol,),
        )
        return Followed((certificate, config.tls_key_file, authorities), make)

    def followed(self) -> Iterator[Followed[Any]]:
        """What is made of files."""
        yield from self._contexts.values()
        if self._tokens is not None:
            yield self._tokens

    def reload(self) -> None:
        """Read the files that changed. Connections that are open go on; if a file cannot be used, nothing changes.

        Raises:
            ConfigError: a file cannot be used.
        """
        try:
            found = [(followed, followed.read()) for followed in self.followed()]
        except FileProblemError as error:
            raise self._problem(error) from None
        for followed, made in found:
            if made is not None:
                followed.adopt(made)

    def _problem(self, error: FileProblemError) -> ConfigError:
        names = ("tls_certificate_file", "tls_key_file", "tls_client_ca_file", "tokens_file")
        key = next((name for name in names if getattr(self._config, name) == error.file), "tls_workload_api")
        return ConfigError([Problem(f"discovery.{key}", str(error), "")])

    def grpc_context(self) -> ssl.SSLContext:
        """What the next gRPC connection is served over TLS with."""
        return self._contexts["grpc"].current[0]

    def websocket_context(self) -> ssl.SSLContext:
        """What the next WebSocket connection is served over TLS with."""
        return self._contexts["websocket"].current[0]

    def guard(self, handlers: Routes) -> Routes:
        """Handlers like these, for callers that may call; what each may see is its call's `caller`, a `View`."""
        return {method: self._guarded(handler) for method, handler in handlers.items()}

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(call: ServerCall[Any, Any]) -> None:
            try:
                names = self._authenticate(call)
            except GrpcError as error:
                self._refuse("unauthenticated", error.message, call.peer)
                raise
            view = self._visibility.view(names)
            if view is None:
                problem = f"{', '.join(names) or 'a caller without a name'} is not in discovery.allow"
                self._refuse("not_allowed", problem, call.peer)
                raise GrpcError(StatusCode.PERMISSION_DENIED, problem)
            call.caller = view
            await handler(call)

        return guarded

    def _refuse(self, why: str, problem: str, peer: str) -> None:
        self.refused[why] += 1
        self._told(trio.current_time(), client=peer, problem=problem)

    def _authenticate(self, call: ServerCall[Any, Any]) -> Sequence[str]:
        """The names that a caller proved.

        Raises:
            GrpcError: UNAUTHENTICATED, it proved nothing where it must.
        """
        trust_domain = next((each.current[0].trust_domain for each in self._contexts.values()), None)
        proved = list(identities(call.certificate, trust_domain))
        if call.certificate and not is_svid(proved, trust_domain):
            raise GrpcError(StatusCode.UNAUTHENTICATED, f"no identity of the trust domain {trust_domain}")
        if self._tokens is None:
            return proved
        sent = dict(call.metadata).get("authorization", "")
        if not sent and call.certificate:
            return proved
        if not isinstance(sent, str) or not sent[: len(_SCHEME)].lower() == _SCHEME:
            raise GrpcError(StatusCode.UNAUTHENTICATED, "a bearer token is needed")
        # By digest: how long the comparison takes tells nothing of a token.
        name = self._tokens.current[0].get(_digest(sent[len(_SCHEME) :].strip()))
        if name is None:
            raise GrpcError(StatusCode.UNAUTHENTICATED, "the token is not known")
        return [*proved, name] if name else proved


def _read_tokens(file: str) -> Mapping[bytes, str]:
    """The names that stand behind tokens, by the tokens' digests.

    Raises:
        FileProblemError: the file holds no token, or cannot be read.
    """
    tokens: dict[bytes, str] = {}
    try:
        for number, line in enumerate(Path(file).read_text().splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            token, comma, name = (part.strip() for part in line.partition(","))
            # The line is not shown: it holds a secret.
            if not token or (comma and not is_identity(name)):
                raise ValueError(f"line {number}: expected TOKEN, or TOKEN,NAME with a name such as web or a SPIFFE ID")
            tokens[_digest(token)] = name
        if not tokens:
            raise ValueError("holds no token")
    except (OSError, ValueError) as error:
        raise FileProblemError(file, error) from None
    return tokens


def _digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogateescape")).digest()
