"""Starts processes: joins each with its pages, and with whom it reports to."""

from __future__ import annotations

import os
from random import Random

import trio

from meshlocal.app.config_loader import UNUSED_VARIABLE, LoadConfig, unused_variables
from meshlocal.net.log import configure_logging, get_log

_log = get_log(__name__)


def run_proxy(load: LoadConfig) -> int:
    """Run a proxy in this process, or in `proxy.workers` processes below it; returns its exit status.

    Raises:
        ConfigError: the configuration cannot be used.
        ListenError: an address cannot be listened on.
    """
    # Imported here, as in the next function: neither process needs the other's code.
    from meshlocal.app.operator import Operator
    from meshlocal.app.proxy import ProxyProcess, freeze_garbage_collector, tell_unused

    config = load()
    configure_logging(config.log.level, config.log.format, levels=config.log.levels)
    tell_unused(config.proxy, os.environ)
    operator = Operator(os.environ)
    if config.proxy.workers > 1:
        # Most proxies are one process; what is not is not small anyway, and its pages bring a large library.
        from meshlocal.app.worker_pages import worker_routes
        from meshlocal.app.workers import Supervisor

        return trio.run(Supervisor(load, config, Random(), operator, worker_routes).run)
    process = ProxyProcess(load, Random(), operator, config=config)
    freeze_garbage_collector()
    return trio.run(process.run)


def run_discovery(load: LoadConfig) -> int:
    """Run a discovery server in this process; returns its exit status.

    Raises:
        ConfigError: the configuration cannot be used.
        ListenError: an address cannot be listened on.
    """
    from meshlocal.app.discovery import DiscoveryProcess
    from meshlocal.app.discovery_pages import discovery_routes

    process = DiscoveryProcess(load, Random(), os.environ, discovery_routes)
    for name in unused_variables(os.environ):
        _log.warning("environment variable has no use", problem=UNUSED_VARIABLE.format(name))
    return trio.run(process.run)
