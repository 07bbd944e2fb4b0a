"""The host runs out of something, or changes its mind about the time."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path

import trio

from nursery_tests.campaign.campaign import BROKEN, Fault, Scene
from nursery_tests.campaign.load import LIMIT, PATIENCE, WORKERS

DESCRIPTORS = 128
"""The proxy may have open."""

PORTS = (20000, 20299)
"""That the kernel chooses from, for a connection to one place from one address."""

REUSE = 1.1
"""Seconds within which a port of a closed connection to this host can be taken again.

`net.ipv4.tcp_tw_reuse` is 2 unless it is set: on the loopback interface, a port that waits in TIME_WAIT is taken from
the second on that follows its last segment's (`tcp_twsk_unique`, on a clock of whole seconds).
"""

FAKETIME = "faketime"
"""The file that says by how much clocks are wrong."""

JUMPS = (3600, -7200, 0, 200 * 86400, -86400)


async def _hold(scene: Scene, stack: AsyncExitStack, count: int) -> None:
    """Open and keep so many connections more to the service `tcp`. Some may be reset."""
    target = scene.fleet.target
    for _ in range(count):
        with suppress(ConnectionResetError):
            stream = await scene.fleet.place.connect(target.host, target.ports["tcp"])
            stack.push_async_callback(trio.aclose_forcefully, stream)


async def no_descriptors(scene: Scene) -> None:
    fleet = scene.fleet
    began = trio.current_time()
    async with AsyncExitStack() as stack:
        await _hold(scene, stack, DESCRIPTORS)
        await fleet.place.measured(fleet.admin, lambda metrics: metrics("accept_errors_total") > 0)
        await scene.hold()
        # Its pages, and discovery, have descriptors of their own.
        metrics = await fleet.place.measured(fleet.admin, lambda metrics: metrics("discovery_connected") == 1)
        assert metrics("descriptors_open") <= DESCRIPTORS
        assert metrics("ejections_total") == 0
    seconds = trio.current_time() - began
    for kind in ("tcp", "replay", "get", "post", "call"):
        each = 1 + int(seconds / PATIENCE)
        scene.allow(kind, ["timeout"], WORKERS[kind] * each, "waited in the listener's queue")


async def no_ports(scene: Scene) -> None:
    fleet = scene.fleet
    ports = PORTS[1] - PORTS[0] + 1
    async with AsyncExitStack() as stack:
        stack.enter_context(many_descriptors())
        while not await _without_port(scene, "node"):
            await _hold(scene, stack, 50)
        # Connects to local instances have none; those to others have.
        await scene.hold()
        assert not await _without_port(scene, "other")
        early = {kind: tally.failed.total() for kind, tally in scene.load.tallies.items()}
        assert not any(early.values()), early
        # Now none has.
        scene.allow("tcp replay held", BROKEN, math.inf, "there is no port")
        held = 0
        while not await _without_port(scene, "other"):
            await _hold(scene, stack, 50)
            held += 50
            assert held <= 4 * ports, "there is no end of ports"
        await scene.hold()
        # It was never an instance's fault.
        assert (await fleet.metrics())("ejections_total") == 0
    # It is over when the ports of what was held can be taken again, and not just those that a second had set free.
    open_without = sum(WORKERS[kind] for kind in ("tcp", "replay", "held"))
    await fleet.place.measured(fleet.admin, lambda metrics: metrics("connections_open") <= open_without)
    await trio.sleep(REUSE)


async def _without_port(scene: Scene, tier: str) -> bool:
    return (await scene.fleet.metrics())("attempts_total", outcome="no_ports", tier=tier) > 0


@contextmanager
def many_descriptors() -> Iterator[None]:
    """Let this process open many files for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def clock_jumps(scene: Scene) -> None:
    fleet = scene.fleet
    for jump in JUMPS:
        (fleet.folder / FAKETIME).write_text(f"{jump:+d}\n")
        await scene.hold(0.3)
        metrics = await fleet.metrics()
        assert 0 <= metrics("snapshot_age_seconds") < LIMIT
        assert metrics("snapshot_stale") == 0
    (fleet.folder / FAKETIME).write_text("+0\n")


def faketime() -> Path | None:
    """The library that makes clocks wrong, if it is there."""
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)


WITHOUT_DESCRIPTORS = (
    Fault("the proxy has no descriptor left", "clients wait in the queue; what is open goes on", no_descriptors),
)

WITHOUT_PORTS = (
    Fault(
        "there is no port left to connect from",
        "other instances take over while any can be reached; then tcp fails at once; nobody is ejected",
        no_ports,
    ),
)

CLOCK = (Fault("the clock jumps, by hours and months", "nothing fails", clock_jumps),)
