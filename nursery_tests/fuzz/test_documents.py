"""Instances files and config files that were damaged: what is wrong is said, with where; or they are used whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlocal.app.config_loader import load_config
from meshlocal.policy.config import Config
from meshlocal.policy.config_build import ConfigError
from meshlocal.policy.model import index
from meshlocal.wire.instances_file import InstancesFile, InstancesFileError, parse_instances_file

INSTANCES = """\
zone: z1
cluster: c1
services:
  b:
    - {address: 10.0.1.10, port: 9000, port_name: grpc, labels: {node: n1}}
    - {address: "::1", port: 9000, protocol: udp, labels: {node: n2}, ready: false}
  idle: []
"""
CONFIG = """\
proxy:
  node_name: n1
  prefer: [node, zone]
  labels: {zone: z1}
  discovery: {urls: [grpc://127.0.0.1:7070], cache_file: /tmp/x}
  listen: [tcp://127.0.0.1:15001=b, http://127.0.0.1:15080]
  services:
    b: {health_check: {kind: http, path: /healthz}, limits: {requests: 5}, attempts: {deadline: 1.5}}
discovery:
  sources: [file:instances.yaml]
  limits: {watchers: 10, message_size: 4096}
log: {level: debug}
"""
SCRAPS = st.one_of(
    st.sampled_from(
        [
            "{",
            "}",
            "[",
            "]",
            ": ",
            "- ",
            "\n",
            "\n  ",
            "\t",
            "&a ",
            "*a",
            "<<: *a",
            "!!python/object:os.system ",
            "|\n",
            "''",
            "null",
            "true",
            "1e999",
            ".nan",
            ".inf",
            "0x10",
            "-1",
            "70000",
            "1:30",
            "2020-01-01",
            "\x00",
            "�",
            "\ufeff",
            "%YAML 9.9\n",
            "---\n",
            "...\n",
            "? ",
            "[" * 60,
            "{a: " * 60,
            "9" * 5000,
            "services",
            "proxy:\n",
            "node_name: ",
            "#",
        ]
    ),
    st.text(max_size=5),
)


@st.composite
def damaged(draw: st.DrawFn, whole: str) -> str:
    """A document with some of it cut out, doubled, or replaced."""
    text = whole
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 3, 20])))
        text = text[:start] + draw(st.one_of(SCRAPS, st.just(text[start:end] * 2), st.just(""))) + text[end:]
    return text


@given(damaged(INSTANCES))
def test_instances_files(text: str) -> None:
    """D3: the whole file or nothing of it; each problem says where it is."""
    found: InstancesFile | None = None
    said = ""
    try:
        found = parse_instances_file(text, "instances.yaml")
    except InstancesFileError as error:
        said = str(error)
    if found is None:
        assert said
        assert all(line.startswith("instances.yaml") for line in said.splitlines())
        return
    for instances in found.services.values():
        assert len(index(instances)) == len(instances)
        assert all(1 <= instance.key.port <= 65_535 for instance in instances)


@given(damaged(CONFIG))
def test_config_files(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    """S2: a configuration that can be used, or every problem in it."""
    file = Path(tmp_path_factory.mktemp("config", numbered=True) / "config.yaml")
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    config: Config | None = None
    said = ""
    try:
        config = load_config(file, {}, {})
    except ConfigError as error:
        said = str(error)
    assert said if config is None else isinstance(config, Config)
