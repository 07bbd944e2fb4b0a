"""What a discovery server takes on: of calls, watches and subscriptions, from all clients and from each.

A client is an address: what a host sends over many connections is counted together. Of IPv6 it is a /64, within which
whoever has one address has them all. What is refused costs its caller that call and nothing else.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import trio

from meshlocal.net.grpc.server import Handler, Routes, ServerCall
from meshlocal.policy.config_discovery import ServerLimitsConfig
from meshlocal.policy.rates import TokenBucket
from meshlocal.wire.grpc.framing import MessageTooLargeError
from meshlocal.wire.grpc.status import GrpcError, StatusCode

MAX_CLIENTS = 4096
"""Clients whose rates are remembered: those who called last."""


class Limited(StrEnum):
    """The limits, by their keys."""

    CONNECTIONS = "connections"
    WATCHERS = "watchers"
    CLIENT_WATCHERS = "client_watchers"
    SUBSCRIPTIONS = "subscriptions"
    ALL_SUBSCRIPTIONS = "all_subscriptions"
    MESSAGE_SIZE = "message_size"
    CLIENT_CALLS = "client_calls_per_second"
    BYTES = "bytes_per_second"
    STALL = "stall_timeout"


class ServerLimits:
    """The limits of one server, and what is under way.

    Args:
        config: the limits.

    Attributes:
        refused: how often each limit refused something.
        subscriptions: services that all watches follow.
    """

    def __init__(self, config: ServerLimitsConfig | None = None) -> None:
        self.config = config or ServerLimitsConfig()
        self.refused: dict[Limited, int] = dict.fromkeys(Limited, 0)
        self.subscriptions = 0
        self._watchers = 0
        self._client_watchers: dict[str, int] = {}
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def guard(self, handlers: Routes) -> Routes:
        """The same handlers, with each client's calls held to the rate, and messages that are too large counted."""
        return {method: self._guarded(handler) for method, handler in handlers.items()}

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(call: ServerCall[Any, Any]) -> None:
            self._admit(call.peer)
            try:
                await handler(call)
            except MessageTooLargeError:
                self.refused[Limited.MESSAGE_SIZE] += 1
                raise

        return guarded

    def _admit(self, peer: str) -> None:
        config = self.config
        rate = config.client_calls_per_second
        if rate is None:
            return
        client, now = client_of(peer), trio.current_time()
        bucket = self._buckets.get(client)
        if bucket is None:
            bucket = self._buckets[client] = TokenBucket(rate, config.client_calls_burst, now)
            while len(self._buckets) > MAX_CLIENTS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(client)
        if not bucket.take(now):
            raise self._refuse(Limited.CLIENT_CALLS, f"{client} begins more than {rate} calls a second")

    @contextmanager
    def watch(self, peer: str, subscriptions: int) -> Iterator[None]:
        """Have a place for one watch.

        Raises:
            GrpcError: RESOURCE_EXHAUSTED, there is none.
        """
        config, client = self.config, client_of(peer)
        if subscriptions > config.subscriptions:
            text = f"subscriptions: {subscriptions} of them; a watch takes 1 to {config.subscriptions}"
            raise self._refuse(Limited.SUBSCRIPTIONS, text)
        if self._watchers >= config.watchers:
            raise self._refuse(Limited.WATCHERS, f"this server has {config.watchers} watches, and takes no more")
        of_client = self._client_watchers.get(client, 0)
        if config.client_watchers is not None and of_client >= config.client_watchers:
            text = f"{client} has {config.client_watchers} watches, and gets no more"
            raise self._refuse(Limited.CLIENT_WATCHERS, text)
        if self.subscriptions + subscriptions > config.all_subscriptions:
            text = f"this server's watches follow {self.subscriptions} services of {config.all_subscriptions}"
            raise self._refuse(Limited.ALL_SUBSCRIPTIONS, text)
        self._watchers += 1
        self._client_watchers[client] = of_client + 1
        self.subscriptions += subscriptions
        try:
            yield
        finally:
            self._watchers -= 1
            self.subscriptions -= subscriptions
            left = self._client_watchers.pop(client) - 1
            if left:
                self._client_watchers[client] = left

    def _refuse(self, limit: Limited, text: str) -> GrpcError:
        self.refused[limit] += 1
        return GrpcError(StatusCode.RESOURCE_EXHAUSTED, text)


def client_of(peer: str) -> str:
    """Whom a peer's address, `HOST:PORT`, counts as."""
    host = peer.rpartition(":")[0] or peer
    if host.startswith("["):
        try:
            return str(ipaddress.ip_network((host.strip("[]").partition("%")[0], 64), strict=False))
        except ValueError:
            return host
    return host
