"""Who may talk to a discovery server, and over what: its certificate and its tokens, from files that may change."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from meshlocal.net.grpc.server import Handler, Routes, ServerCall
from meshlocal.net.tls import FileProblemError, ServerContexts, why
from meshlocal.policy.config import DiscoveryServerConfig
from meshlocal.policy.config_build import ConfigError
from meshlocal.policy.problems import Problem
from meshlocal.wire.grpc.status import GrpcError, StatusCode

_SCHEME = "bearer "


class DiscoveryAccess:
    """The certificate and the tokens of one server.

    Args:
        config: names the files.

    Raises:
        ConfigError: a file cannot be used.

    Attributes:
        tls: whether connections are over TLS.
    """

    def __init__(self, config: DiscoveryServerConfig) -> None:
        self._config = config
        self.tls = config.tls_certificate_file is not None
        self._contexts: ServerContexts | None = None
        self._tokens: frozenset[bytes] | None = None
        self.reload()

    def reload(self) -> None:
        """Read the files again. Connections that are open go on; if a file cannot be used, nothing changes.

        Raises:
            ConfigError: a file cannot be used.
        """
        config = self._config
        tokens = _read_tokens(config.tokens_file) if config.tokens_file is not None else None
        if config.tls_certificate_file is not None:
            try:
                if self._contexts is None:
                    self._contexts = ServerContexts(config.tls_certificate_file, config.tls_key_file)
                else:
                    self._contexts.reload()
            except FileProblemError as error:
                key = "tls_certificate_file" if error.file == config.tls_certificate_file else "tls_key_file"
                raise _problem(key, error.file, error.cause) from None
        self._tokens = tokens

    def context(self) -> ssl.SSLContext | None:
        """A TLS context for one server, which follows each reload; None without TLS."""
        return self._contexts.context() if self._contexts is not None else None

    def guard(self, handlers: Routes) -> Routes:
        """Handlers like these, for calls with a token only, if there are tokens."""
        if self._config.tokens_file is None:
            return handlers
        return {method: self._guarded(handler) for method, handler in handlers.items()}

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(call: ServerCall[Any, Any]) -> None:
            self._check(dict(call.metadata))
            await handler(call)

        return guarded

    def _check(self, metadata: Mapping[str, str | bytes]) -> None:
        sent = metadata.get("authorization", "")
        if not isinstance(sent, str) or not sent[: len(_SCHEME)].lower() == _SCHEME:
            raise GrpcError(StatusCode.UNAUTHENTICATED, "a bearer token is needed")
        # By digest: how long the comparison takes tells nothing of a token.
        if _digest(sent[len(_SCHEME) :].strip()) not in (self._tokens or ()):
            raise GrpcError(StatusCode.UNAUTHENTICATED, "the token is not known")


def _read_tokens(file: str) -> frozenset[bytes]:
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise _problem("tokens_file", file, error) from None
    tokens = frozenset(_digest(line.strip()) for line in lines if line.strip() and not line.startswith("#"))
    if not tokens:
        raise _problem("tokens_file", file, ValueError("holds no token"))
    return tokens


def _digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogateescape")).digest()


def _problem(key: str, file: str, error: Exception) -> ConfigError:
    return ConfigError([Problem(f"discovery.{key}", f"{file}: {why(error)}", "")])
