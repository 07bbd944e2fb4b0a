"""What a cluster's slices mean, written a second time, as plainly as can be: what the product's tables are held to."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

SERVICE = "kubernetes.io/service-name"
ZONE, REGION = "topology.kubernetes.io/zone", "topology.kubernetes.io/region"


def meaning(slices: Any, nodes: Any = None) -> Any:
    """Service → (address, port, port name) → (conditions, node, zone, region), from slices and nodes' labels by key."""
    found: dict[str, dict[Any, Any]] = {}
    for (namespace, _), item in sorted(slices.items()):
        service = (item["metadata"].get("labels") or {}).get(SERVICE, "")
        name = f"{service}.{namespace}"
        if not service or not re.fullmatch(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?", name):
            continue
        instances = found.setdefault(name, {})
        for endpoint in item.get("endpoints") or []:
            for address in endpoint["addresses"][:1]:
                for port in item.get("ports") or []:
                    if item["addressType"] == "FQDN" or not _usable(address, item["addressType"], port):
                        continue
                    key = (str(ipaddress.ip_address(address)), port["port"], port.get("name") or "")
                    value = _value(endpoint, nodes or {})
                    if key not in instances or _rank(value) > _rank(instances[key]):
                        instances[key] = value
    return found


def _usable(address: Any, family: Any, port: Any) -> Any:
    if (port.get("protocol") or "TCP") != "TCP" or not 1 <= (port.get("port") or 0) <= 65535:
        return False
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return f"IPv{parsed.version}" == family and not parsed.is_unspecified and not parsed.is_multicast


def _value(endpoint: Any, nodes: Any) -> Any:
    conditions = endpoint.get("conditions") or {}
    ready = conditions.get("ready") is not False
    serving = conditions.get("serving")
    serving = ready if serving is None else serving
    node = (endpoint.get("nodeName") or "").strip()
    labels = nodes.get(node, {}) if node else {}
    zone = endpoint.get("zone") or labels.get(ZONE, "")
    return (ready, serving, conditions.get("terminating") is True), node, zone, labels.get(REGION, "")


def _rank(value: Any) -> Any:
    (ready, serving, terminating), node, _, _ = value
    return (not terminating, ready, serving, bool(node))


def read(services: Any) -> Any:
    """What was published, in the same terms."""
    return {
        service: {
            (key.address, key.port, key.port_name): (
                (each.conditions.ready, each.conditions.serving, each.conditions.terminating),
                each.labels.get("node", ""),
                each.labels.get("zone", ""),
                each.labels.get("region", ""),
            )
            for key, each in instances.items()
        }
        for service, instances in services.items()
    }
