"""gRPC over TLS: our server with our client and with grpcio's, and certificates that do not match."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from pathlib import Path

import grpc
import pytest
import trio
from google.protobuf.wrappers_pb2 import StringValue

from meshlocal.net.grpc.client import open_channel
from meshlocal.net.grpc.server import GrpcServer, ServerCall, unary
from meshlocal.net.listen import open_tcp_listeners
from meshlocal.wire.grpc.method import Method
from meshlocal.wire.grpc.status import GrpcError, StatusCode

ECHO = Method("/test.Echo/Echo", StringValue, StringValue)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1,DNS:mesh.test"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command = [openssl, "req", *kind, *subject, "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


@pytest.fixture
async def port(certificate: tuple[Path, Path], nursery: trio.Nursery) -> int:
    async def echo(request: StringValue, call: ServerCall[StringValue, StringValue]) -> StringValue:
        return StringValue(value=request.value + call.peer.split(":")[0])

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    context.set_alpn_protocols(["h2"])
    listeners = open_tcp_listeners("127.0.0.1", 0)
    port: int = listeners[0].getsockname()[1]

    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        await GrpcServer({ECHO: unary(echo)}).serve(listeners, tls=lambda: context, task_status=task_status)

    await nursery.start(serve)
    return port


async def test_our_client(port: int, certificate: tuple[Path, Path]) -> None:
    large = "x" * 1_000_000
    for authority in (None, "mesh.test", f"mesh.test:{port}"):
        trusting = ssl.create_default_context(cafile=str(certificate[0]))
        with trio.fail_after(10):
            async with open_channel("127.0.0.1", port, ssl_context=trusting, authority=authority) as channel:
                assert (await channel.unary(ECHO, StringValue(value=large))).value == large + "127.0.0.1"


async def test_a_grpcio_client(port: int, certificate: tuple[Path, Path]) -> None:
    def call() -> str:
        credentials = grpc.ssl_channel_credentials(certificate[0].read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
            echo = channel.unary_unary(
                ECHO.path,
                request_serializer=StringValue.SerializeToString,
                response_deserializer=StringValue.FromString,
            )
            response: StringValue = echo(StringValue(value="x"), timeout=10)
            return response.value

    assert await trio.to_thread.run_sync(call) == "x127.0.0.1"


async def test_certificates_that_do_not_match(port: int, certificate: tuple[Path, Path]) -> None:
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    for context, authority in ((ssl.create_default_context(), None), (trusting, "other.test")):
        with trio.fail_after(10), pytest.raises(GrpcError, match="certificate") as caught:
            async with open_channel("127.0.0.1", port, ssl_context=context, authority=authority):
                raise AssertionError("connected")
        assert caught.value.code is StatusCode.UNAVAILABLE
        assert caught.value.unprocessed


async def test_plain_text_to_a_tls_server_fails_the_call(port: int) -> None:
    with trio.fail_after(10):
        async with open_channel("127.0.0.1", port) as channel:
            with pytest.raises(GrpcError) as caught:
                await channel.unary(ECHO, StringValue())
    assert caught.value.code is StatusCode.UNAVAILABLE


async def test_a_server_that_does_not_offer_http2(certificate: tuple[Path, Path], nursery: trio.Nursery) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    context.set_alpn_protocols(["http/1.1"])
    (listener,) = open_tcp_listeners("127.0.0.1", 0)

    async def serve(listener: socket.socket) -> None:
        with listener:
            client, _ = await trio.socket.from_stdlib_socket(listener).accept()
            async with trio.SSLStream(
                trio.SocketStream(client), context, server_side=True, https_compatible=True
            ) as stream:
                assert await stream.receive_some() == b""

    nursery.start_soon(serve, listener)
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    with trio.fail_after(10), pytest.raises(GrpcError, match="ALPN") as caught:
        async with open_channel("127.0.0.1", listener.getsockname()[1], ssl_context=trusting):
            raise AssertionError("connected")
    assert caught.value.code is StatusCode.UNAVAILABLE
