"""TLS at the proxy's two ends (T1 to T4), with other people's programs: curl, openssl, nginx, nghttpd, grpcio."""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from meshlocal.policy.identity import identities
from nursery_tests.certificates import Pair
from nursery_tests.interop.http.conftest import (
    HERE,
    LIMIT,
    PORT,
    Nginx,
    Process,
    Proxy,
    Threaded,
    listens,
    new_address,
    wait_until,
)
from nursery_tests.interop.http.tls_parts import (
    OTHER,
    WEB,
    Certificates,
    Echo,
    TlsInstance,
    client_context,
    connected,
    echoed,
    exchanged,
    settings,
    upstream,
)
from nursery_tests.spiffe import Agent, answer


@pytest.fixture(scope="module")
def certificates(folder: Path) -> Certificates:
    return Certificates(folder)


# Clients


@pytest.fixture(scope="module")
def echo(folder: Path, running: ExitStack) -> Echo:
    made = Echo(folder, new_address())
    running.callback(made.kill)
    return made


@pytest.fixture(scope="module")
def proxy(folder: Path, running: ExitStack, certificates: Certificates, echo: Echo, nginx: Nginx) -> Proxy:
    """It asks clients for a certificate, and lets in those of one service account."""
    started = Proxy(
        folder,
        {"echo": [echo.address], "nginx": [nginx.address]},
        # nginx speaks HTTP/1.1 in plaintext.
        settings(certificates, allow=["spiffe://td/ns/*/sa/web"], services="nginx: {protocol: http1}"),
        listen=["tls://127.0.0.1:0=echo", "https://127.0.0.1:0=nginx"],
        name="tls-proxy",
    )
    running.callback(started.kill)
    return started


def test_tcp_inside_tls(proxy: Proxy, certificates: Certificates) -> None:
    large = bytes(range(256)) * 4096
    context = client_context(certificates, certificates.web)
    assert exchanged(proxy.ports["tls=echo"], context) == b"hello"
    with connected(proxy.ports["tls=echo"], context) as stream:
        assert echoed(stream, large) == large
        # The end is passed on, and comes back as one (T2).
        stream.unwrap()
    proxy.printed(rf"access request service=echo client=\S+ identity={WEB} ")


@pytest.mark.parametrize(
    ("who", "problem"),
    [
        ("other", "spiffe://td/ns/shop/sa/other is not in proxy.tls.allow"),
        ("foreign", "unable to get local issuer certificate"),
        ("late", "certificate has expired"),
        (None, "peer did not return a certificate"),
    ],
)
def test_who_is_not_allowed_is_refused(proxy: Proxy, certificates: Certificates, who: str | None, problem: str) -> None:
    """T4: before a byte of it reaches an instance, with a reason."""
    served = proxy.measured("requests_total", service="echo")
    with pytest.raises(OSError, match=r"(?i)alert|reset|eof|ended|pipe"):
        exchanged(proxy.ports["tls=echo"], client_context(certificates, getattr(certificates, who) if who else None))
    outcome = "not_allowed" if who == "other" else "failed"
    wait_until(lambda: proxy.measured("tls_handshakes_total", scheme="tls", outcome=outcome) >= 1, outcome)
    assert proxy.measured("requests_total", service="echo") == served


def test_the_reason_is_in_the_log(folder: Path, certificates: Certificates, echo: Echo, running: ExitStack) -> None:
    """One line in five seconds: of a proxy that refuses for the first time."""
    made = Proxy(
        folder,
        {"echo": [echo.address]},
        settings(certificates, allow=[WEB]),
        listen=["tls://127.0.0.1:0=echo"],
        name="tls-reason",
    )
    running.callback(made.kill)
    with pytest.raises(OSError, match=r"(?i)alert|reset|eof|ended|pipe"):
        exchanged(made.ports["tls=echo"], client_context(certificates, certificates.other))
    made.printed(rf"tls connection refused client=127\.0\.0\.1:\d+ problem=.{OTHER} is not in proxy\.tls\.allow")
    made.kill()


@pytest.mark.parametrize("what", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\xff" * 5000])
def test_what_is_no_tls_costs_that_connection_only(proxy: Proxy, certificates: Certificates, what: bytes) -> None:
    place = ("127.0.0.1", proxy.ports["tls=echo"])
    # It may be cut before all of this was said.
    with socket.create_connection(place, LIMIT) as sock, contextlib.suppress(OSError):
        sock.sendall(what)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    assert exchanged(proxy.ports["tls=echo"], client_context(certificates, certificates.web)) == b"hello"
    assert "fault in the proxy" not in proxy.log


@pytest.mark.parametrize(("flag", "version"), [("--http1.1", "1.1"), ("--http2", "2")])
def test_curl_over_https(
    proxy: Proxy, certificates: Certificates, program: Callable[[str], str], flag: str, version: str
) -> None:
    """HTTP/1.1 and HTTP/2 by ALPN."""
    command = [program("curl"), "-sS", flag, "--cacert", certificates.authority.file, "--max-time", "20"]
    command += ["--cert", certificates.web.certificate, "--key", certificates.web.key, "-w", "%{http_version}"]
    url = f"https://localhost:{proxy.ports['https=nginx']}/hello"
    told = subprocess.run([*command, url], capture_output=True, text=True, check=False)
    assert told.stdout == f"hello\n{version}", told.stderr


def told_of(pair: Pair) -> str:
    """X-Forwarded-Client-Cert of who shows a certificate for `WEB`."""
    der = ssl.PEM_cert_to_DER_cert(Path(pair.certificate).read_text())
    return f"Hash={hashlib.sha256(der).hexdigest()};URI={WEB}"


@pytest.mark.parametrize("flag", ["--http1.1", "--http2"])
def test_an_instance_is_told_who_asks(
    folder: Path, instances: ExitStack, certificates: Certificates, program: Callable[[str], str], flag: str
) -> None:
    """In X-Forwarded-Client-Cert, of which nothing is left that a client said itself, over TLS or not."""
    place = new_address()

    def answer(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += sock.recv(65536)
            told = [line for line in head.lower().split(b"\r\n") if b"cert" in line.partition(b":")[0]]
            body = b"\n".join(told)
            sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    instances.callback(Threaded(place, answer).close)
    made = Proxy(
        folder,
        {"b": [place]},
        settings(certificates) + "\nservices: {b: {protocol: http1}}",
        fixed=["b"],
        listen=["https://127.0.0.1:0=b"],
        name=f"tls-told{flag}",
    )
    instances.callback(made.kill)
    forged = ["-H", "X-Forwarded-Client-Cert: URI=spiffe://td/admin", "-H", "X_Forwarded_Client-Cert: x", "-H", "A: b"]
    command = [program("curl"), "-sS", flag, "--cacert", certificates.authority.file, "--max-time", "20", *forged]
    command += ["--cert", certificates.web.certificate, "--key", certificates.web.key]
    url = f"https://localhost:{made.ports['https=b']}/hello"
    told = subprocess.run([*command, url], capture_output=True, text=True, check=False)
    assert told.stdout == f"x-forwarded-client-cert: {told_of(certificates.web)}".lower(), told.stderr
    plain = [program("curl"), "-sS", "--max-time", "20", *forged, f"http://127.0.0.1:{made.fixed['b']}/hello"]
    assert subprocess.run(plain, capture_output=True, check=True).stdout == b""


def test_openssl(proxy: Proxy, certificates: Certificates, program: Callable[[str], str]) -> None:
    told = subprocess.run(
        [
            *(program("openssl"), "s_client", "-connect", f"127.0.0.1:{proxy.ports['tls=echo']}", "-brief"),
            *("-verify_return_error", "-CAfile", certificates.authority.file),
            *("-cert", certificates.web.certificate, "-key", certificates.web.key),
        ],
        input="hello\n",
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert "Protocol version: TLSv1.3" in told.stderr, told.stderr
    assert "Verification: OK" in told.stderr


def test_openssl_as_the_instance(
    folder: Path, instances: ExitStack, certificates: Certificates, program: Callable[[str], str]
) -> None:
    """`openssl s_server`, which wants a certificate and turns each line round."""
    place = new_address()
    pair = certificates.instance
    command = [program("openssl"), "s_server", "-accept", f"{place}:{PORT}", "-cert", pair.certificate]
    command += ["-key", pair.key, "-CAfile", certificates.authority.file, "-Verify", "1", "-verify_return_error"]
    server = Process([*command, "-rev", "-tls1_3"], folder, "s_server")
    instances.callback(server.kill)
    server.printed("ACCEPT")
    made = Proxy(
        folder,
        {"b": [place]},
        settings(certificates, services=upstream(certificates, "server_name: b.example"), asks=False),
        listen=["tcp://127.0.0.1:0=b"],
        name="tls-s-server",
    )
    instances.callback(made.kill)
    with socket.create_connection(("127.0.0.1", made.ports["tcp=b"]), LIMIT) as sock:
        sock.sendall(b"hello\n")
        assert sock.recv(100) == b"olleh\n"


def test_an_older_tls_is_refused(proxy: Proxy, certificates: Certificates) -> None:
    context = client_context(certificates, certificates.web)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol version"):
        exchanged(proxy.ports["tls=echo"], context)


# Instances


@pytest.fixture
def instances() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("wrong", ["plaintext", "foreign", "late", "name", "common name", "label", "silent"])
def test_an_instance_that_does_not_prove_itself_is_left_for_the_next(
    folder: Path, instances: ExitStack, certificates: Certificates, wrong: str
) -> None:
    """T1: never in plaintext; its failure has the cause `tls`, or `timeout`."""
    near, far = new_address(), new_address()
    identity = wrong in ("name", "label")
    pair: Pair | None = {
        "plaintext": None,
        "foreign": certificates.stranger.issue("foreign-b", ["b.example"]),
        "late": certificates.authority.issue("late-b", ["b.example"], begin=-10, end=-1),
        "name": certificates.authority.issue("wrong-b", ["b.example"], ["spiffe://td/node/n7"]),
        "common name": certificates.authority.issue("b.example", uris=["spiffe://td/evil"]),
        "label": certificates.authority.issue("label-b", ["b.example"], ["spiffe://td/node/n2"]),
        "silent": None,
    }[wrong]
    bad: TlsInstance | None = None
    if wrong == "silent":
        instances.enter_context(socket.create_server((near, PORT)))
    else:
        bad = TlsInstance(near, pair)
        instances.callback(bad.close)
    good = TlsInstance(far, certificates.instance)
    instances.callback(good.close)
    what = "identity: 'spiffe://td/node/{node}'" if identity else "server_name: b.example"
    made = Proxy(
        folder,
        {"b": [near, far]},
        settings(certificates, services=upstream(certificates, what), asks=False),
        listen=["tcp://127.0.0.1:0=b"],
        name=f"tls-{wrong}".replace(" ", "-"),
    )
    instances.callback(made.kill)
    with socket.create_connection(("127.0.0.1", made.ports["tcp=b"]), LIMIT) as sock:
        sock.sendall(b"secret")
        assert sock.recv(100) == b"secret"
    outcome = "timeout" if wrong == "silent" else "tls"
    assert made.measured("attempts_total", outcome=outcome, tier="node") == 1
    assert bad is None or b"secret" not in bad.plaintext
    assert len(good.heard) == 1


def test_the_proxy_proves_itself_to_instances_and_resumes_sessions(
    folder: Path, instances: ExitStack, certificates: Certificates
) -> None:
    """Mutual TLS onward with the proxy's own certificate; a second connection resumes the first one's session."""
    place = new_address()
    instance = TlsInstance(place, certificates.instance, certificates.authority.file)
    instances.callback(instance.close)
    made = Proxy(
        folder,
        {"b": [place]},
        settings(certificates, services=upstream(certificates, "server_name: b.example"), asks=False),
        listen=["tcp://127.0.0.1:0=b", "tls://127.0.0.1:0=b"],
        name="tls-mutual",
    )
    instances.callback(made.kill)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", made.ports["tcp=b"]), LIMIT) as sock:
            sock.sendall(b"hello")
            assert sock.recv(100) == b"hello"
            sock.shutdown(socket.SHUT_WR)
            # Half-close inside TLS, and back: an end, not a cut (T2).
            assert sock.recv(100) == b""
    # TLS on both sides.
    assert exchanged(made.ports["tls=b"], client_context(certificates)) == b"hello"
    assert identities(instance.heard[0])[0] == "spiffe://td/proxy"
    assert instance.resumed >= 2


def test_a_proxy_beside_its_instance(
    folder: Path, instances: ExitStack, certificates: Certificates, echo: Echo
) -> None:
    """Caller → its proxy → mutual TLS → the instance's proxy → the instance, whose own port the registry has."""
    inbound = Proxy(
        folder,
        {"unused": [new_address()]},
        settings(certificates, allow=[WEB]),
        listen=[f"tls://{echo.address}:15443=@{echo.address}:{PORT}"],
        name="tls-inbound",
    )
    instances.callback(inbound.kill)
    pair = f"certificate_file: {certificates.web.certificate}, key_file: {certificates.web.key}"
    what = f"server_name: proxy.example, port: 15443, {pair}"
    outbound = Proxy(
        folder,
        {"b": [new_address(), echo.address]},
        f"services: {{{upstream(certificates, what)}}}",
        listen=["tcp://127.0.0.1:0=b"],
        name="tls-outbound",
    )
    instances.callback(outbound.kill)
    with socket.create_connection(("127.0.0.1", outbound.ports["tcp=b"]), LIMIT) as sock:
        sock.sendall(b"hello")
        assert sock.recv(100) == b"hello"
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100) == b""
    place = f"@{echo.address}:{PORT}"
    inbound.printed(rf"access request service={place} client=\S+ identity={WEB} instance={echo.address}:{PORT} node=n1")
    assert inbound.measured("requests_total", service=place, outcome="served", tier="node") == 1


@pytest.mark.parametrize("protocol", ["http1", "http2"])
def test_an_instance_on_this_very_host_may_be_spared_tls(
    folder: Path, instances: ExitStack, certificates: Certificates, program: Callable[[str], str], protocol: str
) -> None:
    """`skip_tiers`: the near instance in plaintext at its own port, the far one over TLS where it speaks it."""
    near, far = new_address(), new_address()
    files = folder / f"spared-{protocol}"
    files.mkdir()
    (files / "hello").write_text("hello\n")
    command = [program("nghttpd"), "-d", str(files)]
    place = f"    listen {far}:8443 ssl;\n    ssl_certificate {certificates.instance.certificate};\n"
    place += f"    ssl_certificate_key {certificates.instance.key};\n    ssl_protocols TLSv1.3;\n"
    if protocol == "http1":
        plain: Process = Nginx(program("nginx"), folder, near, f"    location /hello {{ root {files}; }}", "spared")
        secured: Process = Nginx(
            program("nginx"), folder, far, f"{place}    location /hello {{ root {files}; }}", "unspared"
        )
    else:
        plain = Process([*command, "--no-tls", f"--address={near}", str(PORT)], folder, "spared-h2")
        pair = certificates.instance
        secured = Process([*command, f"--address={far}", "8443", pair.key, pair.certificate], folder, "unspared-h2")
        wait_until(lambda: listens(near), "nghttpd listens")
        wait_until(lambda: listens(far, 8443), "nghttpd listens")
    instances.callback(plain.kill)
    instances.callback(secured.kill)
    what = "port: 8443, server_name: b.example, skip_tiers: [node]"
    service = upstream(certificates, what).replace("b: {", f"b: {{protocol: {protocol}, ", 1)
    made = Proxy(folder, {"b": [near, far]}, f"services: {{{service}}}", fixed=["b"], name=f"tls-spared-{protocol}")
    instances.callback(made.kill)
    ask = b"GET /hello HTTP/1.1\r\nHost: b\r\n\r\n"
    with made.connect("b") as wire:
        for _ in range(2):
            wire.send(ask)
            assert wire.response()[::2] == (200, b"hello\n")
        assert made.measured("tls_skipped_total", service="b") == 1
        plain.kill()
        wire.send(ask)
        assert wire.response()[::2] == (200, b"hello\n")
    assert made.measured("picks_total", service="b", tier="other") == 1


def test_an_instance_that_cuts_inside_tls_resets_a_plain_client(
    folder: Path, instances: ExitStack, certificates: Certificates
) -> None:
    """T2: half an answer does not look whole."""
    place = new_address()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates.instance)

    def serve(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            stream = context.wrap_socket(sock, server_side=True)
            stream.sendall(stream.recv(100) + b" half")
            # Without close_notify.
            os.close(stream.detach())

    instances.callback(Threaded(place, serve).close)
    made = Proxy(
        folder,
        {"b": [place]},
        settings(certificates, services=upstream(certificates, "server_name: b.example"), asks=False),
        listen=["tcp://127.0.0.1:0=b"],
        name="tls-cut",
    )
    instances.callback(made.kill)
    with socket.create_connection(("127.0.0.1", made.ports["tcp=b"]), LIMIT) as sock:
        sock.sendall(b"hello")
        with pytest.raises(ConnectionResetError):
            rest_of(sock)


def rest_of(sock: socket.socket) -> bytes:
    """All that comes, up to a proper end."""
    got = b""
    while data := sock.recv(65536):
        got += data
    return got


def test_a_cut_on_either_side_of_a_tls_listener_is_one_on_the_other(
    folder: Path, instances: ExitStack, certificates: Certificates
) -> None:
    """T2: an instance that resets leaves its client without close_notify, and a client without one resets its
    instance."""
    place = new_address()
    ends: queue.Queue[str] = queue.Queue()

    def serve(sock: socket.socket) -> None:
        with sock:
            sock.settimeout(LIMIT)
            if sock.recv(100) == b"reset me":
                sock.sendall(b"half")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            sock.sendall(b"go on")
            try:
                rest_of(sock)
                ends.put("ended")
            except ConnectionResetError:
                ends.put("reset")

    instances.callback(Threaded(place, serve).close)
    made = Proxy(
        folder,
        {"b": [place]},
        settings(certificates, asks=False),
        listen=["tls://127.0.0.1:0=b"],
        name="tls-cuts",
    )
    instances.callback(made.kill)
    context = client_context(certificates)
    with connected(made.ports["tls=b"], context) as stream:
        stream.sendall(b"reset me")
        with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
            rest_of(stream)
    for whole, end in ((True, "ended"), (False, "reset")):
        with connected(made.ports["tls=b"], context) as stream:
            stream.sendall(b"hello")
            assert stream.recv(100) == b"go on"
            if whole:
                stream.unwrap()
            else:
                os.close(stream.detach())
        assert ends.get(timeout=LIMIT) == end


@pytest.mark.parametrize("protocol", ["http1", "http2"])
def test_http_to_instances_over_tls(
    folder: Path,
    instances: ExitStack,
    certificates: Certificates,
    program: Callable[[str], str],
    protocol: str,
) -> None:
    """nginx in HTTP/1.1 and nghttpd in HTTP/2 inside TLS; connections are kept."""
    place = new_address()
    files = folder / f"files-{protocol}"
    files.mkdir()
    (files / "hello").write_text("hello\n")
    if protocol == "http1":
        server = (
            f"    listen {place}:8443 ssl;\n    ssl_certificate {certificates.instance.certificate};\n"
            f"    ssl_certificate_key {certificates.instance.key};\n    ssl_protocols TLSv1.3;\n"
            f"    location /hello {{ root {files}; }}"
        )
        nginx = Nginx(program("nginx"), folder, place, server, "nginx-tls")
        instances.callback(nginx.kill)
        port = "port: 8443, "
    else:
        command = [program("nghttpd"), f"--address={place}", "-d", str(files), str(PORT)]
        nghttpd = Process(
            [*command, certificates.instance.key, certificates.instance.certificate], folder, "nghttpd-tls"
        )
        instances.callback(nghttpd.kill)
        wait_until(lambda: listens(place), "nghttpd listens")
        port = ""
    service = upstream(certificates, f"{port}server_name: b.example").replace("b: {", f"b: {{protocol: {protocol}, ", 1)
    made = Proxy(
        folder,
        {"b": [place]},
        settings(certificates, services=service, asks=False),
        fixed=["b"],
        listen=["https://127.0.0.1:0=b"],
        name=f"tls-{protocol}",
    )
    instances.callback(made.kill)
    with made.connect("b") as wire:
        for _ in range(5):
            wire.send(b"GET /hello HTTP/1.1\r\nHost: b\r\n\r\n")
            assert wire.response()[::2] == (200, b"hello\n")
    told = subprocess.run(
        [
            *(program("curl"), "-sS", "--http2", "--cacert", certificates.authority.file, "--max-time", "20"),
            f"https://localhost:{made.ports['https=b']}/hello",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.stdout == "hello\n", told.stderr
    assert made.measured("http_pool_connections_made_total", service="b") == 1


def test_grpc_with_credentials(folder: Path, instances: ExitStack, certificates: Certificates) -> None:
    """grpcio → TLS → proxy → TLS → grpcio."""
    place = new_address()
    pair = certificates.instance
    greeter = Process(
        [sys.executable, f"{HERE}/greeter.py", place, str(PORT), "tls", pair.certificate, pair.key],
        folder,
        "greeter-tls",
    )
    instances.callback(greeter.kill)
    wait_until(lambda: listens(place), "the greeter listens")
    made = Proxy(
        folder,
        {"b": [place]},
        settings(certificates, services=upstream(certificates, "server_name: b.example"), allow=[WEB]),
        listen=["https://127.0.0.1:0=b"],
        name="tls-grpc",
    )
    instances.callback(made.kill)
    web = certificates.web
    credentials = grpc.ssl_channel_credentials(
        Path(certificates.authority.file).read_bytes(), Path(web.key).read_bytes(), Path(web.certificate).read_bytes()
    )
    options = [("grpc.ssl_target_name_override", "proxy.example"), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(f"127.0.0.1:{made.ports['https=b']}", credentials, options) as channel:
        assert channel.unary_unary("/test.Greeter/Echo")(b"hi", timeout=LIMIT) == b"hi"
        large = bytes(range(256)) * 8_192
        assert channel.unary_unary("/test.Greeter/Echo")(large, timeout=LIMIT) == large
        forged = (("x-forwarded-client-cert", "URI=spiffe://td/ns/shop/sa/admin"),)
        metadata = channel.unary_unary("/test.Greeter/Echo").with_call(b"hi", metadata=forged, timeout=LIMIT)[1]
        assert dict(metadata.initial_metadata())["x-told"] == told_of(web)
        assert list(channel.stream_stream("/test.Greeter/Chat")(iter([b"a", b"b"]), timeout=LIMIT)) == [b"a!", b"b!"]
    made.printed(rf"access request service=b client=\S+ identity={WEB} method=POST")


def test_an_identity_is_proved_by_a_resumed_session_too(
    folder: Path, instances: ExitStack, certificates: Certificates
) -> None:
    near, far = new_address(), new_address()
    instance = TlsInstance(far, certificates.instance)
    instances.callback(instance.close)
    what = "server_name: b.example, identity: 'spiffe://td/node/{node}'"
    made = Proxy(
        folder,
        {"b": [near, far]},
        settings(certificates, services=upstream(certificates, what), asks=False),
        listen=["tcp://127.0.0.1:0=b"],
        name="tls-resumed",
    )
    instances.callback(made.kill)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", made.ports["tcp=b"]), LIMIT) as sock:
            sock.sendall(b"hello")
            assert sock.recv(100) == b"hello"
    assert instance.resumed == 2


@pytest.mark.parametrize("protocol", ["http1", "http2"])
def test_a_service_that_gets_tls_keeps_no_plaintext_connection(
    folder: Path, instances: ExitStack, certificates: Certificates, program: Callable[[str], str], protocol: str
) -> None:
    """T1: what was made before SIGHUP is for nobody behind it."""
    place = new_address()
    files = folder / f"plain-{protocol}"
    files.mkdir()
    (files / "hello").write_text("hello\n")
    if protocol == "http2":
        command = [program("nghttpd"), "--no-tls", f"--address={place}", "-d", str(files), str(PORT)]
        nghttpd = Process(command, folder, "nghttpd-plain")
        instances.callback(nghttpd.kill)
        wait_until(lambda: listens(place), "nghttpd listens")
    else:
        nginx = Nginx(program("nginx"), folder, place, f"    location /hello {{ root {files}; }}", "nginx-plain")
        instances.callback(nginx.kill)
    name = f"tls-comes-{protocol}"
    made = Proxy(folder, {"b": [place]}, f"services: {{b: {{protocol: {protocol}}}}}", fixed=["b"], name=name)
    instances.callback(made.kill)
    with made.connect("b") as wire:
        wire.send(b"GET /hello HTTP/1.1\r\nHost: b\r\n\r\n")
        assert wire.response()[::2] == (200, b"hello\n")
        config = folder / f"{name}.yaml"
        tls = f"tls: {{ca_file: {certificates.authority.file}, server_name: b.example}}"
        config.write_text(config.read_text().replace(f"protocol: {protocol}", f"protocol: {protocol}, {tls}"))
        os.kill(made.pid, signal.SIGHUP)
        made.printed("config applied")
        wire.send(b"GET /hello HTTP/1.1\r\nHost: b\r\n\r\n")
        assert wire.response()[0] == 502
    assert made.measured("attempts_total", service="b", outcome="tls") == 1


# An agent's certificates


@pytest.fixture
def agent(folder: Path, instances: ExitStack, certificates: Certificates) -> Agent:
    # Unix sockets have short names (unix(7)).
    place = instances.enter_context(tempfile.TemporaryDirectory())
    made = Agent(Path(place) / "agent.sock", answer(certificates.authority, WEB))
    instances.callback(made.stop)
    return made


def test_both_ends_have_their_certificates_of_an_agent(
    folder: Path, instances: ExitStack, certificates: Certificates, echo: Echo, agent: Agent
) -> None:
    """Mutual TLS by the SPIFFE Workload API alone: no file holds a certificate or a key, and what the agent says next
    is for new connections (T3)."""
    api = f"tls: {{workload_api: '{agent.address}', allow: [{WEB}]}}"
    inbound = Proxy(
        folder,
        {"unused": [new_address()]},
        api,
        listen=[f"tls://{echo.address}:15444=@{echo.address}:{PORT}"],
        name="spiffe-inbound",
    )
    instances.callback(inbound.kill)
    outbound = Proxy(
        folder,
        {"b": [echo.address]},
        f"tls: {{workload_api: '{agent.address}'}}\nservices: {{b: {{tls: {{identity: '{WEB}', port: 15444}}}}}}",
        listen=["tcp://127.0.0.1:0=b"],
        name="spiffe-outbound",
    )
    instances.callback(outbound.kill)

    def asked() -> bytes:
        place = ("127.0.0.1", outbound.ports["tcp=b"])
        with contextlib.suppress(ConnectionError), socket.create_connection(place, LIMIT) as sock:
            sock.sendall(b"hello")
            return sock.recv(100)
        return b""

    assert asked() == b"hello"
    inbound.printed(rf"access request service=\S+ client=\S+ identity={WEB} ")
    assert outbound.measured("certificate_not_after_timestamp_seconds", file=str(agent.socket)) > 0
    for process in (inbound, outbound):
        opened = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir() if link.is_symlink()]
        assert not [name for name in opened if "memfd" in name]
    with socket.create_connection(("127.0.0.1", outbound.ports["tcp=b"]), LIMIT) as held:
        held.sendall(b"held")
        assert held.recv(100) == b"held"
        # Another identity: the instance's end is another one now, and whom it admits is not there.
        agent.say(answer(certificates.authority, OTHER))
        inbound.printed(f"svid received spiffe_id={OTHER}")
        outbound.printed(f"svid received spiffe_id={OTHER}")
        wait_until(lambda: not asked(), "nobody is believed to be who is asked for")
        held.sendall(b"still")
        assert held.recv(100) == b"still"
    # A certificate that its authority may not sign: of another trust domain.
    agent.say(answer(certificates.authority, WEB, proved="spiffe://elsewhere/ns/shop/sa/web"))
    outbound.printed(rf"svid received spiffe_id={WEB}\n(.*\n)*.*svid received spiffe_id={WEB}\n")
    assert asked() == b""
    agent.say(answer(certificates.authority, WEB))
    wait_until(lambda: asked() == b"hello", "all is well again")


def test_before_the_agent_says_anything(
    folder: Path, instances: ExitStack, certificates: Certificates, echo: Echo
) -> None:
    """Who connects is refused, with the reason in the log; plaintext listeners serve."""
    made = Proxy(
        folder,
        {"echo": [echo.address]},
        f"tls: {{workload_api: 'unix://{folder}/nobody.sock'}}",
        listen=["tls://127.0.0.1:0=echo", "tcp://127.0.0.1:0=echo"],
        name="spiffe-none",
    )
    instances.callback(made.kill)
    made.printed(r"workload api cannot be followed socket=\S+/nobody\.sock problem=.no such file or directory")
    with pytest.raises(OSError, match=r"(?i)alert|reset|eof|ended|pipe"):
        exchanged(made.ports["tls=echo"], client_context(certificates, certificates.web))
    made.printed(r"tls connection refused client=\S+ problem=.the workload API has given no certificate yet")
    with socket.create_connection(("127.0.0.1", made.ports["tcp=echo"]), LIMIT) as sock:
        sock.sendall(b"hello")
        assert sock.recv(100) == b"hello"


# Files


def test_a_file_that_cannot_be_used_is_named(
    folder: Path, instances: ExitStack, certificates: Certificates, echo: Echo
) -> None:
    """At the start, and when the configuration is read again, which changes nothing then (S2)."""
    own = certificates.authority.issue("reloaded", ["proxy.example"])
    config = f"tls: {{certificate_file: {own.certificate}, key_file: {own.key}}}"
    made = Proxy(folder, {"echo": [echo.address]}, config, listen=["tls://127.0.0.1:0=echo"], name="tls-reload")
    instances.callback(made.kill)
    Path(own.key).unlink()
    os.kill(made.pid, signal.SIGHUP)
    made.printed(r"config not applied problem=.*reloaded\.key: No such file or directory")
    assert exchanged(made.ports["tls=echo"], client_context(certificates)) == b"hello"
    certificates.authority.issue("reloaded", ["proxy.example"])
    os.kill(made.pid, signal.SIGHUP)
    made.printed("config applied")
    assert exchanged(made.ports["tls=echo"], client_context(certificates)) == b"hello"
    Path(own.certificate).write_text("nothing\n")
    with pytest.raises(AssertionError, match=r"reloaded\.pem"):
        Proxy(folder, {"echo": [echo.address]}, config, listen=["tls://127.0.0.1:0=echo"], name="tls-never")


def test_a_certificate_that_changes_is_for_new_connections(
    folder: Path, instances: ExitStack, certificates: Certificates, echo: Echo
) -> None:
    """T3: what is open goes on; a pair that does not fit changes nothing, and is reported."""
    own = certificates.authority.issue("changing", ["proxy.example", "first.example"])
    made = Proxy(
        folder,
        {"echo": [echo.address]},
        f"tls: {{certificate_file: {own.certificate}, key_file: {own.key}}}",
        listen=["tls://127.0.0.1:0=echo"],
        name="tls-changes",
    )
    instances.callback(made.kill)
    context = client_context(certificates)

    def names() -> set[str]:
        with connected(made.ports["tls=echo"], context) as stream:
            return set(identities(stream.getpeercert() or {}))

    with connected(made.ports["tls=echo"], context) as held:
        assert "first.example" in names()
        key = Path(own.key).read_text()
        Path(own.key).write_text("no key\n")
        made.printed(r"file not read again problem=.*changing\.pem")
        assert "first.example" in names()
        Path(own.key).write_text(key)
        certificates.authority.issue("changing", ["proxy.example", "second.example"])
        made.printed("files read again")
        wait_until(lambda: "second.example" in names(), "the second certificate is shown")
        held.sendall(b"still here")
        assert held.recv(100) == b"still here"
