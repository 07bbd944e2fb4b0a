"""What requests and checks find out about a service's instances, told to the log as it happens (H1, H3, F3).

The decisions are those of `meshlocal.policy.health`; here are the clock, the log, and the count of what is under way on
each instance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import anyio

from meshlocal.net.log import get_log
from meshlocal.policy.admission import Admission
from meshlocal.policy.backoff import UniformSource
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.feedback import Feedback
from meshlocal.policy.health import Cause, Health
from meshlocal.policy.model import EndpointKey, HostPort, Instance, ServiceKey
from meshlocal.policy.retry import Failure, Verdict, verdict

_log = get_log(__name__)

OWN_FAULTS = frozenset({"no_descriptors", "no_ports", "no_memory", "pool_timeout", "limit_waiting"})
"""Failures to connect that say nothing about the instance: this host has run out of something, or this caller has as
many connections as it allowed itself."""


class Fitness:
    """One service's instances, as they proved so far.

    Args:
        service: for the log.
        ejection: when an instance is ejected, and for how long.
        spill: requests under way on an instance of the first tier from which on it is full; None: never (F3).
        rng: for the jitter of ejections.

    Attributes:
        health: the states.
        spill: may be replaced at any time.
        under_way: requests under way by instance, where there are any.
        feedback: whether all attempts fail (D5).
        on_failing: called with the service when they have for a while.
    """

    __slots__ = ("_service", "feedback", "health", "on_failing", "spill", "under_way")

    def __init__(self, service: ServiceKey, ejection: EjectionConfig, spill: int | None, rng: UniformSource) -> None:
        self._service = service
        self.health = Health(ejection, rng)
        self.spill = spill
        self.under_way: dict[HostPort, int] = {}
        self.feedback = Feedback(rng)
        self.on_failing: Callable[[ServiceKey], None] | None = None

    def gate(self) -> Admission | None:
        """What a plan that begins now must ask; None while every instance is fit and none can be full."""
        if self.spill is None and not self.health.unfit:
            return None
        return Admission(self.health, anyio.current_time(), self.spill, self.under_way)

    def connected(self, instance: Instance, began: float | None = None) -> None:
        """A request connected it. That readmits one that could not be connected before.

        Args:
            instance: which.
            began: when the attempt did, by anyio.current_time(); by default now. What it shows counts from then.
        """
        if self.feedback.failing and not self.health.is_doubted(_place(instance.key)):
            self.feedback.succeeded()
        if not self.health.quiet and self.health.succeeded(
            _place(instance.key), anyio.current_time(), shallow=True, began=began
        ):
            self._say_readmitted(instance.key, "connected")

    def worked(self, instance: Instance, began: float | None = None) -> None:
        """Note that the instance answered a request, whatever the answer, or kept its connection for a while.

        Args:
            instance: the instance.
            began: when the attempt began, by anyio.current_time(); what began before an ejection does not end it.
        """
        if self.feedback.failures:
            self.feedback.succeeded()
        if self.health.known and self.health.succeeded(_place(instance.key), anyio.current_time(), began=began):
            self._say_readmitted(instance.key, "answered")

    def misbehaved(self, instance: Instance, problem: str) -> None:
        """Note that the instance said what nobody had asked for: what follows cannot be told from an answer."""
        seconds = self.health.misbehaved(_place(instance.key), anyio.current_time())
        if seconds is not None:
            self._say_ejected(instance, problem, Cause.PROTOCOL, seconds)

    def ready_again(self, key: EndpointKey) -> None:
        """Note that the instance was not ready, and is: if it is ejected, the next request tries it (F1)."""
        self.health.ready_again(_place(key), anyio.current_time())

    def failed(self, instance: Instance, error: str, cause: Cause = Cause.CONNECT, began: float | None = None) -> None:
        """A request failed on it.

        Args:
            instance: which.
            error: how, in a word, as `classify_connect_error` has it.
            cause: whether it could not be connected, or was and failed before it said a word.
            began: as in `connected`.
        """
        now = anyio.current_time()
        if error in OWN_FAULTS:
            self.health.abandoned(_place(instance.key), now)
            return
        seconds = self.health.failed(_place(instance.key), now, cause, began=began)
        if seconds is not None:
            self._say_ejected(instance, error, cause, seconds)
        if self.feedback.failed(now) and self.on_failing is not None:
            _log.warning("every attempt fails; asking discovery again", service=self._service, problem=error)
            self.on_failing(self._service)

    def judge(self, instance: Instance, failure: Failure, word: str, began: float) -> None:
        """A request's attempt failed on it.

        Args:
            instance: which.
            failure: how.
            word: the same, as the system has it.
            began: as in `connected`.
        """
        told = verdict(failure)
        if told is Verdict.FAILS:
            cause = Cause.CONNECT if failure is Failure.CONNECT else Cause.RESET
            self.failed(instance, word, cause, began)
        elif told is Verdict.WORKS:
            self.worked(instance, began)
        else:
            self.abandoned(instance)

    def abandoned(self, instance: Instance) -> None:
        """A request left it before there was a verdict: its client left, or its deadline came."""
        if not self.health.quiet:
            self.health.abandoned(_place(instance.key), anyio.current_time())

    def checks_failed(self, instance: Instance, problem: str) -> None:
        """Note that so many checks failed in a row that the instance is tried last of all from now on (H3)."""
        if self.health.checks_failed(_place(instance.key)):
            _log.warning(
                "instance fails its health checks",
                service=self._service,
                instance=str(instance.key),
                node=instance.node or None,
                problem=problem,
            )

    def check_passed(self, instance: Instance, *, shallow: bool) -> None:
        """A check of it passed (H3). `shallow`: all that it shows is that it can be connected."""
        if not self.health.quiet and self.health.check_passed(
            _place(instance.key), anyio.current_time(), shallow=shallow
        ):
            self._say_readmitted(instance.key, "passed its check")

    def is_doubted(self, instance: Instance) -> bool:
        """Whether that it can be connected says nothing: its last failure came after a connect."""
        return not self.health.quiet and self.health.is_doubted(_place(instance.key))

    def begin(self, instance: Instance) -> None:
        """A request is under way on it from now on. Each wants an `end`."""
        place = instance.key[:2]  # without a call of Python's own: every request passes here
        self.under_way[place] = self.under_way.get(place, 0) + 1

    def end(self, instance: Instance) -> None:
        """A request is under way on it no longer."""
        place = instance.key[:2]
        left = self.under_way[place] - 1
        if left:
            self.under_way[place] = left
        else:
            del self.under_way[place]

    def retain(self, keys: Iterable[EndpointKey]) -> None:
        """Forget all instances but these."""
        if not self.health.quiet:
            self.health.retain({_place(key) for key in keys})

    def _say_ejected(self, instance: Instance, problem: str, cause: Cause, seconds: float) -> None:
        _log.warning(
            "instance ejected",
            service=self._service,
            instance=str(instance.key),
            node=instance.node or None,
            problem=problem,
            cause=cause,
            seconds=round(seconds, 1),
        )

    def _say_readmitted(self, key: EndpointKey, why: str) -> None:
        _log.info("instance readmitted", service=self._service, instance=str(key), why=why)


def _place(key: EndpointKey) -> HostPort:
    return key[:2]
