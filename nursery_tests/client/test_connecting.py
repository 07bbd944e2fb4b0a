"""The search for an instance, where no socket is needed to see it."""

from __future__ import annotations

import random
import socket

from meshlocal.client.connecting import Client, Connected, connect
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import Outcome
from meshlocal.policy import model
from meshlocal.policy.config import AttemptPolicy, ServiceConfig
from meshlocal.policy.config_health import EjectionConfig
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import ServiceKey, ServiceSnapshot, make_instance

B = ServiceKey("b")


async def test_for_a_client_that_has_left_nothing_is_begun() -> None:
    """A8: an attempt that nobody waits for would leave its socket behind."""
    state = ServiceState(B, Selector(Locality({"node": "n1"})), AttemptPolicy(), random.Random(1))
    state.publish(ServiceSnapshot(B, "v", model.index([make_instance("127.0.0.1", 1, labels={"node": "n1"})])))
    with socket.socket() as sock:
        client = Client(sock)
        client.left = True
        result = Connected()
        await connect(client, state, result)
    assert (result.outcome, result.attempts, result.upstream) == (Outcome.CLIENT_LEFT, 0, None)
    assert not state.statistics.attempts


async def test_a_plan_goes_on_with_the_tiers_that_it_began_with() -> None:
    """S2, A5: whatever tiers there are by the time that the next instance is tried."""
    with socket.create_server(("127.0.0.1", 0)) as near, socket.create_server(("127.0.0.1", 0)) as far:
        zones = Selector(Locality({"node": "n1"}, prefer=("node", "zone")))
        state = ServiceState(B, zones, AttemptPolicy(), random.Random(1))
        instances = [
            make_instance("127.0.0.1", listener.getsockname()[1], labels={"node": node})
            for listener, node in ((near, "n1"), (far, "n2"))
        ]
        state.publish(ServiceSnapshot(B, "v", model.index(instances)))
        with socket.socket() as sock:
            client, result = Client(sock), Connected()
            tiers = []
            for _ in range(2):
                await connect(client, state, result)
                assert result.upstream is not None
                result.upstream.close()
                result.upstream = None
                tiers.append(result.tier)
                state.reselect(Selector(Locality({"node": "n1"})), AttemptPolicy(), EjectionConfig(), ServiceConfig())
    assert tiers == ["node", "other"]
    assert dict(state.statistics.attempts) == {("node", "connected"): 1, ("other", "connected"): 1}
