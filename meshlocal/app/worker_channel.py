"""What the processes of one proxy say to each other, and the channel that it goes over (see `meshlocal.app.workers`).

The channel is a pair of sockets without a name, of which a worker inherits one: nobody else can reach it, so messages
may be pickled objects. Each is preceded by its length.
"""

from __future__ import annotations

import pickle
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from meshlocal.admin.messages import Request
from meshlocal.net.log import get_log
from meshlocal.policy.config import Config

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_log = get_log(__name__)

SEND_LIMIT = 5.0
"""Seconds that the other process may take to read a message, before it is taken for gone."""

_CHUNK = 65536
_HEAD = struct.Struct("!I")


class Start(NamedTuple):
    """To a worker, first of all: which one of how many it is, and how it is configured."""

    number: int
    of: int
    config: Config


class StopOrder(NamedTuple):
    """To a worker: drain; the second time: end now (S1)."""


class Configure(NamedTuple):
    """To a worker: apply this. Answered with a list of what prevents it, empty if it holds now (S2)."""

    config: Config


class Show(NamedTuple):
    """To a worker: one of its admin pages. Answered with a `Response`."""

    request: Request


class Measure(NamedTuple):
    """To a worker: its metrics. Answered with a list of them."""


class Ready(NamedTuple):
    """From a worker: it may be sent work. What it announces: facts, and notes."""

    facts: list[str]
    notes: list[str]


class Call(NamedTuple):
    """A message that is answered."""

    number: int
    message: Configure | Show | Measure | Beat


class Beat(NamedTuple):
    """To a worker, from time to time: say that your event loop runs. Answered with True."""


class Answer(NamedTuple):
    """What a call with this number is answered; `value` is None if a fault in the worker prevents it."""

    number: int
    value: Any


Metrics = list["Metric"]


class Channel:
    """One process's end of the channel between a supervisor and its worker."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._sending = trio.Lock()
        self._broken = False
        self._received = bytearray()

    async def send(self, message: object) -> None:
        """Send a message.

        Raises:
            trio.BrokenResourceError: the other process has gone.
        """
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        async with self._sending:
            if self._broken:
                raise trio.BrokenResourceError("an earlier message was not sent whole")
            # What follows a message that was cut would be read as its rest. So its sender's cancellation waits for it;
            # but not for ever, as the other process may have stopped.
            self._broken = True
            with trio.CancelScope(shield=True, deadline=trio.current_time() + SEND_LIMIT):
                await self._stream.send_all(_HEAD.pack(len(data)) + data)
                self._broken = False
            if self._broken:
                raise trio.BrokenResourceError("the other process does not read")

    async def receive(self) -> object | None:
        """The next message; None if the other process has gone. One task at a time.

        One that cannot be read is passed over, with a line in the log: the two processes may be of different versions,
        where the package was upgraded below a supervisor that runs.
        """
        while True:
            data = await self._take(_HEAD.size)
            if data is not None:
                data = await self._take(_HEAD.unpack(data)[0])
            if data is None:
                return None
            try:
                message: object = pickle.loads(data)
            except Exception:  # noqa: BLE001 - a pickle may raise anything
                _log.exception("a message between the processes of this proxy cannot be read; was it upgraded?")
                continue
            return message

    async def _take(self, size: int) -> bytes | None:
        while len(self._received) < size:
            try:
                part = await self._stream.receive_some(_CHUNK)
            except trio.BrokenResourceError:
                return None
            if not part:
                return None
            self._received += part
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    async def aclose(self) -> None:
        """Close this end."""
        await self._stream.aclose()
