"""What importing the client brings along."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        # trio and asyncio cost memory where the other one runs; health and reflection messages clash with grpcio's.
        ("meshlocal.net.grpc.client", ["trio", "asyncio", "anyio.streams.tls"]),
        ("meshlocal.net.grpc.client", ["meshlocal.wire.pb.health_pb2", "meshlocal.wire.pb.reflection_pb2"]),
        ("meshlocal.net.grpc.server", ["asyncio", "meshlocal.wire.pb.health_pb2"]),
    ],
)
def test_imports_stay_small(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
