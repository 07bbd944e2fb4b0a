"""Meshes over instances on loopback, on trio and, where it runs there, on asyncio."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import anyio
import pytest
import trustme

import meshlocal
from meshlocal.testing import Upstream, virtual_clock

Main = Callable[[], Awaitable[None]]


TOKEN = "sesame-of-the-tests"


class Server(NamedTuple):
    """A discovery server over an instances file.

    Attributes:
        urls: by scheme.
        file: its instances; services of different tests have different names.
        ca_file: who signed its certificate; None without TLS.
        token_file: holds a token that it knows; None without tokens.
        token: the same.
    """

    urls: dict[str, str]
    file: Path
    ca_file: Path | None
    token_file: Path | None
    token: str = ""

    def publish(self, service: str, *upstreams: Upstream) -> None:
        """Replace the file, as editors do."""
        lines = [
            f"    - {{address: 127.0.0.1, port: {each.port}, labels: {{node: {each.instance.node}}}}}"
            for each in upstreams
        ]
        fresh = self.file.with_suffix(".new")
        fresh.write_text("\n".join(["services:", f"  {service}:" if lines else f"  {service}: []", *lines, ""]))
        fresh.rename(self.file)

    def mesh(self, scheme: str) -> AbstractAsyncContextManager[meshlocal.Mesh]:
        url = self.urls[scheme]
        return meshlocal.open_mesh(url, node_name="n1", ca_file=self.ca_file, token_file=self.token_file)


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[dict[str, str]]:
    command = [sys.executable, "-m", "meshlocal", "discovery", "--bind", "127.0.0.1:0"]
    command += ["--websocket-bind", "127.0.0.1:0", "--source", "file:instances.yaml", *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MESHLOCAL_")}
    with subprocess.Popen(command, cwd=folder, env=clean, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            yield {scheme: url for url, scheme in re.findall(r"((grpcs?|wss?)://\S+)", line)}
        finally:
            process.terminate()
            if process.stdout is not None:
                process.stdout.close()


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("plain")
    (folder / "instances.yaml").write_text("services: {}\n")
    with started(folder) as urls:
        yield Server(urls, folder / "instances.yaml", None, None)


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("secured")
    (folder / "instances.yaml").write_text("services: {}\n")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    (folder / "tokens").write_text(f"# who may ask\nanother-token\n{TOKEN}\n")
    (folder / "token").write_text(f"{TOKEN}\n")
    (folder / "config.yaml").write_text(
        "discovery: {tls_certificate_file: cert.pem, tls_key_file: key.pem, tokens_file: tokens}\n"
    )
    with started(folder, "--config", "config.yaml") as urls:
        yield Server(urls, folder / "instances.yaml", folder / "ca.pem", folder / "token", TOKEN)


@pytest.fixture(params=["trio", "asyncio"])
def on_loop(request: pytest.FixtureRequest) -> Callable[[Main], None]:
    """Runs an async function on each loop; on trio by a clock that jumps."""

    def run(main: Main) -> None:
        options = {"clock": virtual_clock()} if request.param == "trio" else {}
        anyio.run(main, backend=request.param, backend_options=options)

    return run
