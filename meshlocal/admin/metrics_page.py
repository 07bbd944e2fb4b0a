"""The `/metrics` page: what collectors say, in the format that the client asks for.

prometheus_client brings parts of http.server and email along, some 3 MB: it is imported when somebody first asks for
metrics, so that a sidecar that nobody scrapes never holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from meshlocal.admin.messages import Request, Response
from meshlocal.admin.server import AsyncRoute
from meshlocal.net.late_import import import_late
from meshlocal.net.slices import in_slices
from meshlocal.policy.steps import Steps

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from prometheus_client.registry import Collector


_LIBRARY = ("prometheus_client.exposition", "prometheus_client.core", "prometheus_client.openmetrics.exposition")


async def import_metrics(modules: Iterable[str] = ()) -> None:
    """Import the library, and these modules that need it."""
    await import_late((*_LIBRARY, *modules))


def metrics_route(collectors: Callable[[], Iterable[Collector]], modules: Iterable[str] = ()) -> AsyncRoute:
    """A route to collectors' metrics: OpenMetrics where `Accept` asks for it, else Prometheus text.

    Each `name[]` in the query lets one metric through, by the name of one of its samples (`requests_total`).

    Args:
        collectors: makes the collectors, once.
        modules: the names of those that it imports for that.
    """
    made: list[Collector] = []

    async def route(request: Request) -> Response:
        await import_metrics(modules)
        if not made:
            made.extend(collectors())
        return await in_slices(metrics_response(request, made))

    return route


def metrics_response(request: Request, collectors: Iterable[Collector]) -> Steps[Response]:
    """What the collectors say, as the request asks for it (see `metrics_route`), in steps.

    The library writes a whole registry at once, which takes a large one tens of milliseconds. So it is given a part of
    one metric at a time.
    """
    from prometheus_client.exposition import choose_encoder

    accept = request.headers.get("accept", "")
    try:
        # It puts the version asked for into its answer's header.
        encoder, content_type = choose_encoder(accept if accept.isascii() else "")
    except (TypeError, ValueError):  # what it raises for a version that is none
        encoder, content_type = choose_encoder("")
    names = frozenset(request.values("name[]"))
    out: list[bytes] = []
    for collector in collectors:
        for metric in _collect(collector):
            yield
            if metric is None:
                continue
            if names:
                metric.samples = [sample for sample in metric.samples if sample.name in names]
                if not metric.samples:
                    continue
            yield from _write(metric, encoder, out)
    out.append(_END if content_type.startswith("application/openmetrics") else b"")
    return Response(200, content_type, b"".join(out))


@runtime_checkable
class InSteps(Protocol):
    """A collector that need not make a metric at once."""

    def collect_in_steps(self) -> Iterator[Metric | None]:
        """As `collect`, with None where others may have their turn."""
        ...


def _collect(collector: Collector) -> Iterable[Metric | None]:
    return collector.collect_in_steps() if isinstance(collector, InSteps) else collector.collect()


_END = b"# EOF\n"
_SAMPLES = 100
"""Samples that a step writes: about a millisecond's worth."""


def _write(metric: Metric, encoder: Callable[[Any], bytes], out: list[bytes]) -> Steps[None]:
    samples = metric.samples
    for start in range(0, max(len(samples), 1), _SAMPLES):
        metric.samples = samples[start : start + _SAMPLES]
        text = encoder(_One(metric)).removesuffix(_END)
        if start:
            # The lines that tell what the metric is stand before its first samples only.
            text = b"".join(line for line in text.splitlines(keepends=True) if not line.startswith(b"# "))
        out.append(text)
        yield


class _One:
    """A registry of one metric."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        yield self._metric


def measure(collectors: Iterable[Collector]) -> Steps[list[Metric]]:
    """What the collectors say, in steps."""
    found: list[Metric] = []
    for collector in collectors:
        for metric in _collect(collector):
            if metric is not None:
                found.append(metric)
            yield
    return found
