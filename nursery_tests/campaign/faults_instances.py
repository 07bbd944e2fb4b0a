"""Instances that fail."""

from __future__ import annotations

import math
from signal import SIGCONT, SIGSTOP

import trio

from nursery_tests.campaign.campaign import BROKEN, LOST, Fault, Scene
from nursery_tests.campaign.fleet import LOCAL, Member
from nursery_tests.campaign.load import PATIENCE, WORKERS

SLOW = 0.15
FLAP = 0.1
CALLS = WORKERS["call"] + WORKERS["stream"]
"""That one connection from the proxy to an instance may carry, all of which end with it."""


def _one(scene: Scene) -> Member:
    return scene.fleet.members["n1a"]


async def _counts(scene: Scene, *names: str) -> int:
    found = await _one(scene).tell("count")
    return sum(found.get(name, 0) for name in names)


async def refused(scene: Scene) -> None:
    await _one(scene).tell("close")
    # The kernel may have accepted one more, between the last accept and the end of the listener.
    # What is held is made anew as a fault begins, and may be that one.
    scene.allow_under_way("tcp held post", [*BROKEN, "502"])
    scene.allow_under_way("call stream", LOST)
    await scene.hold()
    await _one(scene).tell("open")


async def _killed(scene: Scene, names: frozenset[str]) -> None:
    members = [scene.fleet.members[name] for name in sorted(names)]
    async with trio.open_nursery() as nursery:
        for member in members:
            nursery.start_soon(member.kill)
    scene.allow_under_way("tcp held", BROKEN, len(members))
    scene.allow_under_way("post", [*BROKEN, "502"], len(members))
    scene.allow_under_way("call stream", LOST, len(members))
    # What was sent to one of them and half answered goes no further; that is rare, and shows as a cut.
    scene.allow_under_way("get replay", ["cut"], len(members))
    await scene.hold()
    async with trio.open_nursery() as nursery:
        for member in members:
            nursery.start_soon(member.start)


async def killed(scene: Scene) -> None:
    await _killed(scene, frozenset({"n1a"}))


async def all_local(scene: Scene) -> None:
    await _killed(scene, LOCAL)


async def every(scene: Scene) -> None:
    scene.allow("tcp replay held", BROKEN, math.inf, "nobody is there")
    scene.allow("get post", ["502", "504"], math.inf, "nobody is there")
    scene.allow("call stream", LOST, math.inf, "nobody is there")
    await _killed(scene, frozenset(scene.fleet.members))


async def resets(scene: Scene) -> None:
    counted = await _counts(scene, "line-reset")
    http, grpc = await _counts(scene, "http-reset"), await _counts(scene, "grpc-reset")
    began = trio.current_time()
    await _one(scene).tell("reset")
    await scene.hold()
    await _one(scene).tell("work")
    # Three failures eject it; what is under way then fails too, and one trial each time that its ejection is over.
    ejections = 2 + int((trio.current_time() - began) / 0.45)
    made = await _counts(scene, "line-reset") - counted
    assert made > WORKERS["held"], "nothing came to it that it could reset"
    most = 3 + WORKERS["tcp"] + 2 * WORKERS["held"] + ejections
    scene.allow("tcp held", BROKEN, min(made, most), "were reset, until it was ejected")
    made = await _counts(scene, "http-reset") - http
    scene.allow("post", ["502"], min(made, 3 + WORKERS["post"] + ejections), "may not be sent twice")
    made = await _counts(scene, "grpc-reset") - grpc
    scene.allow("call stream", LOST, CALLS * min(made, 3 + CALLS + ejections), "may not be made twice")


def _allow_silence(scene: Scene, seconds: float) -> None:
    # What connected stays (A5), and gets its answer late; or gives up first.
    each = 1 + int(seconds / PATIENCE)
    for kind in ("tcp", "held", "post", "call", "stream"):
        scene.allow(kind, ["timeout"], WORKERS[kind] * each, "waited for longer than they can")


async def silent(scene: Scene) -> None:
    began = trio.current_time()
    await _one(scene).tell("silent")
    await scene.hold(1.5)
    await _one(scene).tell("work")
    _allow_silence(scene, trio.current_time() - began)


async def frozen(scene: Scene) -> None:
    began = trio.current_time()
    _one(scene).signal(SIGSTOP)
    await scene.hold(1.5)
    _one(scene).signal(SIGCONT)
    _allow_silence(scene, trio.current_time() - began)


async def queue_full(scene: Scene) -> None:
    began = trio.current_time()
    one = _one(scene)
    await one.tell("stall")
    async with trio.open_nursery() as nursery:
        full = trio.Event()
        for port in one.ports:
            nursery.start_soon(_fill, scene, one.address, port, full)
        await scene.hold(1.5)
        await one.tell("resume")
        nursery.cancel_scope.cancel()
    _allow_silence(scene, trio.current_time() - began)


async def _fill(scene: Scene, address: str, port: int, full: trio.Event) -> None:
    """Connect until the kernel says no more."""
    streams = []
    try:
        while True:
            with trio.move_on_after(1) as limit:
                streams.append(await scene.fleet.place.connect(address, port))
            if limit.cancelled_caught:
                await trio.sleep_forever()
    finally:
        for stream in streams:
            await trio.aclose_forcefully(stream)


async def slow(scene: Scene) -> None:
    await _one(scene).tell(f"slow {SLOW}")
    await scene.hold()
    await _one(scene).tell("work")


async def half_cut(scene: Scene) -> None:
    await _one(scene).tell("cut")
    await scene.hold()
    await _one(scene).tell("work")
    line, http, grpc = [await _counts(scene, f"{kind}-cut") for kind in ("line", "http", "grpc")]
    assert min(line, http, grpc) > 0, "it cut nothing"
    scene.allow("tcp replay held", BROKEN, line, "were answered by half")
    scene.allow("get post", BROKEN, http, "were answered by half")
    scene.allow("call stream", LOST, CALLS * grpc, "were answered by half, or on the same connection")


async def flapping(scene: Scene) -> None:
    line, http, grpc = [await _counts(scene, f"{kind}-reset") for kind in ("line", "http", "grpc")]
    await _one(scene).tell(f"flap {FLAP}")
    await scene.hold()
    await _one(scene).tell("steady")
    # Between the last accept and the end of a listener the kernel may have accepted one more.
    flaps = await _counts(scene, "flaps")
    scene.allow("tcp replay held", BROKEN, await _counts(scene, "line-reset") - line + flaps, "were reset by it")
    scene.allow("post", ["502"], await _counts(scene, "http-reset") - http + flaps, "may not be sent twice")
    made = await _counts(scene, "grpc-reset") - grpc + flaps
    scene.allow("call stream", LOST, CALLS * made, "may not be made twice")


FAULTS = (
    Fault("a local instance refuses", "its neighbour takes all; nothing fails", refused),
    Fault("a local instance is killed", "what was under way on it may fail (A3, A5), nothing else", killed),
    Fault("all local instances are killed", "likewise; other nodes take all, until they are back (F1)", all_local),
    Fault(
        "every instance is killed", "all fail, at once and with a reason (A6); all succeed once they are back", every
    ),
    Fault(
        "a local instance resets what it accepts",
        "tcp without replay, POSTs and calls fail until it is ejected (H1); nothing else",
        resets,
    ),
    Fault(
        "a local instance is silent",
        "tcp without replay waits for it (A5), as POSTs and calls do (A3); others move on",
        silent,
    ),
    Fault("a local instance is frozen", "likewise: its kernel still accepts", frozen),
    Fault("a local instance's queue is full", "connects run into `connect_timeout_local`, and move on", queue_full),
    Fault("a local instance is slow", "nothing fails", slow),
    Fault("a local instance cuts half of its responses", "what was cut arrives as cut, never as whole", half_cut),
    Fault("a local instance comes and goes each 100 ms", "what it reset may fail (A3, A5), nothing else", flapping),
)
