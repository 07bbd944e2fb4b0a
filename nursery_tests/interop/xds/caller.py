"""A gRPC client, as a process: `caller.py threads|asyncio TARGET [OPTION=NUMBER ...]`.

It reads orders on standard input, and answers each with a line of JSON:

    calls N   makes N calls, one after the other       who served how many
    start N   goes on to call from N places at once    {}
    stop      ends that                                who served how many, and how the calls failed that did
"""

from __future__ import annotations

import asyncio  # noqa: TID251 - a client of other people's
import json
import sys
import threading
from collections import Counter

import grpc

METHOD = "/test.Greeter/Name"
DEADLINE = 20.0


class Threads:
    """Calls from threads."""

    def __init__(self, target: str, options: list[tuple[str, int]]) -> None:
        self._call = grpc.insecure_channel(target, options=options).unary_unary(METHOD)
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def _one(self) -> None:
        try:
            served = self._call(b"", timeout=DEADLINE).decode()
        except grpc.RpcError as error:
            served = f"{error.code().name}: {error.details()}"
        with self._lock:
            self._counts[served] += 1

    def _go_on(self) -> None:
        while not self._stop.is_set():
            self._one()

    def calls(self, number: int) -> Counter[str]:
        for _ in range(number):
            self._one()
        return self.taken()

    def start(self, number: int) -> None:
        self._stop.clear()
        self._threads = [threading.Thread(target=self._go_on) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> Counter[str]:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self.taken()

    def taken(self) -> Counter[str]:
        counts, self._counts = self._counts, Counter()
        return counts


class Asyncio:
    """Calls from tasks; the orders come from another thread."""

    def __init__(self, target: str, options: list[tuple[str, int]]) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._counts: Counter[str] = Counter()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False
        self._run(self._open(target, options))

    def _run(self, what: object) -> object:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()  # type: ignore[arg-type]  # a coroutine, of whatever kind

    async def _open(self, target: str, options: list[tuple[str, int]]) -> None:
        self._call = grpc.aio.insecure_channel(target, options=options).unary_unary(METHOD)

    async def _one(self) -> None:
        try:
            served = (await self._call(b"", timeout=DEADLINE)).decode()
        except grpc.aio.AioRpcError as error:
            served = f"{error.code().name}: {error.details()}"
        self._counts[served] += 1

    async def _several(self, number: int) -> None:
        for _ in range(number):
            await self._one()

    async def _go_on(self) -> None:
        while not self._stopped:
            await self._one()

    async def _begin(self, number: int) -> None:
        self._stopped = False
        self._tasks = [asyncio.ensure_future(self._go_on()) for _ in range(number)]

    async def _end(self) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)

    def calls(self, number: int) -> Counter[str]:
        self._run(self._several(number))
        return self.taken()

    def start(self, number: int) -> None:
        self._run(self._begin(number))

    def stop(self) -> Counter[str]:
        self._run(self._end())
        return self.taken()

    def taken(self) -> Counter[str]:
        counts, self._counts = self._counts, Counter()
        return counts


def main() -> None:
    kind, target, *rest = sys.argv[1:]
    options = [(name, int(number)) for name, _, number in (each.partition("=") for each in rest)]
    caller = Threads(target, options) if kind == "threads" else Asyncio(target, options)
    for line in sys.stdin:
        order, _, number = line.strip().partition(" ")
        answer: Counter[str] = Counter()
        if order == "calls":
            answer = caller.calls(int(number))
        elif order == "start":
            caller.start(int(number))
        else:
            answer = caller.stop()
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
