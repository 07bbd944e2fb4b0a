"""Which addresses are this network namespace's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshlocal.net.routes import Routes


@pytest.fixture
def routes() -> Iterator[Routes]:
    made = Routes()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("192.0.2.1", False),
        ("2001:db8::1", False),
        ("224.0.0.5", False),
        ("255.255.255.255", False),
    ],
)
def test_which_addresses_are_own(routes: Routes, host: str, own: bool) -> None:
    assert routes.is_own(host) is own


def test_what_can_be_bound_is_not_own_for_that(root: None, program: Callable[[str], str]) -> None:
    """ip_nonlocal_bind, as machines with keepalived have it; and an address that comes and goes."""
    script = (
        "import subprocess\n"
        "from meshlocal.net.routes import Routes\n"
        "routes = Routes()\n"
        "ip = lambda *words: subprocess.run(['ip', *words], check=True)\n"
        "open('/proc/sys/net/ipv4/ip_nonlocal_bind', 'w').write('1')\n"
        "ip('link', 'set', 'lo', 'up')\n"
        "found = [routes.is_own('8.8.8.8'), routes.is_own('10.1.2.3')]\n"
        "ip('address', 'add', '10.1.2.3/32', 'dev', 'lo')\n"
        "found.append(routes.is_own('10.1.2.3'))\n"
        "ip('address', 'del', '10.1.2.3/32', 'dev', 'lo')\n"
        "print(*found, routes.is_own('10.1.2.3'))\n"
    )
    said = subprocess.run(
        [program("unshare"), "--net", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert said.stdout == "False False True False\n"


def test_a_closed_one_knows_nothing(routes: Routes) -> None:
    routes.close()
    assert not routes.is_own("127.0.0.1")
