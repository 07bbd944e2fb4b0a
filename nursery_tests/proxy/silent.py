"""An instance that answers no connect."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from meshlocal.policy.model import Instance, make_instance


@contextmanager
def silent() -> Iterator[Instance]:
    """An instance whose accept queue is full: a connect to it gets no answer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = []
        try:
            for _ in range(4):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
                fillers.append(filler)
            yield make_instance("127.0.0.1", listener.getsockname()[1], labels={"node": "n1"})
        finally:
            for filler in fillers:
                filler.close()
