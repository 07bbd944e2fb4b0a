"""What a configuration says that nothing takes up."""

from __future__ import annotations

from typing import Any

import pytest

from meshlocal.policy.config_build import Layer, build_config
from meshlocal.policy.config_unused import unused_keys

TCP = "tcp://127.0.0.1:1=cache"


def told(**proxy: Any) -> list[str]:
    return list(unused_keys(build_config([Layer("", {"proxy": proxy})]).proxy))


@pytest.mark.parametrize(
    ("proxy", "lines"),
    [
        pytest.param({"listen": [TCP], "services": {"cache": {}}}, [], id="a listener's"),
        pytest.param(
            {"listen": [TCP], "services": {"cach": {}}},
            ["proxy.services.cach is not used: no listener and no route names it; did you mean 'cache'?"],
            id="misspelt",
        ),
        pytest.param(
            {"listen": [TCP], "services": {"zz": {}, "cache": {}}},
            ["proxy.services.zz is not used: no listener and no route names it"],
            id="nothing near",
        ),
        pytest.param(
            {"listen": [TCP], "namespace": "shop", "services": {"cache.shop": {}}}, [], id="of the own namespace"
        ),
        pytest.param(
            {
                "listen": ["http://127.0.0.1:1=cache"],
                "http": {"routes": [{"prefix": "/api", "service": "api"}]},
                "services": {"api": {}},
            },
            [],
            id="a route's",
        ),
        pytest.param({"listen": ["http://127.0.0.1:1"], "services": {"any": {}}}, [], id="a request may name it"),
        pytest.param(
            {"discovery": {"urls": ["file:instances.yaml"], "cache_file": "/x"}, "listen": [TCP]},
            ["proxy.discovery.cache_file is not used: an instances file needs none"],
            id="a cache of a file",
        ),
        pytest.param(
            {"discovery": {"urls": ["grpc://127.0.0.1:1"], "cache_file": "/x"}, "listen": [TCP]}, [], id="a cache"
        ),
    ],
)
def test_what_nothing_takes_up_is_named(proxy: dict[str, Any], lines: list[str]) -> None:
    assert told(**proxy) == lines
