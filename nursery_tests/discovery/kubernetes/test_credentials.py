"""Credentials and TLS, against a server that checks them: what works, and how what does not is told."""

from __future__ import annotations

import base64
import json
import logging
import os
import ssl
import stat
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trustme

from meshlocal.discovery.kubernetes import credentials
from meshlocal.discovery.kubernetes.access import in_cluster
from meshlocal.discovery.kubernetes.api import FAILURES, Api, describe_failure
from meshlocal.discovery.kubernetes.credentials import Credentials, CredentialsError
from meshlocal.discovery.kubernetes.kubeconfig import Content, ExecPlugin

NOW = datetime(2026, 1, 1, tzinfo=UTC)
VERSION = "client.authentication.k8s.io/v1"


async def ask(kube: Any, access: Any, now: Any = lambda: NOW) -> Any:
    """One request; the failure as operators see it."""
    api = Api(lambda: access, now)
    try:
        async with api.get(kube.slices, {"limit": "1"}, "application/json") as response:
            return json.loads(await response.receive_all(100_000))["kind"]
    except FAILURES as error:
        return describe_failure(error)


def given(server: Any) -> Any:
    return [each.headers.get("authorization") for each in server.requests]


async def test_a_token_file_that_is_replaced(kube: Any, tmp_path: Any) -> None:
    """As a pod's token is, before it expires: the next request has the new one, without being refused first."""
    (tmp_path / "token").write_text("first\n")
    (tmp_path / "ca.crt").write_bytes(kube.ca_pem)
    async with kube.serving() as server:
        access = in_cluster("127.0.0.1", str(server.port), tmp_path)
        api = Api(lambda: access, lambda: NOW)
        for token in ("first", "second"):
            server.tokens = {token}
            (tmp_path / "token").write_text(f"{token}\n")
            async with api.get(kube.slices, {}, "application/json") as response:
                assert response.status == 200
        assert given(server) == ["Bearer first", "Bearer second"]


async def test_a_client_certificate(kube: Any) -> None:
    """Given as data or in files, with its key; files that are replaced are used from the next request on."""
    async with kube.serving() as server:
        server.need_certificate()
        assert await ask(kube, kube.access(server)) != "EndpointSliceList"
        assert not server.requests
        client = kube.authority.issue_cert("client@example.org")
        key = client.private_key_pem.bytes()
        certificate = b"".join(each.bytes() for each in client.cert_chain_pems)
        access = kube.access(server, certificate=Content(certificate), key=Content(key), token=Content())
        assert await ask(kube, access) == "EndpointSliceList"
        assert given(server)[-1] is None


async def test_certificates_never_reach_a_disk(kube: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """What is given as data is handed to OpenSSL in memory, and the memory is given back."""
    client = kube.authority.issue_cert("client@example.org")
    content = [Content(client.cert_chain_pems[0].bytes()), Content(client.private_key_pem.bytes())]
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    async with kube.serving() as server:
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(3):
            assert await ask(kube, kube.access(server, certificate=content[0], key=content[1])) == "EndpointSliceList"
        assert len(os.listdir("/proc/self/fd")) <= len(before) + 2


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        (b"junk", b"junk", "client-certificate-data: cannot be used with its key"),
        ("own", "other", "client-certificate-data: cannot be used with its key: KEY_VALUES_MISMATCH"),
        ("own", "locked", "client-certificate-data: cannot be used with its key: the key wants a password"),
    ],
)
async def test_client_certificates_that_cannot_be_used(kube: Any, certificate: Any, key: Any, message: Any) -> None:
    from cryptography.hazmat.primitives import serialization as s

    one, two = kube.authority.issue_cert("a@example.org"), kube.authority.issue_cert("b@example.org")
    private = s.load_pem_private_key(one.private_key_pem.bytes(), None)
    locked = private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret"))
    certificate = one.cert_chain_pems[0].bytes() if certificate == "own" else certificate
    key = {"other": two.private_key_pem.bytes(), "locked": locked}.get(key, key)
    async with kube.serving() as server:
        access = kube.access(server, certificate=Content(certificate), key=Content(key))
        assert (await ask(kube, access)).startswith(message)
        assert not server.requests


async def test_a_server_that_is_not_trusted(kube: Any, tmp_path: Any) -> None:
    """Another authority, another name, an authority that is none: told as what it is; nothing is sent."""
    other = trustme.CA().cert_pem.bytes()
    (tmp_path / "empty").write_text("\n")
    async with kube.serving() as server:
        for more, message in (
            (
                {"authority": Content(other)},
                "its certificate is not trusted: self-signed certificate in certificate chain",
            ),
            ({"authority": Content()}, "its certificate is not trusted: self-signed certificate in certificate chain"),
            ({"server_name": "elsewhere"}, "its certificate is not trusted: Hostname mismatch"),
            ({"authority": Content(b"junk")}, "certificate-authority-data: holds no PEM certificates"),
            ({"authority": Content(file=tmp_path / "none")}, "none: cannot be read: No such file or directory"),
            ({"authority": Content(file=tmp_path / "empty")}, "empty: is empty"),
        ):
            assert message in await ask(kube, kube.access(server, **more))
        assert not server.requests
        assert await ask(kube, kube.access(server, server_name="kubernetes.default.svc")) == "EndpointSliceList"
        assert await ask(kube, kube.access(server, authority=Content(other), insecure=True)) == "EndpointSliceList"


async def test_a_server_that_speaks_no_tls(kube: Any) -> None:
    async def answer(stream: Any) -> None:
        async with stream:
            await stream.receive_some(10)
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer, listeners)
        port = listeners[0].socket.getsockname()[1]
        problem = await ask(kube, in_access(kube, port))
        assert "WRONG_VERSION_NUMBER" in problem or "record layer" in problem.lower()
        nursery.cancel_scope.cancel()


def in_access(kube: Any, port: Any) -> Any:
    return kube.access(SimpleNamespace(port=port))


async def test_certificates_without_key_identifiers_are_taken(kube: Any) -> None:
    """What Python 3.13's default context refuses and many clusters' authorities make."""
    context = credentials.make_tls(in_access(kube, 1), credentials.Secrets(authority=kube.ca_pem))
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert not context.verify_flags & getattr(ssl, "VERIFY_X509_STRICT", 0x20)


@pytest.mark.parametrize("token", ["two words", "\u00e9", "a\r\nHost: evil"])
async def test_tokens_that_are_none(kube: Any, tmp_path: Any, token: Any) -> None:
    (tmp_path / "token").write_text(token)
    async with kube.serving() as server:
        problem = await ask(kube, kube.access(server, token=Content(file=tmp_path / "token")))
        assert problem == f"{tmp_path}/token: is no bearer token"
        assert not server.requests


# Plugins.


@pytest.fixture
def plugin(tmp_path: Any) -> Any:
    """A plugin that prints this, counts its runs, and keeps what it was told."""

    def make(printed: Any, *, status: Any = 0, stderr: Any = "", **more: Any) -> Any:
        (tmp_path / "answer").write_text(printed if isinstance(printed, str) else json.dumps(printed))
        script = tmp_path / "plugin"
        script.write_text(
            f'#!/bin/sh\necho x >> {tmp_path}/runs\nprintf %s "$KUBERNETES_EXEC_INFO" > {tmp_path}/told\n'
            f"printf %s \"$EXTRA\" > {tmp_path}/extra\ncat {tmp_path}/answer\necho '{stderr}' >&2\nexit {status}\n"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return ExecPlugin(VERSION, str(script), environment={"EXTRA": "1"}, **more)

    maker: Any = make
    maker.path = tmp_path
    return maker


def credential(token: Any = "t", expires: Any = None, **status: Any) -> Any:
    status = {"token": token} | status
    if expires is not None:
        status["expirationTimestamp"] = expires.isoformat().replace("+00:00", "Z")
    return {"apiVersion": VERSION, "kind": "ExecCredential", "status": status}


def runs(plugin: Any) -> Any:
    return len((plugin.path / "runs").read_text().split())


async def test_a_plugin_runs_again_before_its_answer_expires(kube: Any, plugin: Any) -> None:
    clock = [NOW]
    made = plugin(credential("one", NOW + timedelta(minutes=10)), cluster={"server": "https://x"})
    async with kube.serving() as server:
        access = kube.access(server, token=Content(), plugin=made)
        api = Api(lambda: access, lambda: clock[0])

        async def request() -> Any:
            async with api.get(kube.slices, {}, "application/json"):
                return given(server)[-1], runs(plugin)

        assert await request() == ("Bearer one", 1)
        clock[0] += timedelta(minutes=9)
        assert await request() == ("Bearer one", 1)
        plugin(credential("two"))
        clock[0] += timedelta(seconds=55)
        assert await request() == ("Bearer two", 2), "ten seconds before it expires"
        clock[0] += timedelta(days=9)
        assert await request() == ("Bearer two", 2), "it said nothing of an end"
        # Refused: it runs again, whatever it said.
        plugin(credential("three"))
        server.tokens = {"three"}
        assert await request() == ("Bearer three", 3)
    told = json.loads((plugin.path / "told").read_text())
    assert told["kind"] == "ExecCredential"
    assert told["spec"]["interactive"] is False
    assert base64.b64decode(told["spec"]["cluster"]["certificate-authority-data"]) == kube.ca_pem
    assert (plugin.path / "extra").read_text() == "1"


async def test_a_plugin_that_gives_a_certificate(kube: Any, plugin: Any) -> None:
    client = kube.authority.issue_cert("client@example.org")
    status = {
        "clientCertificateData": b"".join(each.bytes() for each in client.cert_chain_pems).decode(),
        "clientKeyData": client.private_key_pem.bytes().decode(),
    }
    async with kube.serving() as server:
        server.need_certificate()
        access = kube.access(server, token=Content(), plugin=plugin(credential("", **status)))
        assert await ask(kube, access) == "EndpointSliceList"


@pytest.mark.parametrize(
    ("printed", "more", "message"),
    [
        ("", {}, "printed no ExecCredential"),
        ("{}", {}, "printed no ExecCredential"),
        ({"apiVersion": "v1", "status": {}}, {}, "printed 'v1', not client.authentication.k8s.io/v1"),
        (credential(""), {}, "printed neither a token nor a client certificate with its key"),
        (credential("", clientCertificateData="x"), {}, "printed neither a token nor a client certificate"),
        (credential("a b"), {}, "is no bearer token"),
        (credential("hunter2", expirationTimestamp="2026-01-01T00:00:00"), {}, "expirationTimestamp: has no time zone"),
        (credential("hunter2", expirationTimestamp="soon"), {}, "printed no ExecCredential"),
        (credential("hunter2"), {"status": 3, "stderr": "log in first"}, "exited with status 3: log in first"),
        (credential("hunter2"), {"status": 1}, "exited with status 1"),
    ],
)
async def test_plugins_that_fail(kube: Any, plugin: Any, printed: Any, more: Any, message: Any) -> None:
    """Told with the plugin's name and its own last word, never with what it printed."""
    async with kube.serving() as server:
        problem = await ask(kube, kube.access(server, token=Content(), plugin=plugin(printed, **more)))
        assert problem.startswith("plugin plugin: ")
        assert message in problem
        assert "hunter2" not in problem
        assert not server.requests


async def test_a_plugin_that_is_missing(kube: Any) -> None:
    async with kube.serving() as server:
        missing = ExecPlugin(VERSION, "no-such-plugin-anywhere", hint="install it")
        problem = await ask(kube, kube.access(server, token=Content(), plugin=missing))
        assert problem == "plugin no-such-plugin-anywhere: cannot be run: No such file or directory: install it"


async def test_a_plugin_that_hangs(kube: Any, plugin: Any, monkeypatch: Any) -> None:
    """It is ended, and does not outlive its deadline."""
    monkeypatch.setattr(credentials, "PLUGIN_TIMEOUT", 0.1)
    script = plugin.path / "plugin"
    made = plugin(credential())
    script.write_text("#!/bin/sh\nexec sleep 1000\n")
    async with kube.serving() as server:
        holder = Credentials(kube.access(server, token=Content(), plugin=made), lambda: NOW)
        with trio.fail_after(10), pytest.raises(CredentialsError, match=r"gave no answer within 0\.1 s"):
            await holder.get()


async def test_secrets_stay_out_of_the_log(kube: Any, caplog: Any) -> None:
    """Not at any level, neither of what works nor of what fails."""
    caplog.set_level(logging.DEBUG)
    async with kube.serving() as server:
        server.tokens = {"hunter2"}
        async with kube.following(server, find=lambda: kube.access(server, token=Content(b"hunter2"))):
            await server.until(lambda: server.watching == 2)
            server.tokens = set()
            await server.cut()
            await server.until(lambda: len(server.requests) > 12)
    assert given(server)[0] == "Bearer hunter2"
    assert "hunter2" not in "".join(f"{record.getMessage()} {record.__dict__}" for record in caplog.records)
