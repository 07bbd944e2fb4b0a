"""gRPC from an application, on each loop: calls of all kinds, tried by the proxy's rules (A2, A3, C1, C3)."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import grpc
import pytest
import trio

import meshlocal
from meshlocal import AttemptPolicy, CallError, Reason, StatusCode
from meshlocal.library.grpc_channel import GrpcChannel
from meshlocal.net.grpc.server import GrpcServer, ServerCall
from meshlocal.testing import FakeSource
from meshlocal.wire.grpc.status import GrpcError

Main = Callable[[], Awaitable[None]]
LIMIT = 30.0

PROTO = """
syntax = "proto3";
package greet;
message Request { string name = 1; int32 count = 2; }
message Reply { string text = 1; }
service Greeter {
  rpc SayHello (Request) returns (Reply);
  rpc Count (Request) returns (stream Reply);
  rpc Gather (stream Request) returns (Reply);
  rpc Chat (stream Request) returns (stream Reply);
}
"""


@pytest.fixture(scope="module")
def greet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Messages and stubs, as grpcio's compiler makes them."""
    folder = tmp_path_factory.mktemp("greet")
    (folder / "greet.proto").write_text(PROTO)
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", f"--python_out={folder}"]
    subprocess.run([*command, f"--grpc_python_out={folder}", str(folder / "greet.proto")], check=True, timeout=60)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("greet_pb2"), importlib.import_module("greet_pb2_grpc")
    finally:
        sys.path.remove(str(folder))


class Served:
    """A grpcio server in threads: an instance.

    Attributes:
        name: in its replies.
        fails: the status that each call gets; None: none.
        metadata: of the last call.
        remaining: seconds that the last call had.
    """

    def __init__(self, greet: tuple[Any, Any], name: str) -> None:
        self.pb = greet[0]
        self.name = name
        self.fails: grpc.StatusCode | None = None
        self.metadata: dict[str, str | bytes] = {}
        self.remaining: float | None = None
        self.cancelled = threading.Event()
        self.calls = 0
        self._server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        greet[1].add_GreeterServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    @property
    def instance(self) -> meshlocal.Instance:
        return meshlocal.make_instance("127.0.0.1", self.port, labels={"node": self.name})

    def _begin(self, context: grpc.ServicerContext) -> None:
        self.calls += 1
        self.metadata = dict(context.invocation_metadata())
        self.remaining = context.time_remaining()
        if self.fails is not None:
            context.set_trailing_metadata((("why", "so"),))
            context.abort(self.fails, "as asked")

    def SayHello(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - the stub's name
        self._begin(context)
        if request.name == "wait":
            context.add_callback(self.cancelled.set)
            self.cancelled.wait(LIMIT)
        return self.pb.Reply(text=f"{request.name} from {self.name}")

    def Count(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        self._begin(context)
        context.send_initial_metadata([("x-kind", "count")])
        for number in range(request.count):
            yield self.pb.Reply(text=str(number))
        if request.name == "fail":
            context.abort(grpc.StatusCode.ABORTED, "half-way")

    def Gather(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:  # noqa: N802
        self._begin(context)
        return self.pb.Reply(text=",".join(each.name for each in requests))

    def Chat(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        self._begin(context)
        for request in requests:
            yield self.pb.Reply(text=f"{request.name}!")


@pytest.fixture
def pair(greet: tuple[Any, Any]) -> Iterator[tuple[Served, Served]]:
    """Instances on this node and on another."""
    made = Served(greet, "n1"), Served(greet, "n2")
    yield made
    for each in made:
        each.stop()


@pytest.fixture(params=["trio", "asyncio"])
def on_loop(request: pytest.FixtureRequest) -> Callable[[Main], None]:
    def run(main: Main) -> None:
        async def limited() -> None:
            with anyio.fail_after(LIMIT):
                await main()

        anyio.run(limited, backend=request.param)

    return run


def source(*served: Served) -> FakeSource:
    made = FakeSource()
    made.set("b", *(each.instance for each in served))
    return made


def test_calls_of_every_kind(on_loop: Any, greet: tuple[Any, Any], pair: tuple[Served, Served]) -> None:
    """By stubs that grpcio's compiler made."""
    pb, stubs = greet
    near, far = pair

    async def main() -> None:
        async with meshlocal.open_mesh(source(near, far), node_name="n1") as mesh:
            stub = stubs.GreeterStub(mesh.grpc_channel("b"))
            reply = await stub.SayHello(pb.Request(name="hi"), metadata=[("x-mine", "1"), ("x-bin", b"\0")])
            assert reply.text == "hi from n1"
            assert near.metadata["x-mine"] == "1"
            assert near.metadata["x-bin"] == b"\0"
            async with stub.Count(pb.Request(count=3)) as call:
                assert [each.text async for each in call] == ["0", "1", "2"]
                assert call.initial_metadata == (("x-kind", "count"),)
                assert (call.tier, call.reason, call.attempts) == ("node", None, 1)
                assert call.instance == near.instance
            assert (await stub.Gather([pb.Request(name="a"), pb.Request(name="b")])).text == "a,b"

            async def requests() -> Any:
                yield pb.Request(name="c")

            assert (await stub.Gather(requests())).text == "c"
            async with stub.Chat() as chat:
                for name in ("x", "y"):
                    await chat.send(pb.Request(name=name))
                    assert (await chat.receive()).text == f"{name}!"
                await chat.end()
                assert await chat.receive() is None
            statistics = mesh.statistics().services["b"]
            assert sum(statistics.requests.values()) == 5
            assert {key.outcome for key in statistics.requests} == {meshlocal.Outcome.SERVED}
        assert far.calls == 0

    on_loop(main)


def test_an_instance_that_cannot_be_connected_is_passed_over(
    on_loop: Any, greet: tuple[Any, Any], pair: tuple[Served, Served]
) -> None:
    """A2, R1."""
    pb, stubs = greet
    near, far = pair
    near.stop()

    async def main() -> None:
        async with meshlocal.open_mesh(source(near, far), node_name="n1") as mesh:
            stub = stubs.GreeterStub(mesh.grpc_channel("b"))
            assert (await stub.SayHello(pb.Request(name="hi"))).text == "hi from n2"
            async with stub.Count(pb.Request(count=1)) as call:
                assert [each.text async for each in call] == ["0"]
                assert (call.tier, call.reason, call.attempts) == ("other", Reason.LOCAL_FAILED, 2)

    on_loop(main)


def test_a_status_is_raised_with_what_came_with_it(
    on_loop: Any, greet: tuple[Any, Any], pair: tuple[Served, Served]
) -> None:
    pb, stubs = greet
    near, far = pair
    near.fails = grpc.StatusCode.NOT_FOUND

    async def main() -> None:
        async with meshlocal.open_mesh(source(near, far), node_name="n1") as mesh:
            stub = stubs.GreeterStub(mesh.grpc_channel("b"))
            with pytest.raises(CallError, match="b: NOT_FOUND: as asked") as caught:
                await stub.SayHello(pb.Request(name="hi"))
            error = caught.value
            assert (error.code, error.details, error.service) == (StatusCode.NOT_FOUND, "as asked", "b")
            assert dict(error.trailing)["why"] == "so"
            assert error.instance == near.instance
            assert [each.error for each in error.attempts] == ["NOT_FOUND"]
            near.fails = None
            replies: list[str] = []

            async def read() -> None:
                async with stub.Count(pb.Request(name="fail", count=2)) as call:
                    async for each in call:
                        replies.append(each.text)  # noqa: PERF401 - what came before the failure counts

            with pytest.raises(CallError, match="half-way") as caught:
                await read()
            assert replies == ["0", "1"]
            assert caught.value.code is StatusCode.ABORTED
        assert far.calls == 0

    on_loop(main)


def test_a_status_of_grpc_retry_on_goes_to_the_next_instance(
    on_loop: Any, greet: tuple[Any, Any], pair: tuple[Served, Served]
) -> None:
    """C3."""
    pb, stubs = greet
    near, far = pair
    near.fails = grpc.StatusCode.UNAVAILABLE
    policy = AttemptPolicy(grpc_retry_on=("UNAVAILABLE",))

    async def main() -> None:
        async with meshlocal.open_mesh(source(near, far), node_name="n1", attempts=policy) as mesh:
            stub = stubs.GreeterStub(mesh.grpc_channel("b"))
            assert (await stub.SayHello(pb.Request(name="hi"))).text == "hi from n2"
            assert (await stub.Gather([pb.Request(name="a"), pb.Request(name="b")])).text == "a,b"
            async with stub.Count(pb.Request(count=1)) as call:
                assert [each.text async for each in call] == ["0"]
            far.fails = grpc.StatusCode.UNAVAILABLE
            with pytest.raises(CallError) as caught:
                await stub.SayHello(pb.Request(name="hi"))
            assert [each.error for each in caught.value.attempts] == ["UNAVAILABLE", "UNAVAILABLE"]

    on_loop(main)


def test_the_deadline_of_the_cancel_scope_goes_along(
    on_loop: Any, greet: tuple[Any, Any], pair: tuple[Served, Served]
) -> None:
    pb, stubs = greet
    near, far = pair

    async def main() -> None:
        async with meshlocal.open_mesh(source(near, far), node_name="n1") as mesh:
            stub = stubs.GreeterStub(mesh.grpc_channel("b"))
            with anyio.fail_after(25):
                await stub.SayHello(pb.Request(name="hi"))
            assert near.remaining is not None
            assert 15 < near.remaining <= 25
            with anyio.move_on_after(0.2) as scope:
                await stub.SayHello(pb.Request(name="wait"))
            assert scope.cancelled_caught
            assert await anyio.to_thread.run_sync(near.cancelled.wait, LIMIT)
            assert sum(mesh.statistics().services["b"].requests.values()) == 2

    on_loop(main)


def test_no_instance(on_loop: Any, greet: tuple[Any, Any]) -> None:
    pb, stubs = greet

    async def main() -> None:
        async with meshlocal.open_mesh(source(), node_name="n1") as mesh:
            with pytest.raises(CallError, match="b: UNAVAILABLE") as caught:
                await stubs.GreeterStub(mesh.grpc_channel("b")).SayHello(pb.Request())
            assert caught.value.attempts == ()
            with pytest.raises(ValueError, match="service"):
                mesh.grpc_channel("")

    on_loop(main)


def test_all_that_was_tried_is_told(on_loop: Any, greet: tuple[Any, Any], pair: tuple[Served, Served]) -> None:
    pb, stubs = greet
    for each in pair:
        each.stop()

    async def main() -> None:
        async with meshlocal.open_mesh(source(*pair), node_name="n1") as mesh:
            with pytest.raises(CallError) as caught:
                await stubs.GreeterStub(mesh.grpc_channel("b")).SayHello(pb.Request())
            assert caught.value.code is StatusCode.UNAVAILABLE
            assert [each.instance for each in caught.value.attempts] == [each.instance for each in pair]

    on_loop(main)


# Refused calls, by a server of our own that says so on cue


def test_a_call_that_was_not_processed_goes_to_the_next_instance_whatever_was_sent() -> None:
    """C1: all that was sent of it is held, and sent again."""
    from google.protobuf.wrappers_pb2 import BytesValue

    from meshlocal.wire.grpc.method import Method

    method = Method("/test.Echo/Stream", BytesValue, BytesValue, client_streaming=True, server_streaming=True)
    got: list[bytes] = []

    async def echo(call: ServerCall[BytesValue, BytesValue]) -> None:
        async for request in call:
            got.append(request.value)
            await call.send(request)

    async def refuse(call: ServerCall[BytesValue, BytesValue]) -> None:
        await call.receive()
        call._stream.close(7)
        raise GrpcError(StatusCode.CANCELLED)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            places = []
            for handler in (refuse, echo):
                listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
                server = GrpcServer({method: handler})

                async def serve(stream: trio.SocketStream, server: GrpcServer = server) -> None:
                    await server.serve_stream(stream)

                nursery.start_soon(trio.serve_listeners, serve, listeners)
                places.append(listeners[0].socket.getsockname()[1])
            made = FakeSource()
            instances = [
                meshlocal.make_instance("127.0.0.1", port, labels={"node": f"n{number}"})
                for number, port in enumerate(places, start=1)
            ]
            made.set("b", *instances)
            async with meshlocal.open_mesh(made, node_name="n1") as mesh:
                channel: GrpcChannel = mesh.grpc_channel("b")
                chat = channel.stream_stream("/test.Echo/Stream", BytesValue.SerializeToString, BytesValue.FromString)
                async with chat() as call:
                    await call.send(BytesValue(value=b"one"))
                    assert (await call.receive()) == BytesValue(value=b"one")
                    assert (call.attempts, call.reason) == (2, Reason.LOCAL_FAILED)
                    await call.send(BytesValue(value=b"two"), end=True)
                    assert (await call.receive()) == BytesValue(value=b"two")
                    assert await call.receive() is None
            nursery.cancel_scope.cancel()
        assert got == [b"one", b"two"]

    with_limit(main)


def with_limit(main: Main) -> None:
    async def limited() -> None:
        with trio.fail_after(LIMIT):
            await main()

    trio.run(limited)


@pytest.mark.parametrize("kind", ["before the head", "in a message"])
def test_a_call_that_may_have_run_is_not_sent_twice(kind: str, greet: tuple[Any, Any]) -> None:
    """A3: gRPC's POST does not say that it may be."""
    pb, stubs = greet
    connections = 0

    async def main() -> None:
        nonlocal connections
        async with trio.open_nursery() as nursery:

            async def break_off(stream: trio.SocketStream) -> None:
                nonlocal connections
                connections += 1
                from nursery_tests.h2_peer import H2Peer

                peer = H2Peer(client=False, max_streams=10, max_header_list_size=16_384)
                seen: list[Any] = []
                while not any(type(each).__name__ == "StreamEnded" for each in seen):
                    await stream.send_all(bytes(peer.outgoing))
                    peer.outgoing.clear()
                    seen += peer.receive(bytes(await stream.receive_some(65_536)))
                if kind == "in a message":
                    peer.send_headers(1, [(b":status", b"200"), (b"content-type", b"application/grpc")])
                    peer.send_data(1, b"\0\0\0")
                    await stream.send_all(bytes(peer.outgoing))
                await stream.aclose()

            ports = []
            for _ in range(2):
                listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
                nursery.start_soon(trio.serve_listeners, break_off, listeners)
                ports.append(listeners[0].socket.getsockname()[1])
            made = FakeSource()
            made.set("b", *(meshlocal.make_instance("127.0.0.1", port) for port in ports))
            async with meshlocal.open_mesh(made, node_name="n1") as mesh:
                with pytest.raises(CallError) as caught:
                    await stubs.GreeterStub(mesh.grpc_channel("b")).SayHello(pb.Request(name="x"))
                assert caught.value.code is StatusCode.UNAVAILABLE
                assert len(caught.value.attempts) == 1
            nursery.cancel_scope.cancel()
        assert connections == 1

    with_limit(main)


def test_an_instance_that_leaves_gets_no_new_call_and_finishes_its_own(
    on_loop: Any, greet: tuple[Any, Any], pair: tuple[Served, Served]
) -> None:
    """H2."""
    pb, stubs = greet
    near, far = pair

    async def main() -> None:
        fake = source(near, far)
        async with meshlocal.open_mesh(fake, node_name="n1") as mesh:
            stub = stubs.GreeterStub(mesh.grpc_channel("b"))
            async with stub.Chat() as chat:
                await chat.send(pb.Request(name="x"))
                assert (await chat.receive()).text == "x!"
                fake.set("b", far.instance)
                while (await stub.SayHello(pb.Request(name="hi"))).text != "hi from n2":
                    pass
                await chat.send(pb.Request(name="y"), end=True)
                assert (await chat.receive()).text == "y!"
                assert await chat.receive() is None

    on_loop(main)


async def test_cancelled_at_each_await_leaves_nothing(greet: tuple[Any, Any], pair: tuple[Served, Served]) -> None:
    """A8."""
    pb, stubs = greet
    async with meshlocal.open_mesh(source(*pair), node_name="n1") as mesh:
        stub = stubs.GreeterStub(mesh.grpc_channel("b"))
        state = None
        for steps in range(60):
            with trio.CancelScope() as scope:

                async def cancel(scope: trio.CancelScope = scope, steps: int = steps) -> None:
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancel)
                    await stub.SayHello(pb.Request(name="hi"))
                    nursery.cancel_scope.cancel()
            state = mesh.core.services.get(mesh.core.key("b"))
            assert state is None or state.in_use == 0
        assert (await stub.SayHello(pb.Request(name="hi"))).text == "hi from n1"
        assert state is not None
        assert state.in_use == 0
