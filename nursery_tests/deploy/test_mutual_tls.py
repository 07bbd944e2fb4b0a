"""The worked examples of mutual TLS, with their own files: two machines with openssl alone, and Kubernetes' overlay."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from nursery_tests.certificates import Authority
from nursery_tests.interop.http.conftest import Process, new_address, wait_until
from nursery_tests.interop.http.tls_parts import Echo
from nursery_tests.ports import free_port

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FOLDER = DEPLOY / "systemd" / "mutual-tls"
LIMIT = 20.0


@pytest.fixture
def running() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Machine:
    """One of two machines, which has an address in place of a network, and a folder in place of /etc/meshlocal."""

    def __init__(self, folder: Path, number: int) -> None:
        self.node = f"n{number}"
        self.address = new_address()
        self.folder = folder / self.node
        (self.folder / "tls").mkdir(parents=True)


class Site:
    """Two machines, set up as docs/physical-machines.md says."""

    def __init__(self, folder: Path, running: ExitStack) -> None:
        self.folder = folder
        self.running = running
        self.machines = [Machine(folder, number) for number in (1, 2)]
        self.authority = folder / "authority"
        self.ports = {"15001": free_port(), "9000": 8080}
        self.script("authority", str(self.authority))
        for machine in self.machines:
            for name in ("caller", "b"):
                self.issue(machine, name)

    def script(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", str(FOLDER / "certificates.sh"), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True)

    def issue(self, machine: Machine, name: str, *, of: str = "") -> None:
        """A certificate made by the script, and brought to its machine."""
        own = f"{machine.node}-{name}"
        self.script("issue", str(self.authority), own, f"spiffe://example/machine/{of or machine.node}/{name}")
        for end in ("pem", "key"):
            made = self.authority / f"{own}.{end}"
            assert made.stat().st_mode & 0o077 == 0, "for nobody else to read"
            made.rename(machine.folder / "tls" / f"{name}.{end}")
        (machine.folder / "tls" / "ca.pem").write_bytes((self.authority / "ca.pem").read_bytes())

    def file(self, machine: Machine, name: str) -> str:
        """A file of the example, with this machine's folder and addresses."""
        text = (FOLDER / name).read_text().replace("/etc/meshlocal", str(machine.folder))
        for number, each in enumerate(self.machines, start=1):
            text = text.replace(f"10.0.0.{number}", each.address)
        text = text.replace("0.0.0.0:15443", f"{machine.address}:15443").replace(
            "@127.0.0.1:9000", f"@{machine.address}:8080"
        )
        text = text.replace("port: 9000", "port: 8080").replace(":15001=", f":{self.ports['15001']}=")
        place = machine.folder / name
        place.write_text(text.replace("127.0.0.1:15010", "127.0.0.1:0"))
        return str(place)

    def proxy(self, machine: Machine, name: str) -> Process:
        config = self.file(machine, name)
        command = [sys.executable, "-m", "meshlocal", "proxy", "--config", config]
        if name == "caller.yaml":
            command += ["--admin", "127.0.0.1:0", "--access-log"]
        process = Process(command, self.folder, f"{machine.node}-{name}", NODE_NAME=machine.node)
        self.running.callback(process.kill)
        process.printed("meshlocal proxy ready")
        return process


def ask(port: int) -> bytes:

    try:
        with socket.create_connection(("127.0.0.1", port), LIMIT) as sock:
            sock.sendall(b"hello")
            return sock.recv(100)
    except ConnectionError:
        return b""


def test_two_machines_with_openssl_alone(tmp_path: Path, running: ExitStack, program: Any) -> None:
    """The first machine's own instance serves over mutual TLS; when it is gone, the second's does. One that proves
    another machine's name is left, and who has no certificate of the authority is not let in."""
    program("openssl")
    site = Site(tmp_path, running)
    first, second = site.machines
    echoes = [Echo(tmp_path, machine.address) for machine in site.machines]
    for echo in echoes:
        running.callback(echo.kill)
    inbound = [site.proxy(machine, "inbound.yaml") for machine in site.machines]
    site.file(first, "instances.yaml")
    caller = site.proxy(first, "caller.yaml")
    assert ask(site.ports["15001"]) == b"hello"
    caller.printed(rf'"instance":"{first.address}:8080","node":"n1"')
    inbound[0].kill()
    assert ask(site.ports["15001"]) == b"hello"
    caller.printed(rf'"instance":"{second.address}:8080","node":"n2"')
    # The second machine proves to be a third one from now on.
    site.issue(second, "b", of="n3")
    inbound[1].printed("files read again")
    wait_until(lambda: ask(site.ports["15001"]) == b"", "it is believed no more")
    site.issue(second, "b")
    wait_until(lambda: ask(site.ports["15001"]) == b"hello", "it is again")
    # Another authority's certificate.
    stranger = Authority(tmp_path, "stranger").issue("stranger", uris=["spiffe://example/machine/n1/caller"])
    refused = subprocess.run(
        [
            *(program("openssl"), "s_client", "-ign_eof", "-connect", f"{second.address}:15443", "-CAfile"),
            *(str(site.authority / "ca.pem"), "-cert", stranger.certificate, "-key", stranger.key),
        ],
        input="hello\n",
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert "alert unknown ca" in refused.stderr.lower(), refused.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        ([], 2, "usage:"),
        (["issue", "x"], 2, "usage:"),
        (["issue", "x", "n", "web"], 2, "web is no SPIFFE ID"),
        (["other", "x"], 2, "usage:"),
    ],
)
def test_the_script_says_how_it_is_called(arguments: list[str], status: int, told: str) -> None:
    command = ["sh", str(FOLDER / "certificates.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert told in done.stderr


def test_the_script_keeps_an_authority_that_is_there(tmp_path: Path, program: Any) -> None:
    program("openssl")
    command = ["sh", str(FOLDER / "certificates.sh"), "authority", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    key = (tmp_path / "ca.key").read_bytes()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    assert (tmp_path / "ca.key").read_bytes() == key


def documents(name: str) -> list[dict[str, Any]]:
    kubectl = Path(sys.executable).with_name("kubectl")
    folder = DEPLOY / "kubernetes" / "mutual-tls" / name
    built = subprocess.run([kubectl, "kustomize", folder], capture_output=True, check=True, text=True)
    return list(yaml.safe_load_all(built.stdout))


def test_the_kubernetes_overlay_as_processes(tmp_path: Path, running: ExitStack) -> None:
    """Its configurations and its certificates' names fit: the caller's proxy finds b's over mutual TLS, by a discovery
    server that knows it."""
    authority = Authority(tmp_path)
    example, discovery = documents("example"), documents("discovery")
    ports = {"7070": free_port(), "15001": free_port()}
    b = new_address()
    secrets = {}
    for each in [*example, *discovery]:
        if each["kind"] == "Certificate":
            spec = each["spec"]
            pair = authority.issue(each["metadata"]["name"], [*spec.get("dnsNames", ()), "localhost"], spec["uris"])
            folder = tmp_path / spec["secretName"]
            folder.mkdir()
            for file, name in ((pair.certificate, "tls.crt"), (pair.key, "tls.key"), (authority.file, "ca.crt")):
                os.link(file, folder / name)
            secrets[spec["secretName"]] = str(folder)
    (tmp_path / "instances.yaml").write_text(
        "services:\n  b.meshlocal-example:\n"
        f"    - {{address: {b}, port: 8080, port_name: http, labels: {{node: node-1, namespace: meshlocal-example}}}}\n"
        "  other.bank: []\n"
    )
    replaced = {
        "kubernetes:": f"file:{tmp_path}/instances.yaml",
        "0.0.0.0:7070": f"127.0.0.1:{ports['7070']}",
        "0.0.0.0:15000": "127.0.0.1:0",
        "meshlocal-discovery.meshlocal.svc:7070": f"localhost:{ports['7070']}",
        ":15001=": f":{ports['15001']}=",
        "0.0.0.0:15443=@127.0.0.1:8080": f"{b}:15443=@{b}:8080",
        "/var/lib/meshlocal": str(tmp_path),
        "delay: 5": "delay: 0",
    }

    def start(kind: str, file: str, secret: str, found: list[dict[str, Any]]) -> Process:
        text = next(
            each["data"][file] for each in found if each["kind"] == "ConfigMap" and file in each.get("data", {})
        )
        for old, new in {**replaced, "/etc/meshlocal-tls": secrets[secret]}.items():
            text = text.replace(old, new)
        (tmp_path / file).write_text(text)
        command = [sys.executable, "-m", "meshlocal", kind, "--config", str(tmp_path / file)]
        own = {"NODE_NAME": "node-1", "MESHLOCAL_PROXY__NAMESPACE": "meshlocal-example"}
        process = Process(command, tmp_path, file, **own)
        running.callback(process.kill)
        process.printed("ready:")
        return process

    echo = Echo(tmp_path, b)
    running.callback(echo.kill)
    start("discovery", "discovery.yaml", "meshlocal-discovery-tls", discovery)
    inbound = start("proxy", "inbound.yaml", "b-tls", example)
    caller = start("proxy", "proxy.yaml", "caller-tls", example)
    assert ask(ports["15001"]) == b"hello", caller.log + inbound.log
    # What it may not see.
    own = secrets["caller-tls"]
    command = [
        sys.executable,
        "-m",
        "meshlocal",
        "get",
        "services",
        "--discovery",
        f"grpcs://localhost:{ports['7070']}",
    ]
    environment = {
        **os.environ,
        "MESHLOCAL_PROXY__DISCOVERY__CERTIFICATE_FILE": f"{own}/tls.crt",
        "MESHLOCAL_PROXY__DISCOVERY__KEY_FILE": f"{own}/tls.key",
        "MESHLOCAL_PROXY__DISCOVERY__CA_FILE": f"{own}/ca.crt",
    }
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "b.meshlocal-example" in told.stdout
    assert "bank" not in told.stdout
