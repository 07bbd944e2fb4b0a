"""One TCP connection's life (behaviour rules A1 to A8, H1, R1, S1).

It looks for an instance, relays until both sides have ended, and tells what the connection shows of its instance. What
need not be waited for is not waited for: `begin` and `start_relay` do it, in the relay loop if there is one, and
`forward` goes on from there in the connection's task.

An instance that was connected and reset the connection before it said a word has failed as much as one that could not
be connected, and is ejected for it (H1). That a connect succeeded says nothing of such an instance then: its next
connections are watched until they have lived for a while.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from meshlocal.client.account import Account
from meshlocal.client.connecting import Client, connect_at_once, connect_waiting
from meshlocal.client.security import Security
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import Outcome
from meshlocal.net.dial import Connecting
from meshlocal.net.pipe import Pipe
from meshlocal.net.relay import copy_back, relay_pipes
from meshlocal.net.relay_state import RelayCounters, RelayResult
from meshlocal.net.sockets import abort, close
from meshlocal.policy.limits import Limit
from meshlocal.policy.retry import Decision, Failure
from meshlocal.proxy.tcp.replay import Heard, Replay

if TYPE_CHECKING:
    from meshlocal.net.flows import Pair
    from meshlocal.net.relay_loop import RelayLoop
    from meshlocal.net.task_pool import KeptTask

SETTLED = 1.0
"""Seconds that a connection must live to show that its instance works, if nothing else shows it (H1)."""

RETURNED = "returned"
"""Why a connection was cut whose client is to come back to the local tier (F2)."""


class TcpConnection(Account):
    """One client's connection while it lives.

    Args:
        service: what it is for.
        pipe: the client's bytes.
        peer: the client's address.
        started: when it was accepted, by trio.current_time().

    Attributes:
        service: what it is for.
        client: who made it, and its bytes.
        peer: the client's address.
        counters: bytes moved; None until an instance is connected.
        cut: why the proxy ended it; empty if it did not.
        upstream: the instance's bytes; None while it has none.
        outcome: why it has none, and will have none; None as long as that is not known.
        relay: is under way with its instance, or was; None if its task relays.
        kept: its task, if that was kept from another connection and has not begun yet.
        fault: of ours, met before its task had made a step.
    """

    __slots__ = (
        "_begun",
        "_connected",
        "_connecting",
        "_scope",
        "client",
        "counters",
        "cut",
        "fault",
        "kept",
        "outcome",
        "peer",
        "relay",
        "service",
        "upstream",
    )

    def __init__(self, service: ServiceState, pipe: Pipe, peer: object, started: float) -> None:
        super().__init__(started)
        self.service = service
        self.client = Client(pipe)
        self.peer = peer
        self.counters: RelayCounters | None = None
        self.cut = ""
        self.upstream: Pipe | None = None
        self.outcome: Outcome | None = None
        self.relay: Pair | None = None
        self.kept: KeptTask[TcpConnection] | None = None
        self.fault: Exception | None = None
        self._scope: trio.CancelScope | None = None
        self._begun = False
        self._connected = False
        self._connecting: Connecting[Security] | None = None

    @property
    def scope(self) -> trio.CancelScope:
        """The scope whose cancellation ends the connection. Most short connections are over without one."""
        if self._scope is None:
            self._scope = trio.CancelScope()
        return self._scope

    # Its return (F2): see `meshlocal.proxy.returning.Lasting`.

    def away_since(self, service: ServiceState) -> float | None:
        """Since when it was silent on another tier; None if it is not there, or not of the service, or ends already."""
        pick, counters = self.pick, self.counters
        if self.service is not service or pick is None or not pick.tier or counters is None or self.cut:
            return None
        return counters.last_activity

    def send_home(self) -> None:
        """End it, so that its client comes again."""
        self.cut = RETURNED
        self.scope.cancel()

    # What waits for nothing.

    def start_relay(self, loop: RelayLoop) -> bool:
        """Do all that can be done before the connection's task; false if that has something to do now."""
        try:
            self._begin()
            if self.upstream is None or self.service.policy.replay or self._is_doubted:
                return False
            assert self.counters is not None
            client, upstream = self.client.pipe.plain, self.upstream.plain
            if client is None or upstream is None:
                return False
            self.end_search()
            self.relay = loop.begin(client, upstream, self.counters)
        except Exception as error:  # noqa: BLE001 - here is no place to raise; the task does
            self.fault = error
            return False
        return not self.relay.done

    def conclude(self) -> Outcome:
        """How the relay ended, which the loop had begun; tells what it shows of the instance."""
        assert self.relay is not None
        self.relay.on_end = None
        ended = self.relay.state.result()
        self._judge(ended)
        return self._outcome(ended)

    def _begin(self) -> None:
        """Count it, and look for an instance as far as that waits for nothing."""
        self._begun = True
        if super().begin(self.service, self.service.policy.deadline, Limit.CONNECTIONS, Limit.REQUESTS) is None:
            self._seek()
        else:
            self.outcome = Outcome.LIMITED

    def _seek(self) -> None:
        """Look for an instance, or for the next; if that has to be waited for, `_connect` does."""
        if not self.may_wait():
            self.outcome = Outcome.LIMITED
            return
        begun = connect_at_once(self.client, self)
        if begun is None or isinstance(begun, Connecting):
            self._connecting = begun
            self.start_waiting()
        else:
            self._have_instance(begun)

    def _have_instance(self, upstream: Pipe) -> None:
        self.upstream = upstream
        # After what its connect showed, so that what becomes of it counts as well (H1).
        self.began = now = trio.current_time()
        self.counters = RelayCounters(now)
        self._connected = True
        self.service.statistics.open += 1
        self.enter_instance()

    def _lose_instance(self) -> None:
        if self._connected:
            self._connected = False
            self.service.statistics.open -= 1
            self.leave_instance()

    # What waits.

    async def forward(self) -> Outcome:
        """Do all that is left to do for the connection, to its end."""
        if self.fault is not None:
            raise self.fault
        if not self._begun:
            self._begin()
        replay: Replay | None = None
        while True:
            if not await self._connect():
                assert self.outcome is not None
                return self.outcome
            if self.relay is not None or not (replay or self.service.policy.replay):
                return self._outcome(await self._relay(self.client.early))
            replay = replay or Replay(self.client, self.service.policy)
            heard = await self._wait_heard(replay)
            if self.client.left:
                return Outcome.CLIENT_LEFT
            if heard.failed:
                self._lose_instance()
                self._seek()
                continue
            assert self.upstream is not None
            assert self.counters is not None
            if heard.ended:
                self.end_search()
                return self._outcome(await copy_back(self.client.pipe, self.upstream, self.counters))
            return self._outcome(await self._relay(self.client.early[heard.sent :]))

    async def _connect(self) -> bool:
        """Wait for an instance; False if there is none, for the reason in `outcome`."""
        if self.upstream is None and self.outcome is None:
            connecting, self._connecting = self._connecting, None
            try:
                found = await connect_waiting(self.client, self, connecting)
            finally:
                self.stop_waiting()
            if isinstance(found, Outcome):
                self.outcome = found
            else:
                self._have_instance(found)
        return self.upstream is not None

    async def _wait_heard(self, replay: Replay) -> Heard:
        """Wait for the instance's first byte. One that fails before is left like one that cannot be connected (A5)."""
        assert self.upstream is not None
        assert self.counters is not None
        heard: Heard | None = None
        try:
            heard = await replay.wait_heard(self.upstream)
        finally:
            if heard is None or not (heard.failed or heard.spoke or heard.ended):
                self.abandoned()
            elif not heard.failed:
                self.answered()
        self.counters.client_to_upstream += heard.sent
        if heard.failed:
            self.service.statistics.replays[heard.failed] += 1
            # All that was said is held, and by its configuration may be said again. As of the start, for a client may
            # speak long after: the deadline is for what has to be connected, and `connect_waiting` keeps to it.
            decision = self.attempt_failed(
                Failure.NO_RESPONSE,
                self.started,
                heard.failed,
                sent=True,
                idempotent=True,
                held=True,
                failed_at=trio.current_time(),
            )
            assert decision is not Decision.SAME
            self.upstream.abort()
            self.upstream = None
        return heard

    async def _relay(self, early: bytes | bytearray) -> RelayResult:
        """Relay, and tell what the connection shows of its instance (H1)."""
        assert self.upstream is not None
        assert self.counters is not None
        ended: RelayResult | None = None
        self.end_search()
        try:
            if self.relay is not None:
                ended = await self.relay.join()
            elif self._is_doubted:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._settle_soon)
                    ended = await relay_pipes(self.client.pipe, self.upstream, self.counters, early=early)
                    nursery.cancel_scope.cancel()
            else:
                ended = await relay_pipes(self.client.pipe, self.upstream, self.counters, early=early)
        finally:
            self._judge(ended)
        assert ended is not None
        return ended

    def _judge(self, ended: RelayResult | None) -> None:
        assert self.counters is not None
        silent = not self.counters.upstream_to_client
        if ended is None or (silent and ended.failed == "client"):
            self.abandoned()
        elif not silent or ended.failed is None or ended.first_end is not None:
            self.answered()
        elif trio.current_time() - self.began < SETTLED:
            self.fell_silent(ended.reason)

    @property
    def _is_doubted(self) -> bool:
        """Whether it has to live for a while to show that its instance works."""
        pick = self.pick
        assert pick is not None
        return self.service.fitness.is_doubted(pick.instance)

    async def _settle_soon(self) -> None:
        await trio.sleep(SETTLED)
        self.answered()

    def _outcome(self, ended: RelayResult) -> Outcome:
        if ended.failed is None:
            return Outcome.SERVED
        self.cut = f"{ended.failed} {ended.reason}"
        return Outcome.CUT

    # Its end.

    def finish(self, outcome: Outcome, now: float) -> None:
        """Let go of all that it has, and count it. A stream that was cut must not look complete: it is reset.

        Args:
            outcome: how it ended.
            now: when it did, by trio.current_time().
        """
        if self._connecting is not None:
            # A fault of ours came before its task could wait for it.
            close(self._connecting.socket, awaited=False)
        if not self._begun:
            # It is counted all the same, in no limit.
            super().begin(self.service, 0.0)
        if self._connected:
            self.lasted(now - self.began)
        self._lose_instance()
        self.end(outcome, now)
        _end(self.client.pipe, whole=outcome is Outcome.SERVED)
        if self.upstream is not None:
            _end(self.upstream, whole=outcome is Outcome.SERVED)
        counters = self.counters
        if counters is not None:
            self.service.statistics.bytes_sent += counters.client_to_upstream
            self.service.statistics.bytes_received += counters.upstream_to_client


def _end(pipe: Pipe, *, whole: bool) -> None:
    """Close it, or cut it. Nobody waits for it any more."""
    if pipe.plain is not None:
        (close if whole else abort)(pipe.plain, awaited=False)
    elif whole:
        pipe.close()
    else:
        pipe.abort()
