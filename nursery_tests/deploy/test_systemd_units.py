"""The systemd units: systemd accepts them, and they run what meshlocal offers."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from meshlocal.app.config_loader import load_config
from meshlocal.cli.main import cli
from meshlocal.policy.model import ServiceKey
from meshlocal.wire.instances_file import parse_instances_file

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
UNITS = {"proxy": FOLDER / "meshlocal-proxy.service", "discovery": FOLDER / "meshlocal-discovery.service"}
PROGRAM = "/usr/local/bin/meshlocal"
MOST_EXPOSED = 30
"""Tenths of what `systemd-analyze security` gives: 0 is shut, 100 is open."""

each_unit = pytest.mark.parametrize("role", UNITS)


def settings(role: Any) -> Any:
    """The unit's settings; of one that stands several times the last."""
    return dict(re.findall(r"^(\w+)=(.*)$", UNITS[role].read_text(), re.MULTILINE))


def analyze(program: Any, tmp_path: Any, role: Any, *command: Any) -> Any:
    """Run systemd-analyze on the unit, with a program that exists in place of meshlocal."""
    unit = tmp_path / UNITS[role].name
    unit.write_text(UNITS[role].read_text().replace(PROGRAM, "/bin/true"))
    tool = program("systemd-analyze")
    return subprocess.run([tool, *command, unit], capture_output=True, text=True, check=False)


@each_unit
def test_systemd_accepts_the_unit(program: Any, tmp_path: Any, role: Any) -> None:
    done = analyze(program, tmp_path, role, "verify", "--man=no")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_systemd_would_refuse_a_wrong_one(program: Any, tmp_path: Any, monkeypatch: Any) -> None:
    broken = tmp_path / "broken" / "meshlocal-proxy.service"
    broken.parent.mkdir()
    broken.write_text(UNITS["proxy"].read_text().replace("ProtectHome=yes", "ProtectHouse=yes"))
    monkeypatch.setitem(UNITS, "proxy", broken)
    assert "ProtectHouse" in analyze(program, tmp_path, "proxy", "verify", "--man=no").stderr


def test_the_bypass_gets_what_it_needs_and_no_more(program: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """The drop-in of docs/bypass.md: systemd accepts it, with two capabilities and one system call more."""
    drop_in = (FOLDER / "bypass.conf").read_text()
    unit = tmp_path / "with" / "meshlocal-proxy.service"
    unit.parent.mkdir()
    unit.write_text(UNITS["proxy"].read_text().replace("[Install]", f"{drop_in}\n[Install]"))
    monkeypatch.setitem(UNITS, "proxy", unit)
    done = analyze(program, tmp_path, "proxy", "verify", "--man=no")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    added = dict(re.findall(r"^(\w+)=(.*)$", drop_in, re.MULTILINE))
    assert added == {
        "AmbientCapabilities": "CAP_BPF CAP_NET_ADMIN",
        "CapabilityBoundingSet": "CAP_BPF CAP_NET_ADMIN",
        "PrivateUsers": "no",
        "SystemCallFilter": "bpf",
    }


@each_unit
def test_the_service_sees_little(program: Any, tmp_path: Any, role: Any) -> None:
    done = analyze(program, tmp_path, role, "security", "--offline=yes", f"--threshold={MOST_EXPOSED}", "--no-pager")
    assert done.returncode == 0, done.stdout


@each_unit
def test_the_command_and_its_configuration_are_meshlocals(role: Any) -> None:
    words = shlex.split(
        shlex.split(settings(role)["ExecStart"])[-1] if role == "proxy" else settings(role)["ExecStart"]
    )
    arguments = words[words.index(PROGRAM) + 1 :]
    assert arguments[0] == role
    context = cli.commands[role].make_context(role, arguments[1:])
    assert context.params["config_file"] == Path(f"/etc/meshlocal/{role}.yaml")
    config = load_config(FOLDER / f"{role}.yaml", {}, {}, role)
    drain = getattr(config, role).drain
    assert drain.delay + drain.timeout < int(settings(role)["TimeoutStopSec"])


def test_the_proxys_node_is_the_host_name(tmp_path: Any) -> None:
    """L1, by the unit's own command line: in a shell, since systemd expands no commands."""
    stub = tmp_path / "meshlocal"
    stub.write_text('#!/bin/sh\necho "$NODE_NAME" "$@"\n')
    stub.chmod(0o755)
    command = shlex.split(settings("proxy")["ExecStart"].replace(PROGRAM, str(stub)))
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    assert done.stdout == f"{socket.gethostname()} proxy --config /etc/meshlocal/proxy.yaml\n"


def test_the_example_of_an_instances_file_is_one() -> None:
    file = FOLDER / "instances.yaml"
    content = parse_instances_file(file.read_text(), str(file))
    assert [instance.node for instance in content.services[ServiceKey("b")]] == ["n1", "n2"]


def test_the_proxys_unit_starts_reloads_and_stops_as_systemd_is_told(tmp_path: Any) -> None:
    """The unit's own command and configuration, with ports that are free; S1 and S2 by sd_notify(3) and signals."""
    config = tmp_path / "proxy.yaml"
    text = (FOLDER / "proxy.yaml").read_text().replace("grpc://127.0.0.1:7070", f"file:{FOLDER}/instances.yaml")
    config.write_text(text.replace("15001=b", "0=b") + "  admin: null\n")
    line = settings("proxy")["ExecStart"].replace("/etc/meshlocal/proxy.yaml", str(config))
    command = shlex.split(line.replace(PROGRAM, str(Path(sys.executable).with_name("meshlocal"))))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        environment = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(tmp_path / "notify")}
        with subprocess.Popen(command, env=environment, stdout=PIPE, stderr=PIPE, text=True) as process:
            assert manager.recv(100) == b"READY=1"
            assert process.stdout is not None
            assert process.stderr is not None
            ready = process.stdout.readline()
            process.send_signal(signal.SIGHUP)
            log = ""
            while "config applied" not in log:
                read = process.stderr.readline()
                assert read, log
                log += read
            process.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            process.communicate()
    assert ready.startswith(f"meshlocal proxy ready: node={socket.gethostname()} tcp://127.0.0.1:")
    assert process.returncode == 0


REGISTER = FOLDER / "meshlocal-register@.service"


@pytest.mark.parametrize(
    "command", [["verify", "--man=no"], ["security", "--offline=yes", f"--threshold={MOST_EXPOSED}"]]
)
def test_systemd_accepts_the_unit_that_registers(program: Any, tmp_path: Any, command: Any) -> None:
    (tmp_path / "b.service").write_text("[Service]\nExecStart=/bin/true\n")
    unit = tmp_path / "meshlocal-register@b.service"
    unit.write_text(REGISTER.read_text().replace(PROGRAM, "/bin/true"))
    done = subprocess.run(
        [program("systemd-analyze"), *command, unit],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_registered_is_said_in_a_file(tmp_path: Any) -> None:
    """By the unit's own command line; of OPTIONS each word is one."""
    stub = tmp_path / "meshlocal"
    stub.write_text('#!/bin/sh\necho "$NODE_NAME" "$@"\n')
    stub.chmod(0o755)
    line = dict(re.findall(r"^(\w+)=(.*)$", REGISTER.read_text(), re.MULTILINE))["ExecStart"]
    environment = {"PATH": os.environ["PATH"], "REGISTRY": "etcd://h:1/p", "SERVICE": "b", "PORT": "9000"}
    environment["OPTIONS"] = "--health http --drain 10"
    command = shlex.split(line.replace(PROGRAM, str(stub)))
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    expected = (
        f"{socket.gethostname()} register --registry etcd://h:1/p --service b --port 9000 {environment['OPTIONS']}\n"
    )
    assert done.stdout == expected
    words = shlex.split(done.stdout)[2:]
    assert cli.commands["register"].make_context("register", words).params["drain"] == 10
