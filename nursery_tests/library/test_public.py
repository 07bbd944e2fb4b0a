"""The public surface: what it holds, and that importing it does nothing but that."""

from __future__ import annotations

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import meshlocal

ROOT = Path(__file__).resolve().parents[2]

PUBLIC = {
    "meshlocal": """
        Attempt AttemptOutcome AttemptOverrides AttemptPolicy AttemptsFailedError CallError Conditions DeadlineError
        EjectionConfig EndpointKey Feed FeedStatus Instance InstanceSource LeftOut LimitedError LimitsConfig Mesh
        MeshClosedError MeshConfigError MeshError MeshStatistics ModelError NoInstanceError NotTrioError Outcome
        PlanStep Reason RequestKey ServiceConfig ServiceError ServiceKey ServicePlan ServiceSnapshot ServiceStatistics
        ServiceWatch SnapshotSink StatusCode TooManyServicesError make_instance open_mesh
    """,
    "meshlocal.httpx": """
        HttpBrokenError HttpConnectError HttpDeadlineError HttpLimitedError HttpNoInstanceError HttpReadError
        HttpTimeoutError MeshTransport Served
    """,
    "meshlocal.httpx2": """
        HttpBrokenError HttpConnectError HttpDeadlineError HttpLimitedError HttpNoInstanceError HttpReadError
        HttpTimeoutError MeshTransport Served
    """,
    "meshlocal.testing": """
        Behaviour FakeSource HttpRequest HttpResponse Upstream UpstreamConnection answer echo http open_upstream reset
        run silent virtual_clock
    """,
}
"""What users may rely on. A change of this list is a change of the interface, and belongs into the changelog."""


@pytest.mark.parametrize("name", PUBLIC)
def test_the_surface_is_what_is_listed(name: str) -> None:
    """Each name is there, documented, and listed; nothing else is."""
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(PUBLIC[name].split())
    for each in module.__all__:
        if each != "Behaviour":  # an alias, which has no docstring of its own
            assert getattr(module, each).__doc__, f"{name}.{each} has no docstring"


def test_every_name_is_documented_for_users() -> None:
    """docs/library.md speaks of each name that a user may meet."""
    page = (ROOT / "docs" / "library.md").read_text()
    missing = [each for names in PUBLIC.values() for each in names.split() if each not in page]
    assert missing == []


def test_the_lazy_names_are_the_typed_ones() -> None:
    """What a type checker sees is what is imported at run time."""
    lazy = {name for names in meshlocal._MODULES.values() for name in names.split()}
    assert lazy == set(meshlocal.__all__) <= set(dir(meshlocal))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        meshlocal.nonsense  # type: ignore[attr-defined]  # noqa: B018 - its lookup is what is tested


def test_errors_form_one_tree() -> None:
    """Everything that is raised for a user is a MeshError, and what the builtin kinds' handlers expect too."""
    errors = [each for each in (getattr(meshlocal, name) for name in meshlocal.__all__) if _is_error(each)]
    assert {each.__name__ for each in errors if not issubclass(each, meshlocal.MeshError)} == {"ModelError"}
    assert issubclass(meshlocal.MeshConfigError, ValueError)
    assert issubclass(meshlocal.ServiceError, OSError)
    assert issubclass(meshlocal.DeadlineError, TimeoutError)
    assert issubclass(meshlocal.NotTrioError, RuntimeError)


def _is_error(each: object) -> bool:
    return isinstance(each, type) and issubclass(each, Exception)


SIDE_EFFECTS = """
import os, signal, sys, threading

def state():
    return (
        threading.active_count(), sorted(os.listdir("/proc/self/fd")), dict(os.environ), sys.excepthook,
        [signal.getsignal(number) for number in signal.valid_signals()], __import__("logging").getLogger().handlers[:],
        __import__("warnings").filters[:], len(__import__("atexit").__dict__), os.listdir("/proc/self/task"),
    )

before, known = state(), set(sys.modules)
{statement}
assert state() == before, (state(), before)
print(*sorted(set(sys.modules) - known))
"""

LIGHT = ("import meshlocal", "import meshlocal; dir(meshlocal); meshlocal.__version__")
HEAVY = frozenset({"asyncio", "trio", "anyio", "msgspec", "google", "ngh2", "httpx", "ssl", "socket", "logging"})
FORBIDDEN = {
    LIGHT[0]: HEAVY,
    LIGHT[1]: HEAVY,
    # anyio asks for trio where both are, never for asyncio.
    "import meshlocal; meshlocal.open_mesh": {
        "asyncio",
        "google",
        "ngh2",
        "httpx",
        "yaml",
        "wsproto",
        "trio_websocket",
    },
    "import meshlocal.httpx": {"asyncio", "google", "yaml", "wsproto", "trio_websocket"},
    "import meshlocal.testing": {"asyncio", "google", "yaml", "wsproto", "trio_websocket", "httpx"},
}


@pytest.mark.parametrize("statement", FORBIDDEN)
def test_an_import_does_nothing(statement: str) -> None:
    """No thread, no descriptor, no signal handler, no log handler; and no loop or codec that is not asked for."""
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", SIDE_EFFECTS.replace("{statement}", statement)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert set(done.stdout.split()) & FORBIDDEN[statement] == set()


def test_the_wheel_holds_the_package_and_its_types(tmp_path: Path) -> None:
    """py.typed makes type checkers believe the annotations; generated stubs come along, tests do not."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        metadata = opened.read(next(each for each in names if each.endswith("/METADATA"))).decode()
    wanted = {"__init__.py", "py.typed", "httpx.py", "testing/__init__.py", "wire/pb/discovery_pb2.pyi"}
    assert {f"meshlocal/{each}" for each in wanted} <= names
    assert {each.partition("/")[0] for each in names} == {"meshlocal", f"meshlocal-{meshlocal.__version__}.dist-info"}
    assert "Provides-Extra: httpx" in metadata
    assert "Classifier: Typing :: Typed" in metadata
