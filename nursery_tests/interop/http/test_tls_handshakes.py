"""Handshakes that fail, and what each side sees of it (T1, T4): who is not admitted, and a stall, an end and a reset at
every flight."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from nursery_tests.certificates import NO_TEXT, Pair
from nursery_tests.interop.http.conftest import LIMIT, Proxy, Threaded, new_address, wait_until
from nursery_tests.interop.http.tls_parts import (
    WEB,
    Certificates,
    Echo,
    TlsInstance,
    client_context,
    exchanged,
    settings,
)

TIMEOUT = 0.4
"""Seconds that a handshake may take here."""

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
ACTS = ("stall", "end", "reset")


@pytest.fixture(scope="module")
def certificates(folder: Path) -> Certificates:
    return Certificates(folder)


@pytest.fixture(scope="module")
def echo(folder: Path, running: ExitStack) -> Echo:
    made = Echo(folder, new_address())
    running.callback(made.kill)
    return made


@pytest.fixture(scope="module")
def proxy(folder: Path, running: ExitStack, certificates: Certificates, echo: Echo) -> Proxy:
    tls = settings(certificates, allow=[WEB])
    made = Proxy(
        folder,
        {"echo": [echo.address]},
        tls.replace("tls: {", f"tls: {{handshake_timeout: {TIMEOUT}, min_version: '1.2', "),
        listen=["tls://127.0.0.1:0=echo"],
        name="tls-handshakes",
    )
    running.callback(made.kill)
    return made


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def end_of(sock: socket.socket) -> str:
    """How the other side ended a connection."""
    sock.settimeout(LIMIT)
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return "reset"
    return "end"


class Flights:
    """One side's handshake in memory, sent flight by flight."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server: bool) -> None:
        self._sock = sock
        self._came, self._going = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = None if server else "proxy.example"
        self.tls = context.wrap_bio(self._came, self._going, server_side=server, server_hostname=name)

    def next(self) -> bytes:
        """The next flight of this side's, once the other's has come; empty at the handshake's end."""
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                self.tls.do_handshake()
                return self._going.read()
            if flight := self._going.read():
                return flight
            data = self._sock.recv(65536)
            if not data:
                raise ConnectionError("ended")
            self._came.write(data)


class Point(NamedTuple):
    """Where a side stops: behind so many whole flights, and this part of the next."""

    whole: int
    part: float

    def send(self, sock: socket.socket, flights: Flights) -> None:
        for _ in range(self.whole):
            sock.sendall(flights.next())
        if self.part:
            flight = flights.next()
            assert len(flight) > 10
            sock.sendall(flight[: int(len(flight) * self.part)])


POINTS = [Point(0, 0), Point(0, 0.1), Point(0, 0.6), Point(1, 0), Point(1, 0.5)]
"""Of a client: before its first flight, within it, behind it, and within its second one, which is the last."""


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point.whole}+{point.part}")
def test_a_client_that_stops_at_any_flight(
    proxy: Proxy, certificates: Certificates, version: str, act: str, point: Point
) -> None:
    """It is counted, costs no other client anything, and never reaches an instance."""
    outcome = "timeout" if act == "stall" else "failed"
    good = proxy.measured("tls_handshakes_total", scheme="tls", outcome="ok")
    before = proxy.measured("tls_handshakes_total", scheme="tls", outcome=outcome)
    context = client_context(certificates, certificates.web)
    context.minimum_version = context.maximum_version = VERSIONS[version]
    with socket.create_connection(("127.0.0.1", proxy.ports["tls=echo"]), LIMIT) as sock:
        point.send(sock, Flights(sock, context, server=False))
        if act == "stall":
            assert end_of(sock) == "reset"
        elif act == "reset":
            reset(sock)
        else:
            sock.shutdown(socket.SHUT_WR)
            end_of(sock)
    wait_until(
        lambda: proxy.measured("tls_handshakes_total", scheme="tls", outcome=outcome) == before + 1, "it is counted"
    )
    assert exchanged(proxy.ports["tls=echo"], context) == b"hello"
    assert proxy.measured("tls_handshakes_total", scheme="tls", outcome="ok") == good + 1
    assert "fault in the proxy" not in proxy.log


@pytest.mark.parametrize(
    ("who", "problem", "sees"),
    [
        ("expired", "certificate has expired", "expired"),
        ("not yet valid", "certificate is not yet valid", "bad certificate|expired"),
        ("wrong authority", "unable to get local issuer certificate", "unknown ca"),
        ("self-signed", "self-signed certificate|self signed certificate", "unknown ca"),
        ("none", "peer did not return a certificate", "certificate required|handshake failure"),
        ("not allowed", "is not in proxy.tls.allow", "reset|eof"),
        ("older", "unsupported protocol", "protocol version"),
        ("no text", "a certificate that makes no sense", "reset|eof"),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_who_is_refused_and_what_it_sees(
    folder: Path,
    running: ExitStack,
    echo: Echo,
    certificates: Certificates,
    version: str,
    who: str,
    problem: str,
    sees: str,
) -> None:
    """T4: an alert that says why, or a reset where the certificate is good and its owner is not meant."""
    authority = certificates.authority
    pair: Pair | None = {
        "expired": certificates.late,
        "not yet valid": authority.issue("early", uris=[WEB], begin=10, end=20),
        "wrong authority": certificates.foreign,
        "self-signed": Pair(certificates.stranger.file, certificates.stranger.key_file()),
        "none": None,
        "not allowed": certificates.other,
        "older": certificates.web,
        "no text": authority.issue_raw("no-text", NO_TEXT),
    }[who]
    made = refusing(folder, running, echo, certificates)
    context = client_context(certificates, pair)
    context.minimum_version = context.maximum_version = VERSIONS[version]
    if who == "older":
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    before = len(made.log)
    # One line in five seconds would be told of the first one only: each is waited for by its count.
    counts = made.measured("tls_handshakes_total", scheme="tls", outcome="failed")
    counts += made.measured("tls_handshakes_total", scheme="tls", outcome="not_allowed")
    with pytest.raises(OSError, match=rf"(?i){sees.replace(' ', '[_ ]')}"):
        exchanged(made.ports["tls=echo"], context)

    def counted() -> bool:
        found = made.measured("tls_handshakes_total", scheme="tls", outcome="failed")
        return found + made.measured("tls_handshakes_total", scheme="tls", outcome="not_allowed") == counts + 1

    wait_until(counted, "it is counted")
    told = re.findall(r"tls connection refused.*", made.log[before:])
    assert not told or re.search(problem, told[-1]), told
    assert exchanged(made.ports["tls=echo"], client_context(certificates, certificates.web)) == b"hello"


_refusing: dict[int, Proxy] = {}


def refusing(folder: Path, running: ExitStack, echo: Echo, certificates: Certificates) -> Proxy:
    """A proxy for all cases of that table."""
    made = _refusing.get(id(certificates))
    if made is None:
        tls = settings(certificates, allow=[WEB]).replace("tls: {", "tls: {min_version: '1.2', ")
        made = Proxy(folder, {"echo": [echo.address]}, tls, listen=["tls://127.0.0.1:0=echo"], name="tls-refusing")
        running.callback(made.kill)
        _refusing[id(certificates)] = made
    return made


# Instances


class Stopping(Threaded):
    """An instance that stops at a point of its handshake."""

    def __init__(self, address: str, context: ssl.SSLContext, point: Point, act: str) -> None:
        self.saw: list[str] = []
        self._context, self._point, self._act = context, point, act
        super().__init__(address, self._serve)

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(LIMIT)
            self._point.send(sock, Flights(sock, self._context, server=True))
            if self._act == "stall":
                self.saw.append(end_of(sock))
            elif self._act == "reset":
                reset(sock)
            else:
                sock.shutdown(socket.SHUT_WR)
                self.saw.append(end_of(sock))


INSTANCE_POINTS = [
    ("1.3", Point(0, 0)),
    ("1.3", Point(0, 0.1)),
    ("1.3", Point(0, 0.8)),
    ("1.2", Point(0, 0)),
    ("1.2", Point(0, 0.6)),
    ("1.2", Point(1, 0)),
    ("1.2", Point(1, 0.5)),
]
"""Of a server, whose last flight in TLS 1.3 is its first, and in TLS 1.2 its second."""


class Table(NamedTuple):
    """A proxy, and the instances of its services that stop, by service."""

    proxy: Proxy
    stopping: dict[str, Stopping]


@pytest.fixture(scope="module")
def table(folder: Path, running: ExitStack, certificates: Certificates) -> Table:
    good = TlsInstance(new_address(), certificates.instance)
    running.callback(good.close)
    instances: dict[str, list[str]] = {}
    stopping: dict[str, Stopping] = {}
    sections = []
    for number, (version, point) in enumerate(INSTANCE_POINTS):
        for act in ACTS:
            name = f"{act}-{number}"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = context.maximum_version = VERSIONS[version]
            context.load_cert_chain(*certificates.instance)
            address = new_address()
            stopping[name] = Stopping(address, context, point, act)
            running.callback(stopping[name].close)
            instances[name] = [address, good.address]
            tls = f"ca_file: {certificates.authority.file}, server_name: b.example, min_version: '1.2'"
            sections.append(f"{name}: {{tls: {{{tls}}}, attempts: {{connect_timeout_local: {TIMEOUT}}}}}")
    made = Proxy(
        folder,
        instances,
        f"services: {{{', '.join(sections)}}}",
        listen=[f"tcp://127.0.0.1:0={name}" for name in instances],
        name="tls-stopping",
    )
    running.callback(made.kill)
    return Table(made, stopping)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("number", range(len(INSTANCE_POINTS)), ids=lambda number: str(INSTANCE_POINTS[number]))
def test_an_instance_that_stops_at_any_flight(table: Table, number: int, act: str) -> None:
    """T1: the attempt fails within its time, and the next instance serves; nothing was sent in plaintext."""
    name = f"{act}-{number}"
    with socket.create_connection(("127.0.0.1", table.proxy.ports[f"tcp={name}"]), LIMIT) as sock:
        sock.sendall(b"hello")
        assert sock.recv(100) == b"hello"
    outcome = {"stall": "timeout", "end": "tls", "reset": "reset"}[act]
    assert table.proxy.measured("attempts_total", service=name, outcome=outcome, tier="node") == 1
    if act == "stall":
        wait_until(lambda: table.stopping[name].saw, "the instance sees the end")
        assert table.stopping[name].saw == ["reset"]


# What comes where a handshake should


SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_at_random_in_a_handshake(proxy: Proxy, certificates: Certificates, seed: int) -> None:
    """Each flight with some bytes changed, cut out or put in: the proxy goes on, and so does everybody else."""
    rng = random.Random(seed)
    context = client_context(certificates, certificates.web)
    context.minimum_version = context.maximum_version = rng.choice(list(VERSIONS.values()))
    for _ in range(12):
        spoiled = rng.randrange(2)
        with socket.create_connection(("127.0.0.1", proxy.ports["tls=echo"]), LIMIT) as sock:
            flights = Flights(sock, context, server=False)
            with contextlib.suppress(OSError):
                for number in range(2):
                    flight = bytearray(flights.next())
                    if number == spoiled and flight:
                        at = rng.randrange(len(flight))
                        flight[at : at + rng.randrange(4)] = rng.randbytes(rng.randrange(1, 6))
                    sock.sendall(flight)
                sock.shutdown(socket.SHUT_WR)
                end_of(sock)
    assert exchanged(proxy.ports["tls=echo"], context) == b"hello"
    assert "fault in the proxy" not in proxy.log


def test_a_renegotiation_is_refused(proxy: Proxy, certificates: Certificates, program: Callable[[str], str]) -> None:
    """TLS 1.2's; TLS 1.3 has none. The client is told, and served or cut, and nobody else sees anything."""
    command = [program("openssl"), "s_client", "-connect", f"127.0.0.1:{proxy.ports['tls=echo']}", "-tls1_2"]
    command += ["-CAfile", certificates.authority.file, "-cert", certificates.web.certificate]
    command += ["-key", certificates.web.key]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as asking:
        assert asking.stdin is not None
        time.sleep(0.3)
        asking.stdin.write("R\n")
        asking.stdin.flush()
        told, _ = asking.communicate(timeout=LIMIT)
    assert "RENEGOTIATING" in told
    assert re.search(r"(?i)no renegotiation|renegotiation.*not|handshake failure|alert|unexpected eof|errno", told), (
        told
    )
    assert exchanged(proxy.ports["tls=echo"], client_context(certificates, certificates.web)) == b"hello"


def test_certificates_that_change_under_load_fail_nobody(
    folder: Path, instances_of: ExitStack, certificates: Certificates
) -> None:
    """T3: the proxy's and the instance's certificates are replaced again and again, and no connection fails."""
    place = new_address()
    own = certificates.authority.issue("rotating", ["proxy.example"], ["spiffe://td/proxy"])
    instance = TlsInstance(place, certificates.instance, certificates.authority.file)
    instances_of.callback(instance.close)
    services = f"b: {{tls: {{ca_file: {certificates.authority.file}, server_name: b.example}}}}"
    made = Proxy(
        folder,
        {"b": [place]},
        f"tls: {{certificate_file: {own.certificate}, key_file: {own.key}}}\nservices: {{{services}}}",
        listen=["tls://127.0.0.1:0=b"],
        name="tls-rotating",
    )
    instances_of.callback(made.kill)
    context = client_context(certificates)
    done = threading.Event()
    failed: list[BaseException] = []
    served = [0]

    def load() -> None:
        while not done.is_set():
            try:
                assert exchanged(made.ports["tls=b"], context) == b"hello"
                served[0] += 1
            except (OSError, AssertionError) as error:
                failed.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            before = made.log.count("files read again")
            certificates.authority.issue("rotating", ["proxy.example"], ["spiffe://td/proxy"])
            wait_until(partial(_read_again, made, before), "it is read again")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert failed == []
    assert served[0] > 50


def test_a_key_update_amid_a_connection(
    proxy: Proxy, certificates: Certificates, program: Callable[[str], str]
) -> None:
    """RFC 8446, 4.6.3: the client asks for new keys both ways; what is said before and behind arrives."""
    command = [program("openssl"), "s_client", "-connect", f"127.0.0.1:{proxy.ports['tls=echo']}", "-tls1_3"]
    command += ["-CAfile", certificates.authority.file, "-cert", certificates.web.certificate]
    command += ["-key", certificates.web.key]
    with subprocess.Popen(
        [*command, "-brief"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as asking:
        assert asking.stdin is not None
        assert asking.stdout is not None
        for said in ("before", "amid", "behind"):
            asking.stdin.write(f"{said}\n")
            asking.stdin.flush()
            assert asking.stdout.readline() == f"{said}\n"
            # A line of its own, to s_client.
            asking.stdin.write("K\n")
            asking.stdin.flush()
            time.sleep(0.05)
        asking.stdin.write("Q\n")
        asking.stdin.flush()
        asking.communicate(timeout=LIMIT)


def _read_again(made: Proxy, before: int) -> bool:
    return made.log.count("files read again") > before


@pytest.fixture
def instances_of() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_stalled_handshake_holds_nobody_up(proxy: Proxy, certificates: Certificates) -> None:
    """While a hundred clients stall, another is served."""
    place = ("127.0.0.1", proxy.ports["tls=echo"])
    with ExitStack() as stalled:
        waiting = [stalled.enter_context(socket.create_connection(place, LIMIT)) for _ in range(100)]
        for sock in waiting:
            sock.sendall(b"\x16\x03\x01")
        assert exchanged(place[1], client_context(certificates, certificates.web)) == b"hello"
