"""Heads and bodies that nobody would think of: read alike wherever they are cut, and by other people's parsers.

A bounded number of examples, the same ones each time; the profile `fuzz` looks for new ones.
"""

from __future__ import annotations

import contextlib
from itertools import pairwise

import h11
from hypothesis import example, given
from hypothesis import strategies as st

from meshlocal.wire.http1.chunked import ChunkedBody
from meshlocal.wire.http1.errors import ProtocolError
from meshlocal.wire.http1.known import KnownHeads
from meshlocal.wire.http1.messages import RequestBody, ResponseFlow
from meshlocal.wire.http1.request import HeadLimits, RequestHead, check_unfinished, parse_request
from meshlocal.wire.http1.response import parse_response
from meshlocal.wire.http1.rewrite import upstream_head

LIMITS = HeadLimits()

# Pieces out of which trouble is made: what parsers have disagreed about.
PIECES = st.sampled_from(
    [
        *(b"GET ", b"POST ", b"OPTIONS ", b"CONNECT ", b"HEAD ", b"get "),
        *(b"/", b"*", b"/a?b", b"http://b/", b"http://b:80", b"b:80", b"//b", b"/%2e"),
        *(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b" HTTP/1.1\n", b" HTTP/2.0\r\n", b" HTTP/1.1 \r\n"),
        *(b"Host: b\r\n", b"host:b\r\n", b"Host: b, c\r\n", b"Host : b\r\n", b"Host: \r\n"),
        *(b"Content-Length: 5\r\n", b"content-length: 0\r\n", b"Content-Length: +5\r\n", b"Content-Length: 5, 5\r\n"),
        *(b"Content-Length:\t5 \r\n", b"Content-Length: 005\r\n", b"Content-Length: \xb2\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: Chunked \r\n", b"Transfer-Encoding: x, chunked\r\n"),
        *(b"Transfer-Encoding:\x0bchunked\r\n", b"Transfer-Encoding: identity\r\n", b"Transfer_Encoding: chunked\r\n"),
        *(b"Connection: close\r\n", b"Connection: keep-alive, x\r\n", b"Connection: Host\r\n", b"X: y\r\n"),
        *(b"Connection: Content-Length, Transfer-Encoding\r\n", b"Upgrade: websocket\r\n", b"Connection: upgrade\r\n"),
        *(b" folded\r\n", b"\tfolded\r\n", b"X:\r\n", b": y\r\n", b"X y\r\n", b"X: \x00\r\n", b"X: \xff\r\n"),
        *(b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b"Expect: 100-continue\r\n", b"TE: trailers\r\n"),
    ]
)
HEAD = st.one_of(
    st.lists(PIECES, max_size=9).map(b"".join),
    st.binary(max_size=100),
    st.tuples(
        st.sampled_from([b"GET / HTTP/1.1\r\n", b"POST /a HTTP/1.1\r\nHost: b\r\n", b"GET http://b/ HTTP/1.0\r\n"]),
        st.lists(PIECES, max_size=5).map(b"".join),
        st.just(b"\r\n"),
    ).map(b"".join),
)
GOOD_HEAD = st.tuples(
    st.sampled_from(
        [
            *(
                b"GET / HTTP/1.1\r\n",
                b"PUT /a?b=c HTTP/1.1\r\n",
                b"POST http://b:80/ HTTP/1.1\r\n",
                b"HEAD //x HTTP/1.0\r\n",
            ),
            *(b"OPTIONS * HTTP/1.1\r\n", b"DELETE http://b HTTP/1.0\r\n"),
        ]
    ),
    st.permutations(
        [
            *(b"Host: b\r\n", b"X: y\r\n", b"TE: trailers\r\n", b"Connection: close, x\r\n", b"Keep-Alive: 5\r\n"),
            *(b"Proxy-Connection: x\r\n", b"Connection: Content-Length, Transfer-Encoding, Host\r\n", b"a:\t b \t\r\n"),
        ]
    ),
    st.sampled_from([b"", b"Content-Length: 5\r\n", b"content-length:0\r\n", b"Transfer-Encoding: chunked\r\n"]),
    st.integers(0, 8),
).map(
    lambda made: (
        made[0]
        + b"Host: b\r\n" * (made[1].index(b"Host: b\r\n") >= made[3])
        + b"".join(made[1][: made[3]])
        + made[2]
        + b"\r\n"
    )
)
CUTS = st.lists(st.integers(0, 1000), max_size=6)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(at)]


def well_told(error: ProtocolError) -> None:
    """It has a status, a word for programs, and a text that cannot break an answer."""
    assert 400 <= error.status < 600
    assert error.reason.isidentifier()
    assert error.detail.isascii()
    assert error.detail.isprintable()


def parsed(data: bytes) -> RequestHead | None:
    """The head at the beginning of some bytes; None if it is refused, or not complete. Nothing else may come of it."""
    end = data.find(b"\r\n\r\n") + 4
    try:
        if end < 4:
            check_unfinished(data, LIMITS)
            return None
        return parse_request(data[:end], LIMITS)
    except ProtocolError as error:
        well_told(error)
        return None


@given(HEAD | GOOD_HEAD)
def test_a_head_is_read_or_refused(data: bytes) -> None:
    """No byte is lost by what is taken for good, and what is not refused early is not refused for its beginning."""
    head = parsed(data)
    if head is not None:
        assert data.startswith(head.raw)
        for end in range(len(head.raw)):
            check_unfinished(data[:end], LIMITS)


@given(HEAD | GOOD_HEAD)
@example(b"POST /a HTTP/1.1\r\nHost: b\r\nConnection: Content-Length\r\nContent-Length: 5\r\n\r\n")
def test_what_goes_on_is_read_by_others_as_it_was_here(data: bytes) -> None:
    """h11 sees the same request in what an instance gets: method, target, host, and above all where its body ends."""
    head = parsed(data)
    if head is None:
        return
    passed = upstream_head(head, b"via: 1.1 x\r\n", host=b"b")
    peer = h11.Connection(h11.SERVER)
    peer.receive_data(passed)
    complained = ""
    event: object
    try:
        event = peer.next_event()
    except h11.RemoteProtocolError as error:
        complained = str(error)
        event = None
    if event is None:
        # h11 wants a port or a host where the grammar does not, and knows no bytes above ASCII in field values.
        assert "Host" in complained or not passed.isascii(), passed
        return
    assert isinstance(event, h11.Request)
    assert (event.method, event.target) == (head.method, head.target)
    fields = list(event.headers)
    assert not {b"transfer-encoding", b"content-length"} <= {name for name, _ in fields}
    assert [value for name, value in fields if name == b"transfer-encoding"] == [b"chunked"] * head.chunked
    lengths = [int(value) for name, value in fields if name == b"content-length"]
    assert lengths == ([head.content_length] if head.content_length is not None else [])
    assert len([name for name, _ in fields if name == b"host"]) == 1
    assert not {name for name, _ in fields} & {b"te", b"keep-alive", b"proxy-connection", b"proxy-authorization"}
    # And here it is read as the same again.
    again = parse_request(passed, LIMITS)
    assert (again.method, again.target, again.content_length, again.chunked) == (
        head.method,
        head.target,
        head.content_length,
        head.chunked,
    )


CHUNK_PIECES = st.sampled_from(
    [
        *(
            b"5\r\nhello\r\n",
            b"1\r\nx\r\n",
            b"0\r\n\r\n",
            b"0\r\nX: y\r\n\r\n",
            b"00000\r\n\r\n",
            b"a;b=c\r\n0123456789\r\n",
        ),
        *(
            b"5 \r\nhello\r\n",
            b"5\nhello\r\n",
            b"-1\r\n",
            b"+1\r\nx\r\n",
            b"0x1\r\nx\r\n",
            b"FFFFFFFFFFFFFFFFF\r\n",
            b"1;\r\nx\r\n",
        ),
        *(b"\r\n", b"\n", b"\r", b"0", b"\0", b"0\r\nHost: c\r\n\r\n", b"0\r\n x\r\n\r\n", b"g\r\n", b"1\r\nxy\r\n"),
    ]
)
CHUNKS = st.one_of(st.lists(CHUNK_PIECES, max_size=6).map(b"".join), st.binary(max_size=40))


def read_chunks(parts: list[bytes], *, decode: bool) -> tuple[bytes, bytes, str]:
    """What passed, what was left behind the end, and how it ended."""
    body = ChunkedBody(decode=decode)
    passed, behind = b"", b""
    try:
        for part in parts:
            if body.finished:
                behind += part
                continue
            out, used = body.feed(part)
            passed += b"".join(out)
            behind += part[used:]
    except ProtocolError as error:
        return passed, b"", error.reason
    return passed, behind, "finished" if body.finished else "unfinished"


@given(CHUNKS, CUTS)
def test_chunks_are_read_alike_wherever_they_are_cut(data: bytes, cuts: list[int]) -> None:
    for decode in (False, True):
        whole = read_chunks([data], decode=decode)
        cut = read_chunks(pieces(data, cuts), decode=decode)
        assert (whole[1], whole[2]) == (cut[1], cut[2])
        if whole[2] == "finished":
            assert whole[0] == cut[0]
        if not decode and whole[2] == "finished":
            # What passed is itself a body, with nothing behind it.
            assert read_chunks([whole[0]], decode=False) == (whole[0], b"", "finished")


@given(
    st.lists(CHUNK_PIECES.filter(lambda piece: len(piece) > 4 and not piece.startswith(b"0")), max_size=5)
    .map(b"".join)
    .flatmap(lambda made: st.sampled_from([made + b"0\r\n\r\n", made + b"000;x=y\r\nX: y\r\nHost: c\r\n\r\n"]))
    | CHUNKS
)
def test_chunks_that_pass_are_read_by_others_alike(data: bytes) -> None:
    passed, _, ended = read_chunks([data], decode=False)
    if ended != "finished":
        return
    peer = h11.Connection(h11.SERVER)
    peer.receive_data(b"PUT / HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n" + passed)
    assert isinstance(peer.next_event(), h11.Request)
    content = b""
    while isinstance(event := peer.next_event(), h11.Data):
        content += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert peer.trailing_data == (b"", False)
    assert content == read_chunks([data], decode=True)[0]


@given(CHUNKS, CUTS, st.booleans(), st.sampled_from([None, 0, 10, 1000]), st.integers(0, 30))
def test_a_request_body_holds_what_it_says(
    data: bytes, cuts: list[int], chunked: bool, limit: int | None, hold: int
) -> None:
    """What is held is all that came, or nothing; the limit is kept."""
    framing = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % len(data)
    head = parse_request(b"PUT / HTTP/1.1\r\nhost: b\r\n" + framing + b"\r\n\r\n")
    passed = b""
    with contextlib.suppress(ProtocolError):
        body = RequestBody(head, limit=limit, hold=hold)
        for part in pieces(data, cuts):
            if body.finished:
                break
            piece, _ = body.feed(part)
            passed += piece
            assert body.size == len(passed)
            assert limit is None or body.size <= limit
            assert body.held is None if body.size > hold else body.held is not None and b"".join(body.held) == passed
        if not chunked:
            assert body.finished
            assert passed == data


RESPONSE_PIECES = st.sampled_from(
    [
        *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 204 \r\n"),
        *(b"HTTP/1.1 304 Not Modified\r\n", b"HTTP/1.1 101 X\r\n\r\n", b"HTTP/1.1 2000 OK\r\n", b"ICY 200 OK\r\n"),
        *(b"Content-Length: 5\r\n", b"Content-Length: 5\r\nContent-Length: 6\r\n", b"Content-Length: x\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"X: y\r\n", b" folded\r\n", b"\r\n", b"\n"),
        *(b"5\r\nhello\r\n", b"0\r\n\r\n", b"hello", b"\0", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ]
)
RESPONSES = st.one_of(st.lists(RESPONSE_PIECES, max_size=8).map(b"".join), st.binary(max_size=60))


def flow_through(parts: list[bytes], method: bytes, *, http10: bool) -> tuple[bytes, str]:
    """What a client gets of a response, and how that ended."""
    flow = ResponseFlow(method, KnownHeads(LIMITS))
    out = b""
    begun = False
    try:
        for part in parts:
            if flow.complete:
                break
            if begun:
                out += flow.body(part)
                continue
            head = flow.receive(part)
            while head is not None and head.status < 200:
                if head.status == 101:
                    return out, "switched"
                head = flow.receive(b"")
            if head is not None:
                begun = True
                close = flow.closes_client(head, http10=http10)
                out += flow.begin(head, http10=http10, close=close)
    except ProtocolError as error:
        well_told(error)
        return b"" if not begun else out, "refused"
    if not flow.complete:
        rest = flow.end() if begun else None
        if rest is None:
            return out, "cut"
        out += rest
    return out, "complete"


@given(RESPONSES, CUTS, st.sampled_from([b"GET", b"HEAD"]), st.booleans())
def test_a_response_is_read_alike_wherever_it_is_cut(data: bytes, cuts: list[int], method: bytes, http10: bool) -> None:
    """And what a client gets of one that is whole is read by h11 as one response, with nothing behind it."""
    whole, ended = flow_through([data], method, http10=http10)
    cut, ended_cut = flow_through(pieces(data, cuts), method, http10=http10)
    assert ended == ended_cut
    if ended != "complete":
        return
    assert _read(whole, method) == _read(cut, method)


def _read(data: bytes, method: bytes) -> bytes:
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("host", "b")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    client.receive_data(b"")
    content = b""
    event = client.next_event()
    assert isinstance(event, h11.Response)
    assert parse_response(data[: data.index(b"\r\n\r\n") + 4]).status == event.status_code
    while isinstance(event := client.next_event(), h11.Data):
        content += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert client.trailing_data[0] == b""
    return content
