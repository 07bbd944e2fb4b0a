"""A response's flow: what is behind it, and how large a head may be."""

from __future__ import annotations

import pytest

from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.known import KnownHeads
from meshlocal.wire.http1.messages import ResponseFlow
from meshlocal.wire.http1.request import HeadLimits

LIMIT = 200


def flow(method: bytes = b"GET") -> ResponseFlow:
    return ResponseFlow(method, KnownHeads(HeadLimits(head=LIMIT)))


def passed(response: ResponseFlow, data: bytes) -> bytes:
    """What a client gets for the first bytes of a response, which have its head."""
    head = response.receive(data)
    assert head is not None
    return response.begin(head, http10=False, close=False)


WHOLE = {
    "204": (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
    "304": (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"),
    "HEAD": (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"),
    "length 0": (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "length": (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"),
    "chunks": (b"GET", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("behind", [b"", b"!", b"\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"])
@pytest.mark.parametrize("case", WHOLE)
def test_what_is_behind_a_response_costs_the_connection(case: str, behind: bytes) -> None:
    """It does not go on, and what comes next would not be trusted."""
    method, whole = WHOLE[case]
    response = flow(method)
    assert passed(response, whole + behind) == whole
    assert response.complete
    assert response.reusable == (not behind)


def heads_of(pieces: list[bytes]) -> tuple[list[bytes], int, str]:
    """The heads in some bytes, how many pieces were taken, and why the next one was refused."""
    response = flow()
    heads: list[bytes] = []
    for number, piece in enumerate(pieces):
        try:
            head = response.receive(piece)
            while head is not None:
                heads.append(head.raw)
                head = response.receive(b"") if head.status < 200 else None
        except ProtocolError as error:
            return heads, number, f"{error.status} {error.reason}"
    return heads, len(pieces), ""


@pytest.mark.parametrize("size", [1, 7, LIMIT, 10 * LIMIT])
def test_a_head_without_an_end_is_refused_at_its_limit(size: int) -> None:
    """No more of it is kept, in whatever pieces it comes."""
    data = b"HTTP/1.1 200 OK\r\nX: " + b"y" * 10 * LIMIT
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert heads_of(pieces) == ([], LIMIT // size, "502 head_too_large")


@pytest.mark.parametrize("interim", [b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"])
@pytest.mark.parametrize("at", [0, -1, -4])
def test_a_head_may_be_as_large_as_the_limit(interim: bytes, at: int) -> None:
    """Each head has it for itself."""
    interims = [interim] if interim else []
    head = b"HTTP/1.1 204 No Content\r\nX: %b\r\n\r\n"
    largest = head % (b"y" * (LIMIT - len(head % b"")))
    assert heads_of([interim + largest[:at], largest[at:]]) == ([*interims, largest], 2, "")
    larger = head % (b"y" * (LIMIT + 1 - len(head % b"")))
    assert heads_of([interim + larger[:at], larger[at:]])[2] == "502 head_too_large"
