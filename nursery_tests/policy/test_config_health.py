"""The configuration of checks, limits, ejection, return and spill (H1, H3, F2, F3)."""

from __future__ import annotations

from typing import Any

import pytest

from meshlocal.policy.config import ServiceConfig
from meshlocal.policy.config_build import ConfigError, Layer, build_config
from meshlocal.policy.config_health import HealthCheckConfig, LimitsConfig
from meshlocal.policy.model import ServiceKey


def service(section: dict[str, Any]) -> ServiceConfig:
    config = build_config([Layer("c.yaml", {"proxy": {"services": {"b": section}}})])
    return config.proxy.services[ServiceKey("b")]


def refusal(section: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        service(section)
    return str(caught.value)


def test_a_health_check_whole() -> None:
    """H3."""
    check = {
        "kind": "http",
        "interval": 2,
        "timeout": 1,
        "failures": 4,
        "port": 8080,
        "path": "/live?x=1",
        "host": "b.example:80",
        "status": 204,
        "service": "a.B",
    }
    assert service({"health_check": check}).health_check == HealthCheckConfig(
        kind="http",
        interval=2.0,
        timeout=1.0,
        failures=4,
        port=8080,
        path="/live?x=1",
        host="b.example:80",
        status=204,
        service="a.B",
    )


def test_none_by_default() -> None:
    assert service({}) == ServiceConfig()
    assert service({"health_check": None}).health_check is None


@pytest.mark.parametrize(
    ("check", "problem"),
    [
        ({}, "health_check: has no 'kind'"),
        ({"kind": "icmp"}, "health_check.kind: expected one of grpc, http, tcp"),
        ({"kind": "http", "path": "healthz"}, "health_check.path: expected a path such as /healthz"),
        ({"kind": "http", "path": "/a b"}, "health_check.path: expected a path"),
        ({"kind": "http", "path": "/a\r\nx: y"}, "health_check.path: expected a path"),
        ({"kind": "http", "host": "a\r\nb"}, "health_check.host: expected a host"),
        ({"kind": "tcp", "interval": 1, "timeout": 2}, "health_check.timeout: 2 is more than the interval, 1"),
        ({"kind": "http", "status": 42}, "health_check.status: expected a whole number, from 200 to 599"),
        ({"kind": "tcp", "port": 70000}, "health_check.port: expected a whole number, from 1 to 65535"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_path(check: dict[str, Any], problem: str) -> None:
    """S2: and nothing of it can reach a request that a check sends."""
    assert problem in refusal({"health_check": check})


def test_limits_and_spill() -> None:
    """F3."""
    read = service({"limits": {"requests": 5}, "spill": 3})
    assert (read.limits, read.spill) == (LimitsConfig(requests=5), 3)
    assert "spill: expected a whole number, from 1" in refusal({"spill": 0})
