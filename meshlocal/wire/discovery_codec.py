"""The discovery interface's messages, to and from the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import ip_address

from meshlocal.policy.model import (
    READY,
    Caller,
    Conditions,
    EndpointKey,
    Instance,
    ModelError,
    ServiceChange,
    ServiceKey,
    ServiceSnapshot,
    make_instance,
)
from meshlocal.policy.steps import STEP, Steps, finish
from meshlocal.wire.pb import discovery_pb2 as pb

OnBadInstance = Callable[[ServiceKey, ModelError], None]
"""Told of each instance in an answer that is left out, and why; the others are used."""


CALLER_TEXT = 253
"""Characters of each text that are kept of what a caller says of itself."""


def caller_to_message(caller: Caller) -> pb.Caller:
    """A caller as it travels."""
    return pb.Caller(name=caller.name, node=caller.node, software=caller.software)


def caller_from_message(message: pb.Caller) -> Caller:
    """A caller as it describes itself, cut to what is kept of it."""
    return caller_of(message.name, message.node, message.software)


def caller_of(name: str, node: str, software: str) -> Caller:
    """A caller by what it says of itself, cut to what is kept of it."""
    return Caller(*map(_told, (name, node, software)))


def _told(text: str) -> str:
    return "".join(char for char in text[:CALLER_TEXT] if char.isprintable())


def instance_to_message(instance: Instance) -> pb.Instance:
    """An instance as it travels. Conditions travel only where they are not the usual ones."""
    message = pb.Instance(endpoint=endpoint_to_message(instance.key))
    message.labels.labels.update(instance.labels)
    if instance.conditions != READY:
        conditions = instance.conditions
        message.conditions.ready = conditions.ready
        message.conditions.serving = conditions.serving
        message.conditions.terminating = conditions.terminating
    return message


def instance_from_message(message: pb.Instance) -> Instance:
    """An instance as a server sent it.

    Raises:
        ModelError: a field holds what no instance can have.
    """
    conditions = READY
    if message.HasField("conditions"):
        sent = message.conditions
        conditions = Conditions(
            ready=sent.ready if sent.HasField("ready") else True,
            serving=sent.serving if sent.HasField("serving") else True,
            terminating=sent.terminating,
        )
    endpoint = message.endpoint
    return make_instance(
        endpoint.address, endpoint.port, endpoint.port_name, message.labels.labels, conditions, endpoint.protocol
    )


def endpoint_to_message(key: EndpointKey) -> pb.NetworkEndpoint:
    """An endpoint as it travels; the protocol only where it is not TCP."""
    return pb.NetworkEndpoint(
        address=key.address,
        port=key.port,
        port_name=key.port_name,
        protocol="" if key.protocol == "tcp" else key.protocol,
    )


def endpoint_from_message(message: pb.NetworkEndpoint) -> EndpointKey:
    """The key that an endpoint stands for. Only its spelling is mended: it is compared with keys that were checked."""
    try:
        address = str(ip_address(message.address))
    except ValueError:
        address = message.address
    return EndpointKey(address, message.port, message.port_name, message.protocol or "tcp")


def snapshot_event(snapshot: ServiceSnapshot) -> pb.WatchInstancesResponse:
    """A service's whole state."""
    return pb.WatchInstancesResponse(
        snapshot=pb.ServiceSnapshot(
            service=snapshot.service,
            version=snapshot.version,
            instances=[instance_to_message(instance) for instance in snapshot.instances.values()],
            unknown=snapshot.unknown,
        )
    )


def change_event(change: ServiceChange) -> pb.WatchInstancesResponse:
    """What turns one version into another. A change to or from an unknown service travels as a snapshot instead."""
    return pb.WatchInstancesResponse(
        change=pb.ServiceChange(
            service=change.service,
            base_version=change.base_version,
            version=change.version,
            upserted=[instance_to_message(instance) for instance in change.upserted],
            removed=[endpoint_to_message(key) for key in change.removed],
        )
    )


def heartbeat_event(interval: float, pending: Iterable[ServiceKey]) -> pb.WatchInstancesResponse:
    """A heartbeat: it promises an event at least every `interval` seconds, and names what is not known yet."""
    return pb.WatchInstancesResponse(
        heartbeat=pb.Heartbeat(interval_ms=max(1, round(interval * 1000)), pending=sorted(pending))
    )


NAMES = 1000
"""Services that one event names."""


def lineage_event(servers: Iterable[str]) -> pb.WatchServicesResponse:
    """Whom a server learns from: its own id first."""
    return pb.WatchServicesResponse(lineage=pb.Lineage(servers=servers))


def services_events(
    added: Sequence[ServiceKey], removed: Sequence[ServiceKey], *, complete: bool
) -> Iterator[pb.WatchServicesResponse]:
    """What becomes of the services that a watcher knows, in events of `NAMES` names at most: only the last may say that
    it is complete. There is one at least."""
    names = [*((each, True) for each in added), *((each, False) for each in removed)]
    for start in range(0, max(len(names), 1), NAMES):
        part = names[start : start + NAMES]
        yield pb.WatchServicesResponse(
            change=pb.ServicesChange(
                added=[name for name, is_added in part if is_added],
                removed=[name for name, is_added in part if not is_added],
                complete=complete and start + NAMES >= len(names),
            )
        )


def services_heartbeat(interval: float) -> pb.WatchServicesResponse:
    """Nothing changed, and there will be an event at least every `interval` seconds."""
    return pb.WatchServicesResponse(heartbeat=pb.Heartbeat(interval_ms=max(1, round(interval * 1000))))


def snapshot_from_message(message: pb.ServiceSnapshot, on_bad: OnBadInstance) -> ServiceSnapshot:
    """A service's whole state as a server sent it."""
    return finish(snapshot_in_steps(message, on_bad))


def snapshot_in_steps(message: pb.ServiceSnapshot, on_bad: OnBadInstance) -> Steps[ServiceSnapshot]:
    """`snapshot_from_message` in steps: no step reads more than a few instances."""
    service = ServiceKey(message.service)
    by_key: dict[EndpointKey, Instance] = {}
    yield from _read(service, message.instances, on_bad, lambda instance: by_key.setdefault(instance.key, instance))
    return ServiceSnapshot(service, message.version, by_key, message.unknown)


def change_from_message(message: pb.ServiceChange, on_bad: OnBadInstance) -> ServiceChange:
    """A change as a server sent it. What it names twice, or both removes and upserts, is as `apply` reads it."""
    return finish(change_in_steps(message, on_bad))


def change_in_steps(message: pb.ServiceChange, on_bad: OnBadInstance) -> Steps[ServiceChange]:
    """`change_from_message` in steps: no step reads more than a few instances."""
    service = ServiceKey(message.service)
    upserted: dict[EndpointKey, Instance] = {}
    yield from _read(service, message.upserted, on_bad, lambda instance: upserted.update({instance.key: instance}))
    # Each once: a picker takes the change as it is. What is upserted is there afterwards, removed or not.
    removed = dict.fromkeys(map(endpoint_from_message, message.removed))
    return ServiceChange(
        service,
        message.base_version,
        message.version,
        tuple(upserted.values()),
        tuple(key for key in removed if key not in upserted),
    )


def _read(
    service: ServiceKey,
    messages: Sequence[pb.Instance],
    on_bad: OnBadInstance,
    add: Callable[[Instance], object],
) -> Steps[None]:
    for position, message in enumerate(messages):
        try:
            instance = instance_from_message(message)
        except ModelError as error:
            on_bad(service, ModelError(f"instances[{position}].{error.where}", error.what))
        else:
            add(instance)
        if position % STEP == STEP - 1:
            yield
