"""httpx and httpx2: two libraries of one interface, each over an httpcore of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from meshlocal.library.http_errors import HttpErrors

_SHARED = (
    "ConnectError",
    "ConnectTimeout",
    "LocalProtocolError",
    "PoolTimeout",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "UnsupportedProtocol",
    "WriteError",
    "WriteTimeout",
)
"""Errors that both layers have."""


class HttpKind:
    """One of the two.

    Args:
        httpx: the library.
        httpcore: what it stands on.
        errors: what its transport raises.

    Attributes:
        httpx, httpcore, errors: as given.
    """

    def __init__(self, httpx: ModuleType, httpcore: ModuleType, errors: HttpErrors) -> None:
        self.httpx = httpx
        self.httpcore = httpcore
        self.errors = errors
        self._above: dict[type, type[Exception]] = {getattr(httpcore, name): getattr(httpx, name) for name in _SHARED}

    @contextmanager
    def as_httpx_errors(self) -> Iterator[None]:
        """httpcore's errors become httpx's of the same name."""
        try:
            yield
        except Exception as error:
            kind = self._above.get(type(error))
            if kind is None:
                raise
            raise kind(str(error)) from error
