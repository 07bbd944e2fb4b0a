"""/explain: whose plan it shows."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import pytest

from meshlocal.admin.messages import Request, Response
from meshlocal.admin.server import answer
from meshlocal.app.config_loader import load_config
from meshlocal.app.operator import Operator
from meshlocal.app.proxy import ProxyProcess
from meshlocal.app.proxy_pages import proxy_routes
from meshlocal.policy import model
from meshlocal.policy.config import Config
from meshlocal.policy.model import Conditions, ServiceKey, ServiceSnapshot, make_instance


@pytest.fixture
def make() -> Callable[[], ProxyProcess]:
    """Proxies of the namespace shop, on the node n1."""

    def load() -> Config:
        flags = {
            "proxy.discovery.urls": ("grpc://127.0.0.1:1",),
            "proxy.listen": ("tcp://127.0.0.1:0=b",),
            "proxy.namespace": "shop",
            "proxy.node_name": "n1",
        }
        return load_config(None, flags, {}, "proxy")

    return lambda: ProxyProcess(load, random.Random(0), Operator({}))


@pytest.mark.parametrize("asked", ["b", "b.shop"])
async def test_a_bare_name_is_one_of_the_proxys_own_namespace(make: Callable[[], ProxyProcess], asked: str) -> None:
    """R2."""
    process = make()
    instance = make_instance("10.0.0.1", 9000, "", {})
    process.services.publish(ServiceSnapshot(ServiceKey("b.shop"), "1", model.index([instance])))
    response = await answer(proxy_routes(process)["/explain"], Request("GET", "/explain", f"service={asked}", {}))
    assert response.status == 200
    assert [step["instance"] for step in json.loads(response.body)["plan"]] == ["10.0.0.1:9000"]


async def explain(process: ProxyProcess, query: str, accept: str) -> Response:
    return await answer(proxy_routes(process)["/explain"], Request("GET", "/explain", query, {"accept": accept}))


async def test_a_browser_gets_a_table(make: Callable[[], ProxyProcess]) -> None:
    """R2: the same plan for people, and JSON for whoever does not ask for HTML."""
    process = make()
    near = make_instance("10.0.0.1", 9000, "", {"node": "n1"})
    far = make_instance("10.0.0.2", 9000, "", {"node": "<n2>"})
    unready = make_instance("10.0.0.3", 9000, "", {}, Conditions(ready=False))
    process.services.publish(ServiceSnapshot(ServiceKey("b.shop"), "1", model.index([near, far, unready])))
    text = (await explain(process, "service=b", "text/html,*/*;q=0.8")).body.decode()
    rows = re.findall("<tr><td>(.*?)</td></tr>", text)
    assert [re.sub("<.*?>", "|", row).split("|")[0] for row in rows] == ["1", "2", ""]
    assert "10.0.0.1:9000" in rows[0]
    assert "&lt;n2&gt;" in rows[1]
    assert "<code>local_failed</code>" in rows[1]
    assert "not_ready" in rows[2]
    assert json.loads((await explain(process, "service=b", "*/*")).body)["node"] == "n1"
    assert b"which service? /explain?service=NAME; there are: b.shop" in (await explain(process, "", "*/*")).body
