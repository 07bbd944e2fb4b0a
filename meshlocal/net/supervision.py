"""Tasks that live as long as their process, and are begun again when they fail (behaviour rule P1).

Theory of operation. Nothing beside the data path may end or hold up a process that forwards traffic. So what such a
task raises is logged with the task's name and counted, and the task begins again after a backoff. Cancellation is no
failure, and passes.

    what the task does               a task beside the data path    a vital task
    raises, or returns               begun again, with backoff      likewise
    fails `MANY` times in `WHILE`    goes on like that              the process is dead: `TaskDeadError`
    cannot be begun again            -                              likewise, at once

A *vital* task is part of the data path: a process without it would look alive and serve nobody. It becomes unready at
once and ends, so that whoever supervises the process starts it anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NoReturn, TypeVarTuple, Unpack

import anyio

from meshlocal.net.log import get_log
from meshlocal.policy.backoff import Backoff, UniformSource

if TYPE_CHECKING:
    import trio

_log = get_log(__name__)

Ts = TypeVarTuple("Ts")

BACKOFF_INITIAL = 0.1
BACKOFF_MAX = 30.0
"""Seconds before a task is begun again, before jitter."""

MANY = 10
WHILE = 60.0
"""So many failures in so many seconds show that a task cannot be mended by beginning again."""

DEAD_STATUS = 70
"""The exit status of a process whose data path is dead: EX_SOFTWARE of sysexits.h."""


class TaskDeadError(Exception):
    """A vital task cannot go on: its process must end.

    Attributes:
        task: its name.
        problem: what it met last.
    """

    def __init__(self, task: str, problem: str) -> None:
        super().__init__(f"{task}: {problem}")
        self.task = task
        self.problem = problem


class Supervision:
    """Keeps tasks of one process going.

    Args:
        rng: for the backoff's jitter.

    Attributes:
        failures: how often each task failed, by its name.
        on_dead: called with a vital task's name and problem before `TaskDeadError` is raised.
    """

    def __init__(self, rng: UniformSource) -> None:
        self._rng = rng
        self.failures: dict[str, int] = {}
        self.on_dead: Callable[[str, str], None] | None = None

    async def keep(
        self,
        name: str,
        function: Callable[[Unpack[Ts]], Awaitable[object]],
        *args: *Ts,
        vital: bool = False,
        may_end: bool = False,
    ) -> None:
        """Run a task for ever, until cancelled.

        Args:
            name: for the log and the metric: what the task does, in two or three words.
            function: the task.
            args: its arguments.
            vital: it is part of the data path.
            may_end: to return is no failure, and the end.

        Raises:
            TaskDeadError: it is vital, and failed too often.
        """
        await self._keep(name, lambda: function(*args), vital=vital, may_end=may_end)

    async def start(
        self,
        name: str,
        function: Callable[..., Awaitable[None]],
        *args: object,
        vital: bool = False,
        task_status: trio.TaskStatus[None],
    ) -> None:
        """`keep`, for a task that takes a `task_status`: started when it says so for the first time.

        A failure before that is raised: what does not start is for whoever started it to see.
        """
        first = _Once(task_status)
        await self._keep(name, lambda: function(*args, task_status=first), vital=vital, first=first)

    async def _keep(
        self,
        name: str,
        begin: Callable[[], Awaitable[object]],
        *,
        vital: bool,
        may_end: bool = False,
        first: _Once | None = None,
    ) -> None:
        backoff = Backoff(BACKOFF_INITIAL, BACKOFF_MAX, self._rng)
        recent: deque[float] = deque(maxlen=MANY)
        while True:
            began = anyio.current_time()
            try:
                await begin()
                if may_end:
                    return
                problem = "it returned"
            except Exception as error:
                if dead_in(error) is not None or (first is not None and not first.said):
                    raise
                problem = f"{type(error).__name__}: {error}"
                _log.exception("task failed", task=name)
            except BaseExceptionGroup as group:
                self._pass_on(name, group)
            self.failures[name] = self.failures.get(name, 0) + 1
            now = anyio.current_time()
            if now - began >= WHILE:
                backoff.reset()
            recent.append(now)
            if vital and len(recent) == MANY and now - recent[0] <= WHILE:
                self.die(name, f"failed {MANY} times in {now - recent[0]:.0f} s: {problem}")
            delay = backoff.next()
            _log.error("task is begun again", task=name, problem=problem, seconds=round(delay, 3))
            await anyio.sleep(delay)

    def die(self, name: str, problem: str) -> NoReturn:
        """A vital task is dead, and cannot be begun again.

        Raises:
            TaskDeadError: always.
        """
        _log.error("the data path is dead: ending", task=name, problem=problem)
        if self.on_dead is not None:
            self.on_dead(name, problem)
        raise TaskDeadError(name, problem)

    def _pass_on(self, name: str, group: BaseExceptionGroup) -> NoReturn:
        """Re-raise what ends a task from outside, and log what it met beside that."""
        ordinary, rest = group.split(Exception)
        if ordinary is not None:
            self.failures[name] = self.failures.get(name, 0) + 1
            _log.error("task failed while it was cancelled", task=name, problem=str(ordinary.exceptions[0]))
        assert rest is not None
        raise rest


def dead_in(error: BaseException) -> TaskDeadError | None:
    """The `TaskDeadError` that an exception is, or holds as a group."""
    if isinstance(error, TaskDeadError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((dead for each in error.exceptions if (dead := dead_in(each)) is not None), None)
    return None


class _Once:
    """A task status that may be told more than once."""

    def __init__(self, status: trio.TaskStatus[None]) -> None:
        self._status = status
        self.said = False

    def started(self, value: None = None, /) -> None:
        if not self.said:
            self.said = True
            self._status.started()
