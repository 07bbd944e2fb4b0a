"""Programs that make load, each in C and a process of its own: wrk, h2load, sockperf, iperf3, redis-benchmark.

wrk makes the load of TCP echoes too. Its script (`echo.lua`) sends bytes that read as an HTTP response, and an echo
server sends them back: so wrk, whose loop serves many connections from one thread, measures exchanges of any size
with any upstream that echoes.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

PACKAGES = {
    "wrk": "wrk",
    "h2load": "nghttp2-client",
    "nghttpd": "nghttp2-server",
    "sockperf": "sockperf",
    "iperf3": "iperf3",
    "haproxy": "haproxy",
    "nginx": "nginx-light",
    "openssl": "openssl",
    "redis-benchmark": "redis-tools",
    "redis-server": "redis-server",
}
"""Debian packages of programs."""

_ECHO = Path(__file__).with_name("echo.lua")
_REPORT = Path(__file__).with_name("report.lua")
_HEADS = Path(__file__).with_name("heads.lua")
_SYSTEM_PATHS = "/usr/sbin:/sbin"
_TRIES = 5


class LoadError(Exception):
    """A program that makes load failed, or its load did."""


class Load(NamedTuple):
    """What came of a while of closed-loop load. Times are in seconds.

    Attributes:
        requests: exchanges that ended.
        rate: exchanges a second.
        errors: exchanges that failed.
    """

    requests: int
    rate: float
    errors: int
    p50: float
    p90: float
    p99: float


def find(program: str) -> str | None:
    """A program's path."""
    return shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":" + _SYSTEM_PATHS)


def missing(*programs: str) -> list[str]:
    """What is not installed, each with the command that installs it."""
    return [f"{name}: apt-get install {PACKAGES[name]}" for name in programs if find(name) is None]


def versions(envoy: str | None) -> dict[str, str]:
    """Of the proxies that are installed."""
    found = {}
    for name, command in (
        ("HAProxy", [find("haproxy"), "-v"]),
        ("nginx", [find("nginx"), "-v"]),
        ("Envoy", [envoy, "--version"]),
    ):
        if command[0] is not None:
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
            if number := re.search(r"\d+\.\d+\.\d+", done.stdout + done.stderr):
                found[name] = number[0]
    return found


def wrk_echo(port: int, size: int, connections: int, seconds: int, *, close: bool = False, tls: bool = False) -> Load:
    """Exchanges of `size` bytes, one after another on each connection; with `close`, one on each connection."""
    environment = {"ECHO_SIZE": str(size), "ECHO_CLOSE": "1" if close else "", "ECHO_REPORT": str(_REPORT)}
    return _wrk(port, connections, seconds, _ECHO, environment, tls=tls)


def wrk_http(port: int, connections: int, seconds: int, *, alike: bool = True) -> Load:
    """GET requests, one after another on each connection; with the same head, or each with one of its own."""
    if alike:
        return _wrk(port, connections, seconds, _REPORT, {})
    return _wrk(port, connections, seconds, _HEADS, {"HEADS_REPORT": str(_REPORT)})


def _wrk(
    port: int, connections: int, seconds: int, script: Path, environment: dict[str, str], *, tls: bool = False
) -> Load:
    url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/"
    flags = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script)]
    text = _run("wrk", *flags, url, environment=environment)
    found = re.search(r"^figures (.*)$", text, re.MULTILINE)
    if found is None:
        raise LoadError(f"wrk printed no figures: {text}")
    figures = json.loads(found[1])
    taken = figures["us"] / 1e6
    times = {key: figures[key] / 1e6 for key in ("p50", "p90", "p99")}
    return Load(figures["requests"], figures["requests"] / taken, figures["errors"], **times)


def h2load_rate(port: int, connections: int, rate: int, seconds: int) -> float:
    """HTTP/1.1 GET requests at a fixed rate over all connections; returns the mean time of a request, in seconds."""
    flags = ["--h1", "-t1", f"-c{connections}", f"--rps={rate / connections}", f"-D{seconds}", "--warm-up-time=0"]
    text = _run("h2load", *flags, f"http://127.0.0.1:{port}/")
    found = re.search(r"time for request:\s+\S+\s+\S+\s+([\d.]+)(us|ms|s)\b", text)
    if found is None:
        raise LoadError(f"h2load printed no times: {text}")
    return float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]]


def h2load_calls(
    port: int, connections: int, at_once: int, seconds: int, body: Path, *, path: str, rate: int | None = None
) -> Load:
    """POST requests in HTTP/2 with a body, so many at once on each connection, as gRPC's unary calls are.

    With `rate`, so many a second over all connections, and no more at once than that; times count from the sending.
    """
    fields = ("content-type: application/grpc", "te: trailers")
    with tempfile.NamedTemporaryFile(prefix="meshlocal-bench-") as log:
        flags = [
            "-t1",
            f"-c{connections}",
            f"-m{at_once}",
            f"-D{seconds}",
            "--warm-up-time=0",
            f"--log-file={log.name}",
        ]
        if rate is not None:
            flags.append(f"--rps={rate / connections}")
        flags += [f"-d{body}", *(f"-H{field}" for field in fields)]
        text = _run("h2load", *flags, f"http://127.0.0.1:{port}{path}")
        # Begun at (µs), status, taken (µs).
        lines = Path(log.name).read_text().splitlines()
    times = sorted(int(line.split("\t")[2]) / 1e6 for line in lines)
    found = re.search(r"finished in ([\d.]+)(us|ms|s),", text)
    failed = re.search(r"(\d+) failed, \d+ errored", text)
    if not times or found is None or failed is None:
        raise LoadError(f"h2load printed no figures: {text}")
    bad = sum(line.split("\t")[1] != "200" for line in lines)
    taken = float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]]
    shares = (times[min(len(times) * share // 100, len(times) - 1)] for share in (50, 90, 99))
    return Load(len(times), len(times) / taken, bad + int(failed[1]), *shares)


def sockperf_ping(port: int, size: int, seconds: int) -> Load:
    """Exchanges with `sockperf server`, one after another on one connection."""
    return _sockperf("ping-pong", port, size, seconds)


def sockperf_rate(port: int, size: int, seconds: int, rate: int) -> Load:
    """Exchanges with `sockperf server` at a fixed rate. It spins between them."""
    return _sockperf("under-load", port, size, seconds, f"--mps={rate}", "--reply-every=1")


def _sockperf(kind: str, port: int, size: int, seconds: int, *flags: str) -> Load:
    base = [kind, "--tcp", "-i", "127.0.0.1", "-p", str(port), "-m", str(size), "-t", str(seconds), "--full-rtt"]
    text = _run("sockperf", *base, *flags)
    found = dict(re.findall(r"percentile (50|90|99)\.000 =\s*([\d.]+)", text))
    run = re.search(r"Total Run\] RunTime=([\d.]+) sec;.* ReceivedMessages=(\d+)", text)
    lost = re.search(r"# dropped messages = (\d+)", text)
    if len(found) != 3 or run is None or lost is None:
        raise LoadError(f"sockperf printed no figures: {text}")
    times = (float(found[share]) / 1e6 for share in ("50", "90", "99"))
    # What the whole run received, its warm-up included, is what the proxy carried.
    return Load(int(run[2]), int(run[2]) / float(run[1]), int(lost[1]), *times)


def iperf3(port: int, seconds: int, *, reverse: bool = False) -> float:
    """Bytes a second through one connection to `iperf3 --server`, from the client, or with `reverse` to it."""
    flags = ["-R"] if reverse else []
    problem = ""
    for _ in range(_TRIES):
        text = _run("iperf3", "-c", "127.0.0.1", "-p", str(port), "-t", str(seconds), "-J", *flags)
        found = json.loads(text)
        if "sum_received" in found["end"]:
            bits: float = found["end"]["sum_received"]["bits_per_second"]
            return bits / 8
        # The server takes one test at a time, and may not have seen the end of the one before.
        problem = found.get("error", text)
        time.sleep(0.2)
    raise LoadError(f"iperf3 measured nothing: {problem}")


def redis_gets(
    port: int, connections: int, count: int, *, pipelined: int = 1, kept: bool = True, command: str = "get"
) -> dict[str, float]:
    """So many GETs of 64 bytes in all, one after another on each connection.

    Args:
        port: of the cache.
        connections: how many clients at once.
        count: requests in all.
        pipelined: so many are sent at once on a connection.
        kept: each client has one connection; otherwise each request has one of its own.
        command: `set` makes what `get` gets.

    Returns:
        `requests`, `rate` (a second), and `p50`, `p95` and `p99` in seconds, without `kept` from the connect on.
    """
    flags = ["-h", "127.0.0.1", "-p", str(port), "-c", str(connections), "-n", str(count), "-P", str(pipelined)]
    text = _run("redis-benchmark", *flags, "-k", str(int(kept)), "-d", "64", "-t", command, "--csv")
    rows = list(csv.DictReader(text.splitlines()))
    if len(rows) != 1:
        raise LoadError(f"redis-benchmark printed no figures: {text}")
    times = {f"p{share}": float(rows[0][f"p{share}_latency_ms"]) / 1e3 for share in (50, 95, 99)}
    return {"requests": float(count), "rate": float(rows[0]["rps"]), **times}


def _run(program: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    path = find(program)
    if path is None:
        raise LoadError(f"{program} is not installed: apt-get install {PACKAGES[program]}")
    command = [path, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        raise LoadError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout
