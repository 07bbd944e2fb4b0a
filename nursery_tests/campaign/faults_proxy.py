"""The proxy itself: stopped, told to read its configuration, killed and restarted, at moments left to chance."""

from __future__ import annotations

import math
from signal import SIGCONT, SIGHUP, SIGSTOP, SIGTERM

import trio

from nursery_tests.campaign.campaign import BROKEN, Fault, Scene
from nursery_tests.campaign.load import WORKERS

_ALL = " ".join(WORKERS)


def _times(scene: Scene) -> int:
    return max(2, round(scene.seconds * 2))


async def _moment(scene: Scene) -> None:
    await trio.sleep(scene.rng.uniform(0.05, 0.5))


async def term(scene: Scene) -> None:
    fleet = scene.fleet
    scene.may_resend = True
    scene.allow(_ALL, ["refused"], math.inf, "nobody listens")
    # Between the last accept and the end of a listener, the kernel may accept one more.
    scene.allow("tcp replay get post", ["reset"], 1, "accepted by the kernel alone")
    for _ in range(_times(scene)):
        await _moment(scene)
        assert fleet.proxy is not None
        fleet.proxy.signal(SIGTERM)
        # What is held does not end by itself: it is cut at the end of drain.timeout.
        assert await fleet.proxy.exited() in (0, 1)
        scene.allow_under_way("held stream", BROKEN)
        await fleet.start_proxy()


async def kill(scene: Scene) -> None:
    fleet = scene.fleet
    scene.may_resend = True
    scene.allow(_ALL, ["refused"], math.inf, "nobody listens")
    for _ in range(_times(scene)):
        await _moment(scene)
        assert fleet.proxy is not None
        await fleet.proxy.killed()
        scene.allow_under_way(_ALL, BROKEN)
        await fleet.start_proxy()


async def reload(scene: Scene) -> None:
    fleet = scene.fleet
    assert fleet.proxy is not None
    for number in range(_times(scene) * 3):
        await _moment(scene)
        said = len(fleet.proxy.err)
        if number % 3 == 2:
            fleet.processes.write("proxy.yaml", "proxy: {listen: [")
            fleet.proxy.signal(SIGHUP)
            await fleet.proxy.printed("config not applied", start=said)
        else:
            fleet.configure(more=number % 3 == 0)
            fleet.proxy.signal(SIGHUP)
            await fleet.proxy.printed("config applied", start=said)
    fleet.configure()
    said = len(fleet.proxy.err)
    fleet.proxy.signal(SIGHUP)
    await fleet.proxy.printed("config applied", start=said)


async def asleep(scene: Scene) -> None:
    """As after a sleep of the whole machine, every deadline has passed at once."""
    fleet = scene.fleet
    assert fleet.proxy is not None
    for _ in range(_times(scene)):
        await _moment(scene)
        fleet.proxy.signal(SIGSTOP)
        await scene.hold(0.5)
        fleet.proxy.signal(SIGCONT)
    await scene.hold(0.5)


FAULTS = (
    Fault("the proxy reads its configuration again and again", "nothing fails (S2)", reload),
    Fault("the proxy stands still, and goes on", "nothing fails", asleep),
    Fault(
        "the proxy is stopped (SIGTERM) and restarted",
        "HTTP loses nothing, tcp and streams what is still open after `drain.timeout` (S1); nobody listens meanwhile",
        term,
    ),
    Fault("the proxy is killed (SIGKILL) and restarted", "what was under way fails; nobody listens meanwhile", kill),
)
