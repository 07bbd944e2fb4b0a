"""The library's errors as httpx's: what a request through `MeshTransport` raises is both."""

from __future__ import annotations

from collections.abc import Sequence

import httpx

from meshlocal.library.errors import (
    Attempt,
    AttemptsFailedError,
    DeadlineError,
    LimitedError,
    NoInstanceError,
    ServiceError,
)


class _HttpError(ServiceError, httpx.TransportError):
    """A `ServiceError` that httpx's callers handle too."""

    def __init__(self, message: str, service: str, attempts: Sequence[Attempt] = ()) -> None:
        httpx.TransportError.__init__(self, message)
        ServiceError.__init__(self, message, service, attempts)


class HttpNoInstanceError(_HttpError, NoInstanceError, httpx.ConnectError):
    """There was no instance to try."""


class HttpLimitedError(_HttpError, LimitedError, httpx.ConnectError):
    """As many requests as the service's limits allow were under way."""


class HttpConnectError(_HttpError, AttemptsFailedError, httpx.ConnectError):
    """No instance could be connected; no byte of the request was sent to the last one."""


class HttpReadError(_HttpError, AttemptsFailedError, httpx.ReadError):
    """The last instance that was tried ended its connection without a response."""


class HttpTimeoutError(_HttpError, AttemptsFailedError, httpx.ReadTimeout):
    """The last instance that was tried did not answer in the time of an attempt."""


class HttpBrokenError(_HttpError, AttemptsFailedError, httpx.RemoteProtocolError):
    """The last instance's response broke off within its head, or is malformed."""


class HttpDeadlineError(_HttpError, DeadlineError, httpx.ReadTimeout):
    """The deadline of the request came before a response's head."""
