"""Admin pages that a proxy and a discovery server have in common, and what their pages are made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from meshlocal.admin.messages import Request, Response
from meshlocal.app.readiness import Readiness
from meshlocal.net.slices import pieces
from meshlocal.policy.addresses import DiscoveryUrl, ListenAddress, SocketAddress
from meshlocal.policy.sources import SourceUrl
from meshlocal.policy.steps import Steps


def livez(request: Request) -> Response:
    """The process runs: the event loop answers."""
    return plain(200, "alive")


def readyz(readiness: Readiness) -> Response:
    """Whether the process may be sent work, and if not, why."""
    return plain(200, "ready") if readiness.ready else plain(503, f"not ready: {readiness.reason}")


def plain(status: int, line: str) -> Response:
    """One line of text."""
    return Response(status, "text/plain; charset=utf-8", f"{line}\n".encode())


def json_response(value: object) -> Response:
    """A value as indented JSON."""
    body = json.dumps(value, indent=2, ensure_ascii=False, default=str).encode() + b"\n"
    return Response(200, "application/json", body)


def json_in_steps(services: Iterable[Iterable[dict[str, Any]]]) -> Steps[Response]:
    """Services as JSON, in steps.

    Args:
        services: of each its facts, and then its instances, of which it may have thousands.
    """
    out = [b"["]
    for position, parts in enumerate(services):
        rows = iter(parts)
        facts = msgspec.json.encode(next(rows), enc_hook=str)
        out.append((b",\n " if position else b"\n ") + facts[:-1] + b',"instances":[')
        first = True
        for piece in pieces(rows):
            encoded = [msgspec.json.encode(row, enc_hook=str) for row in piece]
            out.append((b"\n  " if first else b",\n  ") + b",\n  ".join(encoded))
            first = False
            yield
        out.append(b"]}")
        yield
    out.append(b"\n]\n")
    return Response(200, "application/json", b"".join(out))


def config_view(config: msgspec.Struct) -> Any:
    """The configuration in force, as the file would have it."""
    return _as_data(config)


def _as_data(value: object) -> Any:
    if isinstance(value, SocketAddress | ListenAddress | DiscoveryUrl | SourceUrl):
        return str(value)
    if isinstance(value, msgspec.Struct):
        pairs = ((name, getattr(value, name)) for name in value.__struct_fields__)
        return {name: _as_data(item) for name, item in pairs if item is not msgspec.UNSET}
    if isinstance(value, Mapping):
        return {str(key): _as_data(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_as_data(item) for item in value]
    return value
