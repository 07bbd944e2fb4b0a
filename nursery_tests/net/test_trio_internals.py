"""What is used of Trio that it does not promise is there, in this version."""

from __future__ import annotations

import os
import ssl

import pytest
import trio
import trio.testing

from meshlocal.net.trio_internals import epoll_fileno, last_words, missing


def test_this_trio_has_what_is_used_of_it() -> None:
    assert not missing(), "this Trio lacks what meshlocal.net.trio_internals lists"


async def test_the_epoll_of_a_run_is_found() -> None:
    number = epoll_fileno()
    assert number is not None, "EpollIOManager._epoll has moved: see meshlocal.net.trio_internals"
    assert os.readlink(f"/proc/self/fd/{number}") == "anon_inode:[eventpoll]"


def test_outside_of_a_run_there_is_none() -> None:
    assert epoll_fileno() is None


def test_a_name_that_moves_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that whoever updates Trio knows what to look for."""
    monkeypatch.setattr("trio._core._run.Runner.__attrs_attrs__", ())
    assert missing() == ["Runner.is_guest", "Runner.io_manager"]


def test_where_tls_keeps_what_it_has_to_send() -> None:
    ours, _ = trio.testing.memory_stream_pair()
    context = ssl.create_default_context()
    stream: trio.SSLStream[trio.abc.Stream] = trio.SSLStream(ours, context, server_hostname="x")
    assert isinstance(getattr(stream, "_outgoing", None), ssl.MemoryBIO)
    assert last_words(stream) == b""
