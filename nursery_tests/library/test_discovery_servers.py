"""A mesh at real discovery servers, processes of their own: each transport, with TLS and tokens, on each loop (D1)."""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import trustme

import meshlocal
from meshlocal.client.links import open_link
from meshlocal.httpx import MeshTransport
from meshlocal.net.websocket_client import ClosedError, WebSocketOptions, open_websocket
from meshlocal.policy.addresses import DiscoveryUrl
from meshlocal.policy.config import DiscoveryClientConfig
from meshlocal.testing import http, open_upstream
from meshlocal.wire import discovery_websocket as wire
from meshlocal.wire.discovery_methods import LIST_SERVICES
from meshlocal.wire.grpc.status import GrpcError, StatusCode
from meshlocal.wire.pb import discovery_pb2 as pb

LIMIT = 30
SCHEMES = ["grpc", "ws", "grpcs", "wss"]
LOOPS = ["trio", "asyncio"]


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(request: pytest.FixtureRequest, scheme: str) -> Any:
    found: Any = request.getfixturevalue("secured" if scheme in ("grpcs", "wss") else "plain")
    assert scheme in found.urls
    return found


@pytest.mark.parametrize("loop", LOOPS)
def test_http_goes_local_first_and_follows_changes(server: Any, scheme: str, loop: str) -> None:
    """O1, A2, D1: plan, watch, statistics and httpx, from what a server publishes."""

    async def main() -> None:
        async with (
            open_upstream(node="n1", behaviour=http()) as near,
            open_upstream(node="n2", behaviour=http()) as far,
            server.mesh(scheme) as mesh,
            httpx.AsyncClient(transport=MeshTransport(mesh), timeout=LIMIT) as client,
        ):
            name = f"http-{scheme}-{loop}"
            server.publish(name, near, far)
            watch = mesh.watch(name)
            while len((await anext(watch)).instances) != 2:
                pass
            assert [step.tier for step in mesh.plan(name).steps] == ["node", "other"]
            assert (await client.get(f"http://{name}/")).text == "n1"
            near.kill()
            assert (await client.get(f"http://{name}/")).text == "n2"
            server.publish(name, far)
            assert [each.key for each in (await anext(watch)).instances.values()] == [far.instance.key]
            told = mesh.statistics()
            assert (told.connected, told.problem, told.source) == (True, None, server.urls[scheme])
            assert told.services[name].instances == {"node": 0, "other": 1}

    with_limit(main, loop)


def test_streams_go_local_first(server: Any, scheme: str) -> None:
    """The same for Trio's streams."""

    async def main() -> None:
        name = f"streams-{scheme}"
        async with open_upstream(node="n1") as near, open_upstream(node="n2") as far, server.mesh(scheme) as mesh:
            server.publish(name, near, far)
            watch = mesh.watch(name)
            while len((await anext(watch)).instances) != 2:
                pass
            for refused, expected in ((None, b"n1\n"), (near, b"n2\n")):
                if refused is not None:
                    refused.refuse()
                async with await mesh.open_tcp_stream(name) as stream:
                    assert await stream.receive_some() == expected

    with_limit(main, "trio")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("secure", ["grpcs", "wss"])
def test_what_keeps_a_client_out(secured: Any, secure: str, loop: str, tmp_path: Path) -> None:
    """No token, a wrong one, an authority that is not trusted, no TLS: each is said, and nothing is published."""
    wrong, empty, other = tmp_path / "wrong", tmp_path / "empty", tmp_path / "other.pem"
    wrong.write_text("guess")
    empty.write_text("\n")
    trustme.CA().cert_pem.write_to_path(other)
    assert secured.ca_file is not None
    trusted, token = str(secured.ca_file), str(secured.token_file)

    async def ask(scheme: str, ca_file: str | None, token_file: str | None) -> GrpcError:
        url = DiscoveryUrl.parse(secured.urls[secure].replace(secure, scheme))
        options = DiscoveryClientConfig(connect_timeout=LIMIT, ca_file=ca_file, token_file=token_file)
        with pytest.raises(GrpcError) as caught:
            async with open_link(url, options) as link:
                await link.unary(LIST_SERVICES, pb.ListServicesRequest())
        return caught.value

    async def main() -> None:
        denied = StatusCode.UNAUTHENTICATED
        for file, said in (
            (None, "a bearer token is needed"),
            (str(wrong), "the token is not known"),
            (str(empty), "holds no token"),
            (str(tmp_path / "none"), "No such file"),
        ):
            error = await ask(secure, trusted, file)
            assert (error.code, said in str(error)) == (denied, True), error
        for file in (None, str(other)):
            error = await ask(secure, file, token)
            assert error.code is StatusCode.UNAVAILABLE
            assert "certificate" in str(error)
        error = await ask(secure, str(tmp_path / "none.pem"), token)
        assert "none.pem: No such file" in str(error)
        error = await ask({"grpcs": "grpc", "wss": "ws"}[secure], None, token)
        assert error.code is StatusCode.UNAVAILABLE

    with_limit(main, loop)


@pytest.mark.parametrize("secure", ["grpcs", "wss"])
def test_a_token_that_came_late_lets_in(secured: Any, secure: str, tmp_path: Path) -> None:
    """The token is read for each connection: who had a wrong one gets in once it is right, with no restart."""
    file = tmp_path / "token"
    file.write_text("guess")

    async def main() -> None:
        async with (
            open_upstream(node="n1") as near,
            meshlocal.open_mesh(secured.urls[secure], ca_file=secured.ca_file, token_file=file) as mesh,
        ):
            name = f"late-{secure}"
            secured.publish(name, near)
            mesh.plan(name)
            while mesh.statistics().problem is None:  # noqa: ASYNC110 - plain numbers, with no event to wait for
                await anyio.sleep(0.01)
            assert "the token is not known" in str(mesh.statistics().problem)
            assert not mesh.plan(name).heard
            file.write_text(secured.token)
            watch = mesh.watch(name)
            while not (await anext(watch)).instances:
                pass
            assert mesh.statistics().problem is None

    with_limit(main, "trio")


def test_a_browsers_token_comes_in_a_subprotocol(secured: Any) -> None:
    """Browsers set no header; the token never stands in a URL, which would be logged."""
    assert secured.ca_file is not None
    url = DiscoveryUrl.parse(secured.urls["wss"])
    context = ssl.create_default_context(cafile=str(secured.ca_file))
    bearer = wire.BEARER + base64.urlsafe_b64encode(secured.token.encode()).decode().rstrip("=")
    options = WebSocketOptions(max_message_size=1 << 20, keepalive_interval=LIMIT, keepalive_timeout=LIMIT)

    async def main() -> None:
        for offered in ([wire.JSON, bearer], [wire.JSON]):
            async with open_websocket(
                url.host, url.port, LIST_SERVICES.path, offered, options=options, ssl_context=context
            ) as websocket:
                assert websocket.subprotocol == wire.JSON
                await websocket.send("{}")
                if bearer in offered:
                    assert isinstance(json.loads(await websocket.receive()), dict)
                else:
                    with pytest.raises(ClosedError, match="a bearer token is needed") as caught:
                        await websocket.receive()
                    assert caught.value.code == wire.STATUS_BASE + StatusCode.UNAUTHENTICATED

    with_limit(main, "trio")


def with_limit(main: Callable[[], Awaitable[None]], loop: str) -> None:
    async def limited() -> None:
        with anyio.fail_after(LIMIT):
            await main()

    anyio.run(limited, backend=loop)
