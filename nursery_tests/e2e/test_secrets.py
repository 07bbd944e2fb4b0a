"""Secrets reach no log at any level, no page and no error: tokens, keys, and what clients send to prove themselves."""

from __future__ import annotations

import base64
import os
import ssl
from pathlib import Path
from typing import Any

import pytest
import trio

from nursery_tests.certificates import Authority
from nursery_tests.e2e.running import LIMIT

DISCOVERY_TOKEN, OTHER_TOKEN, ADMIN_TOKEN, REQUEST_TOKEN = (
    "d1scovery-t0ken",
    "0ther-t0ken",
    "adm1n-t0ken",
    "requ3st-t0ken",
)
PAGES = ("/", "/config", "/services", "/metrics", "/readyz")


def secrets(*keys: str) -> list[str]:
    """What must not be seen, also as a client may encode it."""
    tokens = [DISCOVERY_TOKEN, OTHER_TOKEN, ADMIN_TOKEN, REQUEST_TOKEN]
    encoded = [base64.b64encode(text.encode()).decode().rstrip("=") for text in tokens]
    lines = [line for key in keys for line in Path(key).read_text().splitlines()[1:-1]]
    return [*tokens, *encoded, *lines]


async def page(port: int, path: str, token: str, context: ssl.SSLContext) -> tuple[int, str]:
    with trio.fail_after(LIMIT):
        plain = await trio.open_tcp_stream("127.0.0.1", port)
        async with trio.SSLStream(plain, context, server_hostname="localhost", https_compatible=True) as stream:
            head = (
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
            )
            await stream.send_all(head.encode())
            answer = b"".join([bytes(part) async for part in stream])
    return int(answer.split()[1]), answer.decode()


@pytest.mark.parametrize("scheme", ["grpcs", "wss"])
async def test_nothing_shows_a_secret(processes: Any, tmp_path: Path, program: Any, scheme: str) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("own", ["localhost"])
    context = ssl.create_default_context(cafile=authority.file)
    for name, text in (
        ("tokens", f"{DISCOVERY_TOKEN},web\n{OTHER_TOKEN}\n"),
        ("token", DISCOVERY_TOKEN),
        ("admin", ADMIN_TOKEN),
        ("instances.yaml", "services: {b: [{address: 127.0.0.1, port: 1}]}\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o400)
    os.chmod(pair.key, 0o400)
    tls = f"certificate_file: {pair.certificate}, key_file: {pair.key}"
    access = f"admin: 127.0.0.1:0, admin_access: {{token_file: admin, {tls}}}"
    (tmp_path / "discovery.yaml").write_text(
        f"discovery: {{tls_certificate_file: {pair.certificate}, tls_key_file: {pair.key}, tokens_file: tokens,"
        f" allow: [{{identity: web, services: ['*']}}], bind: ['127.0.0.1:0'], websocket_bind: ['127.0.0.1:0'],"
        f" sources: ['file:instances.yaml'], {access}}}\nlog: {{level: debug}}\n"
    )
    server = await processes.meshlocal("discovery", "--config", "discovery.yaml")
    ready = await server.printed(r"ready: grpcs://\S+:(\d+) wss://\S+:(\d+) admin=https://127\.0\.0\.1:(\d+)", "out")
    port = ready[1] if scheme == "grpcs" else ready[2]
    client = f"urls: ['{scheme}://localhost:{port}'], ca_file: {authority.file}, token_file: token"
    (tmp_path / "proxy.yaml").write_text(
        f"proxy: {{discovery: {{{client}}}, listen: ['http://127.0.0.1:0=b', 'https://127.0.0.1:0=b'],"
        f" tls: {{{tls}}}, access_log: true, {access}}}\nlog: {{level: debug}}\n"
    )
    proxy = await processes.meshlocal("proxy", "--config", "proxy.yaml")
    serving = await proxy.printed(
        r"ready: .*http://127\.0\.0\.1:(\d+)=b https://127\.0\.0\.1:(\d+)=b admin=https://127\.0\.0\.1:(\d+)", "out"
    )
    curl = [program("curl"), "-sS", "--cacert", authority.file, "-H", f"Authorization: Bearer {REQUEST_TOKEN}"]
    curl += ["-H", f"Cookie: session={REQUEST_TOKEN}", "-H", f"Proxy-Authorization: Basic {REQUEST_TOKEN}"]
    for flag in ("--http1.1", "--http2-prior-knowledge"):
        asked = await processes.start([*curl, flag, f"http://127.0.0.1:{serving[1]}/x"])
        assert await asked.exited() == 0
        asked = await processes.start(
            [*curl, flag.replace("-prior-knowledge", ""), f"https://localhost:{serving[2]}/x"]
        )
        assert await asked.exited() == 0
    shown = []
    for program_, number in ((server, int(ready[3])), (proxy, int(serving[3]))):
        status, _ = await page(number, "/config", "wrong", context)
        assert status == 401
        for path in PAGES:
            status, text = await page(number, path, ADMIN_TOKEN, context)
            assert status == 200, path
            shown.append(text)
        # A file that makes no sense is named, and not shown.
        shown.append(program_.out)
    for name in ("tokens", "admin"):
        (tmp_path / name).chmod(0o600)
        (tmp_path / name).write_text(f"{DISCOVERY_TOKEN},no name\n" if name == "tokens" else " \n")
    await server.printed(r"file not read again.*tokens: line 1")
    await proxy.printed(r"file not read again.*admin: holds no token")
    shown += [server.err, proxy.err]
    hidden = secrets(pair.key)
    assert len(hidden) > 8
    for text in shown:
        assert not [secret for secret in hidden if secret in text]
