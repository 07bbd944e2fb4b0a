"""The order in which one request tries instances (behaviour rules L1 to O5, F3, R1).

Theory of operation. A `Picker` belongs to one snapshot of one service and never
changes. It holds the usable instances in groups, each sorted by endpoint: a
group for every tier, nearest first, then once more a group for every tier with
the terminating instances, which are used only when nothing else is left (L4).
A new snapshot makes a new picker, which shares the groups that did not change
and is swapped in whole.

What does change is in `Cursors`, which outlives pickers: for each group, the
instance that comes next. It remembers the instance, as a position within the
very group object that it was read from; when a later picker brings another
group object, the position is found again by bisection on the endpoint (O3). So
an instance that is added or removed elsewhere moves nothing, and one that is
removed under the cursor moves it to its successor.

A `Plan` is one request's walk: it takes the instance under the group's cursor
that it has not tried yet, and sets the cursor one past it (O2). Walks share the
cursors, so requests under way at the same time that fail on one dead instance
go on to different ones. Plans are lazy: one that succeeds at once costs one
cursor step, however many instances there are.

While some instances are ejected, or some tier may be full, plans get a `Gate`
that says of each instance whether it is to be passed over. A walk then goes
round the tiers up to three times: past those that the gate passes over; then
through those that were only full; last through the ejected ones (O5). No walk
leaves out anything.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import chain, islice
from typing import NamedTuple, Protocol

from meshlocal.policy.locality import LeftOut, Selector
from meshlocal.policy.model import EndpointKey, Instance, ServiceChange, ServiceSnapshot
from meshlocal.policy.steps import STEP, Steps, finish

_RUN = 8 * STEP


class Reason(StrEnum):
    """Why a request left the first tier (R1)."""

    NODE_UNKNOWN = "node_unknown"
    NO_LOCAL = "no_local"
    LOCAL_FAILED = "local_failed"
    LOCAL_EJECTED = "local_ejected"
    SPILL = "spill"


REASONS = {
    Reason.NODE_UNKNOWN: "the proxy does not know its {nearest}",
    Reason.NO_LOCAL: "no usable instance has the same {nearest}",
    Reason.LOCAL_FAILED: "only after every instance of the same {nearest} failed",
    Reason.LOCAL_EJECTED: "every instance of the same {nearest} is ejected",
    Reason.SPILL: "every instance of the same {nearest} is full",
}
"""The reasons in words, for people; `nearest` is the label that the first tier goes by."""


def explain_reason(reason: str, nearest: str) -> str:
    """A reason and what it means; one that is not known here, as from a newer server, as it is."""
    words = REASONS.get(Reason(reason)) if reason in set(Reason) else None
    return f"{reason}: {words.format(nearest=nearest)}" if words is not None else reason


class PassedOver(StrEnum):
    """Why a gate passes an instance over while others are left."""

    FULL = "full"
    EJECTED = "ejected"


class Gate(Protocol):
    """What a plan asks about each instance that it comes to, while not all of them are fit to be tried first."""

    def passed_over(self, place: tuple[str, int], tier: int) -> PassedOver | None:
        """Why the instance is to be tried later; None if now. The plan that is told None tries it."""
        ...

    def would_pass_over(self, place: tuple[str, int], tier: int) -> PassedOver | None:
        """Why a plan that is only looked at would try the instance later; None: it would not. Changes nothing."""
        ...


class RandomSource(Protocol):
    """What cursors need of `random.Random`."""

    def randrange(self, stop: int, /) -> int:
        """A number from 0 up to, not including, `stop`."""
        ...


class Pick(NamedTuple):
    """One step of a plan.

    Attributes:
        instance: what to try.
        tier: its tier's index; 0 is the nearest.
        reason: why the request left the first tier; None while it has not.
        last_resort: the instance is terminating (L4).
        passed_over: the instance had been passed over before, and comes now because nothing else is left.
    """

    instance: Instance
    tier: int
    reason: Reason | None
    last_resort: bool = False
    passed_over: PassedOver | None = None


class Group:
    """Instances of one tier, sorted by endpoint. Immutable."""

    __slots__ = ("instances", "keys")

    def __init__(self, keys: Sequence[EndpointKey], instances: Sequence[Instance]) -> None:
        self.keys = keys
        self.instances = instances

    def changed(self, removed: Sequence[EndpointKey], added: Sequence[Instance]) -> Group:
        """A copy without some keys and with some instances; each costs a bisection and a move of pointers."""
        keys, instances = list(self.keys), list(self.instances)
        for key in removed:
            at = bisect_left(keys, key)
            del keys[at], instances[at]
        for instance in added:
            at = bisect_left(keys, instance.key)
            keys.insert(at, instance.key)
            instances.insert(at, instance)
        return Group(keys, instances)


_EMPTY = Group((), ())


class Cursors:
    """Where the rotation of each group of one service stands. The only mutable part.

    Args:
        rng: gives each cursor its first position (O4).
    """

    __slots__ = ("_rng", "_stands")

    def __init__(self, rng: RandomSource) -> None:
        self._rng = rng
        self._stands: dict[int, tuple[Group, int]] = {}

    def position(self, number: int, group: Group) -> int:
        """The index, within a group that is not empty, of the instance that comes next."""
        stand = self._stands.get(number)
        if stand is None:
            at = self._rng.randrange(len(group.keys))
        elif stand[0] is group:
            return stand[1]
        else:
            at = bisect_left(group.keys, stand[0].keys[stand[1]])
            if at == len(group.keys):
                at = 0
        self._stands[number] = (group, at)
        return at

    def take(self, number: int, group: Group) -> int:
        """The index of the instance that comes next, in a group that is not empty; the cursor is set one past it."""
        stand = self._stands.get(number)
        at = stand[1] if stand is not None and stand[0] is group else self.position(number, group)
        following = at + 1 if at + 1 < len(group.keys) else 0
        if following != at:
            self._stands[number] = (group, following)
        return at

    def advance(self, number: int, group: Group, tried: int) -> None:
        """Set the cursor one past the instance just tried."""
        following = tried + 1
        self._stands[number] = (group, following if following < len(group.keys) else 0)


class Rotation(Protocol):
    """What a plan needs of `Cursors`."""

    def position(self, number: int, group: Group) -> int:
        """See `Cursors.position`."""
        ...

    def take(self, number: int, group: Group) -> int:
        """See `Cursors.take`."""
        ...

    def advance(self, number: int, group: Group, tried: int) -> None:
        """See `Cursors.advance`."""
        ...


class Picker:
    """The usable instances of one snapshot, in tiers. Immutable; built by `build` and `updated`.

    Attributes:
        selector: what decided on each instance.
        tiers: the tiers' names, nearest first.
        snapshot: what it was built from.
        matching: how many instances, usable or not, carry the proxy's own node as their label (L5).
    """

    __slots__ = ("_groups", "_leave", "_tiers", "matching", "selector", "snapshot", "tiers")

    def __init__(self, selector: Selector, snapshot: ServiceSnapshot, groups: Sequence[Group], matching: int) -> None:
        locality = selector.locality
        self.selector = selector
        self.tiers = selector.tiers
        self.snapshot = snapshot
        self.matching = matching
        self._groups = groups
        self._tiers = len(locality.tiers)
        if not locality.own(locality.prefer[0]):
            self._leave = Reason.NODE_UNKNOWN
        elif not groups[0].keys:
            self._leave = Reason.NO_LOCAL
        else:
            self._leave = Reason.LOCAL_FAILED

    @classmethod
    def build(cls, selector: Selector, snapshot: ServiceSnapshot) -> Picker:
        """Place every instance of a snapshot."""
        return finish(cls.in_steps(selector, snapshot))

    @classmethod
    def in_steps(cls, selector: Selector, snapshot: ServiceSnapshot) -> Steps[Picker]:
        """`build` in steps: no step places more than a few instances."""
        lists: list[list[Instance]] = [[] for _ in range(2 * len(selector.locality.tiers))]
        node = selector.locality.node
        matching = 0
        for position, instance in enumerate(snapshot.instances.values()):
            number = _group_number(selector, instance)
            if number is not None:
                lists[number].append(instance)
            if node and instance.node == node:
                matching += 1
            if position % STEP == STEP - 1:
                yield
        groups = []
        for members in lists:
            if len(members) > _RUN:
                # Sorted runs are merged by the sort below, which is most of the work that it spares.
                for start in range(0, len(members), _RUN):
                    members[start : start + _RUN] = sorted(members[start : start + _RUN], key=_key)
                    yield
            members.sort(key=_key)
            groups.append(Group([instance.key for instance in members], members) if members else _EMPTY)
        return cls(selector, snapshot, groups, matching)

    def updated(self, snapshot: ServiceSnapshot, change: ServiceChange) -> Picker:
        """The picker of the snapshot that `change` led to from this one's, sharing what did not change.

        Costs work for the changed instances and a copy of the pointers of the groups that they are in.
        """
        if 4 * (len(change.upserted) + len(change.removed)) > len(snapshot.instances):
            return Picker.build(self.selector, snapshot)
        before = self.snapshot.instances
        node = self.selector.locality.node
        matching = self.matching
        removed: dict[int, list[EndpointKey]] = {}
        added: dict[int, list[Instance]] = {}
        for key in chain(change.removed, (instance.key for instance in change.upserted)):
            old = before.get(key)
            if old is None:
                continue
            number = _group_number(self.selector, old)
            if number is not None:
                removed.setdefault(number, []).append(key)
            if node and old.node == node:
                matching -= 1
        for instance in change.upserted:
            number = _group_number(self.selector, instance)
            if number is not None:
                added.setdefault(number, []).append(instance)
            if node and instance.node == node:
                matching += 1
        groups = list(self._groups)
        for number in removed.keys() | added.keys():
            groups[number] = groups[number].changed(removed.get(number, ()), added.get(number, ()))
        return Picker(self.selector, snapshot, groups, matching)

    def plan(self, cursors: Cursors, gate: Gate | None = None) -> Plan:
        """One request's walk over every usable instance (O1)."""
        return Plan(self, cursors, gate)

    def preview(self, cursors: Cursors, gate: Gate | None = None) -> Iterator[Pick]:
        """The picks of the next request's plan if every attempt fails (R2). Moves no cursor that stood already."""
        plan = Plan(self, _Shadow(cursors), _Looking(gate) if gate is not None else None)
        yield from iter(plan.next, None)

    def left_out(self) -> Iterator[tuple[Instance, LeftOut]]:
        """The instances that no plan contains, with the reason of each."""
        for instance in self.snapshot.instances.values():
            why = self.selector.left_out(instance)
            if why is not None:
                yield instance, why

    def shown(self, most: int) -> Iterator[Instance]:
        """At most so many instances for people to see: the nearest tiers' first, and last what is left out."""
        found = 0
        for group in self._groups:
            for instance in group.instances[: most - found]:
                found += 1
                yield instance
        if found < most:
            left_out = (instance for instance, _ in self.left_out())
            yield from islice(left_out, most - found)

    def ranked(self) -> Iterator[Sequence[Instance]]:
        """The usable instances by group, in the order in which plans go through the groups; those that have some."""
        return (group.instances for group in self._groups if group.keys)

    def first_tier(self) -> Sequence[Instance]:
        """The usable instances of the nearest tier, terminating ones not among them."""
        return self._groups[0].instances

    def tier_sizes(self) -> Mapping[str, int]:
        """Usable instances by tier name, terminating ones not counted."""
        names = self.selector.locality.tiers
        return {name: len(group.keys) for name, group in zip(names, self._groups, strict=False)}

    def port_names(self) -> frozenset[str]:
        """The port names among the usable instances; more than one calls for a `port_name` in the config."""
        return frozenset(key.port_name for group in self._groups for key in group.keys)

    def __len__(self) -> int:
        """How many instances a plan can try at most."""
        return sum(len(group.keys) for group in self._groups)

    def _pick(self, number: int, instance: Instance) -> Pick:
        tier = number % self._tiers
        # As Pick(...) does, without a call of Python's own: every request passes here.
        return tuple.__new__(Pick, (instance, tier, self._leave if tier else None, number >= self._tiers, None))


class Plan:
    """One request's walk. Each `next` gives the next instance to try; None after the last.

    A walk belongs to the picker that it began with: a snapshot that comes meanwhile does not change it.

    Attributes:
        tiers: the names of the tiers that its picks are in, nearest first.
    """

    __slots__ = ("_cursors", "_first", "_gate", "_number", "_picker", "_taken", "_tried", "tiers")

    def __init__(self, picker: Picker, cursors: Rotation, gate: Gate | None = None) -> None:
        self._picker = picker
        self.tiers = picker.tiers
        self._cursors = cursors
        self._gate = None if gate is None else _Gated(gate, picker)
        self._number = 0
        self._taken = 0
        # One address and port can stand under several port names; it is one instance to a request.
        self._tried: set[tuple[str, int]] | None = None
        self._first: EndpointKey | None = None

    def next(self) -> Pick | None:
        """Take the next instance and step the cursor past it (O2)."""
        groups = self._picker._groups
        gate = self._gate
        first, tried = self._first, self._tried
        if first is None and gate is None:
            # Most requests need no other instance.
            for number, group in enumerate(groups):
                if group.keys:
                    at = self._cursors.take(number, group)
                    self._number = number
                    self._taken = 1
                    self._first = group.keys[at]
                    return self._picker._pick(number, group.instances[at])
            return None
        if tried is None:
            tried = self._tried = set() if first is None else {first[:2]}
        while self._number < len(groups):
            group = groups[self._number]
            size = len(group.keys)
            if self._taken < size:
                at = self._cursors.position(self._number, group)
                for _ in range(size):
                    place = group.keys[at][:2]
                    if place not in tried and (gate is None or gate.lets_pass(place, self._number)):
                        tried.add(place)
                        self._taken += 1
                        self._cursors.advance(self._number, group, at)
                        pick = self._picker._pick(self._number, group.instances[at])
                        return pick if gate is None else gate.explained(pick)
                    at = at + 1 if at + 1 < size else 0
            self._number += 1
            self._taken = 0
            if gate is not None and self._number == len(groups) and gate.goes_round():
                self._number = 0
        return None


class _Gated:
    """What a plan with a gate remembers: which round it is, and why it left the first tier (R1)."""

    __slots__ = ("_gate", "_local_full", "_local_tried", "_round", "_seen", "_tiers")

    def __init__(self, gate: Gate, picker: Picker) -> None:
        self._gate = gate
        self._tiers = picker._tiers
        self._round: PassedOver | None = None
        self._seen: set[PassedOver] = set()
        self._local_tried = False
        self._local_full = False

    def lets_pass(self, place: tuple[str, int], number: int) -> bool:
        """Whether the instance is to be tried in this round."""
        if self._round is PassedOver.EJECTED:
            return True
        tier = number % self._tiers
        why = self._gate.passed_over(place, tier)
        if why is None or why is self._round:
            return True
        self._seen.add(why)
        self._local_full = self._local_full or (why is PassedOver.FULL and not tier)
        return False

    def explained(self, pick: Pick) -> Pick:
        """The pick with its true reason."""
        reason = pick.reason
        if not pick.tier:
            self._local_tried = True
        elif reason is Reason.LOCAL_FAILED and not self._local_tried:
            reason = Reason.SPILL if self._local_full else Reason.LOCAL_EJECTED
        elif self._round is None:
            return pick
        return Pick(pick.instance, pick.tier, reason, pick.last_resort, self._round)

    def goes_round(self) -> bool:
        """After the last tier: whether there is another round, which then begins."""
        if not self._seen:
            return False
        self._round = PassedOver.FULL if PassedOver.FULL in self._seen else PassedOver.EJECTED
        self._seen.discard(self._round)
        return True


class _Shadow:
    """Cursors that move only for the one who looks at them."""

    def __init__(self, cursors: Cursors) -> None:
        self._cursors = cursors
        self._moved: dict[int, int] = {}

    def position(self, number: int, group: Group) -> int:
        at = self._moved.get(number)
        return self._cursors.position(number, group) if at is None else at

    def take(self, number: int, group: Group) -> int:
        at = self.position(number, group)
        self.advance(number, group, at)
        return at

    def advance(self, number: int, group: Group, tried: int) -> None:
        self._moved[number] = tried + 1 if tried + 1 < len(group.keys) else 0


class _Looking:
    """A gate that changes nothing."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def passed_over(self, place: tuple[str, int], tier: int) -> PassedOver | None:
        return self._gate.would_pass_over(place, tier)

    would_pass_over = passed_over


def _key(instance: Instance) -> EndpointKey:
    return instance.key


def _group_number(selector: Selector, instance: Instance) -> int | None:
    if selector.left_out(instance) is not None:
        return None
    tier = selector.tier(instance)
    return tier + len(selector.locality.prefer) + 1 if instance.conditions.terminating else tier
