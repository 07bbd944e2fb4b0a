"""Ejections as operators see them: /services, /explain, the page and the metrics (H1, O5, R1, R2)."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from meshlocal.admin.messages import Request
from meshlocal.admin.server import answer
from meshlocal.app.config_loader import load_config
from meshlocal.app.operator import Operator
from meshlocal.app.proxy import ProxyProcess
from meshlocal.app.proxy_pages import proxy_routes
from meshlocal.cli.lookup import _explanation
from meshlocal.policy import model
from meshlocal.policy.config import Config
from meshlocal.policy.limits import Limit
from meshlocal.policy.model import ServiceKey, ServiceSnapshot, make_instance

B = ServiceKey("b")
LOCAL = make_instance("10.0.0.1", 9000, "grpc", {"node": "n1"})
REMOTE = make_instance("10.0.0.2", 9000, "grpc", {"node": "n2"})


@pytest.fixture
async def process() -> ProxyProcess:
    def load() -> Config:
        flags = {
            "proxy.discovery.urls": ("grpc://127.0.0.1:1",),
            "proxy.listen": ("tcp://127.0.0.1:0=b",),
            "proxy.node_name": "n1",
        }
        return load_config(None, flags, {}, "proxy")

    made = ProxyProcess(load, random.Random(0), Operator({}))
    made.services.publish(ServiceSnapshot(B, "1", model.index([LOCAL, REMOTE])))
    for _ in range(3):
        made.services[B].fitness.failed(LOCAL, "refused")
    made.services[B].fitness.begin(REMOTE)
    return made


async def get(process: ProxyProcess, target: str) -> str:
    path, _, query = target.partition("?")
    response = await answer(proxy_routes(process)[path], Request("GET", path, query, {}))
    assert response.status == 200
    return response.body.decode()


async def test_services_tells_the_state_of_each_instance(process: ProxyProcess) -> None:
    """H1."""
    local, remote = json.loads(await get(process, "/services"))[0]["instances"]
    left = local["health"].pop("next_trial_in")
    assert 4 < left < 6
    assert local["health"] == {"state": "ejected", "cause": "connect", "under_way": 0, "ejections": 1}
    assert remote["health"] == {"state": "admitted", "under_way": 1}


async def test_explain_tells_why_the_node_is_left(process: ProxyProcess) -> None:
    """R1, R2, O5."""
    view: dict[str, Any] = json.loads(await get(process, "/explain?service=b"))
    steps = [(step["instance"], step["reason"], step["passed_over"]) for step in view["plan"]]
    assert steps == [("10.0.0.2:9000", "local_ejected", None), ("10.0.0.1:9000", None, "ejected")]
    told = _explanation(view)
    assert "local_ejected: every instance of the same node is ejected" in told
    assert "same node; ejected: only after the others" in told


async def test_the_page_shows_it(process: ProxyProcess) -> None:
    """H1."""
    lines = (await get(process, "/live?service=b")).splitlines()
    local, remote = json.loads(lines[-1])["instances"]
    assert (local["state"], local["cause"]) == ("ejected", "connect")
    assert 4 <= local["next_trial_in"] <= 6
    assert (remote["state"], remote["under_way"]) == ("admitted", 1)


async def test_metrics_count_it(process: ProxyProcess) -> None:
    """H1."""
    process.services[B].circuit.refused[Limit.REQUESTS] = 7
    process.services.circuit.refused[Limit.CONNECTIONS] = 8
    lines = (await get(process, "/metrics")).splitlines()
    assert 'meshlocal_instances_ejected{service="b"} 1.0' in lines
    assert 'meshlocal_ejections_total{cause="connect",service="b"} 1.0' in lines
    assert 'meshlocal_limit_refused_total{limit="requests",service="b"} 7.0' in lines
    assert 'meshlocal_limit_refused_total{limit="connections",service=""} 8.0' in lines


async def test_the_command_line_tells_ejected_instances_and_what_is_stale(process: ProxyProcess) -> None:
    """An instance that is ejected is no usable one like others, and what is old is said to be (D1, D2)."""
    view = json.loads(await get(process, "/explain?service=b"))
    view["discovery"] = {"connected": True, "problem": "", "from_cache_file": False, "age_seconds": 0.1}
    told = _explanation(view).splitlines()
    assert told[0] == "service b, seen from node n1; usable instances by tier: node 1, other 1 (1 ejected)"
    assert told[1] == ""
    view["discovery"] = {"connected": False, "problem": "refused", "from_cache_file": True, "age_seconds": 61.0}
    assert _explanation(view).splitlines()[1] == "from the cache file, 61 s old; discovery is away: refused"
    view["discovery"] = {"connected": False, "problem": "", "from_cache_file": False, "age_seconds": None}
    assert _explanation(view).splitlines()[1] == "stale; discovery is away"
