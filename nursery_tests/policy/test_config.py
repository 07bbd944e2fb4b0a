"""The schema: its defaults, the policy of a service, the node's name (L1)."""

import msgspec.inspect
import pytest
from msgspec import UNSET

from meshlocal.policy.addresses import SocketAddress
from meshlocal.policy.config import (
    AttemptOverrides,
    AttemptPolicy,
    Config,
    ProxyConfig,
    ServiceConfig,
    resolve_node_name,
)
from meshlocal.policy.config_http import HttpConfig
from meshlocal.policy.model import ServiceKey


def test_defaults_are_those_of_the_rules() -> None:
    """A1, A3, A7, L3, O5."""
    proxy = Config().proxy
    assert proxy.attempts == AttemptPolicy(
        connect_timeout_local=0.25,
        connect_timeout=1.0,
        deadline=10.0,
        max_attempts=None,
        first_snapshot_wait=5.0,
        idle_timeout=3600.0,
        attempt_timeout=None,
        response_deadline=15.0,
        retry_on=(503,),
        replay_buffer=65536,
    )
    assert proxy.http == HttpConfig(
        max_head=65536,
        max_headers=128,
        max_target=16384,
        max_body=None,
        header_timeout=10.0,
        body_timeout=60.0,
        keep_alive_timeout=600.0,
        pool_size=256,
        pool_idle_timeout=60.0,
        retry_percent=20,
        retry_floor=10,
    )
    assert proxy.prefer == ("node",)
    assert proxy.within is None
    assert proxy.admin == SocketAddress("127.0.0.1", 15000)
    assert Config().discovery.admin is None


def test_overrides_have_the_keys_of_the_policy() -> None:
    assert AttemptOverrides.__struct_fields__ == AttemptPolicy.__struct_fields__
    assert all(getattr(AttemptOverrides(), name) is UNSET for name in AttemptOverrides.__struct_fields__)


def test_a_service_keeps_what_it_does_not_override() -> None:
    base = AttemptPolicy(deadline=7.0, max_attempts=3, idle_timeout=60.0)
    services = {
        ServiceKey("b"): ServiceConfig(attempts=AttemptOverrides(connect_timeout=2.0, max_attempts=None)),
        ServiceKey("c.other"): ServiceConfig(port_name="grpc"),
    }
    proxy = ProxyConfig(attempts=base, services=services)
    assert proxy.attempts_for(ServiceKey("b")) == AttemptPolicy(
        deadline=7.0, connect_timeout=2.0, max_attempts=None, idle_timeout=60.0
    )
    assert proxy.attempts_for(ServiceKey("c.other")) is base
    assert proxy.attempts_for(ServiceKey("unknown")) is base
    assert proxy.service(ServiceKey("c.other")).port_name == "grpc"
    assert proxy.service(ServiceKey("unknown")) == ServiceConfig()


@pytest.mark.parametrize(
    ("namespace", "key", "found"),
    [
        (None, "b.default", None),
        (None, "b", "bare"),
        ("default", "b.default", "bare"),
        ("default", "b", "bare"),
        ("default", "b.other", None),
        ("default", "c", "full"),
        ("default", "c.default", "full"),
        (None, "c", None),
    ],
)
def test_a_bare_name_belongs_to_the_namespace(namespace: str | None, key: str, found: str | None) -> None:
    services = {
        ServiceKey("b"): ServiceConfig(port_name="bare"),
        ServiceKey("c.default"): ServiceConfig(port_name="full"),
    }
    assert ProxyConfig(namespace=namespace, services=services).service(ServiceKey(key)).port_name == found


@pytest.mark.parametrize(
    ("configured", "environment", "name"),
    [
        ("n1", {"NODE_NAME": "n2"}, "n1"),
        (" n1 ", {}, "n1"),
        (None, {"NODE_NAME": "n2"}, "n2"),
        (None, {"NODE_NAME": " n2\n"}, "n2"),
        ("", {"NODE_NAME": "n2"}, "n2"),
        (" ", {"NODE_NAME": " "}, ""),
        (None, {}, ""),
    ],
)
def test_node_name(configured: str | None, environment: dict[str, str], name: str) -> None:
    """L1."""
    assert resolve_node_name(configured, environment) == name


def test_every_key_is_described() -> None:
    """The reference documentation is made from the descriptions."""

    def check(kind: msgspec.inspect.Type, path: str) -> int:
        if isinstance(kind, msgspec.inspect.Metadata):
            return check(kind.type, path)
        if isinstance(kind, msgspec.inspect.DictType):
            return check(kind.value_type, path)
        if not isinstance(kind, msgspec.inspect.StructType) or not kind.forbid_unknown_fields:
            return 1
        for field in kind.fields:
            assert isinstance(field.type, msgspec.inspect.Metadata), f"{path}.{field.name}"
            assert field.type.extra_json_schema is not None, f"{path}.{field.name}"
            assert field.type.extra_json_schema["description"].endswith("."), f"{path}.{field.name}"
        return sum(check(field.type, f"{path}.{field.name}") for field in kind.fields)

    assert check(msgspec.inspect.type_info(Config), "") > 40
