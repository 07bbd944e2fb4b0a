"""Active checks of instances, on a schedule (behaviour rule H3).

One task for each instance of each service that has a `health_check`, shared by all listeners. It checks at a random
moment within the first interval, and then once each interval, give or take a tenth, so that neither one proxy's checks
nor those of a thousand proxies come together. What they find goes into the same state machine as what requests find
(`meshlocal.policy.health`).
"""

from __future__ import annotations

import trio

from meshlocal.client.fitness import OWN_FAULTS
from meshlocal.client.security import reach
from meshlocal.client.services import ServiceState, ServiceTable
from meshlocal.net.log import get_log
from meshlocal.policy.backoff import UniformSource
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.config_health import HealthCheckConfig
from meshlocal.policy.model import Instance, ServiceKey
from meshlocal.policy.picker import Picker
from meshlocal.proxy.checkers import Check, CheckFailed, make_check

_log = get_log(__name__)

LOOK = 0.5
"""Seconds between two looks at whether services or instances changed."""

AT_ONCE = 64
"""Checks under way at most; others wait for their turn."""

_JITTER = 0.1


class _Followed:
    """The checks of one service's instances, each under way in a scope of its own."""

    def __init__(self, state: ServiceState, config: HealthCheckConfig) -> None:
        self.state = state
        self.config = config
        self.check: Check = make_check(config)
        self.picker: Picker | None = None
        self.scopes: dict[tuple[str, int], trio.CancelScope] = {}


def import_checkers(config: ProxyConfig) -> None:
    """Import what the checks of a configuration are made of."""
    for service in config.services.values():
        if service.health_check is not None:
            make_check(service.health_check)


class HealthChecks:
    """Checks the instances of all services that want it.

    Args:
        services: the services; those that come and go are followed.
        rng: for the moments of checks.
    """

    def __init__(self, services: ServiceTable, rng: UniformSource) -> None:
        self._services = services
        self._rng = rng
        self._followed: dict[ServiceKey, _Followed] = {}
        self._turns = trio.CapacityLimiter(AT_ONCE)

    async def run(self) -> None:
        """Check the instances of every service that wants it, until cancelled."""
        # What was followed before a failure has no tasks any more.
        self._followed.clear()
        async with trio.open_nursery() as nursery:
            while True:
                self.follow(nursery)
                await trio.sleep(LOOK)

    def follow(self, nursery: trio.Nursery) -> None:
        """Start the checks of instances that came, and end those of instances that are gone."""
        config = self._services.config
        for key, followed in list(self._followed.items()):
            if self._services.get(key) is not followed.state or config.service(key).health_check != followed.config:
                self._drop(key)
        for state in self._services:
            wanted = config.service(state.key).health_check
            if wanted is None:
                continue
            found = self._followed.get(state.key)
            if found is None:
                found = self._followed[state.key] = _Followed(state, wanted)
            if found.picker is not state.picker and state.picker is not None:
                found.picker = state.picker
                self._follow_instances(found, state.picker, nursery)

    def _follow_instances(self, followed: _Followed, picker: Picker, nursery: trio.Nursery) -> None:
        usable = {
            instance.key[:2]: instance
            for instance in picker.snapshot.instances.values()
            if picker.selector.left_out(instance) is None
        }
        for place in followed.scopes.keys() - usable.keys():
            followed.scopes.pop(place).cancel()
        for place, instance in usable.items():
            if place not in followed.scopes:
                scope = followed.scopes[place] = trio.CancelScope()
                nursery.start_soon(self._check_instance, followed, instance, scope)

    def _drop(self, key: ServiceKey) -> None:
        followed = self._followed.pop(key)
        for scope in followed.scopes.values():
            scope.cancel()
        followed.state.fitness.health.unchecked(trio.current_time())

    async def _check_instance(self, followed: _Followed, instance: Instance, scope: trio.CancelScope) -> None:
        config = followed.config
        failures = 0
        with scope:
            await trio.sleep(self._rng.uniform(0, config.interval))
            while True:
                problem = await self._check(followed, instance)
                if problem is None:
                    failures = 0
                    followed.state.fitness.check_passed(instance, shallow=config.kind == "tcp")
                elif problem not in OWN_FAULTS:
                    failures += 1
                    if failures >= config.failures:
                        followed.state.fitness.checks_failed(instance, problem)
                followed.state.statistics.checks["passed" if problem is None else "failed"] += 1
                await trio.sleep(config.interval * self._rng.uniform(1 - _JITTER, 1 + _JITTER))

    async def _check(self, followed: _Followed, instance: Instance) -> str | None:
        """One check; returns how it failed."""
        # What can be connected where requests go says something of what they will find.
        state = followed.state
        tier = state.selector.tier(instance)
        port, path, _ = reach(instance, tier, state.security, state.sockets)
        if followed.config.port is not None:
            port, path = followed.config.port, None
        async with self._turns:
            with trio.move_on_after(followed.config.timeout):
                try:
                    await followed.check(instance.key.address, port, path)
                except CheckFailed as failed:
                    return str(failed)
                except Exception:  # noqa: BLE001 - whatever an instance sends must not end the checks of the others
                    _log.exception("check failed by a fault in the proxy", instance=str(instance.key))
                    return "fault in the check"
                return None
        return "timeout"
