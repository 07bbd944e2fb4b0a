"""What is wrong with a message, and the answer that it gets."""

from __future__ import annotations


class ProtocolError(ValueError):
    """A message that is refused.

    Attributes:
        status: of the answer, were it a client's request.
        reason: what is wrong, in a word that programs can go by.
        detail: what is wrong, for people; never holds bytes of the message.
    """

    def __init__(self, status: int, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.detail = detail
