"""/explain: whose plan it shows."""

from __future__ import annotations

import json
import random

import pytest

from meshlocal.admin.messages import Request
from meshlocal.app.config_loader import load_config
from meshlocal.app.proxy import ProxyProcess
from meshlocal.app.proxy_pages import proxy_routes
from meshlocal.policy import model
from meshlocal.policy.config import Config
from meshlocal.policy.model import ServiceKey, ServiceSnapshot, make_instance


@pytest.mark.parametrize("asked", ["b", "b.shop"])
async def test_a_bare_name_is_one_of_the_proxys_own_namespace(asked: str) -> None:
    """R2."""

    def load() -> Config:
        flags = {
            "proxy.discovery.urls": ("grpc://127.0.0.1:1",),
            "proxy.listen": ("tcp://127.0.0.1:0=b",),
            "proxy.namespace": "shop",
        }
        return load_config(None, flags, {}, "proxy")

    process = ProxyProcess(load, random.Random(0), {})
    instance = make_instance("10.0.0.1", 9000, "", {})
    process.services.publish(ServiceSnapshot(ServiceKey("b.shop"), "1", model.index([instance])))
    response = proxy_routes(process)["/explain"](Request("GET", "/explain", f"service={asked}", {}))
    assert response.status == 200
    assert [step["instance"] for step in json.loads(response.body)["plan"]] == ["10.0.0.1:9000"]
