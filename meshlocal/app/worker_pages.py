"""The admin pages of a proxy of several processes: its own, those that add all workers up, and those of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import trio

from meshlocal.admin.messages import Request, Response
from meshlocal.admin.metrics_page import metrics_response
from meshlocal.admin.server import AsyncRoute, Route
from meshlocal.app.common_pages import config_view, json_response, livez, plain, readyz
from meshlocal.app.followed_pages import LIVE, TAP
from meshlocal.app.log_page import LOG, log_page
from meshlocal.app.worker_channel import Measure, Metrics, Show
from meshlocal.app.worker_metrics import Fixed, Totals, WorkersCollector
from meshlocal.app.workers import Supervisor, Worker, WorkerGoneError
from meshlocal.net.slices import in_slices
from meshlocal.policy.exposure import of_proxy


def worker_routes(supervisor: Supervisor) -> Mapping[str, Route | AsyncRoute]:
    """Every page, by path."""
    pages = _WorkerPages(supervisor)
    return {
        "/": pages.of_one,
        "/livez": livez,
        "/readyz": lambda request: readyz(supervisor.readiness),
        "/metrics": pages.metrics,
        "/config": lambda request: json_response(config_view(supervisor.config)),
        "/services": pages.of_one,
        LIVE: pages.of_one,
        TAP: pages.of_all,
        LOG: pages.log,
        "/explain": pages.of_one,
        "/workers": pages.workers,
    }


class _WorkerPages:
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._totals = Totals()
        supervisor.on_end = self._totals.forget

    async def metrics(self, request: Request) -> Response:
        """What all workers count, added up."""
        supervisor = self._supervisor
        measured: dict[Worker, Metrics] = await self._ask_all(Measure())
        # One that ended meanwhile was counted when it did, and another has its number by now.
        living = sorted(supervisor.workers.items())
        found = {number: measured[worker] for number, worker in living if worker in measured}
        collectors = [
            Fixed(self._totals.merge(found)),
            WorkersCollector(
                len(self._ready()), supervisor.count, supervisor.restarts, of_proxy(supervisor.config.proxy)
            ),
        ]
        return await in_slices(metrics_response(request, collectors))

    async def _ask_all(self, message: Measure | Show) -> dict[Worker, Any]:
        """What each worker that may be sent work answers, all asked at once; those that do not are left out."""
        answers: dict[Worker, Any] = {}

        async def ask(worker: Worker) -> None:
            with suppress(WorkerGoneError):
                answers[worker] = await worker.ask(message)

        async with trio.open_nursery() as nursery:
            for worker in self._ready():
                nursery.start_soon(ask, worker)
        return answers

    async def of_one(self, request: Request) -> Response:
        """A page of the worker that `?worker=` names, else of the first that may be sent work."""

        ready = self._ready()
        wanted = request.values("worker")
        if wanted:
            ready = [worker for worker in ready if str(worker.number) == wanted[0]]
        for worker in ready:
            try:
                response = await worker.ask(Show(request))
            except WorkerGoneError:
                continue
            assert isinstance(response, Response)
            return response
        return plain(503, f"no worker {wanted[0]} is ready" if wanted else "no worker is ready")

    async def of_all(self, request: Request) -> Response:
        """The lines that each worker's page has; or what one of them says, if none has lines."""
        answers: dict[Worker, Response] = await self._ask_all(Show(request))
        found = [each for each in answers.values() if each.status == 200]
        if not found:
            return next(iter(answers.values()), plain(503, "no worker is ready"))
        return found[0]._replace(body=b"".join(each.body for each in found))

    async def log(self, request: Request) -> Response:
        """What is logged, by this process; a change is one of all processes."""
        response = log_page(request)
        if request.method == "PUT" and response.status == 200:
            await self.of_all(request)
        return response

    def workers(self, request: Request) -> Response:
        """The workers, and what became of them."""
        supervisor = self._supervisor
        living = supervisor.workers
        return json_response(
            {
                "restarts": supervisor.restarts,
                "workers": [
                    {
                        "worker": number,
                        "pid": living[number].process.pid if number in living else None,
                        "ready": number in living and living[number].announced is not None,
                    }
                    for number in range(1, supervisor.count + 1)
                ],
            }
        )

    def _ready(self) -> list[Worker]:
        workers = self._supervisor.workers
        return [workers[number] for number in sorted(workers) if workers[number].announced is not None]
