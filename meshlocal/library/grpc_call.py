"""One gRPC call of a mesh: pick, attempts, what follows from each failure (behaviour rules A1 to A4, C1, C3, H1, O1).

A call moves on to another instance while nothing of a response came and all that was sent of it is held: if it provably
was not processed, or if its status is one of `grpc_retry_on`. Its deadline is its caller's cancel scope, which goes
along as grpc-timeout; `response_deadline` covers picking and connecting.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from typing import Generic

import anyio

from meshlocal.client.account import Account
from meshlocal.client.services import ServiceState
from meshlocal.client.statistics import AttemptOutcome, Outcome
from meshlocal.library.core import MeshCore
from meshlocal.library.errors import Attempt, CallError
from meshlocal.library.grpc_channels import InstanceChannels
from meshlocal.library.unavailable import why_none
from meshlocal.net.grpc.clientcall import ClientCall
from meshlocal.policy.limits import Limit
from meshlocal.policy.model import Instance, ServiceKey
from meshlocal.policy.picker import Reason
from meshlocal.policy.retry import Decision, Failure, RetryBudget
from meshlocal.wire.grpc.method import CallMethod, Got, Sent
from meshlocal.wire.grpc.status import GrpcError, Metadata, StatusCode


class MeshCall(Generic[Sent, Got]):
    """A call under way, for as long as its block lasts. One task may send while another receives.

    Args:
        core: of the mesh.
        channels: connections to instances.
        key: the service.
        budget: how many retries after an answer there may be.
        method: what is called.
        metadata: what goes along.

    Attributes:
        initial_metadata: what the instance sent before its first response, once that came.
        trailing_metadata: what came with the status, once `receive` saw the end.
    """

    def __init__(
        self,
        core: MeshCore,
        channels: InstanceChannels,
        key: ServiceKey,
        budget: RetryBudget,
        method: CallMethod[Sent, Got],
        metadata: Iterable[tuple[str, str | bytes]] = (),
    ) -> None:
        self.initial_metadata: Metadata | None = None
        self.trailing_metadata: Metadata | None = None
        self._core = core
        self._channels = channels
        self._key = key
        self._budget = budget
        self._method = method
        self._metadata = tuple(metadata)
        self._account: Account | None = None
        self._stack = AsyncExitStack()
        self._call: ClientCall[Sent, Got] | None = None
        self._recovering: anyio.Lock | None = None
        self._held: list[Sent] | None = []
        self._held_size = 0
        self._ended = False
        self._deadline = math.inf
        self._begun = False
        self._outcome = Outcome.CLIENT_LEFT
        self._attempts: list[Attempt] = []

    # How it came about.

    @property
    def instance(self) -> Instance | None:
        """The instance that serves it, or was tried last; None before there is one."""
        pick = self._account.pick if self._account is not None else None
        return pick.instance if pick is not None else None

    @property
    def tier(self) -> str:
        """The name of that instance's tier; empty before there is one."""
        return self._account.tier if self._account is not None else ""

    @property
    def reason(self) -> Reason | None:
        """Why it left the first tier; None while it did not (R1)."""
        pick = self._account.pick if self._account is not None else None
        return pick.reason if pick is not None else None

    @property
    def attempts(self) -> int:
        """How many instances were tried."""
        return self._account.attempts if self._account is not None else 0

    async def __aenter__(self) -> MeshCall[Sent, Got]:
        """Begin: find an instance, and connect to it.

        Raises:
            CallError: there is none.
            MeshClosedError, TooManyServicesError: see there.
        """
        await anyio.lowlevel.checkpoint()
        # Its caller's, and not that of finding an instance.
        self._deadline = anyio.current_effective_deadline()
        state = self._core.demand(self._key)
        account = self._account = Account(anyio.current_time())
        self._recovering = anyio.Lock()
        try:
            full = account.begin(state, state.policy.response_deadline, Limit.REQUESTS)
            if full is not None:
                self._outcome = Outcome.LIMITED
                raise self._error(StatusCode.RESOURCE_EXHAUSTED, "as many calls as its limits allow are under way")
            self._budget.request(account.started)
            await self._open(account, state)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None and self._begun and self._outcome is Outcome.CLIENT_LEFT:
            # Its caller had heard enough.
            self._outcome = Outcome.SERVED
        await self._close()

    async def _close(self) -> None:
        try:
            with anyio.CancelScope(shield=True):
                await self._stack.aclose()
        finally:
            if self._account is not None:
                self._account.end(self._outcome)

    # Requests and responses.

    async def send(self, request: Sent, *, end: bool = False) -> None:
        """Send one request, waiting while the instance's windows are full. `end`: no other follows.

        Raises:
            CallError: the call failed.
            anyio.BrokenResourceError: the instance ended the call with OK before.
            anyio.ClosedResourceError: after `end`.
        """
        # Before it is held: what is held goes to the next instance, if this one fails.
        call = await self._current()
        self._hold(request)
        self._ended = self._ended or end
        try:
            await call.send(request, end=end)
        except GrpcError as error:
            # A call on another instance was sent all that is held, this one among it.
            await self._recover(call, error)

    async def end(self) -> None:
        """Half-close: no request follows. No error if the instance ended the call before."""
        call = await self._current()
        self._ended = True
        try:
            await call.end()
        except GrpcError as error:
            await self._recover(call, error)

    async def receive(self) -> Got | None:
        """The next response; None after the last, when the status was OK.

        Raises:
            CallError: the status, or why there is none.
        """
        while True:
            call = await self._current()
            try:
                response = await call.receive()
            except GrpcError as error:
                await self._recover(call, error)
                continue
            self._note_answered(call)
            if response is None:
                self._outcome = Outcome.SERVED
                self.trailing_metadata = call.trailing_metadata
            return response

    def __aiter__(self) -> AsyncIterator[Got]:
        return self

    async def __anext__(self) -> Got:
        response = await self.receive()
        if response is None:
            raise StopAsyncIteration
        return response

    async def _current(self) -> ClientCall[Sent, Got]:
        """The call on the instance that has it; while the other task moves it to another one, that is waited for."""
        if self._call is None and self._recovering is not None:
            async with self._recovering:
                pass
        if self._call is None:
            raise anyio.ClosedResourceError
        return self._call

    def _hold(self, request: Sent) -> None:
        """Keep what was sent, as long as it may have to be sent again."""
        if self._held is None or self._account is None or self._account.state is None:
            return
        self._held_size += len(self._method.serialize(request))
        if self._begun or self._held_size > self._account.state.policy.replay_buffer:
            self._held = None
        else:
            self._held.append(request)

    def _note_answered(self, call: ClientCall[Sent, Got]) -> None:
        """The instance answers: the call is its own from here on."""
        if not self._begun and self._account is not None:
            self._begun = True
            self._held = None
            self.initial_metadata = call.initial_metadata
            self._account.answered()
            self._account.end_search()

    # Attempts.

    async def _open(self, account: Account, state: ServiceState) -> None:
        """Find an instance, connect to it, and send it what there is of the call."""
        with anyio.CancelScope(deadline=account.deadline) as scope:
            if state.picker is None:
                account.start_waiting(limited=False)
                try:
                    with anyio.move_on_after(state.policy.first_snapshot_wait):
                        await state.first_snapshot.wait()
                finally:
                    account.stop_waiting()
            while account.try_next(anyio.current_time()) is not None:
                if await self._try(account, state):
                    return
        if scope.cancelled_caught:
            self._outcome = Outcome.DEADLINE
            raise self._error(StatusCode.DEADLINE_EXCEEDED, f"no instance within {state.policy.response_deadline:g} s")
        self._outcome = Outcome.NO_INSTANCE
        raise self._error(StatusCode.UNAVAILABLE, why_none(state))

    async def _try(self, account: Account, state: ServiceState) -> bool:
        """Begin the call on the instance that was picked; False: the next one is to be tried."""
        pick = account.pick
        assert pick is not None
        policy = state.policy
        try:
            limit = policy.connect_timeout if pick.tier else policy.connect_timeout_local
            held = await self._channels.channel(pick.instance.key, limit)
        except GrpcError as error:
            self._fail(account, Failure.CONNECT, error, sent=False)
            return False
        account.reached(None)
        stack = AsyncExitStack()
        try:
            stack.enter_context(self._channels.using(held))
            account.enter_instance()
            stack.callback(account.leave_instance)
            assert held.channel is not None
            opened = held.channel.call(self._method, self._metadata, deadline=self._deadline)
            call = await stack.enter_async_context(opened)
            for request in self._held or ():
                await call.send(request)
            if self._ended:
                await call.end()
        except GrpcError as error:
            await stack.aclose()
            self._fail(account, Failure.REFUSED if error.unprocessed else Failure.RESET, error, sent=True)
            return False
        except BaseException:
            with anyio.CancelScope(shield=True):
                await stack.aclose()
            raise
        self._call, self._stack = call, stack
        return True

    def _fail(self, account: Account, failure: Failure, error: GrpcError, *, sent: bool) -> None:
        """An attempt failed; returns if the next instance is to be tried.

        Raises:
            CallError: it is not.
        """
        self._note_attempt(account, str(failure), error)
        decision = account.attempt_failed(
            failure, anyio.current_time(), sent=sent, idempotent=False, held=self._held is not None
        )
        if decision is not Decision.NEXT:
            self._outcome = Outcome.FAILED
            raise self._error(error.code, error.message, error.trailing) from error

    def _note_attempt(self, account: Account, word: str, error: GrpcError) -> None:
        pick = account.pick
        assert pick is not None
        self._attempts.append(Attempt(pick.instance, account.tier, pick.reason, word, error))

    async def _recover(self, call: ClientCall[Sent, Got], error: GrpcError) -> None:
        """A call failed: go on with the next instance, or raise.

        Raises:
            CallError: it is not to be tried elsewhere.
        """
        account = self._account
        assert account is not None
        assert account.state is not None
        assert self._recovering is not None
        async with self._recovering:
            if self._call is not call:
                # The other task has seen to it.
                return
            if self._begun:
                self._note_attempt(account, error.code.name, error)
                self._outcome = Outcome.SERVED if call.answered else Outcome.CUT
                raise self._error(error.code, error.message, error.trailing) from error
            if call.answered:
                await self._replace_answer(account, account.state, error)
            else:
                self._fail(account, Failure.REFUSED if error.unprocessed else Failure.RESET, error, sent=True)
            self._call = None
            stack, self._stack = self._stack, AsyncExitStack()
            await stack.aclose()
            await self._open(account, account.state)

    async def _replace_answer(self, account: Account, state: ServiceState, error: GrpcError) -> None:
        """A status without a message came: returns if the next instance is to be asked instead (C3).

        Raises:
            CallError: it is the call's.
        """
        dropped = error.code.name in state.policy.grpc_retry_on and account.drop_answer(
            anyio.current_time(),
            self._budget,
            error.code.value,
            sent=True,
            idempotent=True,
            held=self._held is not None,
        )
        self._note_attempt(account, error.code.name, error)
        if not dropped:
            account.answered()
            self._outcome = Outcome.SERVED
            raise self._error(error.code, error.message, error.trailing) from error

    def _error(self, code: StatusCode, details: str, trailing: Metadata = ()) -> CallError:
        account = self._account
        if account is not None and account.trying and account.pick is not None:
            pick = account.pick
            given_up = Attempt(pick.instance, account.tier, pick.reason, AttemptOutcome.ABANDONED, None)
            return CallError(code, details, self._key, [*self._attempts, given_up], trailing)
        return CallError(code, details, self._key, self._attempts, trailing)
