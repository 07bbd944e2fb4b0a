"""admin/access: who may read the pages, and how those are kept from pages of the web."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio

from meshlocal.admin.access import AdminAccess
from meshlocal.admin.messages import Request, Response
from meshlocal.admin.server import AdminServer
from meshlocal.net.following import FileProblemError
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.policy.config_access import AdminAccessConfig
from nursery_tests.certificates import Authority


def ask(access: AdminAccess, path: str = "/services", local: str = "10.0.0.7", **headers: str) -> Response | None:
    fields: Mapping[str, str] = {"host": "10.0.0.7:15000", **headers}
    return access.refusal(Request("GET", path, "", fields), local)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:15000", None), ("10.0.0.7", None), ("ops.example", None), ("evil.example:15000", 421), ("", 421)],
)
def test_hosts(host: str, status: int | None) -> None:
    """A page that made a name of its own lead here is refused by that name, but for the probes' pages."""
    access = AdminAccess(AdminAccessConfig(names=("Ops.Example",)), "proxy")
    refused = ask(access, host=host)
    assert (refused.status if refused is not None else None) == status
    if refused is not None:
        assert b"proxy.admin_access.names" in refused.body
    assert ask(access, "/readyz", host=host) is None


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [("http://10.0.0.7:15000", True), ("https://10.0.0.7", True), ("http://evil.example", False), ("null", False)],
)
def test_origins(origin: str, allowed: bool) -> None:
    refused = ask(AdminAccess(AdminAccessConfig(), "proxy"), origin=origin)
    assert (refused is None) is allowed
    assert refused is None or refused.status == 403


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("authorization", "knows"),
    [
        ("Bearer s3cret", True),
        ("bearer  s3cret ", True),
        (basic("anybody", "s3cret"), True),
        (basic("", "s3cret"), True),
        (basic("s3cret", ""), False),
        (basic("x", "S3cret"), False),
        ("Bearer ", False),
        ("Bearer s3cre", False),
        ("Basic !", False),
        ("Basic", False),
        ("s3cret", False),
        ("Digest s3cret", False),
        ("", False),
    ],
)
def test_tokens(tmp_path: Path, authorization: str, knows: bool) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    access = AdminAccess(AdminAccessConfig(token_file=str(file)), "proxy")
    refused = ask(access, authorization=authorization)
    assert (refused is None) is knows
    if refused is not None:
        assert refused.status == 401
        assert [name for name, _ in refused.headers] == ["WWW-Authenticate", "WWW-Authenticate"]
        assert b"s3cret" not in refused.body
    assert ask(access, "/livez", authorization=authorization) is None


def test_a_token_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    access = AdminAccess(AdminAccessConfig(token_file=str(file)), "proxy")
    file.write_text("newer")
    assert [followed.look() for followed in access.followed()] == [True]
    assert ask(access, authorization="Bearer newer") is None
    assert ask(access, authorization="Bearer old") is not None
    file.write_text(" \n")
    with pytest.raises(FileProblemError, match="holds no token"):
        next(access.followed()).look()
    assert ask(access, authorization="Bearer newer") is None
    with pytest.raises(FileProblemError, match="holds no token"):
        AdminAccess(AdminAccessConfig(token_file=str(file)), "proxy")


@pytest.mark.parametrize("text", ["abc\ndef", "a b", "sesame \u00fc", "\x7f"])
def test_what_no_header_can_hold_is_no_token(tmp_path: Path, text: str) -> None:
    """The error shows nothing of it."""
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(FileProblemError, match="holds no token: one is of printable") as caught:
        AdminAccess(AdminAccessConfig(token_file=str(file)), "proxy")
    assert text not in str(caught.value)


async def test_over_tls(tmp_path: Path) -> None:
    """Each connection has the certificate that the file holds then; one that speaks no TLS costs nobody else."""
    authority = Authority(tmp_path)
    pair = authority.issue("pages", ["localhost"])
    access = AdminAccess(AdminAccessConfig(certificate_file=pair.certificate, key_file=pair.key), "proxy")
    assert access.scheme == "https"
    server = AdminServer({"/page": lambda _: Response.text("secret")}, access)
    listeners = open_tcp_listeners("127.0.0.1", 0)
    port = listeners[0].getsockname()[1]
    trusting = ssl.create_default_context(cafile=authority.file)

    async def get() -> tuple[bytes, object]:
        plain = await trio.open_tcp_stream("127.0.0.1", port)
        async with trio.SSLStream(plain, trusting, server_hostname="localhost", https_compatible=True) as stream:
            await stream.send_all(b"GET /page HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            number = stream.getpeercert()["serialNumber"]
            return b"".join([bytes(part) async for part in stream]), number

    with listeners[0], trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listeners)
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(b"GET /page HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert b"secret" not in b"".join([bytes(part) async for part in stream])
            answer, first = await get()
            assert answer.endswith(b"secret\n")
            authority.issue("pages", ["localhost"])
            assert [followed.look() for followed in access.followed()] == [True]
            answer, second = await get()
            assert answer.endswith(b"secret\n")
            assert first != second
            nursery.cancel_scope.cancel()
