"""What TLS fails with, for who runs on any event loop."""

from __future__ import annotations

import errno


class TlsError(OSError):
    """A TLS handshake failed, or what the other side sent cannot be read (T1). The text says why."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EPROTO, why)
