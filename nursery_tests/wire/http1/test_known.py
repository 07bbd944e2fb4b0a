"""Known heads: what is looked up is what parsing gives, for every order of heads, and no more of them is kept."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

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

LETTERS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="#"), max_size=12)
PATHS = LETTERS.map(lambda text: b"/" + text.encode())
FRAGMENTS = st.tuples(PATHS, LETTERS).map(lambda made: made[0] + b"#" + made[1].encode())
OTHERS = st.sampled_from([b"*", b"http://c/x", b"http://c", b"c:80", b"", b"/a b", b"//c", b"/\xff", b"/" + b"x" * 20])
METHODS = st.sampled_from([b"GET"] * 8 + [b"POST"] * 6 + [b"CONNECT", b"OPTIONS", b"PURGE", b"NONSENSE", b"get", b""])
LIMITS = HeadLimits(head=4000, fields=5, target=15)


def seen(head: RequestHead | ResponseHead) -> dict[str, object]:
    return {name: getattr(head, name) for name in head.__slots__ if name != "onward"}


def outcome(parse: Callable[[bytes], RequestHead | ResponseHead], raw: bytes) -> tuple[Any, ...]:
    """What comes of a head: all that is read out of it and what goes on, or why it is refused."""
    try:
        head = parse(raw)
    except ProtocolError as error:
        return error.status, error.reason, error.detail
    if isinstance(head, ResponseHead):
        ways = [(framing, close) for framing in Framing for close in (False, True)]
        return seen(head), [client_head(head, framing, extra=b"via: x\r\n", close=close) for framing, close in ways]
    extras = (b"", b"x-forwarded-for: 127.0.0.1\r\n")
    return seen(head), [
        upstream_head(head, extra, host=b"h", strip_forwarded=strip) for extra in extras for strip in (False, True)
    ]


FIELDS = st.tuples(
    st.sampled_from([b"Host: b\r\n", b"host:c:80\r\n"]),
    st.lists(
        st.sampled_from(
            [
                *(b"X: y\r\n", b"TE: trailers\r\n", b"Connection: close, x\r\n", b"Keep-Alive: 5\r\n"),
                *(b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b"Proxy-Connection: x\r\n", b"a:\t b \t\r\n"),
                *(b"X-Forwarded-For: a\r\n", b"Idempotency-Key: 1\r\n", b"Expect: 100-continue\r\n"),
            ]
        ),
        max_size=2,
        unique=True,
    ).map(b"".join),
    st.sampled_from([b"", b"", b"Content-Length: 5\r\n", b"content-length:0\r\n", b"Transfer-Encoding: chunked\r\n"]),
).map(b"".join)
"""Field lines of which a head is made that is good if its first line is."""


@st.composite
def families(draw: st.DrawFn) -> list[bytes]:
    """Heads with the same field lines, for several targets, some with other methods or another version."""
    fields = draw(FIELDS)
    version = b" HTTP/1.%d\r\n" % draw(st.sampled_from([1] * 5 + [0]))
    made = []
    for _ in range(draw(st.integers(2, 5))):
        target = draw(draw(st.sampled_from([PATHS] * 9 + [FRAGMENTS] * 2 + [OTHERS])))
        made.append(draw(METHODS) + b" " + target + version + fields + b"\r\n")
    return made


def test_known_requests_are_what_parsing_gives() -> None:
    """Also those whose field lines another one had, with a target or a method that makes it another request."""
    seen_of: Counter[str] = Counter()

    @given(st.lists(families(), min_size=1, max_size=3), st.lists(HEAD | GOOD_HEAD, max_size=1))
    @example([], [b"GET / HTTP/1.1\r\nHost: b\r\nX-Forwarded-For: a\r\nConnection: X, close\r\nX: y\r\n\r\n"])
    @example([[b"GET /" + path + b" HTTP/1.1\r\nHost: b\r\n\r\n" for path in (b"", b"x" * 20, b"x#y", b"#")]], [])
    def check(heads: list[list[bytes]], others: list[bytes]) -> None:
        looked_up = KnownHeads(LIMITS)
        for _ in range(2):
            for raw in itertools.chain(*heads, others):
                expected = outcome(lambda raw: parse_request(raw, LIMITS), raw)
                assert outcome(looked_up.request, raw) == expected
                good = isinstance(expected[0], dict)
                seen_of["good" if good else "refused"] += 1
                seen_of["fragment"] += not good and expected[2] == "a fragment in the target"

    check()
    # Otherwise it would have shown little.
    assert seen_of["good"] > seen_of["refused"]
    assert seen_of["fragment"] > seen_of["good"] / 10


@pytest.mark.parametrize("target", [b"/a#b", b"/#", b"/a?b#c", b"/a#b#c"])
def test_a_fragment_is_refused_however_well_the_head_is_known(target: bytes) -> None:
    """To one parser it would be part of the path, and to another not."""
    looked_up = KnownHeads()
    raw = b"GET %b HTTP/1.1\r\nHost: b\r\n\r\n"
    for _ in range(2):
        assert looked_up.request(raw % b"/a").target == b"/a"
        with pytest.raises(ProtocolError) as caught:
            looked_up.request(raw % target)
        assert (caught.value.status, caught.value.reason) == (400, "bad_target")


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
