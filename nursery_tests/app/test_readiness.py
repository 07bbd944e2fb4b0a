"""app/readiness and app/signals: what is said to whoever started the process, and the stages of stopping (S1, S2)."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from meshlocal.app.readiness import Readiness, announce, notify_service_manager
from meshlocal.app.signals import SIGNALS, Stop, cancel_when_set, handle_signals


def test_readiness_is_never_regained_in_a_drain() -> None:
    """S1."""
    readiness = Readiness("waiting")
    assert (readiness.ready, readiness.reason) == (False, "waiting")
    readiness.set_ready()
    assert (readiness.ready, readiness.reason) == (True, "")
    readiness.drain()
    readiness.set_ready()
    assert (readiness.ready, readiness.reason) == (False, "draining")


def test_the_line_is_flushed(capfd: pytest.CaptureFixture[str]) -> None:
    announce("ready")
    assert capfd.readouterr().out == "ready\n"


def test_nobody_has_to_read_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        announce("ready")
        with pytest.raises(OSError, match="No space"):
            full.flush()
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(tmp_path: Path, abstract: bool) -> None:
    name = f"@meshlocal-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(10)
        notify_service_manager({"NOTIFY_SOCKET": name}, "READY=1")
        assert manager.recv(64) == b"READY=1"


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "/nowhere/at/all"}])
def test_without_a_service_manager_nothing_happens(
    environment: dict[str, str], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is raised, said or left open."""
    before = os.listdir("/proc/self/fd")
    notify_service_manager(environment, "READY=1")
    assert os.listdir("/proc/self/fd") == before
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


async def test_signals_drain_then_end_and_reload(nursery: trio.Nursery) -> None:
    """S1, S2: a second signal of either kind ends it now; SIGHUP only reloads."""
    stop = Stop()
    reloads: list[bool] = []
    reloaded = trio.Event()

    async def reload() -> None:
        reloads.append(stop.requested.is_set())
        reloaded.set()
        await trio.sleep_forever()  # a stop does not wait for it

    await nursery.start(handle_signals, stop, reload)
    with trio.fail_after(10):
        signal.raise_signal(signal.SIGHUP)
        await reloaded.wait()
        assert not stop.requested.is_set()
        signal.raise_signal(signal.SIGTERM)
        await stop.requested.wait()
        assert not stop.now.is_set()
        signal.raise_signal(signal.SIGINT)
        await stop.now.wait()
    assert reloads == [False]
    nursery.cancel_scope.cancel()


async def test_after_a_stop_signals_are_ignored_to_the_end() -> None:
    """S1: a third Ctrl-C, while the process ends, is no traceback. There is no moment without a handler."""
    seen = []
    stop = Stop()
    async with trio.open_nursery() as inner:
        await inner.start(handle_signals, stop, None)
        signal.raise_signal(signal.SIGINT)
        with trio.fail_after(10):
            await stop.requested.wait()
        inner.cancel_scope.cancel()
        seen = [signal.getsignal(number) for number in SIGNALS]
        assert signal.default_int_handler not in seen
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 3
    for number in SIGNALS:
        signal.raise_signal(number)
    await trio.lowlevel.checkpoint()


async def test_reloads_that_are_asked_for_during_one_become_one(nursery: trio.Nursery) -> None:
    """S2."""
    begun, proceed = trio.Event(), trio.Event()
    count = 0

    async def reload() -> None:
        nonlocal count
        count += 1
        begun.set()
        await proceed.wait()

    await nursery.start(handle_signals, Stop(), reload)
    signal.raise_signal(signal.SIGHUP)
    with trio.fail_after(10):
        await begun.wait()
        for _ in range(200):
            signal.raise_signal(signal.SIGHUP)
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked()
        proceed.set()
        await trio.testing.wait_all_tasks_blocked()
    assert count == 2
    nursery.cancel_scope.cancel()


async def test_signals_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    async with trio.open_nursery() as inner:
        await inner.start(handle_signals, Stop(), None)
        inner.cancel_scope.cancel()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before


async def test_a_scope_ends_with_its_event() -> None:
    event = trio.Event()
    with trio.fail_after(10):
        async with trio.open_nursery() as inner:
            inner.start_soon(cancel_when_set, event, inner.cancel_scope)
            await trio.testing.wait_all_tasks_blocked()
            assert not inner.cancel_scope.cancel_called
            event.set()
            await trio.sleep_forever()
    assert inner.cancel_scope.cancelled_caught


async def test_a_reload_that_fails_by_a_fault_costs_no_signal(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    """S1, P1: with the default action, the next signal would end the process without a drain."""
    reloads = 0
    stop = Stop()

    async def reload() -> None:
        nonlocal reloads
        reloads += 1
        raise RuntimeError("can't start new thread")

    await nursery.start(handle_signals, stop, reload)
    caught = signal.getsignal(signal.SIGHUP)
    with trio.fail_after(10):
        for number in (1, 2):
            signal.raise_signal(signal.SIGHUP)
            while reloads < number:  # noqa: ASYNC110 - a count tells nobody
                await trio.sleep(0.001)
            assert signal.getsignal(signal.SIGHUP) is caught
        signal.raise_signal(signal.SIGTERM)
        await stop.requested.wait()
    assert "config not applied, by a fault of this program" in caplog.text
    nursery.cancel_scope.cancel()
