"""What tests of TLS share: certificates, the proxy's settings, and who speaks to it and behind it."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nursery_tests.certificates import Authority, Pair
from nursery_tests.interop.http.conftest import LIMIT, PORT, Process, Threaded, listens, wait_until

WEB = "spiffe://td/ns/shop/sa/web"
OTHER = "spiffe://td/ns/shop/sa/other"


class Certificates:
    """Everybody's certificates, and another authority's."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        self.stranger = Authority(folder, "stranger")
        self.proxy = self.authority.issue("proxy", ["proxy.example", "localhost"], ["spiffe://td/proxy"])
        self.web = self.authority.issue("web", uris=[WEB])
        self.other = self.authority.issue("other", uris=[OTHER])
        self.foreign = self.stranger.issue("foreign", uris=[WEB])
        self.late = self.authority.issue("late", uris=[WEB], begin=-10, end=-1)
        self.instance = self.authority.issue("instance", ["b.example"], ["spiffe://td/node/n2"])


class TlsInstance(Threaded):
    """An instance that echoes what it hears inside TLS, and says whom it heard.

    Attributes:
        heard: connections whose handshake ended well, by what the client proved.
        resumed: how many of them resumed a session.
    """

    def __init__(self, address: str, pair: Pair | None, authority: str | None = None) -> None:
        self.heard: list[Mapping[str, object]] = []
        self.resumed = 0
        self.plaintext = b""
        self._context: ssl.SSLContext | None = None
        if pair is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(*pair)
            if authority is not None:
                self._context.load_verify_locations(authority)
                self._context.verify_mode = ssl.CERT_REQUIRED
        super().__init__(address, self._serve)

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(LIMIT)
        with sock, contextlib.suppress(OSError):
            if self._context is None:
                self.plaintext += sock.recv(65536)
                sock.sendall(b"I speak no TLS\n")
                return
            with self._context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False) as stream:
                self.heard.append(stream.getpeercert() or {})
                self.resumed += bool(stream.session_reused)
                while data := stream.recv(65536):
                    stream.sendall(data)
                # An end of the client's was close_notify, and ours is, too.
                stream.unwrap()


def settings(made: Certificates, *, allow: Sequence[str] = (), services: str = "", asks: bool = True) -> str:
    """YAML below `proxy:`: its own certificate, and whom it lets in."""
    clients = f", client_ca_file: {made.authority.file}" if asks else ""
    allowed = f", allow: [{', '.join(allow)}]" if allow else ""
    own = f"tls: {{certificate_file: {made.proxy.certificate}, key_file: {made.proxy.key}{clients}{allowed}}}"
    return f"{own}\nservices: {{{services}}}" if services else own


def client_context(made: Certificates, pair: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=made.authority.file)
    if pair is not None:
        context.load_cert_chain(*pair)
    return context


@contextlib.contextmanager
def connected(port: int, context: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    with (
        socket.create_connection(("127.0.0.1", port), LIMIT) as sock,
        context.wrap_socket(sock, server_hostname="proxy.example", suppress_ragged_eofs=False) as stream,
    ):
        yield stream


def exchanged(port: int, context: ssl.SSLContext, said: bytes = b"hello") -> bytes:
    """What comes back for a few bytes, up to a proper end."""
    with connected(port, context) as stream:
        stream.sendall(said)
        got = b""
        while len(got) < len(said):
            data = stream.recv(65536)
            if not data:
                break
            got += data
        return got


def echoed(stream: ssl.SSLSocket, said: bytes) -> bytes:
    """As many bytes as were said, sent and read at once.

    By one thread: up to Python 3.12 one that reads and one that writes spoil each other's state of the connection.
    """
    stream.setblocking(False)
    got, sent = b"", 0
    while len(got) < len(said):
        moved = False
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if sent < len(said):
                sent += stream.send(said[sent : sent + 65536])
                moved = True
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            data = stream.recv(65536)
            assert data, f"ended after {len(got)} bytes"
            got += data
            moved = True
        if not moved:
            ready = select.select([stream], [stream] if sent < len(said) else [], [], LIMIT)
            assert any(ready), f"nothing came behind {len(got)} bytes"
    stream.settimeout(LIMIT)
    return got


def upstream(made: Certificates, what: str) -> str:
    """A service's section."""
    return f"b: {{tls: {{ca_file: {made.authority.file}, {what}}}}}"


class Echo(Process):
    """A plain instance that sends back what it hears."""

    def __init__(self, folder: Path, address: str) -> None:
        script = (
            "import socketserver\n"
            "class H(socketserver.BaseRequestHandler):\n"
            "    def handle(self):\n"
            "        while data := self.request.recv(65536): self.request.sendall(data)\n"
            "class S(socketserver.ThreadingTCPServer): allow_reuse_address, daemon_threads = True, True\n"
            f"S(('{address}', {PORT}), H).serve_forever()\n"
        )
        super().__init__([sys.executable, "-c", script], folder, "echo")
        self.address = address
        wait_until(lambda: listens(address), "the echo listens")
