"""What can go wrong, as one small tree under `MeshError`.

    MeshError
      MeshConfigError       also a ValueError: what `open_mesh` was given cannot be used
      MeshClosedError       the mesh's block was left
      NotTrioError          also a RuntimeError: a trio stream was asked for in another loop
      TooManyServicesError  more services are in use at once than one mesh follows
      ServiceError          also an OSError: no instance of a service could be reached
        NoInstanceError       there was none to try
        AttemptsFailedError   each one that was tried failed
        DeadlineError         also a TimeoutError: time ran out
        LimitedError          as much as may be was under way
        CallError             a gRPC call ended with another status than OK

A `ServiceError` carries the attempts that were made; its `__cause__` is what the last of them failed with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from meshlocal.client.tried import attempt_text, in_a_row
from meshlocal.policy.model import Instance
from meshlocal.policy.picker import Reason
from meshlocal.wire.grpc.status import Metadata, StatusCode


class Attempt(NamedTuple):
    """One instance that was tried, in vain.

    Attributes:
        instance: what was tried.
        tier: its tier's name.
        reason: why the request had left the first tier; None while it had not (R1).
        error: how it failed, in a word: `refused`, `timeout`, `unreachable`, `reset` and so on.
        cause: what it failed with; None if it was given up when the time ran out.
    """

    instance: Instance
    tier: str
    reason: Reason | None
    error: str
    cause: Exception | None

    def __str__(self) -> str:
        return attempt_text(self.instance.key, self.tier, self.error)


class MeshError(Exception):
    """Anything that meshlocal raises for its user to handle."""


class MeshConfigError(MeshError, ValueError):
    """What `open_mesh` was given cannot be used. Its text has a line for each problem.

    Attributes:
        problems: one line each: the argument at fault, and why.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class MeshClosedError(MeshError):
    """The block of `open_mesh` was left; nothing can be asked of its mesh any more."""


class NotTrioError(MeshError, RuntimeError):
    """A trio stream was asked for in a loop that is not trio's."""


class TooManyServicesError(MeshError):
    """One more service than a mesh follows at once, all of the others being in use."""


class ServiceError(MeshError, OSError):
    """No instance of a service could be reached.

    Attributes:
        service: its name.
        attempts: what was tried, in order.
    """

    def __init__(self, message: str, service: str, attempts: Sequence[Attempt] = ()) -> None:
        super().__init__(message)
        self.service = service
        self.attempts = tuple(attempts)

    @property
    def attempt(self) -> Attempt | None:
        """The last attempt; None if there was none."""
        return self.attempts[-1] if self.attempts else None

    @property
    def instance(self) -> Instance | None:
        """The instance that was tried last; None if none was."""
        return self.attempts[-1].instance if self.attempts else None


class NoInstanceError(ServiceError):
    """There was no instance to try: none is usable, no registry knows the service, or nothing was heard of it yet."""


class AttemptsFailedError(ServiceError):
    """Every instance that was tried failed."""


class DeadlineError(ServiceError, TimeoutError):
    """The deadline came before an instance was reached."""


class LimitedError(ServiceError):
    """The request was refused at once: as many as the service's limits allow were under way."""


class CallError(ServiceError):
    """A gRPC call ended with another status than OK: an instance's, or, where none gave one, what stands for that.

    Attributes:
        code: the status.
        details: the status's message.
        trailing: the metadata that came with it.
    """

    def __init__(
        self,
        code: StatusCode,
        details: str,
        service: str,
        attempts: Sequence[Attempt] = (),
        trailing: Metadata = (),
    ) -> None:
        told = f"{service}: {code.name}" + (f": {details}" if details else "")
        super().__init__(f"{told}: {tried(attempts)}" if attempts else told, service, attempts)
        self.code = code
        self.details = details
        self.trailing = trailing


def tried(attempts: Sequence[Attempt]) -> str:
    """The attempts in a few words."""
    return in_a_row([str(each) for each in attempts])
