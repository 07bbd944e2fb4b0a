"""`get` and `explain`: answers as tables, JSON or YAML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Any, NoReturn
from urllib.parse import quote

import click
import yaml

from meshlocal.app.explaining import bypass_lines, explain_view, socket_lines
from meshlocal.app.query import (
    QueryError,
    fetch_all,
    fetch_instances,
    list_clusters,
    list_services,
    list_watchers,
    list_zones,
    watch_instances,
)
from meshlocal.app.views import instance_view, nodes_view
from meshlocal.cli.admin import NO_PROXY, Admin
from meshlocal.cli.instances import Changes, Output, columns, row
from meshlocal.cli.tables import table
from meshlocal.client.place import locality_of
from meshlocal.policy.config import ProxyConfig
from meshlocal.policy.hot_nodes import hot_nodes
from meshlocal.policy.locality import Selector
from meshlocal.policy.model import ModelError, ServiceKey, ServiceSnapshot, parse_service_key
from meshlocal.policy.picker import Cursors, Picker, explain_reason
from meshlocal.policy.steps import finish

_SHOWN = 5
_LISTS = {"services": list_services, "zones": list_zones, "clusters": list_clusters}


def get(what: str, service: str | None, config: ProxyConfig, output: Output) -> str:
    """What discovery knows.

    Args:
        what: services, instances, nodes, zones, clusters, proxies or hot-nodes.
        service: of which the instances are; None: of all.
        config: whom to ask.
        output: what the answer looks like.

    Raises:
        QueryError: nobody could answer.
    """
    discovery = config.discovery
    if what in _LISTS:
        rows = _LISTS[what](discovery)
        header = {"services": ("NAME", "INSTANCES"), "zones": ("NAME",), "clusters": ("NAME", "ZONE")}[what]
        return _as(output, rows, lambda: table(header, (list(row.values()) for row in rows)))
    if what == "nodes":
        nodes = nodes_view(fetch_all(discovery))
        return _as(output, nodes, lambda: _nodes(nodes, wide=output == "wide"))
    if what == "proxies":
        watchers, left_out = list_watchers(discovery)
        return _as(output, watchers, lambda: _proxies(watchers, left_out, wide=output == "wide"))
    if what == "hot-nodes":
        watchers, _ = list_watchers(discovery)
        callers = [(each["node"] or "", each["services"]) for each in watchers]
        found, total = finish(hot_nodes(callers, fetch_all(discovery)))
        hot = [each._asdict() for each in found]
        return _as(output, hot, lambda: _hot_nodes(hot, total))
    if service is None:
        views = [_instances_view(snapshot) for snapshot in fetch_all(discovery)]
        return _as(output, views, lambda: _instances(views, wide=output == "wide", of_all=True))
    view = _instances_view(fetch_instances(discovery, _service_key(service, config)))
    return _as(output, view, lambda: _instances([view], wide=output == "wide", of_all=False))


def _instances_view(snapshot: ServiceSnapshot) -> dict[str, Any]:
    instances = [instance_view(snapshot.instances[key]) for key in sorted(snapshot.instances)]
    return {"service": snapshot.service, "version": snapshot.version or None, "instances": instances}


def _instances(views: Iterable[Mapping[str, Any]], *, wide: bool, of_all: bool) -> str:
    rows = (((view["service"],) * of_all + row(each, wide=wide)) for view in views for each in view["instances"])
    return table(("SERVICE",) * of_all + columns(wide=wide), rows)


def _nodes(nodes: Iterable[Mapping[str, Any]], *, wide: bool) -> str:
    """A node's services, each with its number of instances there; as many as a line holds, unless `wide`."""
    rows = []
    for node in nodes:
        services = [f"{name} {count}" for name, count in node["services"].items()]
        shown = services if wide else services[:_SHOWN]
        more = [f"and {len(services) - len(shown)} more"] if len(services) > len(shown) else []
        rows.append((node["name"], node["zone"], node["instances"], ", ".join([*shown, *more])))
    return table(("NODE", "ZONE", "INSTANCES", "SERVICES"), rows)


def _proxies(watchers: Iterable[Mapping[str, Any]], left_out: int, *, wide: bool) -> str:
    rows = [
        (
            each["name"],
            each["node"],
            each["address"],
            each["software"],
            f"{each['behind']:.1f}s" if each["behind"] else "no",
            _age(each["age"]),
            _followed(each["services"], wide=wide),
        )
        for each in watchers
    ]
    shown = table(("NAME", "NODE", "ADDRESS", "SOFTWARE", "BEHIND", "AGE", "SERVICES"), rows)
    return f"{shown}\n… and {left_out} more" if left_out else shown


def _followed(services: Mapping[str, str | None], *, wide: bool) -> str:
    """Services, with `wide` all of them, each with the beginning of the version that was told."""
    if wide:
        return ", ".join(f"{name}@{(version or 'nothing')[:12]}" for name, version in services.items())
    names = list(services)
    return ", ".join([*names[:_SHOWN], *([f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else [])])


def _age(seconds: int) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _hot_nodes(rows: Sequence[Mapping[str, Any]], total: int) -> str:
    shown = table(
        ("SERVICE", "NODE", "CALLERS", "INSTANCES"),
        ((each["service"], each["node"], each["callers"], each["instances"]) for each in rows),
    )
    return f"{shown}\n… and {total - len(rows)} more" if total > len(rows) else shown


def watch(service: str, config: ProxyConfig, output: Output, rng: Random) -> NoReturn:
    """Print the service's instances, and from then on what becomes of them, until nobody reads it.

    Raises:
        BrokenPipeError: nobody reads it.
        QueryError: the service's name is none.
    """
    changes = Changes(output)
    unknown = False

    def tell(snapshot: ServiceSnapshot) -> None:
        nonlocal unknown
        if snapshot.unknown and not unknown:
            click.echo(f"meshlocal: no registry knows a service {snapshot.service!r}; waiting for one", err=True)
        unknown = snapshot.unknown
        if text := changes.text(snapshot):
            click.echo(text)

    watch_instances(config.discovery, _service_key(service, config), rng, tell)


def explain(service: str, config: ProxyConfig, output: Output) -> str:
    """The plan of the next request of a proxy that stands where the config says (R2).

    Raises:
        QueryError: nobody could answer.
    """
    key = _service_key(service, config)
    snapshot = fetch_instances(config.discovery, key)
    picker = Picker.build(Selector(locality_of(config), config.service(key).port_name), snapshot)
    view = explain_view(picker, Cursors(Random()))
    note = "Each tier's rotation starts anywhere (O4): ask a running proxy with --proxy for its own next plan."
    return _as(output, view, lambda: f"{_explanation(view)}\n\n{note}")


def explain_running(service: str, admin: Admin, output: Output) -> tuple[str, bool]:
    """The plan of a running proxy's very next request.

    Args:
        service: its name.
        admin: of the proxy.
        output: what the answer looks like.

    Returns:
        The plan, and whether a registry knows the service.

    Raises:
        QueryError: the proxy could not be asked, or does not know the service.
    """
    answer = admin.get(f"/explain?service={quote(service)}")
    if answer.status != 200 and answer.word is not None:
        raise QueryError(f"{admin.address}: {answer.word}")
    try:
        view = json.loads(answer.body) if answer.status == 200 else None
    except ValueError:
        view = None
    if not isinstance(view, dict) or "plan" not in view:
        raise QueryError(NO_PROXY.format(admin.address))
    return _as(output, view, lambda: _explanation(view)), bool(view["known"])


def _explanation(view: Mapping[str, Any]) -> str:
    node = view["node"] or "unknown"
    sizes = ", ".join(f"{name} {size}" for name, size in view["tiers"].items())
    passed = Counter(step["passed_over"] for step in view["plan"] if step.get("passed_over"))
    but = f" ({', '.join(f'{count} {why}' for why, count in sorted(passed.items()))})" if passed else ""
    lines = [f"service {view['service']}, seen from node {node}; usable instances by tier: {sizes}{but}"]
    lines += _staleness(view.get("discovery"))
    lines += bypass_lines(view.get("bypass"))
    lines += socket_lines(view.get("sockets"))
    if not view["known"]:
        lines.append("no registry knows this service")
    if view["plan"]:
        rows = (
            (
                step["step"],
                step["instance"],
                step["node"],
                step["tier"],
                _why(step, view),
            )
            for step in view["plan"]
        )
        lines += ["", table(("STEP", "INSTANCE", "NODE", "TIER", "WHY"), rows)]
    else:
        lines.append("no usable instance: a request is refused")
    if view["left_out"]:
        rows_out = ((each["instance"], each["node"], each["why"]) for each in view["left_out"])
        lines += ["", "never tried:", table(("INSTANCE", "NODE", "WHY"), rows_out)]
    return "\n".join(lines)


def _staleness(discovery: Mapping[str, Any] | None) -> list[str]:
    """What a running proxy says of how old its knowledge is; nothing if that is current."""
    if discovery is None or (discovery["connected"] and not discovery["from_cache_file"]):
        return []
    age = discovery["age_seconds"]
    source = "from the cache file" if discovery["from_cache_file"] else "stale"
    old = f", {age:g} s old" if age is not None else ""
    why = f": {discovery['problem']}" if discovery["problem"] else ""
    return [f"{source}{old}; discovery is {'connected' if discovery['connected'] else 'away'}{why}"]


def _why(step: Mapping[str, Any], view: Mapping[str, Any]) -> str:
    nearest = view["prefer"][0]
    why = explain_reason(step["reason"], nearest) if step["reason"] is not None else f"same {nearest}"
    if (passed := step.get("passed_over")) is not None:
        why += f"; {passed}: only after the others"
    return f"{why}; last resort: it is terminating" if step["last_resort"] else why


def _service_key(text: str, config: ProxyConfig) -> ServiceKey:
    try:
        return config.service_key(parse_service_key(text))
    except ModelError as error:
        raise QueryError(str(error)) from None


def _as(output: Output, value: object, for_people: Callable[[], str]) -> str:
    if output == "json":
        return json.dumps(value, indent=2, ensure_ascii=False)
    if output == "yaml":
        text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
        return text.rstrip()
    return for_people()
