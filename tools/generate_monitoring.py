"""Write what deploy/monitoring has beside its sources, or with --check say what is stale.

That is the dashboard for Grafana, and the rules of rules.yaml as a PrometheusRule.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import ReduceDataOptions, StackingConfig, VizLegendOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
    VariableSort,
)

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "monitoring"

_FAILED = "failed|no_instance|deadline|limited|error"
"""Outcomes of requests that a service's owner would call failures (docs/errors.md)."""

_SOURCE = DataSourceRef("prometheus", "${datasource}")
_RATE = "[$__rate_interval]"
_CHOSEN = 'service=~"$service"'


class Drawing(NamedTuple):
    """A panel.

    Attributes:
        title: what it shows.
        why: what it is for, and what to do about it.
        queries: PromQL by what the series are called.
        unit: Grafana's word for it.
        number: it is the latest value, with thresholds (value and colour), rather than a line over time.
        stacked: the lines add up.
        width: of 24.
    """

    title: str
    why: str
    queries: Mapping[str, str]
    unit: str = "short"
    number: tuple[tuple[float | None, str], ...] = ()
    stacked: bool = False
    width: int = 8


def _share(part: str, whole: str, by: str = "") -> str:
    """The rate of what `part` selects of requests, as a share of that of `whole`; nought where there is no part."""
    grouped = f"sum by ({by}) " if by else "sum"
    of_whole = f"{grouped}(rate(meshlocal_requests_total{{{whole}}}{_RATE}))"
    return f"({grouped}(rate(meshlocal_requests_total{{{part}}}{_RATE})) or {of_whole} * 0) / {of_whole}"


def _quantiles(metric: str) -> dict[str, str]:
    return {
        f"p{share:g} {{{{tier}}}}": f"histogram_quantile({share / 100:g},"
        f" sum by (tier, le) (rate({metric}_bucket{{{_CHOSEN}}}{_RATE})))"
        for share in (50, 95, 99)
    }


_GOOD, _BAD, _WORSE = "green", "orange", "red"
_NONE = ((None, _GOOD), (1.0, _BAD))
_FAILURES = f'{_CHOSEN},outcome=~"{_FAILED}"'
_LOCAL = f'{_CHOSEN},reason="",tier!=""'

ROWS: Mapping[str, tuple[Drawing, ...]] = {
    "Requests": (
        Drawing(
            "Success rate",
            "Requests and connections that did not fail anywhere, over the chosen time.",
            {"": f"1 - {_share(_FAILURES, _CHOSEN)}"},
            "percentunit",
            ((None, _WORSE), (0.99, _BAD), (0.999, _GOOD)),
            width=4,
        ),
        Drawing(
            "Stays on its node",
            "Requests that an instance of the first tier took. The others have a reason, below.",
            {"": _share(_LOCAL, _CHOSEN)},
            "percentunit",
            ((None, _BAD), (0.9, _GOOD)),
            width=4,
        ),
        Drawing(
            "Rate",
            "Requests (HTTP) and connections (TCP) that ended, a second.",
            {"{{service}}": f"sum by (service) (rate(meshlocal_requests_total{{{_CHOSEN}}}{_RATE}))"},
            "reqps",
        ),
        Drawing(
            "Failures",
            "By how they ended: docs/errors.md has each word.",
            {
                "{{service}} {{outcome}}": "sum by (service, outcome)"
                f' (rate(meshlocal_requests_total{{{_CHOSEN},outcome!~"served|returned|client_left|drained"}}{_RATE}))'
            },
            "reqps",
            stacked=True,
        ),
        Drawing(
            "HTTP latency by tier",
            "From a request's head to its response's end. What local traffic gains is the distance between the tiers.",
            _quantiles("meshlocal_http_request_seconds"),
            "s",
            width=12,
        ),
        Drawing(
            "Time to connect by tier",
            "From an attempt to its connection.",
            _quantiles("meshlocal_connect_seconds"),
            "s",
            width=12,
        ),
    ),
    "Locality": (
        Drawing(
            "Local share",
            "The share of requests that stayed in the first tier.",
            {"{{service}}": _share(_LOCAL, _CHOSEN, "service")},
            "percentunit",
        ),
        Drawing(
            "Why requests left",
            "no_local: the node has no instance. local_failed, local_ejected: it has, and they fail. spill: they are"
            " full. node_unknown: the proxy does not know its node.",
            {
                "{{service}} {{reason}}": "sum by (service, reason)"
                f' (rate(meshlocal_requests_total{{{_CHOSEN},reason!=""}}{_RATE}))'
            },
            "reqps",
            stacked=True,
        ),
        Drawing(
            "Ejections",
            "Instances taken out, by what showed that they fail; and how many are out now.",
            {
                "{{service}} {{cause}}": "sum by (service, cause)"
                f" (rate(meshlocal_ejections_total{{{_CHOSEN}}}{_RATE}))",
                "{{service}} out": f"sum by (service) (meshlocal_instances_ejected{{{_CHOSEN}}})",
            },
        ),
        Drawing(
            "Stale sidecars",
            "Proxies that have heard of no discovery server for a minute, or never.",
            {
                "": "count(meshlocal_snapshot_age_seconds > 60 or meshlocal_snapshot_stale == 1)"
                " or count(meshlocal_snapshot_age_seconds) * 0"
            },
            number=_NONE,
            width=4,
        ),
        Drawing(
            "Do not know their node",
            "Proxies that keep nothing local: NODE_NAME is missing, or discovery spells it otherwise.",
            {"": "count(meshlocal_node_unknown == 1 or meshlocal_node_unmatched == 1) or count(meshlocal_ready) * 0"},
            number=_NONE,
            width=4,
        ),
        Drawing(
            "Age of what proxies know",
            "Seconds since each last heard that it is current.",
            {"{{instance}}": "topk(10, meshlocal_snapshot_age_seconds)"},
            "s",
        ),
        Drawing(
            "Instances by tier",
            "What the proxies see, on average.",
            {"{{service}} {{tier}}": f"avg by (service, tier) (meshlocal_instances{{{_CHOSEN}}})"},
        ),
    ),
    "Attempts": (
        Drawing(
            "Attempts for each request",
            "1 while nothing fails.",
            {
                "{{service}}": f"sum by (service) (rate(meshlocal_attempts_total{{{_CHOSEN}}}{_RATE}))"
                f" / sum by (service) (rate(meshlocal_requests_total{{{_CHOSEN}}}{_RATE}))"
            },
        ),
        Drawing(
            "Attempts that failed",
            "By tier, and how.",
            {
                "{{tier}} {{outcome}}": "sum by (tier, outcome)"
                f' (rate(meshlocal_attempts_total{{{_CHOSEN},outcome!~"connected|answered"}}{_RATE}))'
            },
            "reqps",
            stacked=True,
        ),
        Drawing(
            "Refused by limits, and waiting",
            "Requests beyond a limit; clients that wait for an instance.",
            {
                "{{limit}}": f"sum by (limit) (rate(meshlocal_limit_refused_total{_RATE}))",
                "waiting": f"sum(meshlocal_requests_waiting{{{_CHOSEN}}})",
            },
        ),
        Drawing(
            "Open connections",
            "With an instance.",
            {"{{service}}": f"sum by (service) (meshlocal_connections_open{{{_CHOSEN}}})"},
        ),
        Drawing(
            "HTTP responses",
            "By the hundreds of their status.",
            {"{{status}}": f"sum by (status) (rate(meshlocal_http_responses_total{{{_CHOSEN}}}{_RATE}))"},
            "reqps",
            stacked=True,
        ),
        Drawing(
            "Bytes",
            "To instances (sent), and from them (received).",
            {"{{direction}}": f"sum by (direction) (rate(meshlocal_bytes_total{{{_CHOSEN}}}{_RATE}))"},
            "Bps",
        ),
    ),
    "Discovery and processes": (
        Drawing(
            "Sources that cannot be followed",
            "Registries with a problem; what they said before stays served.",
            {"": "count(meshlocal_source_healthy == 0) or count(meshlocal_source_healthy) * 0"},
            number=_NONE,
            width=4,
        ),
        Drawing(
            "Proxies that follow",
            "Watches under way on the discovery servers.",
            {"": "sum(meshlocal_watchers)"},
            number=((None, _GOOD),),
            width=4,
        ),
        Drawing(
            "Changes",
            "Of instances, and what was told of them, a second.",
            {
                "changes": f"sum(rate(meshlocal_changes_total{_RATE}))",
                "events sent": f"sum(rate(meshlocal_events_sent_total{_RATE}))",
            },
        ),
        Drawing(
            "Memory",
            "Resident, of each process.",
            {"{{instance}}": "topk(10, meshlocal_memory_bytes)"},
            "bytes",
        ),
    ),
}


def dashboard() -> str:
    """The dashboard, as Grafana imports it."""
    made = (
        builders.Dashboard("meshlocal")
        .uid("meshlocal")
        .description("Whether traffic stays on its node, why it did not, and whether anything is wrong.")
        .tags(["meshlocal"])
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(
            builders.QueryVariable("service")
            .label("Service")
            .datasource(_SOURCE)
            .query("label_values(meshlocal_requests_total, service)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    number = 0
    for title, drawings in ROWS.items():
        made = made.with_row(builders.Row(title))
        for drawing in drawings:
            number += 1
            made = made.with_panel(_panel(drawing, number))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _panel(drawing: Drawing, number: int) -> timeseries.Panel | stat.Panel:
    panel: timeseries.Panel | stat.Panel
    if drawing.number:
        steps = [Threshold(value, colour) for value, colour in drawing.number]
        thresholds = builders.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
        panel = stat.Panel().reduce_options(ReduceDataOptions().calcs(["lastNotNull"])).thresholds(thresholds)
    else:
        legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
        panel = timeseries.Panel().legend(legend.show_legend(True).calcs([])).min(0).fill_opacity(10)
        if drawing.stacked:
            panel = panel.stacking(StackingConfig().mode(StackingMode.NORMAL).group("A"))
    panel = panel.id(number).title(drawing.title).description(drawing.why).datasource(_SOURCE)
    panel = panel.unit(drawing.unit).height(8).span(drawing.width)
    for letter, (name, query) in zip("ABCDEF", drawing.queries.items(), strict=False):
        # Exemplars lead from a latency to a trace.
        target = (
            prometheus.Dataquery().ref_id(letter).datasource(_SOURCE).expr(query).legend_format(name or drawing.title)
        )
        panel = panel.with_target(target.exemplar("_bucket" in query))
    return panel


def prometheus_rule() -> str:
    """rules.yaml as an object of the Prometheus operator."""
    groups = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    made = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "meshlocal", "labels": {"app.kubernetes.io/name": "meshlocal"}},
        "spec": {"groups": groups},
    }
    return (
        "# Generated by tools/generate_monitoring.py from rules.yaml; `make reference` writes it again.\n"
        + yaml.dump(made, sort_keys=False, width=120)
    )


FILES = {"dashboard.json": dashboard, "prometheus-rule.yaml": prometheus_rule}


def stale(names: Iterable[str] = FILES) -> list[str]:
    """The files that are not what their sources make."""
    return [name for name in names if not (FOLDER / name).exists() or (FOLDER / name).read_text() != FILES[name]()]


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        if found := stale():
            sys.exit(f"stale in deploy/monitoring: {', '.join(found)}; run `make reference`")
        print(f"generated files of deploy/monitoring are current: {len(FILES)}")
        return
    for name, make in FILES.items():
        (FOLDER / name).write_text(make())
    panels = json.loads(dashboard())["panels"]
    print(f"wrote {', '.join(FILES)}: {sum(panel['type'] != 'row' for panel in panels)} panels")


if __name__ == "__main__":
    main()
