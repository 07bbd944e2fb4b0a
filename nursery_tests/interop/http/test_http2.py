"""HTTP/2 and gRPC through the proxy, with other people's programs at both ends (C1 to C4, A2, F1, S1)."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from bench.machine import ROOT
from bench.peers import ENVOY, Instance, Job
from nursery_tests.interop.http.conftest import (
    HERE,
    PORT,
    Asgi,
    Nginx,
    Process,
    Proxy,
    listens,
    new_address,
    wait_until,
)
from nursery_tests.interop.http.greeter import DETAILS


class Greeter(Process):
    """grpcio as an instance."""

    def __init__(self, folder: Path, address: str, name: str) -> None:
        super().__init__([sys.executable, f"{HERE}/greeter.py", address, str(PORT), name], folder, f"greeter-{name}")
        self.address = address
        wait_until(lambda: listens(address), f"{name} listens\n{self.log}")


class NodeGreeter(Process):
    """@grpc/grpc-js as an instance."""

    def __init__(self, command: Sequence[str], modules: str, folder: Path, address: str, name: str) -> None:
        super().__init__([*command, "serve", address, str(PORT), name], folder, f"greeter-{name}", NODE_PATH=modules)
        self.address = address
        wait_until(lambda: listens(address), f"{name} listens\n{self.log}")


class Nghttpd(Process):
    """nghttp2's server: files of a folder."""

    def __init__(self, path: str, folder: Path, address: str, files: Path, name: str) -> None:
        super().__init__([path, "--no-tls", f"--address={address}", "-d", str(files), str(PORT)], folder, name)
        self.address = address
        wait_until(lambda: listens(address), f"{name} listens\n{self.log}")


@pytest.fixture(scope="module")
def greeters(folder: Path, running: ExitStack) -> Sequence[Greeter]:
    """The first one's place is nowhere at the proxy's node: each call finds the second (A2)."""
    made = Greeter(folder, new_address(), "far")
    running.callback(made.kill)
    return [made]


@pytest.fixture(scope="module")
def files(folder: Path) -> Path:
    place = folder / "files"
    place.mkdir()
    (place / "small").write_text("hello\n")
    (place / "large").write_bytes(bytes(range(256)) * 20_000)
    return place


@pytest.fixture(scope="module")
def nghttpd(folder: Path, running: ExitStack, program: Callable[[str], str], files: Path) -> Nghttpd:
    made = Nghttpd(program("nghttpd"), folder, new_address(), files, "nghttpd")
    running.callback(made.kill)
    return made


@pytest.fixture(scope="module")
def proxy(
    folder: Path, running: ExitStack, greeters: Sequence[Greeter], nghttpd: Nghttpd, asgi: Asgi, nginx: Nginx
) -> Proxy:
    services = {
        "greeter": [new_address(), greeters[0].address],
        "nghttpd": [nghttpd.address],
        "asgi": [asgi.address],
        "nginx": [nginx.address],
    }
    settings = "services: {nginx: {protocol: http1}, asgi: {protocol: http2}}"
    started = Proxy(folder, services, settings, fixed=["greeter", "nghttpd", "asgi", "nginx"], name="h2-proxy")
    running.callback(started.kill)
    return started


@contextmanager
def channel(port: int) -> Iterator[grpc.Channel]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as made:
        yield made


@pytest.fixture(scope="module")
def grpcio_behind(proxy: Proxy) -> int:
    return proxy.fixed["greeter"]


@pytest.fixture(scope="module")
def envoy(folder: Path, running: ExitStack) -> Callable[[str, str, int], int]:
    """Starts Envoy before something; gives Envoy's port."""
    if missing := ENVOY.missing(Job({}, http=True, http2=True)):
        pytest.skip(missing)

    def start(name: str, address: str, port: int) -> int:
        place = folder / name
        place.mkdir()
        job = Job({"greeter": [Instance(address, port)]}, http=True, http2=True)
        started = running.enter_context(ENVOY.start(place, job))
        return started.ports["greeter"]  # type: ignore[no-any-return]  # Peer.start is of any kind

    return start


@pytest.fixture(scope="module")
def envoy_in_front(envoy: Callable[[str, str, int], int], proxy: Proxy) -> int:
    """Client → Envoy → proxy → grpcio."""
    return envoy("envoy-front", "127.0.0.1", proxy.fixed["greeter"])


@pytest.fixture(scope="module")
def envoy_behind(
    envoy: Callable[[str, str, int], int], folder: Path, running: ExitStack, greeters: Sequence[Greeter]
) -> int:
    """Client → proxy → Envoy → grpcio."""
    port = envoy("envoy-behind", greeters[0].address, PORT)
    started = Proxy(folder, {"greeter": [new_address(), f"127.0.0.1:{port}"]}, fixed=["greeter"], name="before-envoy")
    running.callback(started.kill)
    return started.fixed["greeter"]


@pytest.fixture(scope="module")
def grpc_js(program: Callable[[str], str]) -> tuple[Sequence[str], str]:
    """How greeter.js is run: the command, and what NODE_PATH is."""
    modules = ROOT / ".venv" / "node" / "node_modules"
    if not (modules / "@grpc" / "grpc-js").is_dir():
        pytest.skip("needs @grpc/grpc-js, which make installs where there is npm")
    return [program("node"), f"{HERE}/greeter.js"], str(modules)


@pytest.fixture(scope="module")
def grpc_js_behind(folder: Path, running: ExitStack, grpc_js: tuple[Sequence[str], str]) -> int:
    """Client → proxy → @grpc/grpc-js."""
    command, modules = grpc_js
    instance = NodeGreeter(command, modules, folder, new_address(), "js")
    running.callback(instance.kill)
    started = Proxy(folder, {"greeter": [new_address(), instance.address]}, fixed=["greeter"], name="before-js")
    running.callback(started.kill)
    return started.fixed["greeter"]


@pytest.fixture(params=["grpcio_behind", "envoy_in_front", "envoy_behind", "grpc_js_behind"])
def greeter(request: pytest.FixtureRequest) -> Iterator[grpc.Channel]:
    """A client of grpcio's, of each greeter in turn."""
    with channel(request.getfixturevalue(request.param)) as made:
        yield made


LIMIT = 30.0

KILLING = int(os.environ.get("MESHLOCAL_TESTS_KILLING", "5"))
"""Seconds for which instances are killed and started again."""


# grpcio, both ends


def test_grpcio_calls_of_every_kind(greeter: grpc.Channel) -> None:
    reply, call = greeter.unary_unary("/test.Greeter/Echo").with_call(
        b"hi", timeout=LIMIT, metadata=[("x-there", "and back")]
    )
    assert reply == b"hi"
    assert dict(call.initial_metadata())["x-back"] == "and back"
    assert b"".join(greeter.unary_stream("/test.Greeter/Count")(b"5", timeout=LIMIT)) == b"01234"
    assert greeter.stream_unary("/test.Greeter/Total")(iter([b"ab", b"c"]), timeout=LIMIT) == b"3"
    assert list(greeter.stream_stream("/test.Greeter/Chat")(iter([b"a", b"b"]), timeout=LIMIT)) == [b"a!", b"b!"]


def test_grpcio_a_message_answers_a_message(greeter: grpc.Channel) -> None:
    """C4: none waits for the next."""
    said = threading.Semaphore(1)

    def say() -> Iterator[bytes]:
        for number in range(20):
            assert said.acquire(timeout=LIMIT)
            yield b"%d" % number

    for number, answer in enumerate(greeter.stream_stream("/test.Greeter/Chat")(say(), timeout=LIMIT)):
        assert answer == b"%d!" % number
        said.release()


def test_grpcio_large_messages_and_many_streams(greeter: grpc.Channel) -> None:
    echo = greeter.unary_unary("/test.Greeter/Echo")
    large = bytes(range(256)) * 16_384
    assert echo(large, timeout=LIMIT) == large
    many = [echo.future(b"%d" % number, timeout=LIMIT) for number in range(300)]
    assert [each.result() for each in many] == [b"%d" % number for number in range(300)]


def test_grpcio_status_details(greeter: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        greeter.unary_unary("/test.Greeter/Fail")(b"", timeout=LIMIT)
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert caught.value.details() == "höchst 100% ärgerlich\n"
    trailing = dict(caught.value.trailing_metadata())
    assert (trailing["grpc-status-details-bin"], trailing["why"]) == (DETAILS, "so")


def test_grpcio_deadline(greeter: grpc.Channel) -> None:
    """C3; and the instance hears of it."""
    with pytest.raises(grpc.RpcError) as caught:
        greeter.unary_unary("/test.Greeter/Wait")(b"", timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert greeter.unary_unary("/test.Greeter/Left")(b"", timeout=LIMIT) == b"yes"


def test_grpcio_cancellation(greeter: grpc.Channel) -> None:
    """C4, A8."""
    waits = greeter.unary_unary("/test.Greeter/Wait").future(b"to be cancelled", timeout=LIMIT)
    assert greeter.unary_unary("/test.Greeter/Echo")(b"x", timeout=LIMIT) == b"x"
    # One that is cancelled before its instance has begun it never came to it.
    began = greeter.unary_unary("/test.Greeter/Began")
    wait_until(lambda: began(b"to be cancelled", timeout=LIMIT) == b"yes", "the call is with its instance")
    waits.cancel()
    assert greeter.unary_unary("/test.Greeter/Left")(b"", timeout=LIMIT) == b"yes"


def test_grpcio_a_reader_that_stalls_holds_up_no_other(greeter: grpc.Channel) -> None:
    """C2."""
    stalls = greeter.unary_stream("/test.Greeter/Count")(b"2000000", timeout=LIMIT)
    assert next(stalls) == b"0"
    echo = greeter.unary_unary("/test.Greeter/Echo")
    for _ in range(50):
        assert echo(b"x", timeout=LIMIT) == b"x"
    stalls.cancel()


def test_a_service_that_nobody_knows_is_unimplemented(proxy: Proxy) -> None:
    with channel(proxy.port) as made, pytest.raises(grpc.RpcError) as caught:
        made.unary_unary("/test.Greeter/Echo")(b"", timeout=LIMIT, metadata=[])
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "meshlocal" in caught.value.details()


# Calls that leave the node and return


class Calls:
    """Calls, ten milliseconds apart, on one connection; who served them, and what failed."""

    def __init__(self, port: int) -> None:
        self.served: Counter[str] = Counter()
        self.failed: list[grpc.StatusCode] = []
        self.last = ""
        self._port = port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Calls:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(LIMIT)

    def _run(self) -> None:
        with channel(self._port) as made:
            name = made.unary_unary("/test.Greeter/Name")
            while not self._stop.wait(0.01):
                try:
                    self.last = name(b"", timeout=LIMIT).decode()
                    self.served[self.last] += 1
                except grpc.RpcError as error:
                    self.failed.append(error.code())

    def until(self, name: str, count: int = 20) -> None:
        """Wait until so many calls more were served by this instance."""
        enough = self.served[name] + count
        wait_until(lambda: self.served[name] >= enough, f"{name} serves: {self.served} {self.failed}")


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_calls_leave_a_node_and_return_on_one_connection(folder: Path, running: ExitStack, how: str) -> None:
    """F1: by SIGTERM none fails; by SIGKILL at most those that were under way, with UNAVAILABLE."""
    here, there = new_address(), new_address()
    local, far = Greeter(folder, here, f"local-{how}"), Greeter(folder, there, f"far-{how}")
    running.callback(far.kill)
    # A call that comes while grpcio stops it may answer with CANCELLED itself.
    settings = "services: {g: {attempts: {grpc_retry_on: [CANCELLED]}}}" if how == "SIGTERM" else ""
    made = Proxy(folder, {"g": [here, there]}, settings, fixed=["g"], name=f"leaving-{how}", access_log=False)
    running.callback(made.kill)
    with Calls(made.fixed["g"]) as calls:
        for _ in range(2):
            calls.until(f"local-{how}")
            if how == "SIGTERM":
                local.stop()
            else:
                local.kill()
            calls.until(f"far-{how}")
            local = Greeter(folder, here, f"local-{how}")
            running.callback(local.kill)
        calls.until(f"local-{how}")
    if how == "SIGTERM":
        assert calls.failed == []
    else:
        assert len(calls.failed) <= 2
        assert set(calls.failed) <= {grpc.StatusCode.UNAVAILABLE}
    assert made.measured("requests_total", reason="local_failed") >= 2


# nghttp2


def test_nghttp(proxy: Proxy, program: Callable[[str], str], files: Path) -> None:
    url = f"http://127.0.0.1:{proxy.fixed['nghttpd']}"
    got = subprocess.run([program("nghttp"), f"{url}/large"], check=True, capture_output=True, timeout=LIMIT).stdout
    assert got == (files / "large").read_bytes()


def test_h2load_while_two_of_three_instances_are_killed_and_started_again(
    folder: Path, running: ExitStack, program: Callable[[str], str], files: Path
) -> None:
    """A3: no GET fails. `make soak` does it for a minute."""
    addresses = [new_address() for _ in range(3)]
    path = program("nghttpd")
    numbers = itertools.count()

    def start(address: str) -> Nghttpd:
        made = Nghttpd(path, folder, address, files, f"killed-{next(numbers)}")
        running.callback(made.kill)
        return made

    servers = {address: start(address) for address in addresses}
    made = Proxy(folder, {"n": addresses}, fixed=["n"], name="killed-proxy", access_log=False)
    running.callback(made.kill)
    url = f"http://127.0.0.1:{made.fixed['n']}/small"
    load = subprocess.Popen(
        [program("h2load"), "-c", "4", "-m", "8", "-D", str(KILLING), url], stdout=subprocess.PIPE, text=True
    )
    for _, address in zip(range(KILLING - 2), itertools.cycle(addresses[:2]), strict=False):
        time.sleep(0.7)  # some load in between; what is asserted hangs on none of it
        servers[address].kill()
        time.sleep(0.3)
        servers[address] = start(address)
    told, _ = load.communicate(timeout=LIMIT + KILLING)
    found = re.search(r"requests: (\d+) total, \d+ started, (\d+) done, (\d+) succeeded, (\d+) failed", told)
    assert found is not None, told
    assert int(found[4]) == 0, told
    assert int(found[3]) == int(found[2]) > 100, told
    statuses = re.search(r"status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", told)
    assert statuses is not None
    assert [int(each) for each in statuses.groups()[1:]] == [0, 0, 0], told


# Other programs


@pytest.mark.parametrize("service", ["asgi", "nginx"])
def test_curl_in_http2(proxy: Proxy, program: Callable[[str], str], folder: Path, service: str) -> None:
    """Hypercorn is spoken to in HTTP/2, nginx in HTTP/1.1."""
    url = f"http://127.0.0.1:{proxy.fixed[service]}"
    curl = [program("curl"), "-sS", "--http2-prior-knowledge", "--max-time", "30", "-w", "%{http_version} %{http_code}"]
    path = "/hello" if service == "nginx" else "/some/path"
    told = subprocess.run([*curl, f"{url}{path}"], check=True, capture_output=True, text=True).stdout
    assert told.endswith("2 200")
    if service == "nginx":
        assert told.startswith("hello\n")
        return
    body = b"0123456789" * 100_000
    (folder / "h2-body").write_bytes(body)
    told = subprocess.run(
        [*curl, "-T", str(folder / "h2-body"), f"{url}/tell"], check=True, capture_output=True, text=True
    ).stdout
    answer = json.loads(told[: told.rindex("}") + 1])
    assert (answer["method"], answer["size"]) == ("PUT", len(body))
    assert answer["sha256"] == hashlib.sha256(body).hexdigest()


def test_nginx_in_front_passes_grpc_on(
    proxy: Proxy, folder: Path, running: ExitStack, program: Callable[[str], str]
) -> None:
    """nginx → proxy → grpcio."""
    address = new_address()
    server = (
        f"    listen {address}:8081 http2;\n    location / {{ grpc_pass grpc://127.0.0.1:{proxy.fixed['greeter']}; }}"
    )
    front = Nginx(program("nginx"), folder, address, server, "nginx-front")
    running.callback(front.kill)
    with grpc.insecure_channel(f"{address}:8081") as made:
        assert made.unary_unary("/test.Greeter/Echo")(b"hi", timeout=LIMIT) == b"hi"
        assert b"".join(made.unary_stream("/test.Greeter/Count")(b"5", timeout=LIMIT)) == b"01234"
        with pytest.raises(grpc.RpcError) as caught:
            made.unary_unary("/test.Greeter/Fail")(b"", timeout=LIMIT)
        assert caught.value.code() is grpc.StatusCode.ABORTED


def test_node(proxy: Proxy, program: Callable[[str], str], folder: Path) -> None:
    """Node's http2, as a client and as an instance."""
    script = folder / "peer.js"
    script.write_text(
        "const http2 = require('http2');\n"
        "const [, , url, count] = process.argv;\n"
        "const session = http2.connect(url);\n"
        "let left = Number(count), bad = 0;\n"
        "for (let i = 0; i < Number(count); i++) {\n"
        "  const stream = session.request({':path': '/small'});\n"
        "  let body = '', status = 0;\n"
        "  stream.on('response', (headers) => { status = headers[':status']; });\n"
        "  stream.setEncoding('utf8');\n"
        "  stream.on('data', (piece) => { body += piece; });\n"
        "  stream.on('end', () => { if (status !== 200 || body !== 'hello\\n') bad++;\n"
        "    if (--left === 0) { console.log('bad', bad); session.close(); } });\n"
        "  stream.end();\n"
        "}\n"
    )
    url = f"http://127.0.0.1:{proxy.fixed['nghttpd']}"
    told = subprocess.run(
        [program("node"), str(script), url, "200"], check=True, capture_output=True, text=True, timeout=LIMIT
    ).stdout
    assert told == "bad 0\n"


@pytest.mark.parametrize("way", ["grpcio_behind", "envoy_behind", "grpc_js_behind"])
def test_grpc_js(request: pytest.FixtureRequest, grpc_js: tuple[Sequence[str], str], way: str) -> None:
    """@grpc/grpc-js as a client: calls of each kind, status details, 4 MiB, a deadline, a cancellation, 300 streams."""
    command, modules = grpc_js
    port = request.getfixturevalue(way)
    done = subprocess.run(
        [*command, "call", "127.0.0.1", str(port)],
        env={"PATH": os.environ["PATH"], "NODE_PATH": modules},
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
        check=True,
    )
    told = json.loads(done.stdout)
    assert told["echo"]["messages"] == ["hi"]
    assert told["echo"]["head"]["x-back"] == "and back"
    assert told["count"]["messages"] == ["0", "1", "2", "3", "4"]
    assert told["total"]["messages"] == ["3"]
    assert told["chat"]["messages"] == ["a!", "b!"]
    assert (told["fail"]["code"], told["fail"]["details"]) == (10, "höchst 100% ärgerlich\n")
    assert bytes(told["fail"]["trailer"]["grpc-status-details-bin"]["data"]) == DETAILS
    assert told["large"] == [0, 4 << 20]
    assert (told["late"], told["leftLate"]) == (4, ["yes"])
    assert (told["cancelled"], told["leftCancelled"]) == (1, ["yes"])
    assert told["many"] == 300


def test_what_was_counted(proxy: Proxy) -> None:
    assert proxy.measured("grpc_calls_total", service="greeter", status="OK") > 300
    assert proxy.measured("grpc_calls_total", service="greeter", status="ABORTED") >= 1
    assert proxy.measured("requests_total", outcome="error") == 0
    assert "fault in the proxy" not in proxy.log
