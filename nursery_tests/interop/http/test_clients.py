"""Other people's clients: curl, httpx, a browser; with the proxy as the server, and as a proxy (A2, R1)."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from nursery_tests.interop.http.conftest import Asgi, Nginx, Proxy, new_address

BROWSER = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
)


@pytest.fixture(scope="module")
def proxy(folder: Path, running: ExitStack, asgi: Asgi, nginx: Nginx) -> Proxy:
    """The first instance of `asgi` is nowhere: every request finds the second (A2)."""
    services = {"asgi": [new_address(), asgi.address], "nginx": [nginx.address]}
    started = Proxy(folder, services, "http: {response_headers: true}", fixed=["asgi", "nginx"])
    running.callback(started.kill)
    return started


@pytest.fixture(scope="module")
def curl(program: Callable[[str], str], folder: Path) -> Callable[..., str]:
    path = program("curl")

    def run(*arguments: str, **env: str) -> str:
        command = [path, "--silent", "--show-error", "--max-time", "60", *arguments]
        return subprocess.run(
            command, cwd=folder, env={"PATH": "/usr/bin:/bin", **env}, check=True, capture_output=True, text=True
        ).stdout

    return run


HOST = ("-H", "host: asgi")


def test_curl_by_host(proxy: Proxy, curl: Callable[..., str]) -> None:
    told = json.loads(curl(*HOST, "-H", "x-mine: 1", f"{proxy.url}/some/path?x=1"))
    assert (told["method"], told["path"], told["query"]) == ("GET", "/some/path", "x=1")
    assert ["host", "asgi"] in told["headers"]
    assert ["x-mine", "1"] in told["headers"]


@pytest.mark.parametrize("options", [(), ("--http1.0",), ("-H", "expect: 100-continue"), ("-H", "expect:")])
@pytest.mark.parametrize("chunked", [False, True])
def test_curl_uploads(
    proxy: Proxy, curl: Callable[..., str], folder: Path, options: Sequence[str], chunked: bool
) -> None:
    """By length and in chunks, with and without asking first; longer than what is held."""
    if chunked and "--http1.0" in options:
        options = ()
    body = b"0123456789" * 100_000
    (folder / "body").write_bytes(body)
    source = ("-T", "-") if chunked else ("-T", "body")
    with (folder / "body").open("rb") as stdin:
        done = subprocess.run(
            ["curl", "-sS", "--max-time", "60", *HOST, *options, *source, f"{proxy.url}/tell"],
            cwd=folder,
            stdin=stdin,
            check=True,
            capture_output=True,
        )
    told = json.loads(done.stdout)
    assert (told["method"], told["size"]) == ("PUT", len(body))
    assert told["sha256"] == hashlib.sha256(body).hexdigest()


def test_curl_keeps_its_connection(proxy: Proxy, curl: Callable[..., str]) -> None:
    out = curl("-w", "%{num_connects} %{http_code}\n", "-o", "/dev/null", *HOST, f"{proxy.url}/[1-20]")
    assert out.split("\n")[:20] == ["1 200"] + ["0 200"] * 19


def test_curl_head_ranges_and_compression(proxy: Proxy, curl: Callable[..., str]) -> None:
    """nginx's own answers, as they are."""
    url = f"http://127.0.0.1:{proxy.fixed['nginx']}"
    head = curl("--head", f"{url}/text").lower()
    assert head.startswith("http/1.1 200 ok")
    size = int(re.search(r"content-length: (\d+)", head)[1])  # type: ignore[index]  # it is there, or the test fails
    assert len(curl(f"{url}/text")) == size
    assert curl("--range", "0-5", f"{url}/text") == "line 0"
    assert curl("--compressed", f"{url}/text") == curl(f"{url}/text")
    assert curl("-w", "%{http_code}", f"{url}/not-modified") == "304"
    assert curl("-w", "%{http_code}", "-o", "/dev/null", f"{url}/nothing") == "404"


def test_curl_with_http_proxy_in_its_environment(proxy: Proxy, curl: Callable[..., str]) -> None:
    """An application becomes node-first without a changed line."""
    told = json.loads(curl("http://asgi:8123/p?q", http_proxy=proxy.url))
    assert (told["path"], told["query"]) == ("/p", "q")
    assert ["host", "asgi:8123"] in told["headers"]
    assert not any(name.startswith("proxy-") for name, _ in told["headers"])
    code = curl(
        "-o", "/dev/null", "-w", "%{http_code} %header{x-meshlocal-error}", "http://10.1.2.3/", http_proxy=proxy.url
    )
    assert code.startswith("503")


def test_curl_through_connect(proxy: Proxy, curl: Callable[..., str]) -> None:
    """To a service that is known; to anything else it is refused."""
    told = json.loads(curl("--proxytunnel", "--proxy", proxy.url, "http://asgi:80/p"))
    assert told["path"] == "/p"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        curl("--proxytunnel", "--proxy", proxy.url, f"http://127.0.0.1:{proxy.admin}/")
    assert "403" in caught.value.stderr


@pytest.fixture(params=["server", "proxy"])
def client(request: pytest.FixtureRequest, proxy: Proxy) -> Iterator[httpx.Client]:
    if request.param == "server":
        made = httpx.Client(base_url=f"http://127.0.0.1:{proxy.fixed['asgi']}", timeout=60, trust_env=False)
    else:
        made = httpx.Client(base_url="http://asgi", proxy=proxy.url, timeout=60, trust_env=False)
    with made:
        yield made


def test_httpx(client: httpx.Client) -> None:
    for number in range(20):
        answer = client.get("/x", params={"n": number})
        assert answer.json()["query"] == f"n={number}"
        assert answer.headers["x-meshlocal-tier"] == "other"
        assert answer.headers["x-meshlocal-reason"] in ("local_failed", "local_ejected")


def test_httpx_streams(client: httpx.Client) -> None:
    """Up in chunks, down in chunks."""
    pieces = [bytes([number]) * 10_000 for number in range(100)]
    told = client.post("/tell", content=iter(pieces)).json()
    assert told["sha256"] == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert ["transfer-encoding", "chunked"] in told["headers"]
    with client.stream("GET", "/large?3000000") as answer:
        assert answer.headers["transfer-encoding"] == "chunked"
        assert sum(map(len, answer.iter_raw())) == 3_000_000


def test_httpx_server_sent_events(client: httpx.Client) -> None:
    """Each one comes when it was sent, not when the response ends."""
    with client.stream("GET", "/events") as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        assert [line for line in answer.iter_lines() if line.startswith("id")] == ["id: 1", "id: 2", "id: 3"]


@pytest.mark.parametrize("mode", ["server", "proxy"])
def test_a_browser(proxy: Proxy, program: Callable[[str], str], tmp_path: Path, mode: str) -> None:
    """A page with a WebSocket, server-sent events with their reconnection, uploads and many requests at once.

    With the proxy as its proxy, a browser asks for WebSockets with CONNECT.
    """
    if mode == "server":
        flags, url = ("--no-proxy-server",), f"http://127.0.0.1:{proxy.fixed['asgi']}/?{mode}"
    else:
        flags, url = (f"--proxy-server={proxy.url}",), f"http://asgi/?{mode}"
    command = [program("chromium"), *BROWSER, *flags, f"--user-data-dir={tmp_path}", "--dump-dom", url]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=env)
    told = re.findall(r"<li>(.*?)</li>", done.stdout)
    assert "all done" in told, f"{done.stdout}\n{done.stderr[-2000:]}\n{proxy.log[-2000:]}"
    assert {"socket said hello", "socket said 200000 letters", "socket closed 1000 true"} <= set(told)
    assert [line for line in told if line.startswith("event")] == [f"event {n} number {n}" for n in range(1, 7)]
    assert "posted 300000" in told
    assert f"fetched {' '.join(map(str, range(20)))}" in told
