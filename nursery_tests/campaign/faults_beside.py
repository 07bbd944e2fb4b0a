"""What stands beside the data path misbehaves: certificates, tokens, file systems, logs, a worker (P1)."""

from __future__ import annotations

import array
import fcntl
import math
import os
import re
import termios
from signal import SIGHUP, SIGSTOP

import trio

from nursery_tests.campaign.campaign import BROKEN, Fault, Scene
from nursery_tests.campaign.fleet import Fleet, Trust
from nursery_tests.campaign.load import LIMIT, WORKERS

_PIPE = 60_000
"""Bytes in a pipe that takes no line more."""


def _trust(fleet: Fleet) -> Trust:
    assert fleet.trust is not None
    return fleet.trust


async def _restart_discovery(fleet: Fleet) -> None:
    assert fleet.discovery is not None
    await fleet.discovery.killed()
    await fleet.start_discovery()


async def not_trusted(scene: Scene) -> None:
    fleet = scene.fleet
    trust = _trust(fleet)
    trust.certify(by_another=True)
    await _restart_discovery(fleet)
    await fleet.measured("discovery_connected", 0)
    await scene.hold()
    assert fleet.proxy is not None
    await fleet.proxy.printed("CERTIFICATE_VERIFY_FAILED|certificate verify failed")
    trust.certify()
    await _restart_discovery(fleet)
    await fleet.measured("discovery_connected", 1)


async def token_is_gone(scene: Scene) -> None:
    fleet = scene.fleet
    trust = _trust(fleet)
    for text in (None, "another\n", "\x00\xff"):
        if text is None:
            trust.token.unlink()
        else:
            trust.token.write_text(text)
        await _restart_discovery(fleet)
        await fleet.measured("discovery_connected", 0)
        await scene.hold(0.4)
        trust.token.write_text("secret\n")
        await fleet.measured("discovery_connected", 1)


async def token_hangs(scene: Scene) -> None:
    """Who opens a FIFO that nobody writes to waits, as on a file system whose server has gone."""
    fleet = scene.fleet
    trust = _trust(fleet)
    fifo = trust.token.with_name("fifo")
    os.mkfifo(fifo)
    fifo.rename(trust.token)
    await _restart_discovery(fleet)
    await fleet.measured("discovery_connected", 0)
    await scene.hold()
    # It answers at last.
    with trio.fail_after(LIMIT):
        writer = await trio.to_thread.run_sync(os.open, trust.token, os.O_WRONLY, abandon_on_cancel=True)
    regular = trust.token.with_name("regular")
    regular.write_text("secret\n")
    regular.rename(trust.token)
    os.write(writer, b"secret\n")
    os.close(writer)
    await fleet.measured("discovery_connected", 1)


async def configuration_hangs(scene: Scene) -> None:
    fleet = scene.fleet
    assert fleet.proxy is not None
    file = fleet.folder / "proxy.yaml"
    os.mkfifo(fleet.folder / "fifo")
    (fleet.folder / "fifo").rename(file)
    for _ in range(3):
        fleet.proxy.signal(SIGHUP)
        await scene.hold(0.3)
    with trio.fail_after(LIMIT):
        writer = await trio.to_thread.run_sync(os.open, file, os.O_WRONLY, abandon_on_cancel=True)
    fleet.configure()
    said = len(fleet.proxy.err)
    os.close(writer)
    await fleet.proxy.printed("config (not )?applied", start=said)
    said = len(fleet.proxy.err)
    fleet.proxy.signal(SIGHUP)
    await fleet.proxy.printed("config applied", start=said)


async def log_is_stuck(scene: Scene) -> None:
    fleet = scene.fleet
    assert fleet.proxy is not None
    with fleet.proxy.deaf() as pipe:
        held = array.array("i", [0])
        with trio.fail_after(LIMIT):
            while held[0] < _PIPE:
                await trio.sleep(0.01)
                fcntl.ioctl(pipe, termios.FIONREAD, held)
        await scene.hold()
        # Its pages go on, too.
        assert (await fleet.metrics())("discovery_connected") == 1
    said = len(fleet.proxy.err)
    await fleet.proxy.printed("request", start=said)


async def worker_hangs(scene: Scene) -> None:
    fleet = scene.fleet
    assert fleet.proxy is not None
    said = len(fleet.proxy.err)
    child = _children(fleet.proxy.process.pid)[0]
    scene.may_resend = True
    # Half of all connections come to it, until it is found out and killed.
    scene.allow(" ".join(WORKERS), [*BROKEN, "timeout"], math.inf, "the worker's")
    os.kill(child, SIGSTOP)
    await fleet.proxy.printed("worker hangs, and is killed", start=said)
    with trio.fail_after(LIMIT):
        while len(_children(fleet.proxy.process.pid)) < 2:  # noqa: ASYNC110 - the kernel tells nobody
            await trio.sleep(0.05)
    await fleet.place.measured(fleet.admin, lambda metrics: metrics("discovery_connected") == 1)
    await scene.hold()


def _children(pid: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parent = re.match(r".*\) \S (\d+) ", file.read())
            except OSError:
                continue
            if parent is not None and int(parent[1]) == pid:
                found.append(int(name))
    return sorted(found)


TRUST = (
    Fault("discovery's certificate is not trusted", "nothing fails; discovery is found again (D1, P1)", not_trusted),
    Fault("the token is gone, wrong, or no text", "nothing fails; discovery is found again (D1, P1)", token_is_gone),
    Fault("the token's file system hangs", "nothing fails; discovery is found again (P1)", token_hangs),
    Fault("the configuration's file system hangs", "nothing fails; it is applied (P1, S2)", configuration_hangs),
)

LOG = (Fault("nobody reads the log", "nothing fails; lines are dropped and counted (P1)", log_is_stuck),)

WORKER = (Fault("one of two workers stands still", "it is found out within 12 s, and replaced (P1)", worker_hangs),)
