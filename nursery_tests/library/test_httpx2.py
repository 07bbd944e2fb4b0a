"""`meshlocal.httpx2`: the tests of `MeshTransport`, over httpx2."""

from __future__ import annotations

from pathlib import Path

import httpx
import httpx2
import pytest

import meshlocal.httpx
import meshlocal.httpx2

_TESTS = Path(__file__).with_name("test_httpx.py")


def _over_httpx2(source: str) -> str:
    """The same tests with the other library in the first one's place."""
    for before, after in (
        ("import httpx\n", "import httpx2 as httpx\n"),
        ("from meshlocal.httpx import", "from meshlocal.httpx2 import"),
    ):
        assert source.count(before) == 1
        source = source.replace(before, after)
    return source


_OVER = {**globals()}
exec(compile(_over_httpx2(_TESTS.read_text()), str(_TESTS), "exec"), _OVER)
globals().update({name: each for name, each in _OVER.items() if name.startswith("test_")})


@pytest.mark.parametrize("name", [each for each in meshlocal.httpx2.__all__ if each.startswith("Http")])
def test_errors_are_the_own_librarys(name: str) -> None:
    kind = getattr(meshlocal.httpx2, name)
    assert issubclass(kind, httpx2.TransportError)
    assert issubclass(kind, meshlocal.ServiceError)
    assert not issubclass(kind, httpx.TransportError)
    assert (kind.__module__, kind.__name__) == ("meshlocal.httpx2", name)
