"""Methods."""

from __future__ import annotations

import pytest
from google.protobuf.wrappers_pb2 import StringValue

from meshlocal.wire.grpc.method import Method


def test_a_method_knows_its_service() -> None:
    assert Method("/grpc.health.v1.Health/Check", StringValue, StringValue).service == "grpc.health.v1.Health"


@pytest.mark.parametrize("path", ["", "a/b", "/a", "/a/", "/a/b/c", "//b", "/a b/c", "/a/b\n"])
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="method path"):
        Method(path, StringValue, StringValue)
