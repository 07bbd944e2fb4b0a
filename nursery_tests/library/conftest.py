"""Meshes over instances on loopback, on trio and, where it runs there, on asyncio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest

from meshlocal.testing import virtual_clock

Main = Callable[[], Awaitable[None]]


@pytest.fixture(params=["trio", "asyncio"])
def on_loop(request: pytest.FixtureRequest) -> Callable[[Main], None]:
    """Runs an async function on each loop; on trio by a clock that jumps."""

    def run(main: Main) -> None:
        options = {"clock": virtual_clock()} if request.param == "trio" else {}
        anyio.run(main, backend=request.param, backend_options=options)

    return run
