"""The time between a tcp client and an instance that has not said a word yet (behaviour rule A5).

With `replay` on, all that the client sends is held for as long as nothing has come back. If the instance resets the
connection then, ends it, or says nothing for `replay_wait`, what is held goes to the next instance of the plan instead.
The first byte from the instance, or more from the client than may be held, ends this time: the connection stays where
it is.
"""

from __future__ import annotations

from typing import NamedTuple

import trio

from meshlocal.client.connecting import EARLY_LIMIT, Client
from meshlocal.net.dial import classify_connect_error
from meshlocal.net.pipe import Pipe, finish_writing
from meshlocal.policy.config import AttemptPolicy


class Heard(NamedTuple):
    """What was heard of an instance.

    Attributes:
        failed: how the instance failed, so that what is held goes to another one; empty if the connection stays.
        sent: bytes of what is held that this instance has.
        spoke: it sent something.
        ended: the client ended its stream, and the instance was told.
    """

    failed: str
    sent: int
    spoke: bool
    ended: bool


class Replay:
    """One client's first words, and who has them.

    Args:
        client: what it sent so far is in its `early`, and what it sends now comes there too.
        policy: how much is held, and how long an instance may be silent.
    """

    def __init__(self, client: Client, policy: AttemptPolicy) -> None:
        self._client = client
        self._limit = min(policy.replay_buffer, EARLY_LIMIT)
        self._wait = policy.replay_wait
        self._ended = False
        self._sent = 0
        self._failed = ""
        self._spoke = False
        self._passed_end = False
        self._stays = False

    async def wait_heard(self, upstream: Pipe) -> Heard:
        """Pass the client's words on, from the first, until this instance speaks or fails; notes a client that left."""
        self._sent = 0
        self._failed = ""
        self._spoke = self._passed_end = self._stays = False
        async with trio.open_nursery() as nursery:
            scope = nursery.cancel_scope
            nursery.start_soon(self._speak, upstream, scope)
            await self._listen(upstream)
            scope.cancel()
        if not (self._stays or self._failed or self._client.left):
            self._failed = "timeout"
        return Heard(self._failed, self._sent, self._spoke, self._passed_end)

    async def _speak(self, upstream: Pipe, scope: trio.CancelScope) -> None:
        """From the client to the instance. Cancels the scope when there is more than may be held."""
        early, client = self._client.early, self._client.pipe
        while True:
            if not await self._send(upstream, scope):
                return
            if self._ended:
                return
            if len(early) >= self._limit:
                self._stays = True
                scope.cancel()
                return
            try:
                await client.wait_readable()
                received = client.read(self._limit - len(early))
            except (OSError, trio.ClosedResourceError):
                self._client.left = True
                scope.cancel()
                return
            if received:
                early += received
            elif received is not None:
                self._ended = True

    async def _send(self, upstream: Pipe, scope: trio.CancelScope) -> bool:
        """Send what was not sent yet; False if the instance takes no more, which `_listen` finds out about."""
        early = self._client.early
        try:
            while self._sent < len(early):
                # A copy: `early` grows meanwhile, and cannot while there is a view of it.
                sent = upstream.write(bytes(early[self._sent :]))
                self._sent += sent
                if not sent:
                    await upstream.wait_writable()
                if self._wait is not None:
                    scope.deadline = trio.current_time() + self._wait
            if self._ended:
                await finish_writing(upstream)
                self._passed_end = True
                if self._wait is not None:
                    scope.deadline = trio.current_time() + self._wait
        except (OSError, trio.ClosedResourceError):
            return False
        return True

    async def _listen(self, upstream: Pipe) -> None:
        """Until the instance speaks, ends or fails; what it says stays unread."""
        while True:
            try:
                await upstream.wait_readable()
                said = upstream.peek(1)
            except OSError as error:
                self._failed = classify_connect_error(error)
                return
            if said is None:
                continue
            self._spoke = bool(said)
            # A silent end is an answer to a client that has ended its stream, and to no other.
            self._stays = self._spoke or self._passed_end
            if not self._stays:
                self._failed = "ended"
            return
