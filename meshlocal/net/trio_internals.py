"""What meshlocal uses of Trio that Trio does not promise. Nobody else may.

    trio._core._run.GLOBAL_RUN_CONTEXT   this thread's run
    GLOBAL_RUN_CONTEXT.runner            its runner
    Runner.is_guest                      another event loop runs it, and sleeps in its stead
    Runner.io_manager                    how it waits for sockets: an EpollIOManager on Linux
    EpollIOManager._epoll                its `select.epoll`, whose descriptor becomes readable when Trio has an event
    SSLStream._outgoing                  what TLS has still to send, an alert after a handshake that failed

With a Trio that lacks one of the first, relays take the path with two tasks, and it is said (`open_relay_loop`);
without the last, who is refused in a handshake is not told why.
"""

from __future__ import annotations

import ssl

import trio


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


def last_words(stream: trio.SSLStream[trio.abc.Stream]) -> bytes:
    """What TLS would still say on a stream whose handshake failed: the alert (RFC 8446, 6.2), which Trio keeps."""
    outgoing = getattr(stream, "_outgoing", None)
    return outgoing.read() if isinstance(outgoing, ssl.MemoryBIO) else b""
