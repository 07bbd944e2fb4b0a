"""The search for an instance, where no socket is needed to see it."""

from __future__ import annotations

import random
import socket

from meshlocal.client.connecting import Client, Connected, connect
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import Outcome
from meshlocal.policy import model
from meshlocal.policy.config import AttemptPolicy
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
