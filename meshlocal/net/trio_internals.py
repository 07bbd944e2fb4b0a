"""What meshlocal uses of Trio that Trio does not promise. Nobody else may.

    trio._core._run.GLOBAL_RUN_CONTEXT   this thread's run
    GLOBAL_RUN_CONTEXT.runner            its runner
    Runner.is_guest                      another event loop runs it, and sleeps in its stead
    Runner.io_manager                    how it waits for sockets: an EpollIOManager on Linux
    EpollIOManager._epoll                its `select.epoll`, whose descriptor becomes readable when Trio has an event

With a Trio that lacks one of these, relays take the path with two tasks, and it is said (`open_relay_loop`).
"""

from __future__ import annotations


def missing() -> list[str]:
    """The names above that this Trio lacks, as far as that shows without a run; for tests to be clear about."""
    lacking = []
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT, Runner
    except ImportError:
        return ["trio._core._run.GLOBAL_RUN_CONTEXT", "trio._core._run.Runner"]
    del GLOBAL_RUN_CONTEXT
    # Attributes of an attrs class stand among its fields; `_epoll` of the manager shows only in a run.
    fields = {field.name for field in getattr(Runner, "__attrs_attrs__", ())}
    lacking += [f"Runner.{name}" for name in ("is_guest", "io_manager") if name not in fields]
    return lacking


def epoll_fileno() -> int | None:
    """The file descriptor of this Trio run's epoll instance; None if it has none, or keeps it where we cannot see."""
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        runner = GLOBAL_RUN_CONTEXT.runner
        if runner.is_guest:
            # Another event loop sleeps then, in which there is no place for this one.
            return None
        return runner.io_manager._epoll.fileno()
    except (ImportError, AttributeError):
        return None
