"""What a proxy's pages say of TLS: how instances are spoken to, own certificates, and what is open."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import trio

from meshlocal.app.config_loader import load_config
from meshlocal.app.operator import Operator
from meshlocal.app.proxy import ProxyProcess
from meshlocal.policy.model import ServiceKey
from nursery_tests.app.test_proxy_pages import B, get, metrics, page, publish
from nursery_tests.certificates import Authority
from nursery_tests.logged import events


def process(folder: Path, text: str) -> ProxyProcess:
    file = folder / "proxy.yaml"
    file.write_text(text)
    flags = {"proxy.discovery.urls": ("grpc://127.0.0.1:1",), "proxy.node_name": "n1"}
    return ProxyProcess(lambda: load_config(file, flags, {}, "proxy"), random.Random(0), Operator({}))


def config(authority: Authority, *, end: float = 30) -> str:
    pair = authority.issue("own", ["proxy.example"], end=end)
    tls = f"ca_file: {authority.file}, identity: 'spiffe://td/{{node}}', port: 8443, skip_tiers: [node]"
    return (
        "proxy:\n  listen: ['tcp://127.0.0.1:0=b', 'tcp://127.0.0.1:0=c', 'tls://127.0.0.1:0=c']\n"
        f"  admin: 0.0.0.0:0\n  tls: {{certificate_file: {pair.certificate}, key_file: {pair.key}}}\n"
        f"  services: {{b: {{tls: {{{tls}}}}}}}\n"
    )


async def spoken_to(process: ProxyProcess, service: str) -> tuple[str, bool]:
    """How the page says that a service's instances are spoken to, and whether that is doubtful."""
    detail = json.loads((await get(process, f"/live?service={service}")).body.splitlines()[-1])
    return detail["spoken"], detail["doubtful"]


async def test_how_instances_are_spoken_to(tmp_path: Path) -> None:
    """`skip_tiers` is said, with how often it was made use of."""
    running = process(tmp_path, config(Authority(tmp_path)))
    publish(running)
    publish(running, ServiceKey("c"))
    spoken = await spoken_to(running, "b")
    assert spoken[0].startswith(
        "TLS 1.3 or newer; an instance must prove the identity spiffe://td/{node}; at port 8443;"
    )
    assert "in plaintext to this host's own addresses in tier node (attempts so far: 0)" in spoken[0]
    assert (spoken[1], await spoken_to(running, "c")) == (False, ("in plaintext", False))
    running.services[B].statistics.tls_skipped = 3
    assert (await spoken_to(running, "b"))[1]
    found = {each["service"]: each["tls"] for each in json.loads((await get(running, "/services")).body)}
    assert found == {
        "b": {
            "server_name": None,
            "identity": "spiffe://td/{node}",
            "port": 8443,
            "skip_tiers": ["node"],
            "plaintext_attempts": 3,
        },
        "c": None,
    }
    assert json.loads((await get(running, "/explain?service=b")).body)["tls"] == found["b"]
    assert json.loads((await get(running, "/explain?service=c")).body)["tls"] is None
    assert (await metrics(running))["meshlocal_tls_skipped_total", "service=b"] == 3


@pytest.mark.parametrize(("end", "told"), [(30, ": until 20"), (0.2, "the certificate expires at 20")])
async def test_own_certificates_and_what_is_open(tmp_path: Path, end: float, told: str) -> None:
    running = process(tmp_path, config(Authority(tmp_path), end=end))
    shown = await page(running)
    assert f"own.pem{told}" in shown or f"own.pem: {told}" in shown
    assert "proxy.admin 0.0.0.0:0 is served in plaintext beyond this machine" in shown
    found = await metrics(running)
    assert found["meshlocal_exposed", "address=0.0.0.0:0", "key=proxy.admin", "lacks=tls"] == 1
    assert found["meshlocal_exposed", "address=0.0.0.0:0", "key=proxy.admin", "lacks=authentication"] == 1
    (name,) = [key for key in found if key[0] == "meshlocal_certificate_not_after_timestamp_seconds"]
    assert name[1] == f"file={tmp_path}/own.pem"


async def test_an_agent_that_says_nothing(tmp_path: Path) -> None:
    text = "proxy: {listen: ['tls://127.0.0.1:0=b'], admin: none, tls: {workload_api: 'unix:///nobody.sock'}}\n"
    shown = await page(process(tmp_path, text))
    assert "<dt>SPIFFE agent</dt>" in shown
    assert "no certificate yet" in shown
    assert "not connected yet" in shown


async def test_what_is_open_is_said_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    running = process(tmp_path, config(Authority(tmp_path)))
    with trio.move_on_after(1):
        await running.run()
    assert events(caplog.records).count("open beyond this machine") == 2
