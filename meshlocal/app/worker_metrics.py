"""The metrics of one proxy that is several processes: added up, and never less than they were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar, Sample

from meshlocal.app.proxy_metrics import exposed
from meshlocal.app.worker_channel import Metrics
from meshlocal.policy.exposure import Exposure

MERGED_BY: Mapping[str, Callable[[Iterable[float]], float]] = {
    "meshlocal_build_info": max,
    "meshlocal_ready": min,
    "meshlocal_exposed": max,
    "meshlocal_certificate_not_after_timestamp_seconds": min,
    "meshlocal_node_unknown": max,
    "meshlocal_node_unmatched": max,
    "meshlocal_instances": max,
    "meshlocal_instances_left_out": max,
    "meshlocal_instances_ejected": max,
    "meshlocal_discovery_connected": min,
    "meshlocal_snapshot_age_seconds": max,
    "meshlocal_snapshot_stale": max,
    "meshlocal_snapshot_missing": max,
    "meshlocal_connections_open": sum,
    "meshlocal_instance_under_way": sum,
    "meshlocal_requests_waiting": sum,
    "meshlocal_connection_tasks_kept": sum,
    "meshlocal_http2_connections": sum,
    "meshlocal_http_clients_open": sum,
    "meshlocal_http_pool_connections": sum,
    "meshlocal_tasks": sum,
    "meshlocal_descriptors_open": sum,
    "meshlocal_memory_bytes": sum,
}
"""What is told of the workers' gauges: their sum, or the worst where they are of something that all of them see."""

_Key = tuple[str, tuple[tuple[str, str], ...]]


class Totals:
    """Adds up what workers count.

    A worker that ended takes its counts with it, and the one in its place begins at nothing; what was told of it last
    is kept, so that no sum ever falls.
    """

    def __init__(self) -> None:
        self._last: dict[int, dict[_Key, float]] = {}
        """What each living worker had counted when it was asked last."""
        self._ended: dict[_Key, float] = defaultdict(float)
        self._families: dict[str, Metric] = {}
        """Counters' families, without samples: what only a worker that ended had counted needs one, too."""

    def forget(self, worker: int) -> None:
        """Keep what a worker that has ended had counted, in the sums of all."""
        for key, value in self._last.pop(worker, {}).items():
            self._ended[key] += value

    def merge(self, measured: Mapping[int, Metrics]) -> Metrics:
        """The metrics of all.

        Args:
            measured: of each worker that answered, by its number. Those that did not count as when they last did.
        """
        gauges: dict[_Key, list[float]] = defaultdict(list)
        exemplars: dict[_Key, Exemplar] = {}
        order: dict[str, Metric] = {}
        for number, metrics in measured.items():
            counts = self._last[number] = {}
            for metric in metrics:
                if metric.name not in order:
                    order[metric.name] = _empty(metric)
                if metric.type == "gauge":
                    for sample in metric.samples:
                        gauges[_key(sample)].append(sample.value)
                else:
                    self._families.setdefault(metric.name, _empty(metric))
                    counts.update({_key(sample): sample.value for sample in metric.samples})
                    exemplars.update(
                        {_key(sample): sample.exemplar for sample in metric.samples if sample.exemplar is not None}
                    )
        sums: dict[_Key, float] = defaultdict(float, self._ended)
        for counts in self._last.values():
            for key, value in counts.items():
                sums[key] += value
        found = {name: _empty(metric) for name, metric in (self._families | order).items()}
        names = {sample: name for name, metric in found.items() for sample in _sample_names(metric)}
        for key, values in gauges.items():
            found[names[key[0]]].samples.append(Sample(key[0], dict(key[1]), MERGED_BY[key[0]](values)))
        for (name, labels), value in sums.items():
            shown = exemplars.get((name, labels))
            found[names[name]].samples.append(Sample(name, dict(labels), value, None, shown))
        return list(found.values())


class WorkersCollector(Collector):
    """What is known of the workers themselves.

    Args:
        ready: how many may be sent work.
        wanted: how many there are to be.
        restarts: how often one ended, and another took its place.
        exposures: what the process above them opens beyond this machine.
    """

    def __init__(self, ready: int, wanted: int, restarts: int, exposures: Iterable[Exposure]) -> None:
        self._ready, self._wanted, self._restarts = ready, wanted, restarts
        self._exposures = exposures

    def collect(self) -> Iterable[Metric]:
        """The metrics as they stand now."""
        workers = GaugeMetricFamily("meshlocal_workers", "With several workers: how many there are to be.")
        workers.add_metric([], self._wanted)
        ready = GaugeMetricFamily("meshlocal_workers_ready", "With several workers: how many may be sent work.")
        ready.add_metric([], self._ready)
        restarts = CounterMetricFamily("meshlocal_worker_restarts", "Workers that ended, and were replaced.")
        restarts.add_metric([], self._restarts)
        yield from (workers, ready, restarts, exposed(self._exposures))


class Fixed(Collector):
    """Metrics that were made before."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """The metrics that it was given."""
        return self._metrics


def _key(sample: Sample) -> _Key:
    return sample.name, tuple(sorted(sample.labels.items()))


def _empty(metric: Metric) -> Metric:
    return Metric(metric.name, metric.documentation, metric.type, metric.unit)


def _sample_names(metric: Metric) -> list[str]:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(metric.type, ("",))
    return [metric.name + suffix for suffix in suffixes]
