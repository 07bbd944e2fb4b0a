"""Runs `meshlocal` with an audit hook: once it is ready, its event loop opens no file and imports nothing (P1).

What it does all the same goes to standard error, a line each, with where it came from. `/proc` is no file system that
could hang.
"""

from __future__ import annotations

import os
import sys
import threading
from types import FrameType

_EVENTS = ("open", "import", "os.listdir", "os.scandir", "os.rename", "os.remove")
_FRAMES = 8


class Watch:
    """What a thread does from some time on.

    Attributes:
        on: whether that has come.
    """

    def __init__(self) -> None:
        self.on = False
        self._thread = threading.get_ident()

    def audit(self, event: str, args: tuple[object, ...]) -> None:
        """See `sys.addaudithook`."""
        if not self.on or event not in _EVENTS or threading.get_ident() != self._thread:
            return
        if str(args[0]).startswith("/proc/"):
            return
        came: list[str] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and len(came) < _FRAMES:
            came.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")
            frame = frame.f_back
        os.write(2, f"AUDIT {event} {args[0]!r} from {' < '.join(came)}\n".encode())


def main() -> None:
    """Watch from the line on that says that the process is ready."""
    from meshlocal.app import readiness
    from meshlocal.cli.main import main as run

    watch = Watch()
    announce = readiness.announce

    def announce_and_watch(line: str) -> None:
        announce(line)
        watch.on = True

    readiness.announce = announce_and_watch
    sys.addaudithook(watch.audit)
    run()


if __name__ == "__main__":
    main()
