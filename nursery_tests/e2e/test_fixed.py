"""A proxy beside an instance: its listeners have fixed addresses, so that it needs no discovery."""

from __future__ import annotations

from typing import Any

import trio


async def test_without_discovery(processes: Any, here: Any) -> None:
    """It serves, holds a section of `services` for the one address, and neither complains nor alarms."""
    instance = await processes.instance("n1", "127.0.0.1", 0)
    port = (await instance.printed(r"listening (\d+)", "out"))[1]
    processes.write(
        "proxy.yaml",
        f"proxy:\n  listen: ['tcp://127.0.0.1:0=@localhost:{port}']\n  admin: 127.0.0.1:0\n"
        f"  services: {{'@127.0.0.1:{port}': {{limits: {{connections: 1}}}}}}\n",
    )
    proxy = await processes.meshlocal("proxy", "--config", "proxy.yaml")
    ready = await proxy.printed(
        r"ready: .*tcp://127\.0\.0\.1:(\d+)=@127\.0\.0\.1:\d+ admin=http://127\.0\.0\.1:(\d+)", "out"
    )
    listening, admin = int(ready[1]), int(ready[2])
    async with await here.connect("127.0.0.1", listening) as held:
        await held.send_all(b"who?\n")
        assert await held.receive_some(64) == b"n1\n"
        # The limit of this one address.
        async with await here.connect("127.0.0.1", listening) as refused:
            await refused.send_eof()
            assert await _ended(refused)
    found = await here.measured(admin, lambda metrics: metrics("limit_refused_total", limit="connections") == 1)
    for name, value in (("discovery_connected", 1), ("snapshot_age_seconds", 0), ("snapshot_stale", 0)):
        assert found(name) == value
    assert found("node_unknown") == 0
    status, page = await here.get(admin, "/")
    assert status == 200
    assert "none: every listener has a fixed address" in page
    assert "warning" not in proxy.err.lower()


async def _ended(stream: Any) -> bool:
    try:
        return not await stream.receive_some(64)
    except trio.BrokenResourceError:
        return True
