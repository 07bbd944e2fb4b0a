"""Heads that were checked before.

A client on a kept connection sends the same field lines again and again, most often for another target, and an instance
answers with the same ones within a second. To check them costs more than all else that is done with a plain request. So
the latest ones that passed every check are kept, by their bytes: what has the same bytes is the same head. Of a request
only the first line is looked at anew, if its target is a path, which no field line depends on; what makes any other
target, or a method or version with other field lines, is another head altogether.

Bounded: at most `MOST` heads each way, of at most `LONGEST` bytes; then it begins anew.
"""

from __future__ import annotations

import re

from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.fields import TOKEN
from meshlocal.wire.http1.request import HeadLimits, RequestHead, parse_request
from meshlocal.wire.http1.response import ResponseHead, parse_response

MOST = 256
"""Heads that are kept each way."""

LONGEST = 2048
"""Bytes of a head that is kept."""

# A path, without a fragment. What follows is compared byte by byte, up to the empty line.
_FIRST_LINE = re.compile(rb"(" + TOKEN + rb"++) (/[!\"$-~]*+) HTTP/1\.")


class KnownHeads:
    """Parses heads, most of them by looking them up.

    Args:
        limits: of both ways' heads. Another limit wants another one of these.
    """

    __slots__ = ("_requests", "_responses", "_same", "limits")

    def __init__(self, limits: HeadLimits = HeadLimits()) -> None:  # noqa: B008 - it is immutable
        self.limits = limits
        self._requests: dict[tuple[bytes, bytes], RequestHead] = {}
        self._same: dict[bytes, RequestHead] = {}
        self._responses: dict[bytes, ResponseHead] = {}

    def request(self, raw: bytes) -> RequestHead:
        """See `parse_request`. The head is everybody's.

        Raises:
            ProtocolError: it is refused.
        """
        same = self._same.get(raw)
        if same is not None:
            return same
        match = _FIRST_LINE.match(raw)
        if match is None:
            return parse_request(raw, self.limits)
        method, target = match.groups()
        key = method, raw[match.end() :]
        known = self._requests.get(key)
        if known is None:
            head = parse_request(raw, self.limits)
            if len(raw) <= LONGEST:
                if len(self._requests) >= MOST:
                    self._requests.clear()
                    self._same.clear()
                self._requests[key] = self._same[raw] = head
            return head
        if known.raw == raw:
            return known
        if len(target) > self.limits.target:
            raise ProtocolError(414, "target_too_long", f"the target is longer than {self.limits.target} bytes")
        return known.with_target(raw, target)

    def response(self, raw: bytes) -> ResponseHead:
        """See `parse_response`. The head is everybody's.

        Raises:
            ProtocolError: it is malformed.
        """
        known = self._responses.get(raw)
        if known is None:
            known = parse_response(raw, self.limits)
            if len(raw) <= LONGEST:
                if len(self._responses) >= MOST:
                    self._responses.clear()
                self._responses[raw] = known
        return known
