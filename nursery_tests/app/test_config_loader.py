"""Flags, environment and file together."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshlocal.app.config_loader import load_config, unused_variables
from meshlocal.policy.addresses import DiscoveryUrl, ListenAddress, SocketAddress
from meshlocal.policy.config import AttemptPolicy, Config, DrainConfig, ProxyConfig
from meshlocal.policy.config_build import ConfigError, known_keys
from meshlocal.policy.model import ServiceKey


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def refused(file: Path | None, flags: dict[str, object], environment: dict[str, str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(file, flags, environment)
    text = str(caught.value)
    return (text.replace(str(file.parent) + "/", "") if file is not None else text).splitlines()


def test_nothing_gives_the_defaults_and_an_unknown_node() -> None:
    """L1."""
    assert load_config(None, {}, {}) == Config(proxy=ProxyConfig(node_name=""))


def test_flags_win_over_environment_over_file(file: Path) -> None:
    file.write_text(
        "proxy: {attempts: {deadline: 1, connect_timeout: 1, max_attempts: 1}, labels: {a: file, b: file, c: file}}"
    )
    environment = {
        "MESHLOCAL_PROXY__ATTEMPTS__DEADLINE": "2",
        "MESHLOCAL_PROXY__ATTEMPTS__CONNECT_TIMEOUT": "2",
        "MESHLOCAL_PROXY__LABELS": "a=environment, b=environment",
    }
    flags = {"proxy.attempts.deadline": 3.0, "proxy.labels": {"a": "flag"}}
    proxy = load_config(file, flags, environment).proxy
    assert proxy.attempts == AttemptPolicy(deadline=3.0, connect_timeout=2.0, max_attempts=1)
    assert proxy.labels == {"a": "flag", "b": "environment", "c": "file"}


def test_flags_that_were_not_given_do_not_count(file: Path) -> None:
    file.write_text("proxy: {listen: ['tcp://127.0.0.1:1=b'], admin: '127.0.0.1:2'}")
    proxy = load_config(file, {"proxy.listen": (), "proxy.admin": None}, {}).proxy
    assert proxy.listen == (ListenAddress("tcp", "127.0.0.1", 1, ServiceKey("b")),)
    assert proxy.admin == SocketAddress("127.0.0.1", 2)


@pytest.mark.parametrize(
    ("configured", "environment", "name"),
    [
        ("file", {"NODE_NAME": "node"}, "file"),
        ("file", {"NODE_NAME": "node", "MESHLOCAL_PROXY__NODE_NAME": "own"}, "own"),
        ("", {"NODE_NAME": "node"}, "node"),
        ("''", {"NODE_NAME": " "}, ""),
    ],
)
def test_node_name(file: Path, configured: str, environment: dict[str, str], name: str) -> None:
    """L1."""
    file.write_text(f"proxy: {{node_name: {configured}}}")
    assert load_config(file, {}, environment).proxy.node_name == name


def test_the_environment_has_every_kind_of_value() -> None:
    config = load_config(
        None,
        {},
        {
            "MESHLOCAL_PROXY__NODE_NAME": "1.20",
            "MESHLOCAL_PROXY__LISTEN": "tcp://127.0.0.1:1=b, tcp://127.0.0.1:2=c\ttcp://127.0.0.1:3=d",
            "MESHLOCAL_PROXY__DISCOVERY__URLS": "[grpc://a:1, 'grpc://b:2']",
            "MESHLOCAL_PROXY__ADMIN": "none",
            "MESHLOCAL_PROXY__ATTEMPTS__IDLE_TIMEOUT": "null",
            "MESHLOCAL_PROXY__ATTEMPTS__MAX_ATTEMPTS": "4",
            "MESHLOCAL_PROXY__LABELS__ZONE": "true",
            "MESHLOCAL_PROXY__SERVICES": "{b.Default: {attempts: {deadline: 7}}}",
            "MESHLOCAL_PROXY__SERVICES__C__PORT_NAME": "grpc",
            "MESHLOCAL_PROXY__DRAIN": "delay=1,timeout=2",
            "MESHLOCAL_PROXY__DRAIN__TIMEOUT": "3",
            "MESHLOCAL_PROXY__NAMESPACE": " ",
            "MESHLOCAL_LOG__LEVEL": "debug",
        },
    )
    proxy = config.proxy
    assert proxy.node_name == "1.20"
    assert [listener.port for listener in proxy.listen] == [1, 2, 3]
    assert proxy.discovery.urls == (DiscoveryUrl("grpc", "a", 1), DiscoveryUrl("grpc", "b", 2))
    assert proxy.admin is None
    assert (proxy.attempts.idle_timeout, proxy.attempts.max_attempts) == (None, 4)
    assert proxy.labels == {"zone": "true"}
    assert proxy.attempts_for(ServiceKey("b.Default")).deadline == 7.0
    assert proxy.service(ServiceKey("c")).port_name == "grpc"
    assert proxy.drain == DrainConfig(delay=1.0, timeout=3.0), "the longer path wins"
    assert proxy.namespace is None, "blank is as good as none"
    assert config.log.level == "debug"


KUBERNETES = {
    "MESHLOCAL_DISCOVERY_SERVICE_HOST": "10.0.0.1",
    "MESHLOCAL_DISCOVERY_SERVICE_PORT": "7070",
    "MESHLOCAL_DISCOVERY_SERVICE_PORT_GRPC": "7070",
    "MESHLOCAL_DISCOVERY_PORT": "tcp://10.0.0.1:7070",
    "MESHLOCAL_DISCOVERY_PORT_7070_TCP": "tcp://10.0.0.1:7070",
    "MESHLOCAL_DISCOVERY_PORT_7070_TCP_PROTO": "tcp",
    "MESHLOCAL_DISCOVERY_PORT_7070_TCP_PORT": "7070",
    "MESHLOCAL_DISCOVERY_PORT_7070_TCP_ADDR": "10.0.0.1",
    "MESHLOCAL_PORT": "tcp://10.0.0.2:80",
    # Of services that are called meshlocal-proxy--listen and meshlocal--x, with a port named a--b.
    "MESHLOCAL_PROXY__LISTEN_SERVICE_HOST": "10.0.0.3",
    "MESHLOCAL_PROXY__LISTEN_PORT_80_UDP_ADDR": "10.0.0.3",
    "MESHLOCAL__X_PORT": "tcp://10.0.0.3:80",
    "MESHLOCAL_DISCOVERY_SERVICE_PORT_A__B": "7070",
}


def test_what_kubernetes_sets_for_services_does_no_harm() -> None:
    assert load_config(None, {}, KUBERNETES) == load_config(None, {}, {})
    assert unused_variables(KUBERNETES) == ()


def test_variables_that_are_no_keys_can_be_named() -> None:
    environment = {
        **KUBERNETES,
        "MESHLOCAL_PROXY_LISTEN": "x",
        "MESHLOCAL_": "",
        "HOME": "/",
        "MESHLOCAL_LOG__LEVEL": "",
    }
    assert load_config(None, {}, environment) == load_config(None, {}, {})
    assert unused_variables(environment) == ("MESHLOCAL_", "MESHLOCAL_PROXY_LISTEN")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PROXY__LISTENN", "x", "proxy.listenn: unknown key; did you mean 'listen'?"),
        ("PROXI__LISTEN", "x", "proxi: unknown key; did you mean 'proxy'?"),
        ("PROXY__", "x", f"proxy.: unknown key; known here: {', '.join(known_keys(('proxy',)))}"),
        ("PROXY__LISTEN__X", "x", "proxy.listen: expected a list, got a mapping"),
        (
            "PROXY__LISTEN",
            "x",
            "proxy.listen[0]: expected tcp://HOST:PORT=SERVICE or http://HOST:PORT[=SERVICE] (or tls, https), got 'x'",
        ),
        ("PROXY__LISTEN", "[", "proxy.listen: while parsing a flow node, did not find expected node content"),
        ("PROXY__DRAIN__DELAY", "5s", "proxy.drain.delay: expected a number of seconds, got the text '5s'"),
        ("PROXY__DRAIN", "delay=x", "proxy.drain.delay: expected a number of seconds, got the text 'x'"),
        (
            "PROXY__LABELS",
            "zone",
            "proxy.labels: expected key=value, separated by commas, or a mapping in braces; got the text 'zone'",
        ),
        (
            "PROXY__LABELS",
            "zone=a,zone=b",
            "proxy.labels: expected key=value, separated by commas, or a mapping in braces; got zone twice",
        ),
        ("PROXY__LABELS", "{a: 1}", "proxy.labels.a: expected text, got the number 1; put it between quotes"),
        ("LOG__LEVEL", "loud", "log.level: expected one of debug, error, info, warning, got the text 'loud'"),
    ],
)  # fmt: skip
def test_mistakes_in_the_environment(name: str, value: str, message: str) -> None:
    assert refused(None, {}, {f"MESHLOCAL_{name}": value}) == [f"environment MESHLOCAL_{name}: {message}"]


def test_mistakes_in_flags() -> None:
    assert refused(None, {"proxy.admin": "x", "proxy.nope": 1}, {}) == [
        "flag: proxy.admin: expected HOST:PORT, got 'x'",
        f"flag: proxy.nope: unknown key; known here: {', '.join(known_keys(('proxy',)))}",
    ]


def test_mistakes_in_the_file_have_a_line(file: Path) -> None:
    file.write_text(
        "log:\n  level: info\nproxy:\n  listen:\n    - tcp://127.0.0.1:1=b\n    - 5\n  drain:\n    dely: 1\n"
    )
    assert refused(
        file, {}, {"MESHLOCAL_LOG__FORMAT": "x", "MESHLOCAL_LOG__LEVEL": "x", "MESHLOCAL_PROXY__ADMIN": "x"}
    ) == [
        "environment MESHLOCAL_LOG__FORMAT: log.format: expected one of auto, json, text, got the text 'x'",
        "environment MESHLOCAL_LOG__LEVEL: log.level: expected one of debug, error, info, warning, got the text 'x'",
        "environment MESHLOCAL_PROXY__ADMIN: proxy.admin: expected HOST:PORT, got 'x'",
        "config.yaml:6: proxy.listen[1]: expected text, got the number 5; put it between quotes",
        "config.yaml:8: proxy.drain.dely: unknown key; did you mean 'delay'?",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"proxy: {\n", "config.yaml:2:1: while parsing a flow node, did not find expected node content"),
        (b"log: {}\nlog: {}\n", "config.yaml:2:1: the key 'log' is already on line 1"),
        (b"- proxy\n", "config.yaml:1: expected a mapping, got a list"),
        (b"a\n\xff", "config.yaml:2: is not UTF-8"),
        (b"#" * (16 * 1024 * 1024 + 1), "config.yaml: is longer than 16777216 bytes"),
        (None, "config.yaml: cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_no_configuration(file: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        file.write_bytes(content)
    assert refused(file, {}, {}) == [message]


def test_an_empty_file_is_as_good_as_none(file: Path) -> None:
    file.write_text("# nothing yet\n")
    assert load_config(file, {}, {}) == load_config(None, {}, {})


def test_what_is_needed_is_asked_for(file: Path) -> None:
    file.write_text("proxy: {discovery: {urls: ['file:instances.yaml']}}")
    with pytest.raises(ConfigError) as caught:
        load_config(file, {}, {}, "proxy")
    assert str(caught.value) == "proxy.listen: no listener is given; such as tcp://127.0.0.1:15001=b"
    config = load_config(file, {"proxy.listen": ("tcp://127.0.0.1:0=b",)}, {}, "proxy")
    assert config.proxy.discovery.urls == (DiscoveryUrl("file", path="instances.yaml"),)


def test_the_documented_example(file: Path) -> None:
    file.write_text("""\
proxy:
  node_name: n1
  namespace: default
  labels: {zone: z1}
  prefer: [node, zone]
  within: zone
  discovery:
    urls: ["grpc://127.0.0.1:7070"]
    keepalive_interval: 10.0
  listen: ["tcp://127.0.0.1:15001=b"]
  admin: 127.0.0.1:15000
  attempts: {connect_timeout_local: 0.25, max_attempts: null}
  services:
    b: {port_name: grpc, attempts: {deadline: 3}}
discovery:
  bind: ["127.0.0.1:7070"]
  sources: ["file:instances.yaml"]
  admin: null
log: {level: info, format: auto}
""")
    config = load_config(file, {}, {}, "proxy")
    assert config.proxy.attempts_for(ServiceKey("b")) == AttemptPolicy(deadline=3.0)


names = st.sampled_from(
    [
        "PROXY",
        "LOG",
        "DISCOVERY",
        "LABELS",
        "LISTEN",
        "DRAIN",
        "DELAY",
        "ADMIN",
        "SERVICES",
        "URLS",
        "_",
        "",
        "PORT",
        "é",
    ]
)
variables = st.lists(names, max_size=4).map(lambda parts: "MESHLOCAL_" + "__".join(parts))
values = st.text(alphabet=st.sampled_from("[]{}=,:1ab &*!\n'\"\ud800"), max_size=12)


@given(
    st.dictionaries(variables, values, max_size=4),
    st.binary(max_size=30) | values.map(lambda t: t.encode("utf-8", "replace")),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_but_config_errors(file: Path, environment: dict[str, str], content: bytes) -> None:
    file.write_bytes(content)
    problems: tuple[object, ...] = ()
    config = None
    try:
        config = load_config(file, {}, environment)
    except ConfigError as error:
        problems = error.problems
    assert (config is None) == bool(problems)
