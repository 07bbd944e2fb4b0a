"""The Containerfile's steps, run without a container engine: its own RUN lines, in a folder instead of an image.

The base image's python is played by a virtual environment; the paths that are arguments (ARG) lie in the folder. What
comes out is then run as the image's user, which may write nowhere in it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Any

import pip
import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTAINERFILE = ROOT / "deploy" / "container" / "Containerfile"
IGNORE_FILES = (ROOT / ".containerignore", CONTAINERFILE.with_name("Containerfile.dockerignore"))
NO_INDEX = re.compile(r"NewConnectionError|NameResolutionError|Temporary failure in name resolution|ConnectTimeout")


def instructions(text: Any) -> Any:
    """`(name, rest)` of each, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def pairs(rest: Any) -> Any:
    """The pairs of an ENV, LABEL or ARG with values."""
    return {key: bare or quoted for key, quoted, bare in re.findall(r'([\w.]+)=(?:"([^"]*)"|(\S*))', rest)}


def sent(path: Any) -> Any:
    """Whether an engine would have the file in its build context."""
    included = True
    for line in IGNORE_FILES[0].read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        parents = [path, *path.parents][:-1]
        names = [each.name for each in parents] if pattern.startswith("**/") else [str(each) for each in parents]
        if any(fnmatch(name, pattern.removeprefix("**/")) for name in names):
            included = line.startswith("!")
    return included


READ_ONLY = """
set -e
folder=$1 python=$2 closed=$3 spare=$4
shift 4
if [ -n "$closed" ]; then
    mkdir -p "$spare"
    mount --bind "$python" "$spare"
    mount -t tmpfs -o mode=755 none "$closed"
    mkdir -p "$python"
    mount --bind "$spare" "$python"
fi
mount --bind "$folder" "$folder"
mount -o remount,bind,ro "$folder"
exec "$@"
"""
"""Makes the image read-only, and python readable where it lies in a folder that is closed to others, such as /root."""


def _closed_folder(path: Any) -> Any:
    """The outermost folder on the path that only its owner may pass, or none."""
    closed = [str(each) for each in reversed([path, *path.parents]) if not each.stat().st_mode & 0o001]
    return closed[0] if closed else ""


class Image:
    """What the Containerfile makes, in a folder.

    Attributes:
        prefix: where meshlocal is installed.
        environment: the last stage's.
        said: the other instructions of the last stage.
    """

    def __init__(self, folder: Any) -> None:
        self.folder = folder
        self.prefix = folder / "opt" / "meshlocal"
        self.base = folder / "base"
        self.stdlib = folder / "stdlib"
        self.environment: dict[str, str] = {}
        self.said: dict[str, str] = {}
        self.copied: list[Any] = []

    def build(self) -> None:
        # With pip as it is here: to install it anew would take longer than all of the rest.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.base], check=True)
        (packages,) = (self.base / "lib").glob("python*/site-packages")
        record = next(file for file in metadata.files("pip") or () if file.name == "RECORD")
        for part in (Path(pip.__file__).parent, Path(record.locate()).parent):
            shutil.copytree(part, packages / part.name)
        self.base_packages = packages
        for package in ("json", "ensurepip"):
            source = Path(os.__file__).parent / package
            shutil.copytree(source, self.stdlib / package, ignore=shutil.ignore_patterns("__pycache__"))
        given = {"PREFIX": str(self.prefix), "STDLIB": str(self.stdlib)}
        arguments: dict[str, str] = {}
        work = self.folder
        for name, rest in instructions(CONTAINERFILE.read_text()):
            rest = rest if name == "RUN" else Template(rest).safe_substitute(arguments | self.environment)
            if name == "FROM":
                self.environment = {"PATH": f"{self.base}/bin:{os.environ['PATH']}"}
                self.said = {"FROM": rest}
                arguments, work = dict(arguments) if not self.copied else {}, self.folder
            elif name == "ARG":
                arguments |= {key: given.get(key, value) for key, value in pairs(rest).items()}
            elif name == "ENV":
                self.environment |= pairs(rest)
            elif name == "WORKDIR":
                work = self.folder / rest.strip("/")
                work.mkdir(parents=True)
            elif name == "COPY":
                self.copy(work, rest.split())
            elif name == "RUN":
                self.run(rest, work, arguments)
            else:
                assert name not in self.said or name == "LABEL"
                self.said[name] = rest

    def copy(self, work: Any, words: Any) -> None:
        if words[0].startswith("--from="):
            assert words[1:] == [str(self.prefix)] * 2
            return
        *sources, target = words
        for source in sources:
            files = [ROOT / source] if (ROOT / source).is_file() else sorted((ROOT / source).rglob("*"))
            inside = Path(".") if len(files) == 1 else Path(source)
            for file in files:
                path = file.relative_to(ROOT)
                if file.is_dir() or not sent(path):
                    continue
                place = work / target / (path.name if inside == Path(".") else path.relative_to(inside))
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place)
                self.copied.append(str(path))

    def run(self, command: Any, work: Any, arguments: Any) -> None:
        environment = {**os.environ, **arguments, **self.environment}
        # A cache changes nothing of what comes out, and spares the index.
        environment.pop("PIP_NO_CACHE_DIR", None)
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            check=False,
            cwd=work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode and NO_INDEX.search(done.stdout):
            pytest.skip("needs a package index")
        assert done.returncode == 0, f"RUN {command}\n{done.stdout}"

    def command(self, *arguments: Any) -> Any:
        """ENTRYPOINT and arguments, and how a kubelet would start them: with nothing but ENV.

        As root: also as USER, and in a mount namespace in which the image is read-only.
        """
        entrypoint, *fixed = json.loads(self.said["ENTRYPOINT"])
        program = [shutil.which(entrypoint, path=self.environment["PATH"]), *fixed, *arguments]
        options = {"env": self.environment, "cwd": "/", "text": True}
        if os.geteuid() != 0:
            return program, options
        user, group = self.said["USER"].split(":")
        setpriv = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs"]
        names = [str(self.folder), sys.base_prefix, _closed_folder(Path(sys.base_prefix)), str(self.folder / "python")]
        return ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", *names, *setpriv, *program], options

    def listing(self) -> Any:
        return {path: path.lstat().st_mtime_ns for path in self.prefix.rglob("*")}


@pytest.fixture(scope="module")
def image(program: Any) -> Iterator[Any]:
    if os.geteuid() == 0:
        for tool in ("unshare", "setpriv"):
            program(tool)
    # Not pytest's own folder, into which only root may look.
    with tempfile.TemporaryDirectory(prefix="meshlocal-image-") as folder:
        os.chmod(folder, 0o755)
        made = Image(Path(folder))
        made.build()
        folders = [path for path in (made.prefix, *made.prefix.rglob("*")) if path.is_dir() and not path.is_symlink()]
        for path in folders:
            path.chmod(0o555)
        yield made
        for path in folders:
            path.chmod(0o755)


def test_the_entrypoint_runs_as_the_images_user(image: Any) -> None:
    command, options = image.command("--version")
    assert str(image.prefix / "bin" / "meshlocal") in command
    done = subprocess.run(command, capture_output=True, check=True, **options)
    assert re.fullmatch(r"meshlocal \d+\.\d+\.\d+\S*\n", done.stdout)
    assert done.stderr == ""


def test_the_demo_runs_and_writes_nothing_into_the_tree(image: Any) -> None:
    before = image.listing()
    command, options = image.command("demo", "--seconds", "0.2")
    done = subprocess.run(command, check=False, capture_output=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert image.listing() == before


def test_the_stop_signal_stops_it_cleanly(image: Any) -> None:
    file = image.folder / "instances.yaml"
    file.write_text("services: {}\n")
    file.chmod(0o644)
    command, options = image.command("discovery", "--bind", "127.0.0.1:0", "--source", f"file:{file}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("meshlocal discovery ready")
        process.send_signal(getattr(signal, image.said["STOPSIGNAL"]))
        _, log = process.communicate()
    assert process.returncode == 0, log


def test_nothing_but_the_locked_versions_is_installed_and_no_pip(image: Any) -> None:
    code = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()), sep='\\n')"
    python = [image.prefix / "bin" / "python", "-I", "-c", code]
    installed = subprocess.run(python, capture_output=True, check=True, text=True).stdout.split()
    locked = [line.split(" ")[0] for line in (ROOT / "requirements" / "run.lock").read_text().splitlines()]
    normal = {re.sub(r"[-_.]+", "-", line).lower() for line in installed}
    assert {line for line in normal if not line.startswith("meshlocal==")} <= {
        re.sub(r"[-_.]+", "-", line).lower() for line in locked
    }
    assert any(line.startswith("meshlocal==") for line in normal)
    assert not any(line.startswith("pip==") for line in normal)
    assert not list(image.base_packages.glob("pip*"))


def test_every_module_is_compiled_and_never_checked_against_its_source(image: Any) -> None:
    """Flags 1: PEP 552's hash-based byte code, not to be checked."""
    tag = sys.implementation.cache_tag
    sources = [path for path in (image.prefix / "lib").rglob("*.py") if path.stat().st_size]
    sources += (image.stdlib / "json").glob("*.py")
    assert len(sources) > 200
    for source in sources:
        compiled = source.parent / "__pycache__" / f"{source.stem}.{tag}.pyc"
        assert compiled.read_bytes()[4:8] == b"\x01\0\0\0", source
    assert not list(image.stdlib.glob("ensurepip/__pycache__"))


def test_the_image_says_what_a_restricted_cluster_wants(image: Any) -> None:
    """The kubelet can tell that the user is not root by a number only."""
    user, group = image.said["USER"].split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert json.loads(image.said["ENTRYPOINT"]) == ["meshlocal"]
    assert image.said["STOPSIGNAL"] == "SIGTERM"
    assert image.environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert "CMD" not in image.said


def test_only_what_the_wheel_needs_is_copied(image: Any) -> None:
    assert "meshlocal/cli/main.py" in image.copied
    assert "requirements/run.lock" in image.copied
    assert {path.split("/")[0] for path in image.copied} == {
        "meshlocal",
        "requirements",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
    assert not [path for path in image.copied if "__pycache__" in path]


def test_both_ignore_files_say_the_same() -> None:
    one, other = ([line for line in path.read_text().splitlines() if not line.startswith("#")] for path in IGNORE_FILES)
    assert one == other
    assert not sent(Path(".git/config"))
    assert not sent(Path("nursery_tests/conftest.py"))
    assert not sent(Path("meshlocal/__pycache__/x.pyc"))
