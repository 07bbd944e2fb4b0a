"""Other people's servers as instances: nginx, Python's http.server, hypercorn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from nursery_tests.interop.http.conftest import (
    PORT,
    Asgi,
    Nginx,
    Process,
    Proxy,
    listens,
    new_address,
    wait_until,
)


class Plain(Process):
    """Python's http.server: HTTP/1.0, a connection a request; or HTTP/1.1."""

    def __init__(self, folder: Path, protocol: str) -> None:
        self.address = new_address()
        place = folder / protocol[-3:]
        place.mkdir()
        (place / "text").write_text("hello\n" * 10_000)
        command = ["-m", "http.server", "--bind", self.address, "--protocol", protocol, str(PORT)]
        super().__init__([sys.executable, *command], place, "http.server")
        wait_until(lambda: listens(self.address), "http.server listens")


@pytest.fixture(scope="module")
def proxy(folder: Path, running: ExitStack, asgi: Asgi, nginx: Nginx) -> Proxy:
    services = {"asgi": [asgi.address], "nginx": [nginx.address]}
    for protocol in ("HTTP/1.0", "HTTP/1.1"):
        plain = Plain(folder, protocol)
        running.callback(plain.kill)
        services[f"plain{protocol[-1]}"] = [plain.address]
    started = Proxy(folder, services)
    running.callback(started.kill)
    return started


@pytest.mark.parametrize("service", ["plain0", "plain1", "nginx"])
def test_files(proxy: Proxy, service: str) -> None:
    """Whether the server keeps connections or not, the client's is kept."""
    before = proxy.measured("http_pool_connections_made_total", service=service)
    with httpx.Client(base_url=proxy.url, headers={"host": service}, trust_env=False, timeout=60) as client:
        whole = client.get("/text")
        assert whole.status_code == 200
        assert len(whole.content) > 30_000
        for _ in range(10):
            assert client.get("/text").content == whole.content
            assert client.head("/text").headers["content-type"] == whole.headers["content-type"]
            assert client.get("/nothing").status_code == 404
            later = {"if-modified-since": "Fri, 01 Jan 2100 00:00:00 GMT"}
            if service != "nginx":
                assert client.get("/text", headers=later).status_code == 304
            assert client.post("/text", content=b"x" * 100).status_code in (405, 501)
    made = proxy.measured("http_pool_connections_made_total", service=service) - before
    if service == "nginx":
        assert made == 1
    elif service == "plain0":
        assert made >= 41
    assert "fault in the proxy" not in proxy.log


def test_nginx_refuses_an_upload(proxy: Proxy) -> None:
    """It answers, and closes while the client still sends: the client gets the answer."""
    with httpx.Client(base_url=proxy.url, headers={"host": "nginx"}, trust_env=False, timeout=60) as client:
        for _ in range(5):
            assert client.put("/text", content=b"x" * 5_000_000).status_code == 413
            assert client.get("/hello").text == "hello\n"


def test_nginx_compresses_in_chunks(proxy: Proxy) -> None:
    with httpx.Client(base_url=proxy.url, headers={"host": "nginx"}, trust_env=False, timeout=60) as client:
        answer = client.get("/text")
        assert answer.headers["content-encoding"] == "gzip"
        assert answer.headers["transfer-encoding"] == "chunked"
        assert answer.text.endswith("line 4999\n")


def test_nginx_ends_connections_after_so_many_requests(
    folder: Path, running: ExitStack, program: Callable[[str], str], proxy: Proxy
) -> None:
    """A4: no request notices, not even one that may not be repeated."""
    server = '    keepalive_requests 3;\n    location / { return 200 "x"; }'
    # `keepalive_requests` stands once in the block above and once here: the server's own counts.
    nginx = Nginx(program("nginx"), folder, new_address(), server, name="ends")
    running.callback(nginx.kill)
    services = {"ends": [nginx.address]}
    started = Proxy(folder, services, name="ends-proxy")
    running.callback(started.kill)
    with httpx.Client(base_url=started.url, headers={"host": "ends"}, trust_env=False, timeout=60) as client:
        for _ in range(50):
            assert client.post("/", content=b"x").status_code == 200
            assert client.get("/").status_code == 200
    assert started.measured("http_pool_connections_made_total") == 34
    assert started.stop() == 0


def test_slow_answers(proxy: Proxy) -> None:
    """Beyond what is looked at without a clock (A1)."""
    with httpx.Client(base_url=proxy.url, headers={"host": "asgi"}, trust_env=False, timeout=60) as client:
        for _ in range(3):
            assert client.get("/slow?0.1").text == "at last"
