"""What a discovery server takes on: of calls, watches and subscriptions, from all clients and from each.

A client is an address: what a host sends over many connections is counted together. Of IPv6 it is a /64, within which
whoever has one address has them all. What is refused costs its caller that call and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import trio

from meshlocal.net.crowding import client_of
from meshlocal.net.grpc.server import Handler, Routes, ServerCall
from meshlocal.policy.config_discovery import ServerLimitsConfig
from meshlocal.policy.rates import TokenBucket
from meshlocal.wire.grpc.framing import MessageTooLargeError
from meshlocal.wire.grpc.status import PUSHBACK, GrpcError, StatusCode

MAX_CLIENTS = 4096
"""Clients whose rates are remembered: those who called last."""


MOST_UNFINISHED = 64 << 20
CLIENT_UNFINISHED = 8 << 20
"""Bytes that are held of requests that are not whole: of all clients, and of each."""

FULL_PUSHBACK = 2.0
"""Seconds for which a client that is refused is asked to leave the server alone; it is to spread them by chance."""


Resize = Callable[[int], None]
"""Sets how many services a watch follows; raises GrpcError, RESOURCE_EXHAUSTED, where there is no room for more."""


class Limited(StrEnum):
    """The limits: by their keys where they have one."""

    CONNECTIONS = "connections"
    CLIENT_CONNECTIONS = "client_connections"
    WATCHERS = "watchers"
    CLIENT_WATCHERS = "client_watchers"
    SUBSCRIPTIONS = "subscriptions"
    CLIENT_SUBSCRIPTIONS = "client_subscriptions"
    ALL_SUBSCRIPTIONS = "all_subscriptions"
    MESSAGE_SIZE = "message_size"
    UNFINISHED = "unfinished_requests"
    RESETS = "resets"
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
        unfinished: bytes that are held of requests that are not whole.
    """

    def __init__(self, config: ServerLimitsConfig | None = None) -> None:
        self.config = config or ServerLimitsConfig()
        self.refused: dict[Limited, int] = dict.fromkeys(Limited, 0)
        self.subscriptions = 0
        self._watchers = 0
        self._client_watchers: dict[str, int] = {}
        self._client_subscriptions: dict[str, int] = {}
        self._unfinished: dict[str, int] = {}
        self.unfinished = 0
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def guard(self, handlers: Routes) -> Routes:
        """Handlers like these, with each client's calls held to the rate, and messages that are too large counted."""
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
    def watch(self, peer: str, subscriptions: int) -> Iterator[Resize]:
        """Have a place for one watch, for what it subscribes to at first; what is yielded sets another number.

        Raises:
            GrpcError: RESOURCE_EXHAUSTED, there is none.
        """
        config, client = self.config, client_of(peer)
        self._check_subscriptions(client, 0, subscriptions)
        if self._watchers >= config.watchers:
            raise self._refuse(Limited.WATCHERS, f"this server has {config.watchers} watches, and takes no more")
        of_client = self._client_watchers.get(client, 0)
        if config.client_watchers is not None and of_client >= config.client_watchers:
            text = f"{client} has {config.client_watchers} watches, and gets no more"
            raise self._refuse(Limited.CLIENT_WATCHERS, text)
        held = subscriptions

        def resize(wanted: int) -> None:
            nonlocal held
            self._check_subscriptions(client, held, wanted)
            self._client_subscriptions[client] += wanted - held
            self.subscriptions += wanted - held
            held = wanted

        self._watchers += 1
        self._client_watchers[client] = of_client + 1
        self._client_subscriptions[client] = self._client_subscriptions.get(client, 0) + subscriptions
        self.subscriptions += subscriptions
        try:
            yield resize
        finally:
            self._watchers -= 1
            self.subscriptions -= held
            _less(self._client_watchers, client, 1)
            self._client_subscriptions[client] -= held
            if client not in self._client_watchers:
                del self._client_subscriptions[client]

    def _check_subscriptions(self, client: str, held: int, wanted: int) -> None:
        """Raise GrpcError, RESOURCE_EXHAUSTED, if a watch that follows `held` services may not follow `wanted`."""
        if wanted <= held:
            return
        config, more = self.config, wanted - held
        if wanted > config.subscriptions:
            text = f"subscriptions: {wanted} of them; a watch takes 1 to {config.subscriptions}"
            raise self._refuse(Limited.SUBSCRIPTIONS, text)
        followed = self._client_subscriptions.get(client, 0)
        if config.client_subscriptions is not None and followed + more > config.client_subscriptions:
            text = f"{client}'s watches follow {followed} services of {config.client_subscriptions}"
            raise self._refuse(Limited.CLIENT_SUBSCRIPTIONS, text)
        if self.subscriptions + more > config.all_subscriptions:
            text = f"this server's watches follow {self.subscriptions} services of {config.all_subscriptions}"
            raise self._refuse(Limited.ALL_SUBSCRIPTIONS, text)

    def change(self, peer: str, size: int) -> None:
        """Note how many bytes more, or, negative, less are held of a peer's requests that are not whole (`Holding`).

        Raises:
            GrpcError: RESOURCE_EXHAUSTED, more is too much; it does not count then.
        """
        client = client_of(peer)
        held = self._unfinished.get(client, 0) + size
        if size > 0 and (held > CLIENT_UNFINISHED or self.unfinished + size > MOST_UNFINISHED):
            raise self._refuse(Limited.UNFINISHED, f"{client} has {held - size} bytes of unfinished requests here")
        self.unfinished += size
        if held:
            self._unfinished[client] = held
        else:
            self._unfinished.pop(client, None)

    def _refuse(self, limit: Limited, text: str) -> GrpcError:
        self.refused[limit] += 1
        pushback = ((PUSHBACK, str(round(FULL_PUSHBACK * 1000))),)
        return GrpcError(StatusCode.RESOURCE_EXHAUSTED, text, pushback)


def _less(counts: dict[str, int], client: str, by: int) -> None:
    left = counts[client] - by
    if left:
        counts[client] = left
    else:
        del counts[client]
