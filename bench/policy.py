"""What the pure decisions cost: a pick, a whole plan, and a change of a large service. CPU time of one thread."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from bench import report
from bench.machine import describe
from meshlocal.client.services import ServiceState
from meshlocal.policy.config import AttemptPolicy
from meshlocal.policy.locality import Locality, Selector
from meshlocal.policy.model import (
    Instance,
    ServiceChange,
    ServiceKey,
    ServiceSnapshot,
    apply,
    diff,
    index,
    make_instance,
)
from meshlocal.policy.picker import Cursors, Picker
from meshlocal.wire.discovery_codec import change_event, change_from_message
from meshlocal.wire.pb import discovery_pb2 as pb

B = ServiceKey("b")
NODES = 100
PICK_GOAL = 5e-6
CHANGE_GOAL = 2e-3


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.policy", description=__doc__)
    parser.add_argument("--instances", type=int, default=1000, help="instances of the service that is picked from")
    parser.add_argument("--large", type=int, default=10000, help="instances of the service that changes")
    parser.add_argument("--repeat", type=int, default=30, help="measurements, of which the least counts")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="folder of the JSON file")
    return parser.parse_args()


def instance(number: int, **labels: str) -> Instance:
    address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    return make_instance(address, 9000, "tcp", {"node": f"n{number % NODES}", "zone": f"z{number % 3}", **labels})


def snapshot(count: int) -> ServiceSnapshot:
    return ServiceSnapshot(B, "v0", index(instance(number) for number in range(1, count + 1)))


def middle(latest: ServiceSnapshot) -> Instance:
    """The instance that a pass over all finds half-way."""
    return list(latest.instances.values())[len(latest.instances) // 2]


def selector() -> Selector:
    return Selector(Locality({"node": "n1", "zone": "z1"}, ("node", "zone")))


def cpu(work: Callable[[], object], repeat: int, times: int = 1) -> float:
    """CPU seconds of one call: the least of `repeat` measurements of `times` calls each.

    What else runs on the machine, on the other half of a core above all, can only add to it.
    """
    work()
    found = []
    gc.collect()
    for _ in range(repeat):
        start = time.thread_time_ns()
        for _ in range(times):
            work()
        found.append((time.thread_time_ns() - start) / 1e9 / times)
    return min(found)


def picks(count: int, repeat: int) -> dict[str, float]:
    """A request's first pick, and each further one, among `count` instances and alone."""
    alone = Picker.build(selector(), snapshot(1)), Cursors(Random(1))
    many = Picker.build(selector(), snapshot(count)), Cursors(Random(1))

    def first(picker: Picker, cursors: Cursors) -> None:
        assert picker.plan(cursors).next() is not None

    def walk(picker: Picker, cursors: Cursors) -> None:
        plan = picker.plan(cursors)
        taken = 0
        while plan.next() is not None:
            taken += 1
        assert taken == count

    one = cpu(lambda: first(*alone), repeat, 1000)
    first_of_many = cpu(lambda: first(*many), repeat, 1000)
    whole = cpu(lambda: walk(*many), repeat)
    return {
        "first_of_one": one,
        "first_of_many": first_of_many,
        "whole_plan": whole,
        "each_further": (whole - first_of_many) / (count - 1),
    }


def steps(latest: ServiceSnapshot) -> list[Instance | None]:
    """One changed label, one instance more, one less: None stands for the removal of the middle one."""
    changed = middle(latest)
    return [
        make_instance(changed.key.address, 9000, "tcp", {**changed.labels, "build": "2"}),
        instance(len(latest.instances) + 1),
        None,
    ]


def changes(count: int, repeat: int) -> dict[str, dict[str, float]]:
    """One instance of `count` changes: what it takes a proxy, from the message to the picker in use."""
    base = snapshot(count)
    removed = middle(base).key
    figures = {}
    for name, step in zip(("label changed", "instance added", "instance removed"), steps(base), strict=True):
        upserted, gone = ((step,), ()) if step is not None else ((), (removed,))
        change = ServiceChange(B, "v0", "v1", upserted, gone)
        message = change_event(change).SerializeToString()
        after = apply(base, change)
        state = ServiceState(B, selector(), AttemptPolicy(), Random(1))

        def applied(message: bytes = message) -> ServiceSnapshot:
            event = pb.WatchInstancesResponse.FromString(message)
            return apply(base, change_from_message(event.change, lambda service, error: None))

        def diffed(after: ServiceSnapshot = after) -> None:
            assert diff(base, after)

        # The picker before the change is put back each time, so that every round applies the same change.
        state.publish(base)
        before = state.picker

        def published(state: ServiceState = state, before: Picker | None = before) -> None:
            state.picker = before
            state.publish(applied())

        apply_seconds = cpu(applied, repeat)
        total = cpu(published, repeat)
        figures[name] = {
            "decode and apply": apply_seconds,
            "of it diff": cpu(diffed, repeat),
            "diff, picker and the rest": total - apply_seconds,
            "in all": total,
        }
    return figures


def main() -> None:
    asked = options()
    machine = describe()
    report.heading("CPU time of decisions", machine)
    found = picks(asked.instances, asked.repeat)
    rows = [
        ["first pick, 1 instance", report.micro(found["first_of_one"])],
        [f"first pick, {asked.instances} instances", report.micro(found["first_of_many"])],
        [f"each further pick, {asked.instances} instances", report.micro(found["each_further"])],
        [f"a whole plan, {asked.instances} instances", report.micro(found["whole_plan"])],
    ]
    print(report.table(["A request's plan, µs", "CPU"], rows), end="\n\n")
    changed = changes(asked.large, asked.repeat)
    columns = list(next(iter(changed.values())))
    rows = [[name, *(report.milli(row[column]) for column in columns)] for name, row in changed.items()]
    print(report.table([f"One change of {asked.large} instances, ms", *columns], rows), end="\n\n")
    large = snapshot(asked.large)
    build = cpu(lambda: Picker.build(selector(), large), max(3, asked.repeat // 10))
    print(f"Building the picker of {asked.large} instances from nothing: {report.milli(build)} ms\n")
    beyond = found["first_of_many"] - found["first_of_one"]
    worst = max(row["in all"] for row in changed.values())
    goals = [
        report.verdict(
            f"first pick at {asked.instances} instances, beyond that at 1", beyond * 1e6, PICK_GOAL * 1e6, " µs"
        ),
        report.verdict(f"each further pick at {asked.instances}", found["each_further"] * 1e6, PICK_GOAL * 1e6, " µs"),
        report.verdict(f"a change of one instance of {asked.large}", worst * 1e3, CHANGE_GOAL * 1e3, " ms"),
    ]
    figures: dict[str, Any] = {
        "instances": asked.instances,
        "large": asked.large,
        "repeat": asked.repeat,
        "plan": found,
        "change": changed,
        "build": build,
        "goals": goals,
    }
    report.write("policy", machine, figures, asked.output)


if __name__ == "__main__":
    main()
