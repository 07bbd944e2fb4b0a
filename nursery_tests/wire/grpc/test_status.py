"""Statuses, and where they come from."""

from __future__ import annotations

import pytest

from meshlocal.wire.grpc.status import GrpcError, StatusCode, from_http2_error, from_http_status, parse_status


@pytest.mark.parametrize(
    ("error_code", "status"),
    [(0, "INTERNAL"), (2, "INTERNAL"), (7, "UNAVAILABLE"), (8, "CANCELLED"), (11, "RESOURCE_EXHAUSTED"),
     (12, "PERMISSION_DENIED"), (5, "UNKNOWN"), (999, "UNKNOWN")],
)  # fmt: skip
def test_http2_error_codes(error_code: int, status: str) -> None:
    assert from_http2_error(error_code).name == status


@pytest.mark.parametrize(
    ("http_status", "status"),
    [(400, "INTERNAL"), (401, "UNAUTHENTICATED"), (403, "PERMISSION_DENIED"), (404, "UNIMPLEMENTED"),
     (429, "UNAVAILABLE"), (502, "UNAVAILABLE"), (503, "UNAVAILABLE"), (504, "UNAVAILABLE"), (418, "UNKNOWN")],
)  # fmt: skip
def test_http_statuses(http_status: int, status: str) -> None:
    assert from_http_status(http_status).name == status


@pytest.mark.parametrize(
    ("value", "status"), [(b"0", "OK"), (b"14", "UNAVAILABLE"), (b"17", "UNKNOWN"), (b"x", "UNKNOWN")]
)
def test_status_header(value: bytes, status: str) -> None:
    assert parse_status(value).name == status


def test_an_error_says_its_code_and_message() -> None:
    assert str(GrpcError(StatusCode.NOT_FOUND, "no such service")) == "NOT_FOUND: no such service"
    assert str(GrpcError(StatusCode.ABORTED)) == "ABORTED"
