"""Known heads: what is looked up is what parsing gives, for every order of heads, and no more of them is kept."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshlocal.wire.http1 import known, request
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.known import KnownHeads
from meshlocal.wire.http1.request import HeadLimits, RequestHead, parse_request
from meshlocal.wire.http1.response import Framing, ResponseHead, parse_response
from meshlocal.wire.http1.rewrite import client_head, upstream_head
from nursery_tests.wire.http1.test_fuzz import GOOD_HEAD, HEAD

TARGETS = st.one_of(
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7F), max_size=20).map(lambda text: b"/" + text.encode()),
    st.sampled_from([b"/", b"*", b"http://c/x", b"c:80", b"/a#b", b"", b"/a b", b"//c", b"/\xff"]),
)
METHODS = st.sampled_from([b"GET", b"POST", b"CONNECT", b"OPTIONS", b"PURGE", b"NONSENSE", b"get", b""])
LIMITS = HeadLimits(head=4000, fields=5, target=15)


def seen(head: RequestHead | ResponseHead) -> dict[str, object]:
    return {name: getattr(head, name) for name in head.__slots__ if name != "onward"}


def outcome(parse: object, raw: bytes) -> object:
    """What comes of a head: all that is read out of it and what goes on, or why it is refused."""
    try:
        head = parse(raw)  # type: ignore[operator]  # one of the functions below
    except ProtocolError as error:
        return error.status, error.reason, error.detail
    if isinstance(head, ResponseHead):
        ways = [(framing, close) for framing in Framing for close in (False, True)]
        return seen(head), [client_head(head, framing, extra=b"via: x\r\n", close=close) for framing, close in ways]
    extras = (b"", b"x-forwarded-for: 127.0.0.1\r\n")
    return seen(head), [
        upstream_head(head, extra, host=b"h", strip_forwarded=strip) for extra in extras for strip in (False, True)
    ]


def other_line(raw: bytes, method: bytes, target: bytes) -> bytes:
    """The same head for another target, or with another method too."""
    first, space, rest = raw.partition(b" ")
    return (method or first) + space + target + b" " + rest.partition(b" ")[2]


@given(st.lists(st.tuples(HEAD | GOOD_HEAD, METHODS, TARGETS), min_size=1, max_size=4))
@example([(b"GET / HTTP/1.1\r\nHost: b\r\nX-Forwarded-For: a\r\nConnection: X, close\r\nX: y\r\n\r\n", b"", b"/x")])
@example([(b"GET / HTTP/1.1\r\nHost: b\r\n\r\n", b"", b"/" + b"x" * 20)])
def test_known_requests_are_what_parsing_gives(heads: list[tuple[bytes, bytes, bytes]]) -> None:
    """Also those whose field lines another one had, with a target or a method that makes it another request."""
    looked_up = KnownHeads(LIMITS)
    for _ in range(2):
        for raw, method, target in heads:
            for each in (raw, other_line(raw, b"", target), other_line(raw, method, target)):
                assert outcome(looked_up.request, each) == outcome(lambda raw: parse_request(raw, LIMITS), each)


RESPONSES = st.tuples(
    st.sampled_from([b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 204 \r\n", b"HTTP/1.1 99 X\r\n"]),
    st.lists(
        st.sampled_from(
            [
                *(
                    b"Content-Length: 5\r\n",
                    b"Transfer-Encoding: chunked\r\n",
                    b"Connection: close, X\r\n",
                    b"X: y\r\n",
                ),
                *(b"Keep-Alive: 5\r\n", b"Upgrade: websocket\r\n", b"X: \0\r\n", b"Date: now\r\n"),
            ]
        ),
        max_size=6,
    ).map(b"".join),
).map(lambda made: made[0] + made[1] + b"\r\n")


@given(st.lists(RESPONSES, min_size=1, max_size=4))
def test_known_responses_are_what_parsing_gives(heads: list[bytes]) -> None:
    looked_up = KnownHeads(LIMITS)
    for _ in range(2):
        for raw in heads:
            assert outcome(looked_up.response, raw) == outcome(lambda raw: parse_response(raw, LIMITS), raw)


def test_what_is_done_to_a_head_is_done_to_no_other() -> None:
    """A head whose body is under way is switched no more; the next one with its field lines may be."""
    raw = b"GET /%d HTTP/1.1\r\nHost: b\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    heads = KnownHeads()
    for number in range(3):
        head = heads.request(raw % number)
        assert head.upgrade == b"websocket"
        assert b"upgrade: websocket" in upstream_head(head)
        assert b"upgrade" not in upstream_head(head.without_upgrade())


@pytest.mark.parametrize("way", ["request", "response"])
def test_no_more_is_kept_than_is_good(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Neither heads, nor long ones, nor ways of passing one on."""
    monkeypatch.setattr(known, "MOST", 10)
    heads = KnownHeads()
    raw = b"GET / HTTP/1.1\r\nHost: b\r\nX: %d\r\n\r\n" if way == "request" else b"HTTP/1.1 200 OK\r\nX: %d\r\n\r\n"
    kept = heads._requests if way == "request" else heads._responses
    find = getattr(heads, way)
    for number in range(100):
        find(raw % number)
        assert len(kept) == number % 10 + 1
    before = len(kept)
    assert find(raw % 10**known.LONGEST).raw == raw % 10**known.LONGEST
    assert len(kept) == before
    head = find(raw % 99)
    for number in range(20):
        extra = b"y: %d\r\n" % number
        onward = upstream_head(head, extra) if way == "request" else client_head(head, Framing.NONE, extra=extra)
        assert onward == raw[:-2] % 99 + extra + b"\r\n"
    assert len(head.onward) <= 8


def test_long_hosts_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read all the same, whoever sends them."""
    kept: dict[bytes, bytes] = {}
    monkeypatch.setattr(request, "_hosts", kept)
    for number in range(10):
        long = b"a" * 60000 + b"%d" % number
        head = parse_request(b"GET / HTTP/1.1\r\nHost: %b:80\r\n\r\n" % long)
        assert head.host == long
        assert head.authority == long + b":80"
        assert parse_request(b"GET / HTTP/1.1\r\nHost: b%d:80\r\n\r\n" % number).host == b"b%d" % number
    assert kept == {b"b%d:80" % number: b"b%d" % number for number in range(10)}
