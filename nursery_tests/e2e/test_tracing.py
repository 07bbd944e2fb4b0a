"""Traces of a real proxy, at a collector that reads them with OpenTelemetry's own messages (rule R3)."""

from __future__ import annotations

import re
import signal
from typing import Any

import pytest
import trio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as theirs

from nursery_tests.e2e.running import LIMIT, Place, Processes

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes exports over HTTP, and answers 200.

    Attributes:
        port: where it listens.
        heads: of the exports.
        spans: all that came, with the attributes of who made them.
    """

    def __init__(self) -> None:
        self.port = 0
        self.heads: list[str] = []
        self.spans: list[tuple[dict[str, Any], Any]] = []
        self._news = trio.Event()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._take, listeners)

    async def _take(self, stream: trio.SocketStream) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            received += await stream.receive_some(65536)
        head, _, body = received.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
        while len(body) < int(fields["Content-Length"]):
            body += await stream.receive_some(65536)
        self.heads.append(head.decode())
        for of_resource in theirs.ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = attributes(of_resource.resource)
            self.spans += [(resource, span) for scope in of_resource.scope_spans for span in scope.spans]
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        self._news.set()
        self._news = trio.Event()

    async def until(self, count: int) -> list[Any]:
        """The spans, once there are so many."""
        with trio.move_on_after(LIMIT):
            while len(self.spans) < count:
                await self._news.wait()
        assert len(self.spans) >= count
        return [span for _, span in self.spans]


def attributes(message: Any) -> dict[str, Any]:
    return {each.key: each.value.string_value or each.value.int_value for each in message.attributes}


@pytest.fixture
async def collector(nursery: trio.Nursery) -> Collector:
    made = Collector()
    await nursery.start(made.serve)
    return made


async def ask(port: int, *lines: str) -> str:
    """One request to `b`, on a connection of its own; the whole answer."""
    with trio.fail_after(LIMIT):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            head = "\r\n".join(("GET /x HTTP/1.1", "host: b", "connection: close", *lines, "", ""))
            await stream.send_all(head.encode())
            return b"".join([bytes(part) async for part in stream]).decode()


async def instance(nursery: trio.Nursery, heads: list[str]) -> int:
    """One that says 200 and notes what it is asked; its port."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            heads.append((await stream.receive_some(65536)).decode())
            await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    await nursery.start(trio.serve_listeners, serve, listeners)
    port: int = listeners[0].socket.getsockname()[1]
    return port


async def test_a_trace_from_client_to_instance(
    processes: Processes, here: Place, nursery: trio.Nursery, collector: Collector
) -> None:
    """On with a configuration that is read again, and off with another; what waits goes out before the proxy ends."""
    heads: list[str] = []
    port = await instance(nursery, heads)
    (closed,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    refusing = closed.socket.getsockname()[1]
    await closed.aclose()
    near, far = (
        f"{{address: 127.0.0.1, port: {number}, labels: {{node: {node}}}}}"
        for number, node in ((refusing, "n1"), (port, "n2"))
    )
    processes.write("instances.yaml", f"services: {{b: [{near}, {far}]}}\n")

    def configure(tracing: str) -> None:
        processes.write(
            "proxy.yaml",
            "proxy: {node_name: n1, listen: ['http://127.0.0.1:0=b'], admin: '127.0.0.1:0', access_log: true,"
            f" discovery: {{urls: ['file:instances.yaml']}}{tracing}}}\n",
        )

    configure("")
    proxy = await processes.meshlocal("proxy", "--config", "proxy.yaml")
    ready = await proxy.printed(r"ready: .*http://127\.0\.0\.1:(\d+)=b admin=http://127\.0\.0\.1:(\d+)", "out")
    listener, admin = int(ready[1]), int(ready[2])
    parent = f"traceparent: 00-{TRACE}-{SPAN}-01"
    await ask(listener, parent)
    assert parent in heads[-1]
    assert (await here.metrics(admin))("trace_spans_total") == 0
    configure(f", tracing: {{endpoint: 'http://127.0.0.1:{collector.port}', service_name: edge}}")
    proxy.signal(signal.SIGHUP)
    await proxy.printed("config applied")
    await ask(listener, parent, "x-request-id: r7")
    asked, failed, served = await collector.until(3)  # all of it, in one export
    assert asked.trace_id.hex() == TRACE
    assert asked.parent_span_id.hex() == SPAN
    assert failed.parent_span_id == served.parent_span_id == asked.span_id
    assert f"traceparent: 00-{TRACE}-{served.span_id.hex()}-01" in heads[-1]
    assert asked.start_time_unix_nano <= failed.start_time_unix_nano <= served.start_time_unix_nano
    assert served.end_time_unix_nano <= asked.end_time_unix_nano
    assert attributes(failed)["error.type"] == "refused"
    assert attributes(asked)["meshlocal.reason"] == attributes(served)["meshlocal.reason"] == "local_failed"
    resource = collector.spans[0][0]
    assert resource["service.name"] == "edge"
    assert resource["meshlocal.node"] == "n1"
    assert collector.heads[0].startswith("POST /v1/traces HTTP/1.1\r\n")
    await proxy.printed(rf'"request_id":"r7","trace_id":"{TRACE}"')
    await here.measured(admin, lambda found: found("trace_spans_total", outcome="exported") == 3)
    configure("")
    proxy.signal(signal.SIGHUP)
    await proxy.printed("config applied", start=len(proxy.err))
    await ask(listener, parent)
    assert parent in heads[-1]
    configure(f", tracing: {{endpoint: 'http://127.0.0.1:{collector.port}'}}")
    proxy.signal(signal.SIGHUP)
    await proxy.printed("config applied", start=len(proxy.err))
    await ask(listener, parent)
    proxy.signal(signal.SIGTERM)
    assert await proxy.exited() == 0
    # By now the first instance may be ejected, and not tried.
    *_, last = await collector.until(5)
    assert attributes(last)["http.response.status_code"] == 200


async def test_a_file_that_is_missing_is_said(processes: Processes) -> None:
    tracing = "tracing: {endpoint: 'https://127.0.0.1:4318', ca_file: nowhere.pem}"
    processes.write(
        "proxy.yaml", f"proxy: {{listen: ['http://127.0.0.1:0=b'], discovery: {{urls: ['file:i']}}, {tracing}}}\n"
    )
    for command in ("proxy", "check"):
        arguments = ["proxy", "--config", "proxy.yaml"] if command == "proxy" else ["check", "proxy.yaml"]
        program = await processes.meshlocal(*arguments)
        assert await program.exited() != 0
        assert "nowhere.pem: No such file or directory" in program.out + program.err


async def test_workers_export_for_themselves(
    processes: Processes, here: Place, nursery: trio.Nursery, collector: Collector
) -> None:
    """Each says which it is; the metrics add up."""
    heads: list[str] = []
    port = await instance(nursery, heads)
    processes.write("instances.yaml", f"services: {{b: [{{address: 127.0.0.1, port: {port}}}]}}\n")
    processes.write(
        "proxy.yaml",
        "proxy: {node_name: n1, workers: 2, listen: ['http://127.0.0.1:0=b'], admin: '127.0.0.1:0',"
        " discovery: {urls: ['file:instances.yaml']},"
        f" tracing: {{endpoint: 'http://127.0.0.1:{collector.port}', sample_percent: 100}}}}\n",
    )
    proxy = await processes.meshlocal("proxy", "--config", "proxy.yaml")
    ready = await proxy.printed(r"ready: .*http://127\.0\.0\.1:(\d+)=b .*admin=http://127\.0\.0\.1:(\d+)", "out")
    for _ in range(20):
        await ask(int(ready[1]))
    assert len(await collector.until(40)) == 40
    made_by = [resource["service.instance.id"] for resource, _ in collector.spans]
    assert all(re.fullmatch(r".*, worker [12] of 2, process \d+", each) for each in made_by)
    # One export each: what a worker makes has one name.
    assert len(set(made_by)) <= 2
    await here.measured(int(ready[2]), lambda found: found("trace_spans_total", outcome="exported") == 40)
