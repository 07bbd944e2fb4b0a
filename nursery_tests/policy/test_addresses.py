"""Addresses and URLs of the configuration."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.addresses import AddressError, DiscoveryUrl, ListenAddress, SocketAddress, fixed_place
from meshlocal.policy.kubernetes_options import KubernetesOptions
from meshlocal.policy.model import ServiceKey
from meshlocal.policy.sources import FileOptions, SourceUrl

TYPES = (SocketAddress, ListenAddress, DiscoveryUrl, SourceUrl)

FORMS = "file:PATH, etcd://HOST:PORT/PREFIX, dns:NAME?service=SERVICE, meshlocal:grpc://HOST:PORT or kubernetes:"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("127.0.0.1:15000", SocketAddress("127.0.0.1", 15000)),
        ("LOCALHOST:0", SocketAddress("localhost", 0)),
        ("[::1]:65535", SocketAddress("::1", 65535)),
        ("[0:0:0:0:0:0:0:0]:1", SocketAddress("::", 1)),
        ("tcp://127.0.0.1:15001=b", ListenAddress("tcp", "127.0.0.1", 15001, ServiceKey("b"))),
        ("TCP://[::1]:0=b.default", ListenAddress("tcp", "::1", 0, ServiceKey("b.default"))),
        ("tcp://localhost:1=b", ListenAddress("tcp", "localhost", 1, ServiceKey("b"))),
        ("http://127.0.0.1:80=b", ListenAddress("http", "127.0.0.1", 80, ServiceKey("b"))),
        ("HTTP://[::1]:80", ListenAddress("http", "::1", 80, None)),
        ("tls://0.0.0.0:1=@127.0.0.1:9", ListenAddress("tls", "0.0.0.0", 1, ServiceKey("@127.0.0.1:9"))),
        ("https://[::]:1=@[0::1]:9", ListenAddress("https", "::", 1, ServiceKey("@[::1]:9"))),
        ("tcp://127.0.0.1:1=@localhost:9", ListenAddress("tcp", "127.0.0.1", 1, ServiceKey("@127.0.0.1:9"))),
        ("https://127.0.0.1:80", ListenAddress("https", "127.0.0.1", 80, None)),
        ("tcp://unix:/run/b.sock=b", ListenAddress("tcp", "", 0, ServiceKey("b"), "/run/b.sock")),
        ("http://unix:/run/b", ListenAddress("http", "", 0, None, "/run/b")),
        ("http://unix:///run//./a/../b=c", ListenAddress("http", "", 0, ServiceKey("c"), "/run/b")),
        ("http://unix:///run/b=c", ListenAddress("http", "", 0, ServiceKey("c"), "/run/b")),
        ("tcp://unix:/run/b=@127.0.0.1:9", ListenAddress("tcp", "", 0, ServiceKey("@127.0.0.1:9"), "/run/b")),
        ("grpc://127.0.0.1:7070", DiscoveryUrl("grpc", "127.0.0.1", 7070)),
        ("GRPC://Discovery.Mesh:7070/", DiscoveryUrl("grpc", "discovery.mesh", 7070)),
        ("grpcs://h:1", DiscoveryUrl("grpcs", "h", 1)),
        ("WSS://h:1", DiscoveryUrl("wss", "h", 1)),
        ("ws://[::1]:1/", DiscoveryUrl("ws", "::1", 1)),
        ("grpc://[fd00::1]:7070", DiscoveryUrl("grpc", "fd00::1", 7070)),
        ("grpc://some_host.:1", DiscoveryUrl("grpc", "some_host.", 1)),
        ("file:instances.yaml", DiscoveryUrl("file", path="instances.yaml")),
        ("file:/etc/i.yaml", DiscoveryUrl("file", path="/etc/i.yaml")),
        ("file:///etc/i.yaml", DiscoveryUrl("file", path="/etc/i.yaml")),
        ("file:instances.yaml", SourceUrl("file", FileOptions("instances.yaml"))),
        ("FILE:///etc/a b.yaml", SourceUrl("file", FileOptions("/etc/a b.yaml"))),
        ("kubernetes:", SourceUrl("kubernetes", KubernetesOptions())),
        (
            "Kubernetes:?namespace=shop&nodes=no",
            SourceUrl("kubernetes", KubernetesOptions(namespaces=("shop",), nodes=False)),
        ),
    ],
)
def test_reads(text: str, value: SocketAddress | ListenAddress | DiscoveryUrl | SourceUrl) -> None:
    kind = type(value)
    assert kind.parse(text) == value
    assert kind.parse(str(value)) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (SocketAddress, "", "expected HOST:PORT, got ''"),
        (SocketAddress, "15000", "expected HOST:PORT, got '15000'"),
        (SocketAddress, ":15000", "expected HOST:PORT, got ':15000'"),
        (SocketAddress, "127.0.0.1:", "expected HOST:PORT, got '127.0.0.1:'"),
        (SocketAddress, "127.0.0.1:x", "port 'x' is not a number within 0 to 65535"),
        (SocketAddress, "127.0.0.1:65536", "port '65536' is not a number within 0 to 65535"),
        (SocketAddress, "127.0.0.1:-1", "port '-1' is not a number within 0 to 65535"),
        (SocketAddress, "127.0.0.1:٣", "port '٣' is not a number within 0 to 65535"),
        (SocketAddress, "::1:80", "expected HOST:PORT, an IPv6 address in brackets; got '::1:80'"),
        (SocketAddress, "[::1]", "expected HOST:PORT, an IPv6 address in brackets; got '[::1]'"),
        (SocketAddress, "[127.0.0.1]:80", "only an IPv6 address stands in brackets, not '127.0.0.1'"),
        (SocketAddress, "example.com:80", "host 'example.com' is neither an IP address nor localhost"),
        (SocketAddress, "*:80", "host '*' is neither an IP address nor localhost"),
        (SocketAddress, " 127.0.0.1:80", "host ' 127.0.0.1' is neither an IP address nor localhost"),
        (
            ListenAddress,
            "127.0.0.1:80=b",
            "expected tcp://HOST:PORT=SERVICE or http://HOST:PORT[=SERVICE] (or tls, https), got '127.0.0.1:80=b'",
        ),
        (
            ListenAddress,
            "http://127.0.0.1:80=",
            "names no service; expected tcp://HOST:PORT=SERVICE or http://HOST:PORT[=SERVICE] (or tls, https), got 'http://127.0.0.1:80='",
        ),
        (
            ListenAddress,
            "udp://127.0.0.1:80=b",
            "unknown scheme 'udp'; expected tcp://HOST:PORT=SERVICE or http://HOST:PORT[=SERVICE] (or tls, https)",
        ),
        (
            ListenAddress,
            "tcp://127.0.0.1:80",
            "names no service; expected tcp://HOST:PORT=SERVICE or http://HOST:PORT[=SERVICE] (or tls, https), got 'tcp://127.0.0.1:80'",
        ),
        (
            ListenAddress,
            "tcp://127.0.0.1:80=",
            "names no service; expected tcp://HOST:PORT=SERVICE or http://HOST:PORT[=SERVICE] (or tls, https), got 'tcp://127.0.0.1:80='",
        ),
        (
            ListenAddress,
            "tcp://127.0.0.1:80=b c",
            "service: 'b c' is no service name (letters, digits, '.', '-', '_'; at most 253)",
        ),
        (
            ListenAddress,
            "tls://unix:/run/b=b",
            "a Unix socket has no TLS: write tcp://unix:/run/b or http://unix:/run/b",
        ),
        (ListenAddress, "tcp://unix:/run/\udcff=b", "'/run/\\udcff' cannot be written in UTF-8"),
        (ListenAddress, "tcp://unix:run/b=b", "expected unix:///PATH, got 'unix:run/b'"),
        (ListenAddress, "http://unix:", "expected unix:///PATH, got 'unix:'"),
        (
            ListenAddress,
            f"http://unix:/{'é' * 54}",
            f"'/{'é' * 54}' is longer than the 107 bytes that a socket's path may have",
        ),
        (ListenAddress, "tls://127.0.0.1:1=@", "expected HOST:PORT, got ''"),
        (ListenAddress, "tls://127.0.0.1:1=@b:9", "host 'b' is neither an IP address nor localhost"),
        (ListenAddress, "tls://127.0.0.1:1=@127.0.0.1:0", "port 0 is not within 1 to 65535"),
        (ListenAddress, "tcp://b.example:80=b", "host 'b.example' is neither an IP address nor localhost"),
        (
            ListenAddress,
            "tcp://127.0.0.1=b",
            "expected tcp://HOST:PORT=SERVICE or http://HOST:PORT[=SERVICE] (or tls, https), got 'tcp://127.0.0.1=b'",
        ),
        (DiscoveryUrl, "", "expected grpc://HOST:PORT (or grpcs, ws, wss) or file:PATH, got ''"),
        (
            DiscoveryUrl,
            "localhost:7070",
            "expected grpc://HOST:PORT (or grpcs, ws, wss) or file:PATH, got 'localhost:7070'",
        ),
        (DiscoveryUrl, "grpc:7070", "expected grpc://HOST:PORT (or grpcs, ws, wss) or file:PATH, got 'grpc:7070'"),
        (DiscoveryUrl, "http://h:1", "expected grpc://HOST:PORT (or grpcs, ws, wss) or file:PATH, got 'http://h:1'"),
        (DiscoveryUrl, "wss://h", "expected wss://HOST:PORT, got 'wss://h'"),
        (DiscoveryUrl, "ws:h:1", "expected grpc://HOST:PORT (or grpcs, ws, wss) or file:PATH, got 'ws:h:1'"),
        (DiscoveryUrl, "grpc://host", "expected grpc://HOST:PORT, got 'grpc://host'"),
        (DiscoveryUrl, "grpc://host:0", "port 0 is not within 1 to 65535"),
        (DiscoveryUrl, "grpc://host:1/path", "port '1/path' is not a number within 0 to 65535"),
        (DiscoveryUrl, "grpc://me@host:1", "host 'me@host' is neither an IP address nor a DNS name"),
        (DiscoveryUrl, "grpc://127.0.0.256:1", "host '127.0.0.256' is neither an IP address nor a DNS name"),
        (DiscoveryUrl, "grpc://-a:1", "host '-a' is neither an IP address nor a DNS name"),
        (DiscoveryUrl, "grpc://a..b:1", "host 'a..b' is neither an IP address nor a DNS name"),
        (DiscoveryUrl, "file:", "names no file; expected file:PATH"),
        (DiscoveryUrl, "file://host/x", "a file URL names no host: write file:PATH or file:///PATH"),
        (
            SourceUrl,
            "instances.yaml",
            f"expected {FORMS}, got 'instances.yaml'",
        ),
        (
            SourceUrl,
            "kubernetes",
            f"expected {FORMS}, got 'kubernetes'",
        ),
        (SourceUrl, "etcd:x", "expected etcd://HOST:PORT/PREFIX, got 'etcd:x'"),
        (SourceUrl, "dns:x", "expected dns:NAME?service=SERVICE, got 'dns:x'"),
        (
            SourceUrl,
            "consul:x",
            f"expected {FORMS}, got 'consul:x'",
        ),
        (SourceUrl, "kubernetes:?nodes=maybe", "nodes: expected yes or no, got 'maybe'"),
        (SourceUrl, "file:", "names no file; expected file:PATH"),
    ],
)
def test_refuses(kind: type[SocketAddress], text: str, message: str) -> None:
    with pytest.raises(AddressError) as caught:
        kind.parse(text)
    assert str(caught.value) == message


def test_a_listener_knows_its_socket() -> None:
    assert ListenAddress.parse("tcp://[::1]:80=b").address == SocketAddress("::1", 80)


def test_a_listener_for_one_address() -> None:
    listener = ListenAddress.parse("tls://0.0.0.0:15443=@[::1]:9000")
    assert listener.service is not None
    assert fixed_place(listener.service) == SocketAddress("::1", 9000)
    assert (listener.is_tls, listener.is_http) == (True, False)
    assert ListenAddress.parse("https://0.0.0.0:1").service is None
    assert fixed_place(ServiceKey("b")) is None


parts = st.sampled_from(
    ["tcp://", "grpc://", "file:", "[", "]", "::1", "127.0.0.1", "localhost", ":", "80", "=", "b", "/"]
)
texts = st.lists(parts | st.text(max_size=2), max_size=7).map("".join)


@given(texts)
def test_nothing_but_address_errors_and_what_is_read_can_be_written(text: str) -> None:
    for kind in TYPES:
        try:
            value = kind.parse(text)
        except AddressError:
            continue
        assert kind.parse(str(value)) == value
