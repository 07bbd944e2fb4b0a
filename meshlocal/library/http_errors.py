"""The library's errors as those of an HTTP library: what a request through a `MeshTransport` raises is both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from meshlocal.library.errors import (
    Attempt,
    AttemptsFailedError,
    DeadlineError,
    LimitedError,
    NoInstanceError,
    ServiceError,
)


class HttpError(ServiceError):
    """A `ServiceError` that the HTTP library's callers handle too.

    Attributes:
        theirs: the library's error of a transport, which it is as well.
    """

    theirs: ClassVar[type[Exception]]

    def __init__(self, message: str, service: str, attempts: Sequence[Attempt] = ()) -> None:
        self.theirs.__init__(self, message)
        ServiceError.__init__(self, message, service, attempts)


class HttpErrors(NamedTuple):
    """What a transport raises, by what happened."""

    no_instance: type[NoInstanceError]
    limited: type[LimitedError]
    connect: type[AttemptsFailedError]
    read: type[AttemptsFailedError]
    timeout: type[AttemptsFailedError]
    broken: type[AttemptsFailedError]
    deadline: type[DeadlineError]
