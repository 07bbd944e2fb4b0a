"""TLS side by side: HAProxy, nginx, Envoy and meshlocal, one worker each, with the same certificates.

Two services: TLS from the client, plaintext to the instance (*terminated*); and TLS from the client, mutual TLS to the
instance (*mutual*), which an nginx before the same echo speaks. Keys are ECDSA P-256. TLS 1.3 but where it says so.
"""

from __future__ import annotations

import argparse
import re
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench import load
from bench.machine import memory_kb
from bench.peers import PEERS, Instance, Job, Running, Tls, nginx_base, present, started, stream_module
from bench.processes import free_port, listening, module
from bench.rounds import Measured, Metrics, Row, Workload, of_load, take_turns

SERVICES = ("terminated", "mutual")
CLIENTS = 2
"""Processes that shake hands, each one handshake after the other: one alone would be the limit."""

IDLE = 1000
"""Connections that are held for the memory of each."""

ROWS = [
    *(
        row
        for name, what in (("terminated", "TLS to the client"), ("mutual", "mutual TLS onward too"))
        for row in (
            Row(f"64 B echo, {what}, 1 connection, p50", f"{name}-64-1", "p50", "µs", 1e6),
            Row(f"64 B echo, {what}, 1 connection, p99", f"{name}-64-1", "p99", "µs", 1e6),
            Row(f"64 B echo, {what}, 32 connections", f"{name}-64-32", "rate", "1000/s", 1e-3, more=True, closed=True),
            Row(f"CPU of that exchange, {what}", f"{name}-64-32", "cpu_per_request", "µs", 1e6),
            Row(f"64 KiB echo, {what}, 4 connections", f"{name}-bulk", "rate", "1000/s", 1e-3, more=True, closed=True),
        )
    ),
    Row("handshakes, TLS 1.3, full", "handshakes", "rate", "1/s", 1, more=True, closed=True),
    Row("CPU of a full handshake", "handshakes", "cpu_per_request", "µs", 1e6),
    Row("handshakes, TLS 1.2, resumed", "resumed", "rate", "1/s", 1, more=True, closed=True),
    Row("CPU of a resumed handshake", "resumed", "cpu_per_request", "µs", 1e6),
    Row("memory per idle TLS connection", "memory", "each", "KB", 1e-3),
]


def needs() -> list[str]:
    """What is not installed, without which nothing of this can be measured."""
    return load.missing("nginx", "wrk", "openssl")


def issue(folder: Path) -> Tls:
    """An authority, and certificates of it for the proxies, their instances and as clients."""
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    authority, key = folder / "ca.pem", folder / "ca.key"
    _openssl("req", "-x509", *curve, "-days", "2", "-subj", "/CN=bench", "-keyout", str(key), "-out", str(authority))
    for name, proved in (("proxy", "DNS:localhost,URI:spiffe://bench/proxy"), ("instance", "DNS:b.example")):
        request, certificate, own = (folder / f"{name}.{end}" for end in ("csr", "pem", "key"))
        _openssl("req", *curve, "-subj", f"/CN={name}", "-keyout", str(own), "-out", str(request))
        extensions = folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={proved}\n")
        signed = ["-CA", str(authority), "-CAkey", str(key), "-CAcreateserial", "-days", "2"]
        _openssl("x509", "-req", "-in", str(request), *signed, "-extfile", str(extensions), "-out", str(certificate))
    # HAProxy wants both in one file.
    both = folder / "proxy-both.pem"
    both.write_text((folder / "proxy.pem").read_text() + (folder / "proxy.key").read_text())
    return Tls(
        str(folder / "proxy.pem"), str(folder / "proxy.key"), str(both), str(authority), "b.example", ("mutual",)
    )


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@contextmanager
def upstreams(folder: Path) -> Iterator[Job]:
    """The echo, and an nginx before it that wants mutual TLS."""
    folder.mkdir()
    tls = issue(folder)
    with ExitStack() as stack:
        _, (near,) = stack.enter_context(module("bench.echo", "127.0.0.1"))
        secured = free_port()
        server = (
            f"server {{ listen 127.0.0.1:{secured} ssl backlog=4096; ssl_certificate {folder}/instance.pem; "
            f"ssl_certificate_key {folder}/instance.key; ssl_client_certificate {tls.authority}; ssl_verify_client on; "
            f"ssl_protocols TLSv1.3; proxy_pass 127.0.0.1:{near}; }}"
        )
        config = folder / "nginx.conf"
        config.write_text(f"{stream_module()}{nginx_base(folder) % ''}}}\nstream {{ {server} }}\n")
        command = [load.find("nginx") or "nginx", "-c", str(config)]
        stack.enter_context(listening(command, folder / "log", [secured]))
        places = {"terminated": near, "mutual": secured}
        yield Job({name: [Instance("127.0.0.1", places[name])] for name in SERVICES}, tls=tls)


def workloads(job: Job, asked: argparse.Namespace) -> list[Workload]:
    """What is measured in rounds."""
    assert job.tls is not None
    found = []
    for service in SERVICES:
        for name, size, connections in (("64-1", 64, 1), ("64-32", 64, 32), ("bulk", 65536, 4)):
            run = partial(echoes, size=size, connections=connections, seconds=asked.seconds)
            found.append(Workload(f"{service}-{name}", service, run))
    for name, flags in (("handshakes", ("-new", "-tls1_3")), ("resumed", ("-reuse", "-tls1_2"))):
        run = partial(handshakes, authority=job.tls.authority, flags=flags, seconds=asked.seconds)
        found.append(Workload(name, "terminated", run))
    return found


def echoes(port: int, size: int, connections: int, seconds: int) -> Metrics:
    return of_load(load.wrk_echo(port, size, connections, seconds, tls=True))


def handshakes(port: int, authority: str, flags: tuple[str, ...], seconds: int) -> Metrics:
    """Connect, shake hands, close: as many as two clients can."""
    command = ["openssl", "s_time", "-connect", f"127.0.0.1:{port}", "-CAfile", authority, "-time", str(seconds)]
    start = time.perf_counter()
    clients = [
        subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(CLIENTS)
    ]
    count = 0
    for client in clients:
        told, _ = client.communicate(timeout=60)
        found = re.search(r"^(\d+) connections in \d+ real seconds", told, re.MULTILINE)
        if found is None:
            raise load.LoadError(f"openssl s_time printed no figures: {told}")
        count += int(found[1])
    taken = time.perf_counter() - start
    return {"requests": count, "rate": count / taken}


def memory(contestant: Running, authority: str, count: int) -> Metrics:
    """What idle TLS connections add to a proxy's memory."""
    before = memory_kb(contestant.pid)
    context = ssl.create_default_context(cafile=authority)
    held = []
    try:
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", contestant.ports["terminated"]), timeout=30)
            held.append(context.wrap_socket(sock, server_hostname="localhost"))
            held[-1].sendall(b"x")
            if not held[-1].recv(1):
                raise ConnectionError("an idle connection was closed")
        time.sleep(1)
        after = memory_kb(contestant.pid)
    finally:
        for each in held:
            each.close()
    return {"each": (after - before) * 1024 / count, "connections": count}


def measure(asked: argparse.Namespace) -> Measured:
    """Everything about TLS; nothing if its upstream or load is missing."""
    if missing := needs():
        print(f"without TLS: {', '.join(missing)}")
        return {}
    with tempfile.TemporaryDirectory(prefix="meshlocal-bench-") as folder, upstreams(Path(folder) / "up") as job:
        assert job.tls is not None
        authority = job.tls.authority
        with started(present(PEERS, job), job, Path(folder)) as proxies:
            # First of all: what was allocated under load and is kept would hide what a connection takes.
            memories: Any = {each.name: [memory(each, authority, IDLE)] for each in proxies}
            measured = take_turns(workloads(job, asked), proxies, asked.rounds)
    return {**measured, "memory": memories}
