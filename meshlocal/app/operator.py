"""Who starts a process by hand or by a service manager, as the process knows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import trio

from meshlocal.admin.server import AsyncRoute, Route
from meshlocal.app.proxy import ProxyProcess
from meshlocal.app.proxy_pages import proxy_routes
from meshlocal.app.readiness import announce, notify_service_manager
from meshlocal.app.signals import handle_signals


class Operator:
    """Who started the process: gives signals, and reads a line; or a service manager that listens for states.

    Args:
        environment: for the service manager's socket.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    async def command(self, process: ProxyProcess, *, task_status: trio.TaskStatus[None]) -> None:
        """Take signals as orders (S1, S2), until cancelled."""
        await handle_signals(process.stop, process.reload, task_status=task_status)

    async def ready(self, process: ProxyProcess, admin: Sequence[str]) -> None:
        """Say what the proxy does, in one line."""
        facts, notes = process.standing()
        self.say_ready([*facts, *(f"admin={process.admin_access.scheme}://{bound}" for bound in admin), *notes])

    def say_ready(self, parts: Sequence[str]) -> None:
        """Print the parts as one line, and tell the service manager."""
        announce(" ".join(parts))
        notify_service_manager(self._environment, "READY=1")

    def draining(self) -> None:
        """Tell the service manager that the proxy stops."""
        notify_service_manager(self._environment, "STOPPING=1")

    def routes(self, process: ProxyProcess) -> Mapping[str, Route | AsyncRoute]:
        """All pages of a proxy."""
        return proxy_routes(process)
