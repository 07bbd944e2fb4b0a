"""Bytes into a running proxy: an instance never sees another request, or another end of one, than what a strict parser
of other people's making (h11) sees in what the client sent.

The same bytes each time; with the profile `fuzz`, many more, and new ones.
"""

from __future__ import annotations

import os
import random
from typing import Any, NamedTuple

import h11
import pytest
import trio

from meshlocal.policy.model import make_instance

LIMIT = 30.0
THOROUGH = os.environ.get("MESHLOCAL_TESTS_PROFILE") == "fuzz"
CASES = 2000 if THOROUGH else 120

FIELDS = [
    *(
        b"Content-Length: 5",
        b"content-length: 0",
        b"Content-Length: +5",
        b"Content-Length: 5, 5",
        b"Content-Length: 5\t",
    ),
    *(
        b"Content-Length: 5, 6",
        b"Content-Length: 0x5",
        b"Content-Length : 5",
        b"Content-Length: ",
        b"Content-Length: 05",
    ),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: Chunked", b"Transfer-Encoding: x, chunked"),
    *(b"Transfer-Encoding:\x0bchunked", b"Transfer-Encoding: identity", b"Transfer_Encoding: chunked"),
    *(b"Transfer-Encoding: chunked, chunked", b" Transfer-Encoding: chunked", b"Transfer-Encoding : chunked"),
    *(b"Connection: close", b"Connection: Content-Length", b"Connection: Transfer-Encoding", b"X: y"),
    *(b"X: y\rContent-Length: 5", b"X: y\nContent-Length: 5", b"X: \x00", b" folded", b"Expect: 100-continue"),
]
BODIES = [
    *(
        b"",
        b"",
        b"hello",
        b"5\r\nhello\r\n0\r\n\r\n",
        b"05\r\nhello\r\n0\r\nX: y\r\n\r\n",
        b"5;a=b\r\nhello\r\n0\r\n\r\n",
    ),
    *(
        b"5 \r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"5\nhello\n0\n\n",
        b"5\r\nhello0\r\n\r\n",
        b"-1\r\n\r\n",
    ),
    *(b"5\r\nhello\r\n0\r\nContent-Length: 5\r\n\r\n", b"10000000000000005\r\nhello\r\n0\r\n\r\n", b"5\r\nhel"),
    *(b"5;\nhello\r\n0\r\n\r\n", b"0\r\n\r\n", b"G\r\n"),
]


class Seen(NamedTuple):
    method: bytes
    ids: tuple[bytes, ...]
    body: bytes


def parse(connection: h11.Connection, body: list[bytes], head: list[h11.Request]) -> Seen | None:
    """The next whole request; None until more bytes come.

    Raises:
        h11.RemoteProtocolError: it is none.
    """
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Request):
            head[:], body[:] = [event], []
        elif isinstance(event, h11.Data):
            body.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            ids = tuple(value for name, value in head[0].headers if name == b"x-id")
            return Seen(head[0].method, ids, b"".join(body))
        else:
            return None


def answer(connection: h11.Connection) -> bytes:
    sent = connection.send(h11.Response(status_code=200, headers=[(b"content-length", b"0")]))
    ended = connection.send(h11.EndOfMessage())
    return (sent or b"") + (ended or b"")


def expected(data: bytes) -> list[Seen]:
    """What the client's bytes say, up to where they say nothing any more."""
    found: list[Seen] = []
    try:
        while True:
            # Empty lines before a request are passed over (RFC 9112, section 2.2), which h11 does not do.
            while data.startswith(b"\r\n"):
                data = data[2:]
            connection = h11.Connection(h11.SERVER)
            connection.receive_data(data)
            seen = parse(connection, [], [])
            if seen is None:
                return found
            found.append(seen)
            if connection.their_state is h11.MUST_CLOSE:
                return found
            data = connection.trailing_data[0]
    except (h11.RemoteProtocolError, h11.LocalProtocolError):
        return found


class Instance:
    """Reads by h11, and says what it saw."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.wrong: list[str] = []

    async def serve(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        body: list[bytes] = []
        head: list[h11.Request] = []
        try:
            async with stream:
                async for data in stream:
                    connection.receive_data(bytes(data))
                    while (seen := parse(connection, body, head)) is not None:
                        self.seen.append(seen)
                        await stream.send_all(answer(connection))
                        if connection.our_state is h11.MUST_CLOSE:
                            return
                        connection.start_next_cycle()
        except h11.RemoteProtocolError as error:
            self.wrong.append(str(error))
        except trio.BrokenResourceError:
            return


def conversation(rng: random.Random) -> bytes:
    """Some requests in a row, each with a number, of which some are not what they should be."""
    data = b""
    for number in range(rng.randint(1, 3)):
        lines = [rng.choice([b"GET", b"POST", b"PUT", b"POST"]) + b" / HTTP/1." + rng.choice([b"1", b"1", b"1", b"0"])]
        lines += [b"Host: b", b"X-Id: %d" % number, *rng.sample(FIELDS, rng.choice([0, 1, 1, 2]))]
        if rng.random() < 0.5:
            body = rng.choice([b"hello", b"5\r\nhello\r\n0\r\n\r\n"])
            lines += [b"Content-Length: 5" if body == b"hello" else b"Transfer-Encoding: chunked"]
        else:
            body = rng.choice(BODIES)
        data += b"\r\n".join(lines) + b"\r\n\r\n" + body
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        at = rng.randrange(len(data))
        data = (
            data[:at] + rng.choice([b"", b"\r", b"\n", b"\r\n", b" ", b"\x00", b"0"]) + data[at + rng.randint(0, 1) :]
        )
    return data


async def test_an_instance_sees_no_other_requests_than_the_client_sent(proxy: Any, nursery: trio.Nursery) -> None:
    """A2, A3: nothing is smuggled past the proxy."""
    instance = Instance()
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    nursery.start_soon(trio.serve_listeners, instance.serve, [listener])
    proxy.publish(make_instance("127.0.0.1", listener.socket.getsockname()[1], labels={"node": "n1"}))
    served = 0
    for case in range(CASES):
        seed = random.randrange(2**32) if THOROUGH else case
        rng = random.Random(seed)
        data = conversation(rng)
        instance.seen.clear()
        cut = rng.randrange(len(data) + 1)
        with trio.fail_after(LIMIT):
            async with await proxy.connect() as client:
                try:
                    await client.send(data[:cut])
                    if rng.random() < 0.3:
                        await trio.lowlevel.checkpoint()
                    await client.send(data[cut:])
                    await client.send_eof()
                    await client.rest()
                except (trio.BrokenResourceError, OSError):
                    pass  # it was refused, and closed
            await proxy.idle()
        wanted = expected(data)
        where = f"seed {seed}: {data!r}: h11 sees {wanted}, the instance saw {instance.seen} {instance.wrong}"
        assert not instance.wrong, where
        assert instance.seen == wanted[: len(instance.seen)], where
        served += len(instance.seen)
    # Most of it is as it should be: a proxy that refuses everything would prove nothing.
    assert served > CASES / 4


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (b"GET / HTTP/1.1\r\nHost: b\r\nX-Id: 1\r\n\r\n", [Seen(b"GET", (b"1",), b"")]),
        (b"POST / HTTP/1.1\r\nHost: b\r\nContent-Length: 5\r\n\r\nhelloGET", [Seen(b"POST", (), b"hello")]),
        (b"POST / HTTP/1.1\r\nHost: b\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", []),
    ],
)
def test_what_the_reference_sees(data: bytes, seen: list[Seen]) -> None:
    assert expected(data) == seen
