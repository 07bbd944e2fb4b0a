"""cli/main in this process: what the command line takes, and one clear line with a status for what it does not."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import yaml

from meshlocal.app import run as run_module
from meshlocal.cli.main import cli, main
from meshlocal.policy.config import Config

INSTANCES = """\
zone: z1
cluster: c1
services:
  b:
    - {address: 127.0.0.1, port: 9001, port_name: grpc, labels: {node: n1}}
    - {address: 127.0.0.2, port: 9002, labels: {node: n2}}
    - {address: 127.0.0.3, port: 9003}
  empty: []
"""
FILE = ("--discovery", "file:instances.yaml")
TCP = ("--listen", "tcp://127.0.0.1:0=b")


class Done(NamedTuple):
    status: object
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    for name in os.environ:
        if name.startswith("MESHLOCAL_") or name == "NODE_NAME":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "instances.yaml").write_text(INSTANCES)

    def run(*arguments: str, **env: str) -> Done:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["meshlocal", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Done(end.value.code, out, err)

    return run


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_version(run: Run) -> None:
    status, out, err = run("--version")
    assert (status, err) == (0, "")
    assert out.startswith("meshlocal 0.")


@pytest.mark.parametrize("command", ["", *cli.commands])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(run: Run, command: str, flag: str) -> None:
    status, out, err = run(*command.split(), flag)
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: meshlocal {command}".rstrip())


def test_every_option_says_what_it_is() -> None:
    for name, command in cli.commands.items():
        assert command.help, name
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help, (name, parameter.name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["proxy"], "proxy.listen: no listener is given"),
        (["proxy", *TCP], "proxy.discovery.urls: no discovery URL is given"),
        (["proxy", *TCP, "--discovery", "http://x:1"], "flag: proxy.discovery.urls[0]: expected grpc://HOST:PORT"),
        (["proxy", "--listen", "tcp://127.0.0.1:70000=b", *FILE], "flag: proxy.listen[0]: "),
        (["proxy", "--listen", "tcp://127.0.0.1:1", *FILE], "flag: proxy.listen[0]: "),
        (["proxy", *TCP, *FILE, "--admin", "nowhere"], "flag: proxy.admin: expected HOST:PORT"),
        (["proxy", *TCP, *FILE, "--label", "zone"], "--label: expected KEY=VALUE"),
        (["proxy", *TCP, *FILE, "--label", "node=n1"], "flag: proxy.labels.node: is set by proxy.node_name"),
        (["proxy", *TCP, *FILE, "--within", "zone"], "flag: proxy.within: "),
        (["proxy", *TCP, *FILE, "--log-level", "loud"], "flag: log.level: expected one of"),
        (["discovery"], "discovery.sources: no source is given"),
        (["discovery", "--source", "file:"], "flag: discovery.sources[0]: "),
        (["discovery", "--source", "ftp:x"], "flag: discovery.sources[0]: "),
        (["discovery", "--source", "file:x", "--bind", "7070"], "flag: discovery.bind[0]: "),
        (["get", "services", "b"], "only instances are those of a SERVICE"),
        (["get", "instances", "-w"], "--watch is for the instances of a SERVICE"),
        (["get", "services", "-w"], "--watch is for the instances of a SERVICE"),
        (["get", "nodes", "b"], "only instances are those of a SERVICE"),
        (["get", "pods"], "'pods' is not one of"),
        (["explain"], "Missing argument 'SERVICE'"),
        (["demo", "--seconds", "0"], "0.0 is not in the range"),
        (["serve"], "No such command 'serve'"),
        (["proxy", "--config", "missing.yaml"], "missing.yaml: cannot be read: No such file or directory"),
        (["proxy", "--config", "."], ".: cannot be read: Is a directory"),
    ],
)
def test_bad_flags_are_refused(run: Run, arguments: list[str], said: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert said in err


def test_an_unknown_flag_is_refused(run: Run) -> None:
    """Click's versions put different characters between the two."""
    status, out, err = run("proxy", "--nonsense")
    assert (status, out) == (2, "")
    assert re.search(r"No such option\W+--nonsense\b", err)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("proxy: {listn: []}", ["config.yaml:1: proxy.listn: unknown key; did you mean 'listen'?"]),
        ("proxy:\n  attempts:\n    deadline: soon", ["config.yaml:3: proxy.attempts.deadline: expected a number"]),
        ("proxy:\n  admin: 15000", ["config.yaml:2: proxy.admin: expected text"]),
        ("proxy: [", ["config.yaml:2:1: while parsing"]),
        ("- 1", ["config.yaml:1: expected a mapping, got a list"]),
        # All that is wrong at once, each on a line of its own.
        ("proxi: {}\nlog: {level: loud}", ["config.yaml:1: proxi: unknown key", "config.yaml:2: log.level: expected"]),
    ],
)
def test_a_bad_config_file_is_refused(run: Run, text: str, said: list[str]) -> None:
    Path("config.yaml").write_text(text)
    status, out, err = run("proxy", "--config", "config.yaml", *TCP, *FILE)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == len(said)
    for line, start in zip(err.splitlines(), said, strict=True):
        assert line.startswith(f"meshlocal: {start}")


def test_bad_environment_variables_are_refused(run: Run) -> None:
    env = {"MESHLOCAL_PROXY__ATTEMPTS__DEADLIN": "3", "MESHLOCAL_PROXY__DRAIN__DELAY": "soon"}
    status, out, err = run("proxy", *TCP, *FILE, **env)
    assert (status, out) == (2, "")
    assert sorted(err.splitlines()) == [
        "meshlocal: environment MESHLOCAL_PROXY__ATTEMPTS__DEADLIN: proxy.attempts.deadlin: unknown key;"
        " did you mean 'deadline'?",
        "meshlocal: environment MESHLOCAL_PROXY__DRAIN__DELAY: proxy.drain.delay: expected a number of seconds,"
        " got the text 'soon'",
    ]


def test_proxy_flags_reach_the_config(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags win over the environment, it over the file; the status is the process's."""
    seen: list[Config] = []
    monkeypatch.setattr(run_module, "run_proxy", lambda load: seen.append(load()) or 7)
    Path("config.yaml").write_text("proxy: {namespace: f, access_log: true, drain: {delay: 1}, node_name: f}")
    status, _, _ = run(
        *("proxy", *FILE, *TCP, "--listen", "tcp://[::1]:1=c", "--config", "config.yaml", "--node-name", "n1"),
        *("--label", "zone=z1", "--label", "rack=", "--prefer", "node, zone", "--within", "zone"),
        *("--namespace", "ns", "--admin", "none", "--no-access-log", "--log-level", "debug", "--log-format", "json"),
        MESHLOCAL_PROXY__NAMESPACE="e",
        MESHLOCAL_PROXY__DRAIN__DELAY="2",
        NODE_NAME="e",
    )
    assert status == 7
    (config,) = seen
    proxy = config.proxy
    assert [str(listen) for listen in proxy.listen] == ["tcp://127.0.0.1:0=b", "tcp://[::1]:1=c"]
    assert (proxy.node_name, proxy.labels, proxy.prefer) == ("n1", {"zone": "z1", "rack": ""}, ("node", "zone"))
    assert (proxy.within, proxy.namespace, proxy.admin, proxy.access_log) == ("zone", "ns", None, False)
    assert (proxy.drain.delay, config.log.level, config.log.format) == (2.0, "debug", "json")
    assert [str(url) for url in proxy.discovery.urls] == ["file:instances.yaml"]


def test_discovery_flags_reach_the_config(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    monkeypatch.setattr(run_module, "run_discovery", lambda load: seen.append(load()) or 0)
    status, _, _ = run(
        *("discovery", "--bind", "127.0.0.1:0", "--bind", "[::1]:0", "--source", "file:a", "--source", "file:b"),
        *("--zone", "z", "--cluster", "c", "--admin", "127.0.0.1:0"),
    )
    assert status == 0
    (config,) = seen
    server = config.discovery
    assert [str(each) for each in server.bind] == ["127.0.0.1:0", "[::1]:0"]
    assert [str(each) for each in server.sources] == ["file:a", "file:b"]
    assert (server.zone, server.cluster, str(server.admin)) == ("z", "c", "127.0.0.1:0")


def test_get_from_a_file(run: Run) -> None:
    assert lines(run("get", "services", *FILE).out) == [["NAME", "INSTANCES"], ["b", "3"], ["empty", "0"]]
    assert json.loads(run("get", "services", *FILE, "-o", "json").out)[0] == {"name": "b", "instances": 3}
    status, out, err = run("get", "instances", "b", *FILE)
    assert (status, err) == (0, "")
    assert lines(out)[1:] == [
        ["127.0.0.1", "9001", "grpc", "n1", "ready", "cluster=c1,zone=z1"],
        ["127.0.0.2", "9002", "-", "n2", "ready", "cluster=c1,zone=z1"],
        ["127.0.0.3", "9003", "-", "-", "ready", "cluster=c1,zone=z1"],
    ]
    view = json.loads(run("get", "instances", "b", *FILE, "-o", "json").out)
    assert [each["node"] for each in view["instances"]] == ["n1", "n2", None]
    assert lines(run("get", "instances", "empty", *FILE).out)[1:] == []
    assert lines(run("get", "zones", *FILE).out)[1:] == [["z1"]]
    assert lines(run("get", "clusters", *FILE).out)[1:] == [["c1", "z1"]]


def test_get_instances_of_all_services(run: Run) -> None:
    out = run("get", "instances", *FILE).out
    assert [line[:3] for line in lines(out)] == [
        ["SERVICE", "ADDRESS", "PORT"],
        ["b", "127.0.0.1", "9001"],
        ["b", "127.0.0.2", "9002"],
        ["b", "127.0.0.3", "9003"],
    ]
    views = json.loads(run("get", "instances", *FILE, "-o", "json").out)
    assert [(view["service"], len(view["instances"])) for view in views] == [("b", 3), ("empty", 0)]


def test_get_wide_has_every_column(run: Run) -> None:
    header, first, *_ = lines(run("get", "instances", "b", *FILE, "-o", "wide").out)
    assert header == ["ADDRESS", "PORT", "PORT", "NAME", "NODE", "STATE", "PROTOCOL", "REGISTRY", "LABELS"]
    assert first == ["127.0.0.1", "9001", "grpc", "n1", "ready", "tcp", "file", "cluster=c1,zone=z1"]


def test_get_nodes_says_what_runs_where(run: Run) -> None:
    many = "".join(f"  s{number}: [{{address: 127.0.0.1, port: 1, labels: {{node: n2}}}}]\n" for number in range(6))
    Path("instances.yaml").write_text(INSTANCES.removesuffix("  empty: []\n") + many)
    nodes = json.loads(run("get", "nodes", *FILE, "-o", "json").out)
    assert [(node["name"], node["zone"], node["instances"]) for node in nodes] == [
        ("n1", "z1", 1),
        ("n2", "z1", 7),
        (None, None, 1),
    ]
    assert nodes[1]["services"] == {"b": 1, **{f"s{number}": 1 for number in range(6)}}
    _, _, n2, _ = lines(run("get", "nodes", *FILE).out)
    assert " ".join(n2) == "n2 z1 7 b 1, s0 1, s1 1, s2 1, s3 1, and 2 more"
    assert "s4 1, s5 1" in run("get", "nodes", *FILE, "-o", "wide").out


@pytest.mark.parametrize("question", [["get", "services"], ["get", "nodes"], ["get", "instances", "b"]])
def test_yaml_says_what_json_says(run: Run, question: list[str]) -> None:
    both = [run(*question, *FILE, "-o", output).out for output in ("yaml", "json")]
    assert yaml.safe_load(both[0]) == json.loads(both[1])


def test_explain_says_the_plan_and_why(run: Run) -> None:
    """R2, L2, L5: the plan of a proxy that stands on a node, or does not know where."""
    on_n1 = run("explain", "b", *FILE, "--node-name", "n1")
    assert on_n1.status == 0
    steps = [line for line in lines(on_n1.out) if line and line[0].isdecimal()]
    assert steps[0][:4] == ["1", "127.0.0.1:9001", "n1", "node"]
    assert {tuple(step[2:5]) for step in steps[1:]} == {
        ("n2", "other", "local_failed:"),
        ("-", "other", "local_failed:"),
    }
    lost = json.loads(run("explain", "b", *FILE, "-o", "json").out)
    assert lost["node"] is None
    assert [step["reason"] for step in lost["plan"]] == ["node_unknown"] * 3
    named = json.loads(run("explain", "b", *FILE, "--port-name", "grpc", "-o", "json", NODE_NAME="n2").out)
    assert [(step["instance"], step["reason"]) for step in named["plan"]] == [("127.0.0.1:9001", "no_local")]
    assert len(named["left_out"]) == 2
    assert "no usable instance: a request is refused" in run("explain", "empty", *FILE).out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["get", "instances", "zz", *FILE], "file:instances.yaml knows no service 'zz'; it knows b, empty"),
        (["explain", "zz", *FILE], "file:instances.yaml knows no service 'zz'; it knows b, empty"),
        (["get", "services", "--discovery", "file:no.yaml"], "no.yaml: cannot be read: No such file or directory"),
        (
            ["get", "instances", "z z", *FILE],
            "service: 'z z' is no service name (letters, digits, '.', '-', '_'; at most 253)",
        ),
    ],
)
def test_what_cannot_be_answered_is_one_line(run: Run, arguments: list[str], line: str) -> None:
    assert run(*arguments) == (1, "", f"meshlocal: {line}\n")


def test_a_proxy_that_is_no_address_is_the_flags_fault(run: Run) -> None:
    assert run("explain", "b", "--proxy", "15000") == (2, "", "meshlocal: --proxy: expected HOST:PORT, got '15000'\n")


def test_a_token_for_a_proxy_elsewhere_goes_over_tls_only(run: Run) -> None:
    Path("token").write_text("s3cret\n")
    status, out, err = run("explain", "b", "--proxy", "192.0.2.1:15000", "--token-file", "token")
    assert (status, out) == (2, "")
    assert err == ("meshlocal: --token-file: no token goes over plaintext beyond this machine: ask at https://\n")


def test_a_malformed_instances_file_says_each_line_and_key(run: Run) -> None:
    Path("bad.yaml").write_text(
        "services:\n  b:\n    - {address: '', port: 9000}\n    - {address: 10.0.0.1, port: 0}\n"
        "    - {address: 10.0.0.1, port: 70000}\n    - {address: 10.0.0.1, prt: 1}\n"
    )
    status, out, err = run("get", "instances", "b", "--discovery", "file:bad.yaml")
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        "meshlocal: bad.yaml:3: services.b[0].address: is empty",
        "meshlocal: bad.yaml:4: services.b[1].port: 0 is not within 1 to 65535",
        "meshlocal: bad.yaml:5: services.b[2].port: 70000 is not within 1 to 65535",
        "meshlocal: bad.yaml:6: services.b[3].prt: unknown key; did you mean 'port'?",
        "meshlocal: bad.yaml:6: services.b[3]: the key port is missing",
    ]


def test_ctrl_c_is_status_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(load: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "run_proxy", interrupted)
    assert run("proxy", *FILE, *TCP).status == 130


def test_a_fault_of_ours_has_its_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def faulty(load: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(run_module, "run_proxy", faulty)
    monkeypatch.setattr(sys, "argv", ["meshlocal", "proxy", *FILE, *TCP])
    with pytest.raises(ZeroDivisionError):
        main()
