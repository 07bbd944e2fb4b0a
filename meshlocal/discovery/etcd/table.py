"""What etcd holds of instances, and which services a change concerns. Nothing here waits."""

from __future__ import annotations

from typing import NamedTuple

from meshlocal.discovery.source import Instances
from meshlocal.policy.model import EndpointKey, Instance, ServiceKey
from meshlocal.wire.etcd_keys import InstanceKey


class _Held(NamedTuple):
    """What a key holds. No instance: what it holds cannot be read, and nothing that could was held before."""

    revision: int
    instance: Instance | None


class _Service:
    """The keys of one service.

    Attributes:
        names: what each key holds.
        current: instances by endpoint. Of several keys for one endpoint, that which was written last counts.
    """

    __slots__ = ("_owners", "current", "names")

    def __init__(self) -> None:
        self.names: dict[str, _Held] = {}
        self.current: dict[EndpointKey, Instance] = {}
        self._owners: dict[EndpointKey, dict[str, int]] = {}
        """For each endpoint the keys that have it, and their revisions."""

    def put(self, name: str, held: _Held) -> None:
        self.remove(name)
        self.names[name] = held
        if held.instance is not None:
            key = held.instance.key
            self._owners.setdefault(key, {})[name] = held.revision
            self._choose(key)

    def remove(self, name: str) -> None:
        held = self.names.pop(name, None)
        if held is None or held.instance is None:
            return
        key = held.instance.key
        owners = self._owners[key]
        del owners[name]
        if owners:
            self._choose(key)
        else:
            del self._owners[key]
            del self.current[key]

    def forget_revisions(self) -> None:
        self.names = {name: held._replace(revision=0) for name, held in self.names.items()}
        self._owners = {key: dict.fromkeys(owners, 0) for key, owners in self._owners.items()}

    def _choose(self, key: EndpointKey) -> None:
        owners = self._owners[key]
        latest = self.names[max(owners, key=lambda name: (owners[name], name))].instance
        assert latest is not None
        self.current[key] = latest


class EtcdTable:
    """All of it.

    Attributes:
        refused: keys whose value cannot be read, by why.
    """

    def __init__(self) -> None:
        self._services: dict[ServiceKey, _Service] = {}
        self._touched: set[ServiceKey] = set()
        self._seen: set[InstanceKey] | None = None
        self.refused: dict[InstanceKey, str] = {}

    def put(self, key: InstanceKey, revision: int, instance: Instance) -> None:
        """A key holds this, as of a revision; what is older than what is held counts for nothing."""
        if self._is_new(key, revision):
            self.refused.pop(key, None)
            self._put(key, _Held(revision, instance))

    def refuse(self, key: InstanceKey, revision: int, problem: str) -> str | None:
        """A key holds what cannot be read: what it said before stays.

        Returns:
            What is served in its place, for the log; None: that was said already, or is old.
        """
        if not self._is_new(key, revision):
            return None
        told = self.refused.get(key) == problem
        self.refused[key] = problem
        service = self._services.get(key.service)
        before = service.names.get(key.name) if service is not None else None
        kept = before.instance if before is not None else None
        self._put(key, _Held(revision, kept))
        if told:
            return None
        return "what it said before" if kept is not None else "nothing of it"

    def remove(self, key: InstanceKey, revision: int) -> None:
        """A key is gone, as of a revision."""
        service = self._services.get(key.service)
        held = service.names.get(key.name) if service is not None else None
        if service is not None and held is not None and held.revision <= revision:
            self._remove(service, key)

    def forget_revisions(self) -> None:
        """What is held is older than whatever comes."""
        for service in self._services.values():
            service.forget_revisions()

    def begin_list(self) -> None:
        """All keys follow, each by `put` or `refuse`."""
        self._seen = set()

    def end_list(self, revision: int) -> None:
        """Those were all, as of this revision: others that are not newer are gone."""
        seen, self._seen = self._seen or set(), None
        for name, service in list(self._services.items()):
            for each, held in list(service.names.items()):
                key = InstanceKey(name, each)
                if key not in seen and held.revision <= revision:
                    self._remove(service, key)

    def take(self) -> dict[ServiceKey, Instances | None]:
        """The services that changed since it was asked last, as they are now; None: no key is left of it."""
        found: dict[ServiceKey, Instances | None] = {}
        for name in self._touched:
            service = self._services.get(name)
            found[name] = dict(service.current) if service is not None else None
        self._touched.clear()
        return found

    def _is_new(self, key: InstanceKey, revision: int) -> bool:
        if self._seen is not None:
            self._seen.add(key)
        service = self._services.get(key.service)
        held = service.names.get(key.name) if service is not None else None
        return held is None or held.revision < revision

    def _put(self, key: InstanceKey, held: _Held) -> None:
        self._services.setdefault(key.service, _Service()).put(key.name, held)
        self._touched.add(key.service)

    def _remove(self, service: _Service, key: InstanceKey) -> None:
        service.remove(key.name)
        self.refused.pop(key, None)
        self._touched.add(key.service)
        if not service.names:
            del self._services[key.service]
