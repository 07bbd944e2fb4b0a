"""Discovery that fails: traffic goes on with what is known (D1, D3)."""

from __future__ import annotations

import math
import random
from signal import SIGCONT, SIGSTOP

import trio

from nursery_tests.campaign.campaign import BROKEN, LOST, Fault, Scene
from nursery_tests.campaign.fleet import DISCOVERY, Fleet
from nursery_tests.campaign.load import WORKERS


async def killed(scene: Scene) -> None:
    fleet = scene.fleet
    assert fleet.discovery is not None
    await fleet.discovery.killed()
    await fleet.measured("discovery_connected", 0)
    await scene.hold()
    await fleet.start_discovery()
    await fleet.measured("discovery_connected", 1)


async def one_of_two_killed(scene: Scene) -> None:
    fleet = scene.fleet
    assert fleet.discovery is not None
    second = await fleet.start_server(1)
    said = len(fleet.proxy.err) if fleet.proxy is not None else 0
    await fleet.discovery.killed()
    assert fleet.proxy is not None
    await fleet.proxy.printed(rf"discovery is watched.*{DISCOVERY[1]}", start=said)
    # It is the second that tells of changes now.
    whole = fleet.registry
    fleet.processes.write("instances.yaml", whole.replace("node: n3", "node: n1"))
    await fleet.measured("instances", 3, service="tcp", tier="node")
    await scene.hold()
    fleet.processes.write("instances.yaml", whole)
    await fleet.measured("instances", 2, service="tcp", tier="node")
    await fleet.start_discovery()
    await second.killed()
    await fleet.proxy.printed(
        rf"(?s)discovery is watched.*{DISCOVERY[1]}.*discovery is watched.*{DISCOVERY[0]}", start=said
    )


async def frozen(scene: Scene) -> None:
    fleet = scene.fleet
    assert fleet.discovery is not None
    fleet.discovery.signal(SIGSTOP)
    await fleet.measured("discovery_connected", 0)
    await scene.hold()
    fleet.discovery.signal(SIGCONT)
    await fleet.measured("discovery_connected", 1)


async def not_in_sync(scene: Scene) -> None:
    fleet = scene.fleet
    assert fleet.discovery is not None
    await fleet.discovery.killed()
    await fleet.start_discovery("missing.yaml", wait=False)
    await fleet.discovery.printed("instances file refused")
    await scene.hold()
    await fleet.discovery.killed()
    await fleet.start_discovery()
    await fleet.measured("discovery_connected", 1)


async def empty(scene: Scene) -> None:
    fleet = scene.fleet
    assert fleet.discovery is not None
    scene.allow("tcp replay held", BROKEN, math.inf, "there is no instance")
    scene.allow("get post", ["503"], math.inf, "there is no instance")
    scene.allow("call", ["unimplemented"], math.inf, "no registry knows the service (C3)")
    talking = await fleet.place.connect(fleet.target.host, fleet.target.ports["tcp"])
    await _talk(talking)
    await fleet.discovery.killed()
    fleet.processes.write("empty.yaml", "services: {}\n")
    await fleet.start_discovery("empty.yaml")
    await fleet.measured("instances", 0)
    await scene.hold()
    # What is open stays open, though its instance is gone (H2).
    await _talk(talking)
    await talking.aclose()
    await fleet.discovery.killed()
    await fleet.start_discovery()
    await fleet.measured("discovery_connected", 1)


async def _talk(stream: trio.SocketStream) -> None:
    with trio.fail_after(20):
        await stream.send_all(b"held\n")
        assert (await stream.receive_some(100)).endswith(b" held\n")


async def garbage(scene: Scene) -> None:
    fleet = scene.fleet
    assert fleet.discovery is not None
    await fleet.discovery.killed()
    host, port = DISCOVERY[0], fleet.discovery_ports[0]
    heard = 0
    enough = trio.Event()

    async def answer(stream: trio.SocketStream) -> None:
        nonlocal heard
        heard += 1
        if heard == 3:
            enough.set()
        try:
            await stream.send_all(_garbage(scene.rng))
            async for _ in stream:
                pass
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        with fleet.place.inside():
            listener = trio.socket.socket()
        listener.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
        await listener.bind((host, port))
        listener.listen()
        await nursery.start(trio.serve_listeners, answer, [trio.SocketListener(listener)])
        await scene.hold()
        with trio.fail_after(20):
            await enough.wait()
        nursery.cancel_scope.cancel()
    await fleet.start_discovery()
    await fleet.measured("discovery_connected", 1)


def _garbage(rng: random.Random) -> bytes:
    """Noise; or, after a beginning that HTTP/2 takes, frames of noise."""
    noise = rng.randbytes(rng.randrange(1, 5000))
    settings = b"\0\0\0\4\0\0\0\0\0"
    if rng.random() < 0.3:
        return noise
    frames = b""
    while noise:
        part, noise = noise[:200], noise[200:]
        frames += len(part).to_bytes(3, "big") + bytes([rng.randrange(10), rng.randrange(64)])
        frames += rng.choice([0, 1, 1, 3]).to_bytes(4, "big") + part
    return settings + frames


async def truncated(scene: Scene) -> None:
    fleet = scene.fleet
    path = fleet.folder / "instances.yaml"
    whole = fleet.registry
    end = trio.current_time() + scene.seconds
    while trio.current_time() < end:
        # In place, as an editor that does not rename: emptied, then a part of it, for long enough to be read so.
        with path.open("w") as file:
            await trio.sleep(scene.rng.uniform(0.05, 0.6))
            at = scene.rng.randrange(len(whole))
            file.write(whole[:at])
            file.flush()
            await trio.sleep(scene.rng.uniform(0.05, 0.6))
            file.write(whole[at:])
    await scene.hold(0.5)


async def _restart(fleet: Fleet) -> None:
    assert fleet.proxy is not None
    await fleet.proxy.killed()
    await fleet.start_proxy(wait=False)


def _allow_restart(scene: Scene) -> None:
    scene.may_resend = True
    scene.allow(" ".join(WORKERS), ["refused", *BROKEN, *LOST], math.inf, "the proxy is restarted")


async def absent_at_start(scene: Scene) -> None:
    fleet = scene.fleet
    assert fleet.discovery is not None
    _allow_restart(scene)
    # Each waits for first_snapshot_wait, and fails with a reason (A7).
    scene.allow("get post", ["503"], math.inf, "nothing is known yet")
    scene.allow("call stream", ["unavailable"], math.inf, "nothing is known yet")
    await fleet.discovery.killed()
    await _restart(fleet)
    assert "nothing heard yet of" in await fleet.ready()
    await scene.hold()
    await fleet.start_discovery()
    await fleet.measured("discovery_connected", 1)


async def absent_at_start_with_cache(scene: Scene) -> None:
    fleet = scene.fleet
    assert fleet.discovery is not None
    _allow_restart(scene)
    with trio.fail_after(20):
        while not (fleet.folder / "cache").exists():  # noqa: ASYNC110 - a file tells nobody that it is there
            await trio.sleep(0.02)
    await fleet.discovery.killed()
    await _restart(fleet)
    assert "(from the cache file)" in await fleet.ready()
    began = trio.current_time()
    await fleet.measured("snapshot_stale", 1)
    await scene.hold()
    assert not [each for each in scene.load.failures if each.began > began], scene.load.failures[-10:]
    await fleet.start_discovery()
    await fleet.measured("snapshot_stale", 0)


FAULTS = (
    Fault("discovery is killed, and comes back", "nothing fails (D1)", killed),
    Fault("one of two discovery servers is killed", "nothing fails; the other one tells of changes", one_of_two_killed),
    Fault("discovery is frozen", "nothing fails; it is found out by pings (D1)", frozen),
    Fault(
        "discovery is restarted without its registry",
        "nothing fails: what is not in sync says nothing (D3)",
        not_in_sync,
    ),
    Fault(
        "discovery is restarted, and its registry is empty",
        "new requests fail at once with a reason (A6), what is open goes on (H2)",
        empty,
    ),
    Fault("discovery sends garbage", "nothing fails (D1)", garbage),
    Fault("the registry's file is cut while it is written", "nothing fails (D3)", truncated),
)

AT_START = (
    Fault("discovery is away when the proxy starts", "requests wait, then fail with a reason (A7)", absent_at_start),
)

AT_START_WITH_CACHE = (
    Fault("the same, with a cache file", "nothing fails once it is ready (D2)", absent_at_start_with_cache),
)
