"""net/connect_errors: why a server could not be connected, in a few words, whatever the error came wrapped in."""

from __future__ import annotations

import errno
import os
import socket
import ssl

import anyio
import pytest
import trio
import trustme

from meshlocal.net.connect_errors import why_not_connected
from nursery_tests.ports import free_port


def system(number: int, words: str | None = None) -> OSError:
    return OSError(number, words or os.strerror(number))


def caused(error: BaseException, by: BaseException) -> BaseException:
    error.__cause__ = by
    return error


REFUSED, UNREACHABLE = system(errno.ECONNREFUSED), system(errno.ENETUNREACH)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (REFUSED, "connection refused"),
        (system(errno.EHOSTUNREACH), "no route to host"),
        # trio's, with the address in its words.
        (
            system(errno.ECONNREFUSED, "[Errno 111] error connecting to ('::1', 1): Connection refused"),
            "connection refused",
        ),
        # anyio's, of one address and of several.
        (caused(OSError("All connection attempts failed"), REFUSED), "connection refused"),
        (
            caused(OSError("All connection attempts failed"), ExceptionGroup("all", [REFUSED, UNREACHABLE, REFUSED])),
            "connection refused, network is unreachable",
        ),
        (caused(ValueError("outer"), caused(OSError("inner"), UNREACHABLE)), "network is unreachable"),
        (ExceptionGroup("outer", [ExceptionGroup("inner", [REFUSED]), ValueError("Odd")]), "connection refused, Odd"),
        # Numbers that are not the system's: 1 would be EPERM, and -2 nothing.
        (socket.gaierror(-2, "Name or service not known"), "name or service not known"),
        (
            ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"),
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed",
        ),
        (ssl.SSLError(8, "Handshake failed"), "handshake failed"),
        (OSError("No number at all"), "no number at all"),
        (ValueError("Not the system's at all"), "Not the system's at all"),
    ],
)
def test_words_for_people(error: BaseException, why: str) -> None:
    assert why_not_connected(error) == why


@pytest.mark.parametrize("backend", ["trio", "asyncio"])
def test_a_real_refusal(backend: str) -> None:
    """As it comes out of each loop, also where a name has several addresses."""

    async def main() -> None:
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(OSError) as caught:
                await anyio.connect_tcp(host, free_port())
            # Of a host without IPv6, more may be said about the other address of the name.
            assert "connection refused" in why_not_connected(caught.value).split(", ")

    anyio.run(main, backend=backend)


async def test_a_real_certificate_that_nobody_trusts() -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("b").configure_cert(server)
    ours, theirs = trio.testing.memory_stream_pair()
    there = trio.SSLStream(theirs, server, server_side=True)
    here = trio.SSLStream(ours, ssl.create_default_context(), server_hostname="b")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(there.do_handshake)
        with trio.fail_after(10), pytest.raises(trio.BrokenResourceError) as caught:
            await here.do_handshake()
        nursery.cancel_scope.cancel()
    assert "certificate verify failed" in why_not_connected(caught.value)
