"""A token that stands in a file, as systemd's credentials and Kubernetes' volumes give it."""

from __future__ import annotations

from pathlib import Path

from meshlocal.net.following import FileProblemError


def read_token(file: str) -> str:
    """The token that a file holds. May block.

    Raises:
        FileProblemError: it holds none, or cannot be read.
    """
    try:
        token = Path(file).read_bytes().strip()
        if not token:
            raise ValueError("holds no token")
        if not all(0x21 <= character <= 0x7E for character in token):
            raise ValueError("holds no token: one is of printable characters of ASCII, without spaces")
    except (OSError, ValueError) as error:
        raise FileProblemError(file, error) from None
    return token.decode("ascii")
