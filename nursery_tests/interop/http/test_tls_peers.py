"""Mutual TLS with Envoy and nginx, in front of the proxy and behind it: certificates both ways, ALPN and SNI."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from bench.peers import ENVOY, Instance, Job, Tls
from nursery_tests.interop.http.conftest import (
    HERE,
    LIMIT,
    PORT,
    Nginx,
    Process,
    Proxy,
    listens,
    new_address,
    wait_until,
)
from nursery_tests.interop.http.tls_parts import WEB, Certificates, settings, upstream


@pytest.fixture(scope="module")
def certificates(folder: Path) -> Certificates:
    return Certificates(folder)


@pytest.fixture
def instances() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def greeter(folder: Path, running: ExitStack) -> str:
    """A plain gRPC server's address."""
    place = new_address()
    process = Process([sys.executable, f"{HERE}/greeter.py", place, str(PORT), "peers"], folder, "greeter-peers")
    running.callback(process.kill)
    wait_until(lambda: listens(place), "the greeter listens")
    return place


def envoy(folder: Path, stack: ExitStack, name: str, place: Instance, tls: Tls) -> int:
    """An Envoy before something; gives its port."""
    job = Job({"greeter": [place]}, http=True, http2=True, tls=tls)
    if missing := ENVOY.missing(job):
        pytest.skip(missing)
    own = folder / name
    own.mkdir()
    return int(stack.enter_context(ENVOY.start(own, job)).ports["greeter"])


def call(port: int, certificates: Certificates, name: str) -> tuple[bytes, str]:
    """A call over TLS: its answer, and what the instance was told of its caller."""
    web = certificates.web
    credentials = grpc.ssl_channel_credentials(
        Path(certificates.authority.file).read_bytes(), Path(web.key).read_bytes(), Path(web.certificate).read_bytes()
    )
    options = [("grpc.ssl_target_name_override", name), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        answer, made = channel.unary_unary("/test.Greeter/Echo").with_call(b"hi", timeout=LIMIT)
        return answer, str(dict(made.initial_metadata())["x-told"])


def test_envoy_in_front(folder: Path, instances: ExitStack, certificates: Certificates, greeter: str) -> None:
    """Client → TLS → Envoy → mutual TLS, HTTP/2 by ALPN → proxy → gRPC: the proxy knows Envoy, and says who it is."""
    made = Proxy(
        folder,
        {"b": [greeter]},
        settings(certificates, allow=[WEB]),
        listen=["https://127.0.0.1:0=b"],
        name="behind-envoy",
    )
    instances.callback(made.kill)
    front = certificates.authority.issue("front", ["front.example"], [WEB])
    tls = Tls(front.certificate, front.key, "", certificates.authority.file, "proxy.example", ("greeter",))
    port = envoy(folder, instances, "envoy-tls-front", Instance("127.0.0.1", made.ports["https=b"]), tls)
    answer, told = call(port, certificates, "front.example")
    assert answer == b"hi"
    assert f"URI={WEB};DNS=front.example" in told
    made.printed(rf"access request service=b client=\S+ identity={WEB} request_id=\S+ method=POST")
    assert made.measured("tls_handshakes_total", scheme="https", outcome="ok") >= 1


def test_envoy_behind(folder: Path, instances: ExitStack, certificates: Certificates, greeter: str) -> None:
    """Client → TLS → proxy → mutual TLS, HTTP/2 by ALPN, the name by SNI → Envoy → gRPC."""
    own = certificates.instance
    tls = Tls(own.certificate, own.key, "", certificates.authority.file, "b.example", (), asks=True)
    port = envoy(folder, instances, "envoy-tls-behind", Instance(greeter, PORT), tls)
    service = upstream(certificates, "server_name: b.example").replace("b: {", "b: {protocol: http2, ", 1)
    made = Proxy(
        folder,
        {"b": [new_address(), f"127.0.0.1:{port}"]},
        settings(certificates, services=service, asks=False),
        listen=["https://127.0.0.1:0=b"],
        name="before-envoy-tls",
    )
    instances.callback(made.kill)
    assert call(made.ports["https=b"], certificates, "proxy.example")[0] == b"hi"
    assert made.measured("requests_total", service="b", tier="other", outcome="served") == 1


def test_nginx_on_both_sides(
    folder: Path, instances: ExitStack, certificates: Certificates, program: Callable[[str], str]
) -> None:
    """Client → nginx → mutual TLS → proxy → mutual TLS → nginx, which says whom it saw."""
    behind = new_address()
    own, web = certificates.instance, certificates.web
    server = (
        f"    listen {behind}:8443 ssl;\n    ssl_certificate {own.certificate};\n    ssl_certificate_key {own.key};\n"
        f"    ssl_client_certificate {certificates.authority.file};\n    ssl_verify_client on;\n"
        "    ssl_protocols TLSv1.3;\n"
        '    location / { return 200 "$ssl_server_name $ssl_client_verify $ssl_client_s_dn\\n"; }'
    )
    instances.callback(Nginx(program("nginx"), folder, behind, server, "nginx-mtls-behind").kill)
    made = Proxy(
        folder,
        {"b": [behind]},
        settings(
            certificates,
            allow=[WEB],
            services=upstream(certificates, "port: 8443, server_name: b.example").replace(
                "b: {", "b: {protocol: http1, ", 1
            ),
        ),
        listen=["https://127.0.0.1:0=b"],
        name="between-nginx",
    )
    instances.callback(made.kill)
    front = new_address()
    server = (
        f"    listen {front}:8444;\n    location / {{\n        proxy_pass https://127.0.0.1:{made.ports['https=b']};\n"
        f"        proxy_ssl_certificate {web.certificate};\n        proxy_ssl_certificate_key {web.key};\n"
        f"        proxy_ssl_trusted_certificate {certificates.authority.file};\n        proxy_ssl_verify on;\n"
        "        proxy_ssl_name proxy.example;\n        proxy_ssl_server_name on;\n"
        "        proxy_ssl_protocols TLSv1.3;\n    }"
    )
    instances.callback(Nginx(program("nginx"), folder, front, server, "nginx-mtls-front").kill)
    wait_until(lambda: listens(front, 8444), "nginx listens")
    with urllib.request.urlopen(f"http://{front}:8444/", timeout=LIMIT) as answer:
        assert answer.read() == b"b.example SUCCESS CN=proxy\n"
    made.printed(rf"access request service=b client=\S+ identity={WEB} method=GET")
