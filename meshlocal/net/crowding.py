"""How many connections a server has, and how often it had no room for one."""

from __future__ import annotations

from meshlocal.net.log import get_log

log = get_log(__name__)


class Crowding:
    """Says once that a server is full, and not again before a tenth of its places were free: who floods it shall not
    flood its log.

    Args:
        what: is refused, for the log.
        limit: connections at once.

    Attributes:
        refused: how many connections were refused.
    """

    def __init__(self, what: str, limit: int) -> None:
        self._what = what
        self._limit = limit
        self._said = False
        self.refused = 0

    def has_room(self, count: int, peer: str) -> bool:
        """Whether there is room for one more beside `count`."""
        if count < self._limit:
            if count <= self._limit * 9 // 10:
                self._said = False
            return True
        self.refused += 1
        if not self._said:
            self._said = True
            log.warning("connection refused: too many are open", server=self._what, peer=peer, limit=self._limit)
        return False
