"""Under load: large bodies in little memory, and instances that are killed and started again (A2, A3, A4, F1).

With MESHLOCAL_TESTS_FULL set, the bodies are 2 GiB and the killing goes on for a minute.
"""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from nursery_tests.interop.http.conftest import Asgi, Nginx, Proxy, Scripted, Wire, new_address, wait_until

FULL = bool(os.environ.get("MESHLOCAL_TESTS_FULL"))
SIZE = (2 << 30) if FULL else (256 << 20)
SECONDS = 60 if FULL else 12
GROWTH = 64 << 20
"""Bytes of memory that a body may cost, however long it is."""

BLOCK = bytes(1 << 20)


class Peak:
    """The most memory that a process held while this is open, beyond what it held before."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._before = proxy.resident
        self.growth = 0

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self.growth = max(self.growth, self._proxy.resident - self._before)


@pytest.fixture(scope="module")
def sink() -> Scripted:
    """Takes bodies, and gives them."""
    scripted = Scripted(new_address())

    def answer(sock: socket.socket, heard: bytes) -> None:
        head, _, rest = heard.partition(b"\r\n\r\n")
        if b"chunked" in head:
            # The last chunk's bytes can be nothing else in a body of zeros.
            tail = rest
            while not tail.endswith(b"0\r\n\r\n"):
                tail = (tail + sock.recv(1 << 20))[-5:]
        elif head.startswith(b"PUT"):
            left = SIZE - len(rest)
            while left:
                left -= len(sock.recv(1 << 20))
        if head.startswith(b"GET /length"):
            sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % SIZE)
            for _ in range(SIZE // len(BLOCK)):
                sock.sendall(BLOCK)
        elif head.startswith(b"GET /chunks"):
            sock.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(SIZE // len(BLOCK)):
                sock.sendall(b"%x\r\n%b\r\n" % (len(BLOCK), BLOCK))
            sock.sendall(b"0\r\n\r\n")
        else:
            sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    scripted.answer = answer
    return scripted


@pytest.mark.parametrize("kind", ["length", "chunks"])
@pytest.mark.parametrize("direction", ["down", "up"])
def test_large_bodies(folder: Path, running: ExitStack, sink: Scripted, direction: str, kind: str) -> None:
    """Memory does not grow with them; what is read slowly at times is not held either."""
    proxy = Proxy(folder, {"sink": [sink.address]}, name=f"large-{direction}-{kind}")
    running.callback(proxy.kill)
    with proxy.connect() as wire:
        wire.send(b"GET / HTTP/1.1\r\nhost: sink\r\n\r\n")
        assert wire.response()[0] == 200
        with Peak(proxy) as peak:
            if direction == "up":
                _upload(wire, kind)
            else:
                _download(wire, kind)
        wire.send(b"GET / HTTP/1.1\r\nhost: sink\r\n\r\n")
        assert wire.response()[0] == 200
    assert peak.growth < GROWTH
    assert proxy.stop() == 0


def _upload(wire: Wire, kind: str) -> None:
    framing = b"transfer-encoding: chunked" if kind == "chunks" else b"content-length: %d" % SIZE
    wire.socket.sendall(b"PUT / HTTP/1.1\r\nhost: sink\r\n" + framing + b"\r\n\r\n")
    for _ in range(SIZE // len(BLOCK)):
        wire.socket.sendall(b"%x\r\n%b\r\n" % (len(BLOCK), BLOCK) if kind == "chunks" else BLOCK)
    if kind == "chunks":
        wire.socket.sendall(b"0\r\n\r\n")
    assert wire.response()[0] == 200


def _download(wire: Wire, kind: str) -> None:
    wire.send(b"GET /%b HTTP/1.1\r\nhost: sink\r\n\r\n" % kind.encode())
    wire.until(b"\r\n\r\n")
    expected = SIZE if kind == "length" else SIZE + SIZE // len(BLOCK) * len(b"100000\r\n\r\n") + len(b"0\r\n\r\n")
    got = len(wire.received)
    wire.received = b""
    buffer = bytearray(1 << 20)
    pauses = {expected // 4, expected // 2}
    while got < expected:
        if pauses and got >= min(pauses):
            pauses.remove(min(pauses))
            time.sleep(0.3)
        size = wire.socket.recv_into(buffer)
        assert size, f"{expected - got} bytes are missing"
        got += size
    assert got == expected


def test_wrk(folder: Path, running: ExitStack, program: Callable[[str], str], nginx: Nginx) -> None:
    """Many connections, none of which meets an error."""
    proxy = Proxy(folder, {"b": [nginx.address]}, fixed=["b"], name="wrk", access_log=False)
    running.callback(proxy.kill)
    done = _wrk(program("wrk"), f"http://127.0.0.1:{proxy.fixed['b']}/hello", 64, 2)
    requests = _assert_no_failure(done)
    assert proxy.measured("http_responses_total", status="2xx") >= requests
    assert proxy.measured("http_pool_connections_made_total") <= 64
    assert proxy.stop() == 0


def _wrk(path: str, url: str, connections: int, seconds: int) -> str:
    command = [path, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s", url]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds + 100).stdout


def _assert_no_failure(told: str) -> int:
    """What wrk says of failures is a line of its own; how many requests it made."""
    assert "Socket errors" not in told, told
    assert "Non-2xx" not in told, told
    found = re.search(r"(\d+) requests in", told)
    assert found is not None, told
    assert int(found[1]) > 0
    return int(found[1])


def test_two_of_three_instances_killed_and_started_again(
    folder: Path, running: ExitStack, program: Callable[[str], str]
) -> None:
    """The node's own and another, at random, both at once at times: idempotent requests see no failure."""
    path = program("nginx")
    server = '    location / { return 200 "hello\\n"; }'
    addresses = [new_address() for _ in range(3)]
    alive: dict[int, Nginx] = {}

    def start(number: int) -> None:
        alive[number] = Nginx(path, folder, addresses[number], server, name=f"killed-{number}")

    for number in range(3):
        start(number)
    running.callback(lambda: [each.kill() for each in alive.values()])
    settings = "ejection: {time: 0.2, max_time: 1}"
    proxy = Proxy(folder, {"b": addresses}, settings, fixed=["b"], name="killed-proxy", access_log=False)
    running.callback(proxy.kill)
    told: list[str] = []
    load = threading.Thread(
        target=lambda: told.append(_wrk(program("wrk"), f"http://127.0.0.1:{proxy.fixed['b']}/", 32, SECONDS))
    )
    rng = random.Random(7)
    kills = 0
    load.start()
    try:
        while load.is_alive():
            number = rng.randrange(2)
            if number in alive:
                alive.pop(number).kill()
                kills += 1
            else:
                start(number)
            load.join(rng.uniform(0.05, 0.5))
    finally:
        load.join(SECONDS + 100)
    requests = _assert_no_failure(told[0])
    assert kills >= 3
    assert proxy.measured("http_responses_total", status="2xx") >= requests
    assert proxy.measured("http_responses_total", status="5xx") == 0
    # Both did some of the work: the load went away from the node, and came back.
    assert proxy.measured("http_responses_total", tier="node", status="2xx") > 0
    assert proxy.measured("http_responses_total", tier="other", reason="local_failed", status="2xx") > 0
    assert proxy.measured("http_retries_total") > 0
    for number in {0, 1} - alive.keys():
        start(number)
    wait_until(lambda: _served_by_node(proxy), "the node's own instance serves again")
    assert proxy.stop() == 0


def _served_by_node(proxy: Proxy) -> bool:
    before = proxy.measured("http_responses_total", tier="node", status="2xx")
    with proxy.connect("b") as wire:
        wire.send(b"GET / HTTP/1.1\r\nhost: b\r\n\r\n")
        assert wire.response()[0] == 200
    return proxy.measured("http_responses_total", tier="node", status="2xx") > before


def test_asgi_under_wrk(folder: Path, running: ExitStack, program: Callable[[str], str], asgi: Asgi) -> None:
    """Hypercorn ends connections by its own rules; nobody notices (A4)."""
    proxy = Proxy(folder, {"b": [asgi.address]}, fixed=["b"], name="asgi-wrk", access_log=False)
    running.callback(proxy.kill)
    _assert_no_failure(_wrk(program("wrk"), f"http://127.0.0.1:{proxy.fixed['b']}/tell", 16, 2))
    assert proxy.stop() == 0
