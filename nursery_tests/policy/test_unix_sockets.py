"""Which instances are connected to by a Unix socket, and to which one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.policy.model import make_instance
from meshlocal.policy.unix_sockets import PATH_LIMIT, UnixSocketError, UnixSockets, socket_path

FOLDER = "/run/services"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("cache.sock", "/run/services/cache.sock"),
        (" cache.sock ", "/run/services/cache.sock"),
        ("cache/a.sock", "/run/services/cache/a.sock"),
        ("./cache.sock", "/run/services/cache.sock"),
        ("/run/services/cache.sock", "/run/services/cache.sock"),
        ("..sock", "/run/services/..sock"),
        ("x" * (PATH_LIMIT - len(FOLDER) - 1), f"{FOLDER}/{'x' * (PATH_LIMIT - len(FOLDER) - 1)}"),
    ],
)
def test_a_label_names_a_socket_in_the_folder(name: str, path: str) -> None:
    assert socket_path(FOLDER, name) == path
    assert socket_path(FOLDER + "/", name) == path


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "'' is no path within /run/services"),
        ("/var/run/docker.sock", "'/var/run/docker.sock' is no path within /run/services"),
        ("../docker.sock", "'../docker.sock' is no path within /run/services"),
        ("a/../cache.sock", "'a/../cache.sock' is no path within /run/services"),
        ("/run/services", "'/run/services' is no path within /run/services"),
        ("/run/services-of-others/x", "'/run/services-of-others/x' is no path within /run/services"),
        ("a\0b", "'a\\x00b' is no path within /run/services"),
        ("b\udcff.sock", "'b\\udcff.sock' cannot be written in UTF-8"),
        ("é" * 48, f"'/run/services/{'é' * 48}' is longer than the 107 bytes that a socket's path may have"),
    ],
)
def test_a_label_that_leads_elsewhere_names_none(name: str, problem: str) -> None:
    """A registry must not be able to name any socket of the machine."""
    with pytest.raises(UnixSocketError) as raised:
        socket_path(FOLDER, name)
    assert str(raised.value) == problem
    if name:
        assert UnixSockets(FOLDER, "n1").of(make_instance("10.0.0.1", 1, labels={"node": "n1", "socket": name})) is None
        assert UnixSockets(FOLDER, "n1").look(name) == (None, problem)


@given(st.text())
def test_no_label_leads_out_of_the_folder(name: str) -> None:
    try:
        path = socket_path(FOLDER, name)
    except UnixSocketError:
        return
    assert path.startswith(FOLDER + "/")
    assert ".." not in path.split("/")


@pytest.mark.parametrize(
    ("own", "labels", "path"),
    [
        ("n1", {"node": "n1", "socket": "s"}, "/run/services/s"),
        ("n1", {"node": "n2", "socket": "s"}, None),
        ("n1", {"socket": "s"}, None),
        ("n1", {"node": "n1"}, None),
        ("n1", {"node": "n1", "socket": ""}, None),
        ("", {"node": "", "socket": "s"}, None),
    ],
)
def test_only_sockets_of_the_own_node_are_here(own: str, labels: dict[str, str], path: str | None) -> None:
    assert UnixSockets(FOLDER, own).of(make_instance("10.0.0.1", 1, labels=labels)) == path
