"""One check of one instance: tcp, http or grpc.health.v1 (behaviour rule H3).

Each opens a connection of its own: a check that went over one that is open already would not see that no new one can be
made. A check that comes to nothing raises `CheckFailed`; its limit of time is the caller's cancel scope.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable
from typing import Protocol

import trio

from meshlocal.net.dial import classify_connect_error, dial
from meshlocal.net.sockets import abort, format_address
from meshlocal.policy.config_health import HealthCheckConfig

GLANCE = 0.05
"""Seconds for which a connection of a tcp check must last."""

_HEAD_LIMIT = 65536


class Check(Protocol):
    """Checks what listens at an address and port, or at a Unix socket's path if there is one that can be connected."""

    def __call__(self, address: str, port: int, path: str | None = None, /) -> Awaitable[None]:
        """Raises `CheckFailed` if it does not work."""
        ...


class CheckFailed(Exception):  # noqa: N818 - as pytest's Failed: what it says is the check's result, no error here
    """The instance does not work; the text says how, in a few words."""


def make_check(config: HealthCheckConfig) -> Check:
    """The check that the config asks for."""
    if config.kind == "tcp":
        return _check_tcp
    if config.kind == "http":
        return _http_check(config)
    return _grpc_check(config)


async def _check_tcp(address: str, port: int, path: str | None = None) -> None:
    sock = await _connect(address, port, path)
    try:
        # Something before the port, a proxy most often, may accept for an instance that is away, and then reset.
        with trio.move_on_after(GLANCE):
            await trio.lowlevel.wait_readable(sock)
            try:
                sock.recv(1)
            except BlockingIOError:
                pass
            except OSError as error:
                raise CheckFailed(classify_connect_error(error)) from None
    finally:
        abort(sock)


async def _connect(address: str, port: int, path: str | None) -> socket.socket:
    try:
        return await dial(address, port, path)
    except OSError as error:
        raise CheckFailed(classify_connect_error(error)) from None


def _http_check(config: HealthCheckConfig) -> Check:
    from meshlocal.wire.http1.errors import ProtocolError
    from meshlocal.wire.http1.request import HeadLimits
    from meshlocal.wire.http1.response import parse_response

    limits = HeadLimits()

    async def check(address: str, port: int, path: str | None = None) -> None:
        host = config.host or format_address((address, port))
        request = f"GET {config.path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: meshlocal\r\nconnection: close\r\n\r\n"
        sock = await _connect(address, port, path)
        try:
            received = await _ask(sock, request.encode())
            while True:
                raw, end, received = received.partition(b"\r\n\r\n")
                if not end:
                    raise CheckFailed("ended its response within the head" if raw else "ended without a response")
                try:
                    head = parse_response(raw + end, limits)
                except ProtocolError as error:
                    raise CheckFailed(error.reason) from None
                if head.status >= 200:
                    break
                if b"\r\n\r\n" not in received:
                    received += await _receive_head(sock)
        except OSError as error:
            raise CheckFailed(classify_connect_error(error)) from None
        finally:
            abort(sock)
        right = head.status < 400 if config.status is None else head.status == config.status
        if not right:
            raise CheckFailed(f"status {head.status}")

    return check


async def _ask(sock: socket.socket, request: bytes) -> bytes:
    """Send a request, which fits into any socket's buffer, and receive until a head's end, or the stream's."""
    sock.send(request)
    return await _receive_head(sock)


async def _receive_head(sock: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        if len(received) > _HEAD_LIMIT:
            raise CheckFailed("head_too_large")
        await trio.lowlevel.wait_readable(sock)
        try:
            data = sock.recv(_HEAD_LIMIT)
        except BlockingIOError:
            continue
        if not data:
            break
        received += data
    return received


def _grpc_check(config: HealthCheckConfig) -> Check:
    from meshlocal.net.grpc.client import channel_over
    from meshlocal.net.grpc.health import CHECK, SERVING
    from meshlocal.wire.grpc.status import GrpcError
    from meshlocal.wire.pb.health_pb2 import HealthCheckRequest, HealthCheckResponse

    async def check(address: str, port: int, path: str | None = None) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(await _connect(address, port, path)))
        authority = config.host or format_address((address, port))
        try:
            async with channel_over(stream, authority=authority) as channel:
                answer = await channel.unary(CHECK, HealthCheckRequest(service=config.service or ""))
        except GrpcError as error:
            raise CheckFailed(error.message or error.code.name) from None
        if answer.status != SERVING:
            names = HealthCheckResponse.ServingStatus
            known = answer.status in names.values()
            raise CheckFailed(names.Name(answer.status) if known else f"status {answer.status}")

    return check
