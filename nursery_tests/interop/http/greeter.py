"""An instance that speaks gRPC: grpcio, with calls of each kind, as a process. ADDRESS PORT NAME [CERTIFICATE KEY]"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

DETAILS = b"\x08\x05\x12\x03why"


def name(_: bytes, context: grpc.ServicerContext) -> bytes:
    """Who serves the call."""
    context.set_trailing_metadata((("served-by", sys.argv[3]),))
    return sys.argv[3].encode()


def echo(request: bytes, context: grpc.ServicerContext) -> bytes:
    came = dict(context.invocation_metadata())
    told = came.get("x-forwarded-client-cert", "")
    context.send_initial_metadata([("x-back", came.get("x-there", "")), ("x-told", told)])
    return request


def count(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    for number in range(int(request)):
        yield b"%d" % number


def total(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    return b"%d" % sum(map(len, requests))


def chat(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    for request in requests:
        yield request + b"!"


def fail(request: bytes, context: grpc.ServicerContext) -> bytes:
    context.set_trailing_metadata((("grpc-status-details-bin", DETAILS), ("why", "so")))
    context.abort(grpc.StatusCode.ABORTED, "höchst 100% ärgerlich\n")
    raise AssertionError


_left = threading.Semaphore(0)


_begun: set[bytes] = set()


def wait(request: bytes, context: grpc.ServicerContext) -> bytes:
    """Until the call is cancelled, which `left` tells of; `began` tells that it is here."""
    _begun.add(request)
    context.add_callback(_left.release)
    while context.is_active():
        threading.Event().wait(0.01)
    return b""


def began(request: bytes, context: grpc.ServicerContext) -> bytes:
    """Whether a `wait` with this request has begun."""
    return b"yes" if request in _begun else b"no"


def left(request: bytes, context: grpc.ServicerContext) -> bytes:
    """Wait until one `wait` more was cancelled."""
    return b"yes" if _left.acquire(timeout=20) else b"no"


def serve(address: str, port: int) -> None:
    handlers = {
        "Name": grpc.unary_unary_rpc_method_handler(name),
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Count": grpc.unary_stream_rpc_method_handler(count),
        "Total": grpc.stream_unary_rpc_method_handler(total),
        "Chat": grpc.stream_stream_rpc_method_handler(chat),
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
        "Wait": grpc.unary_unary_rpc_method_handler(wait),
        "Began": grpc.unary_unary_rpc_method_handler(began),
        "Left": grpc.unary_unary_rpc_method_handler(left),
    }
    server = grpc.server(
        ThreadPoolExecutor(128),
        handlers=[grpc.method_handlers_generic_handler("test.Greeter", handlers)],
        options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)],
    )
    if len(sys.argv) > 4:
        certificate, key = (Path(file).read_bytes() for file in sys.argv[4:6])
        server.add_secure_port(f"{address}:{port}", grpc.ssl_server_credentials([(key, certificate)]))
    else:
        server.add_insecure_port(f"{address}:{port}")
    server.start()
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    stopped.wait()
    server.stop(5).wait()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
