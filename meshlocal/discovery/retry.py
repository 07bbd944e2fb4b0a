"""How a source goes on asking a registry that fails, and says so once."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from meshlocal.discovery.source import Publisher
from meshlocal.net.log import get_log
from meshlocal.policy.backoff import Backoff

_log = get_log(__name__)


class Problems:
    """What is wrong in each part of a source, told as one text.

    Args:
        publisher: who is told.
        registry: what operators call it, for the log: `kubernetes`.
    """

    def __init__(self, publisher: Publisher, registry: str) -> None:
        self._publisher = publisher
        self._registry = registry
        self._problems: dict[str, str] = {}

    def of(self, part: str) -> Callable[[str | None], None]:
        """How one part reports its problem, or that it has none."""

        def report(problem: str | None) -> None:
            if problem == self._problems.get(part):
                return
            if problem is None:
                del self._problems[part]
                _log.info("registry followed again", registry=self._registry, part=part)
            else:
                self._problems[part] = problem
            self.tell()

        return report

    def tell(self) -> None:
        """Tell what is wrong now."""
        self._publisher.report("; ".join(self._problems.values()) or None)


class Retry:
    """Waits between tries, longer each time, and says why.

    Args:
        what: is asked for, for messages.
        registry: what operators call the registry.
        backoff: how long it waits.
        report: told of the problem.

    Attributes:
        failures: how often it was waited.
    """

    def __init__(self, what: str, registry: str, backoff: Backoff, report: Callable[[str | None], None]) -> None:
        self._what = what
        self._registry = registry
        self._report = report
        self._backoff = backoff
        self._calm = True
        self._told = ""
        self.failures = 0

    def reset(self) -> None:
        """Begin anew: the registry answered, and the next failure is reported and waited for as a first one."""
        if not self._calm:
            self._calm = True
            self._told = ""
            self._backoff.reset()

    async def wait(self, problem: str, *, at_least: float = 0.0, at_most: float = math.inf) -> None:
        """Report a failure, and wait before the next try.

        Args:
            problem: what is wrong, in words.
            at_least: seconds, as the registry asks for.
            at_most: seconds, where somebody waits to see that it works again. `at_least` counts more.
        """
        self._calm = False
        self.failures += 1
        delay = max(min(self._backoff.next(), at_most), at_least)
        problem = f"{self._what}: {problem}"
        self._report(problem)
        if problem != self._told:
            # Once, not once a try: an outage may last for days, and what a server refuses for ever.
            self._told = problem
            _log.warning(
                "registry cannot be followed", registry=self._registry, problem=problem, retry_in=round(delay, 3)
            )
        await trio.sleep(delay)
