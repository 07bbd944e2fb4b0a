"""A proxy as a process, and what stands around it: nginx, an ASGI server, instances that say what a test wants.

All of it is synchronous: what is tested here are other people's programs, and bytes on sockets. Instances have
addresses of their own within 127.0.0.0/8, with ports that no outgoing connection takes, so that they can be killed and
started again at the same place.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

HERE = Path(__file__).parent
LIMIT = 20.0
"""Seconds that anything awaited may take; reached only by a failure."""

PORT = 8080
_block = random.Random(os.getpid()).randrange(20, 250)
_numbers = itertools.count(1)


def new_address() -> str:
    """A loopback address that nobody else uses."""
    number = next(_numbers)
    return f"127.{_block}.{os.getpid() % 251}.{number}" if number < 255 else f"127.{_block + 1}.0.{number - 254}"


def wait_until(holds: Callable[[], object], what: str) -> None:
    """Look until something holds."""
    end = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < end, f"not so after {LIMIT} s: {what}"
        time.sleep(0.01)


class Process:
    """A program under way, whose output goes into files."""

    def __init__(self, command: Sequence[str], folder: Path, name: str, **env: str) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MESHLOCAL_")}
        clean.pop("NODE_NAME", None)
        self._log = folder / f"{name}.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, env={**clean, **env}
            )
        self.pid = self._process.pid

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def resident(self) -> int:
        """Bytes of memory."""
        found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    def printed(self, pattern: str) -> re.Match[str]:
        """The first match of a pattern in what it prints, now or later."""
        end = time.monotonic() + LIMIT
        while (found := re.search(pattern, self.log)) is None:
            assert time.monotonic() < end, f"not printed: {pattern}\n{self.log}"
            assert self._process.poll() is None, f"ended, and did not print {pattern}:\n{self.log}"
            time.sleep(0.01)
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


class Proxy(Process):
    """A meshlocal proxy on node n1 with an http listener that goes by Host, and one for each service named in `fixed`.

    Args:
        instances: addresses by service, with a port if it is not `PORT`; the first instance of each is on the proxy's
            own node.
        settings: YAML below `proxy:`.
        listen: further listeners, whose ports are in `ports` by their scheme and service (`tls=b`).
    """

    def __init__(
        self,
        folder: Path,
        instances: Mapping[str, Sequence[str]],
        settings: str = "",
        *,
        fixed: Sequence[str] = (),
        listen: Sequence[str] = (),
        name: str = "proxy",
        access_log: bool = True,
    ) -> None:
        self.file = folder / f"{name}-instances.yaml"
        self.write(instances)
        config = folder / f"{name}.yaml"
        plain = [f"http://127.0.0.1:0{suffix}" for suffix in ("", *(f"={each}" for each in fixed))]
        lines = "".join(f"    - {each}\n" for each in (*plain, *listen))
        indented = "".join(f"  {line}\n" for line in settings.strip("\n").split("\n")) if settings else ""
        config.write_text(
            f"proxy:\n  node_name: n1\n  admin: 127.0.0.1:0\n  access_log: {str(access_log).lower()}\n"
            f"  listen:\n{lines}{indented}  discovery: {{urls: ['file:{self.file}']}}\nlog: {{format: text}}\n"
        )
        super().__init__([sys.executable, "-m", "meshlocal", "proxy", "--config", str(config)], folder, name)
        ready = self.printed(r"meshlocal proxy ready: .*")[0]
        self.port, *others = map(int, re.findall(r" http://127\.0\.0\.1:(\d+)", ready))
        self.ports = {
            f"{scheme}{service or ''}": int(port)
            for scheme, port, service in re.findall(r" (tls|https|tcp)://127\.0\.0\.1:(\d+)(=\S+)?", ready)
        }
        self.fixed = dict(zip(fixed, others, strict=True))
        self.admin = int(re.search(r"admin=http://127\.0\.0\.1:(\d+)", ready)[1])  # type: ignore[index]  # it is there, or the test fails
        self.url = f"http://127.0.0.1:{self.port}"

    def write(self, instances: Mapping[str, Sequence[str]]) -> None:
        lines = ["services:"]
        for service, addresses in instances.items():
            lines.append(f"  {service}:")
            lines += [
                f"    - {{address: {host}, port: {port or PORT}, labels: {{node: n{number}}}}}"
                for number, address in enumerate(addresses, start=1)
                for host, _, port in [address.partition(":")]
            ]
        fresh = self.file.with_suffix(".new")
        fresh.write_text("\n".join(lines) + "\n")
        fresh.rename(self.file)

    def measured(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/metrics", timeout=LIMIT) as answer:
            text = answer.read().decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"meshlocal_{name}" and labels.items() <= sample.labels.items()
        )

    def connect(self, service: str | None = None) -> Wire:
        """A connection to one of its listeners."""
        return Wire(socket.create_connection(("127.0.0.1", self.fixed[service] if service else self.port), LIMIT))


class Wire:
    """A client's connection, for bytes as they are."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(LIMIT)
        self.socket = sock
        self.received = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send; what the proxy does not take any more is no matter."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def ended(self) -> bytes:
        """All that comes until the end, in good order or not."""
        with suppress(ConnectionResetError):
            while data := self.socket.recv(65536):
                self.received += data
        rest, self.received = self.received, b""
        return rest

    def until(self, mark: bytes) -> bytes:
        """What comes, up to and with a mark."""
        while mark not in self.received:
            data = self.socket.recv(65536)
            assert data, f"the connection ended before {mark!r}: {self.received!r}"
            self.received += data
        end = self.received.index(mark) + len(mark)
        found, self.received = self.received[:end], self.received[end:]
        return found

    def response(self) -> tuple[int, dict[str, str], bytes]:
        """The next response with a Content-Length: status, fields, body."""
        head = self.until(b"\r\n\r\n")
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(fields.get("content-length", 0))
        while len(self.received) < length:
            data = self.socket.recv(65536)
            assert data, f"the connection ended within a body: {head!r} {self.received!r}"
            self.received += data
        body, self.received = self.received[:length], self.received[length:]
        return int(first.split()[1]), fields, body


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Threaded:
    """An instance with a thread for each connection.

    Args:
        address: where it listens, on `PORT`.
        serve: serves a connection, which it closes.
    """

    def __init__(self, address: str, serve: Callable[[socket.socket], None]) -> None:
        self.address = address
        self._serve_each = serve
        self._listener = socket.create_server((address, PORT), backlog=512)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve_each, args=(sock,), daemon=True).start()


class Scripted(Threaded):
    """An instance that says what a test wants, whatever it hears.

    Attributes:
        answer: sent for each head that comes; a callable gets the connection and what came of the request.
        closes: it ends the connection behind an answer.
        heard: all bytes that came, by connection, in the order in which those were accepted.
    """

    def __init__(self, address: str) -> None:
        self.answer: bytes | Callable[[socket.socket, bytes], None] = OK
        self.closes = False
        self.heard: list[bytearray] = []
        super().__init__(address, self._serve)

    def reset(self) -> None:
        """As at the start; what is open stays so, and what is heard there is not listed."""
        self.answer, self.closes, self.heard = OK, False, []

    @property
    def requests(self) -> int:
        """Heads that came."""
        return sum(each.count(b"\r\n\r\n") for each in self.heard)

    def _serve(self, sock: socket.socket) -> None:
        heard: bytearray | None = None
        answered = 0
        with sock, suppress(OSError):
            while data := sock.recv(65536):
                if heard is None or not any(heard is each for each in self.heard):
                    heard, answered = bytearray(), 0
                    self.heard.append(heard)
                heard += data
                while heard.count(b"\r\n\r\n", answered):
                    begin = answered
                    answered = heard.index(b"\r\n\r\n", answered) + 4
                    answer = self.answer
                    if callable(answer):
                        answer(sock, bytes(heard[begin:]))
                    else:
                        sock.sendall(answer)
                    if self.closes:
                        sock.shutdown(socket.SHUT_WR)
                        while sock.recv(65536):
                            pass
                        return


class Nginx(Process):
    """nginx in one process, for one address.

    Args:
        location: what a request gets: directives of a `location` block.
    """

    def __init__(self, path: str, folder: Path, address: str, server: str, name: str = "nginx") -> None:
        place = folder / name
        place.mkdir(exist_ok=True)
        paths = "".join(
            f"  {kind}_temp_path {place}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        config = place / "nginx.conf"
        config.write_text(
            f"daemon off;\nmaster_process off;\npid {place}/pid;\nerror_log stderr crit;\n"
            f"events {{ worker_connections 4096; }}\nhttp {{\n  access_log off;\n{paths}"
            "  keepalive_requests 1000000;\n"
            f"  server {{\n    listen {address}:{PORT};\n    root {place};\n{server}\n  }}\n}}\n"
        )
        super().__init__([path, "-p", str(place), "-e", "stderr", "-c", str(config)], folder, name)
        self.address = address
        self.folder = place
        wait_until(lambda: listens(address), f"nginx listens\n{self.log}")


def listens(address: str, port: int = PORT) -> bool:
    """Whether something can be connected there."""
    try:
        socket.create_connection((address, port), 1.0).close()
    except OSError:
        return False
    return True


class Asgi(Process):
    """Hypercorn on Trio, with the application that stands beside this file."""

    def __init__(self, folder: Path, address: str) -> None:
        options = ["--worker-class", "trio", "--workers", "0", "--bind", f"{address}:{PORT}", "--keep-alive", "60"]
        super().__init__([sys.executable, "-m", "hypercorn", *options, f"{HERE}/application.py:app"], folder, "asgi")
        self.address = address
        self.printed("Running on")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("http")


@pytest.fixture(scope="module")
def running() -> Iterator[ExitStack]:
    """What a module's tests share, each with a way to end it."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def asgi(folder: Path, running: ExitStack) -> Asgi:
    started = Asgi(folder, new_address())
    running.callback(started.kill)
    return started


@pytest.fixture(scope="module")
def nginx(folder: Path, running: ExitStack, program: Callable[[str], str]) -> Nginx:
    server = """
    gzip on; gzip_types *; gzip_min_length 100;
    client_max_body_size 1m;
    location /hello { return 200 "hello\\n"; }
    location /not-modified { return 304; }
    location / { }"""
    started = Nginx(program("nginx"), folder, new_address(), server)
    running.callback(started.kill)
    (started.folder / "text").write_text("".join(f"line {number}\n" for number in range(5000)))
    return started
